"""What the method is compared with: FedAvg of one model, central training, and what bounds the T2I.

The first two return lines of metrics as `benchmarks.rows.run_once`, so that they are rows of the same tables.
"""

from __future__ import annotations

import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.measured import measure
from benchmarks.rows import Lines, Overrides, keep, kept_lines
from fedmmkt.client_app.data.private_data import PrivateData, load_private_data
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, parameter_groups, predict, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs
from fedmmkt.common.config import NodeConfig, RunConfig, Setting, T2IConfig, to_flower
from fedmmkt.common.datasets import Examples, load_splits, to_examples
from fedmmkt.common.images import resize_images
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.prompts import build_prompt_source
from fedmmkt.server_app.record.judge import GeneratorMeasures, Judge
from fedmmkt.server_app.record.round_record import personal_accuracy
from fedmmkt.server_app.t2i.generator import Generator, as_images
from fedmmkt.server_app.t2i.samples import Samples

MODEL = "extra.model"

# ---------------------------------------------------------------------- FedAvg of one model

app = ClientApp()


@app.train()
def _train(message: Message, context: Context) -> Message:
    """Train the averaged model for one epoch on the node's images, with the loss of the other rows' clients."""
    config = RunConfig.from_flower(context.run_config)
    torch.set_num_threads(config.client.threads)
    data = _node_data(config, int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    private = _private_set(data.train)
    torch.manual_seed(config.seed)
    model = _new_model(config, str(context.run_config[MODEL]))
    model.task_model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    place = (config.seed, message.content.config_records["config"]["server-round"], context.node_id)
    order = torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))
    train(model, _optimizer(model, config), private, None, config.client, 1, order)
    metrics = MetricRecord({"num-examples": len(data.train)})
    arrays = ArrayRecord(model.task_model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def fedavg(folder: Path, overrides: Overrides, nodes: int, model: str) -> Lines:
    """Run Flower's FedAvg of one model on all nodes' images, unless the run is kept; return its lines of metrics.

    It has a round for each private epoch that clients of FedMMKT have in all, and one epoch a round, which is the most
    exchange that this number of epochs allows.
    """
    if (lines := kept_lines(folder)) is not None:
        return lines
    start = time.perf_counter()
    run_config: dict[str, Setting] = to_flower(RunConfig()) | overrides | {MODEL: model}
    config = RunConfig.from_flower(run_config)
    grid = InProcessGrid(
        "benchmarks.references:app", run_config, [{"partition-id": n, "num-partitions": nodes} for n in range(nodes)]
    )
    torch.manual_seed(config.seed)
    initial = ArrayRecord(_new_model(config, model).task_model.state_dict())
    rounds = _epochs(config)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    found = strategy.start(grid, initial, num_rounds=rounds)
    averaged = _new_model(config, model)
    averaged.task_model.load_state_dict(found.arrays.to_torch_state_dict())
    parts = [_node_data(config, node, nodes) for node in range(nodes)]
    traffic = initial.count_bytes() * nodes * rounds
    line = _measured(averaged, parts[0].test, [part.train.labels_N for part in parts], (traffic, traffic))
    return _kept(folder, line, start)


def centralised(folder: Path, overrides: Overrides, nodes: int, model: str) -> Lines:
    """Train one model on all private images, with a client's epochs, unless it is kept; return its line of metrics."""
    if (lines := kept_lines(folder)) is not None:
        return lines
    start = time.perf_counter()
    config = RunConfig.from_flower(to_flower(RunConfig()) | overrides)
    parts = [_node_data(config, node, nodes) for node in range(nodes)]
    images_NHWC = np.concatenate([_images(part.train) for part in parts])
    everything = Examples(np.concatenate([part.train.labels_N for part in parts]), images_NHWC)
    torch.manual_seed(config.seed)
    learner = _new_model(config, model)
    order = torch.Generator().manual_seed(config.seed)
    private = _private_set(everything)
    train(learner, _optimizer(learner, config), private, None, config.client, _epochs(config), order)
    return _kept(folder, _measured(learner, parts[0].test, [part.train.labels_N for part in parts], (0, 0)), start)


def _epochs(config: RunConfig) -> int:
    """Return the private epochs of a client in a whole run; its last ones are with the last soft targets."""
    return config.client.warmup_epochs + config.client.local_epochs * config.rounds


def _new_model(config: RunConfig, model: str) -> AlignedModel:
    classes = len(load_splits(config.data, config.seed).classes)
    return AlignedModel(build_task_model(model, classes, config.data.image_size), anchor_size=0)


def _optimizer(model: AlignedModel, config: RunConfig) -> torch.optim.Optimizer:
    return AdamW(parameter_groups(model, config.client), weight_decay=1e-3)


def _node_data(config: RunConfig, node: int, nodes: int) -> PrivateData:
    place = NodeConfig.from_flower({"partition-id": node, "num-partitions": nodes})
    return load_private_data(config, place, load_splits(config.data, config.seed).classes, images=True, texts=False)


def _images(examples: Examples) -> np.ndarray:
    if examples.images_NHWC is None:
        raise ValueError("these references read images, and the dataset has none")
    return examples.images_NHWC


def _inputs(examples: Examples) -> Inputs:
    return Inputs(torch.from_numpy(_images(examples)).permute(0, 3, 1, 2).contiguous())


def _private_set(examples: Examples) -> PrivateSet:
    return PrivateSet(_inputs(examples), torch.from_numpy(examples.labels_N))


def _measured(
    model: AlignedModel, test: Examples, labels: list[np.ndarray], traffic: tuple[int, int]
) -> dict[str, Any]:
    """Return a model's line of metrics: its accuracy on the test part, and by each node's own mixture of classes."""
    is_right_N = predict(model.task_model, _inputs(test)).argmax(1).numpy() == test.labels_N
    classes = model.task_model.class_count
    correct_C, tested_C = (
        np.bincount(labels, minlength=classes) for labels in (test.labels_N[is_right_N], test.labels_N)
    )
    held = [np.bincount(labels_M, minlength=classes) for labels_M in labels]
    shares = [personal_accuracy(correct_C, tested_C, examples_C) for examples_C in held]
    personal = statistics.mean(share for share in shares if share is not None)
    accuracy = float(is_right_N.mean())
    return {
        "clients": {"accuracy": accuracy, "by_modality": {"image": accuracy}},
        "evaluation": {"personal": personal},
        "generator": {},
        "bytes": dict(zip(("down", "up"), traffic, strict=True)),
    }


def _kept(folder: Path, line: dict[str, Any], start: float) -> Lines:
    seconds = time.perf_counter() - start
    lines = [line | {"seconds": {"total": seconds}}]
    keep(folder, lines, seconds)
    return lines


# ---------------------------------------------------------------------- what bounds the T2I


def t2i_bounds(overrides: Overrides) -> list[tuple[str, GeneratorMeasures]]:
    """Measure bounds of the T2I: real images, their reconstructions, a LoRA trained on private images, and blocks.

    The LoRA has as many steps as all updates of a run, on the training images with prompts of their classes. Random
    blocks show nothing; what a measure says of them is no merit of a T2I.
    """
    config = RunConfig.from_flower(to_flower(RunConfig()) | overrides)
    splits = load_splits(config.data, config.seed)
    train_part, test = (to_examples(part, config.data, True, False) for part in (splits.train, splits.test))
    real_NHWC, labels_N = _images(train_part), train_part.labels_N
    judge = Judge(real_NHWC, labels_N, _images(test), test.labels_N, len(splits.classes), config.seed)
    t2i, rows = config.t2i, []
    count = t2i.evaluation_samples

    def measured(name: str, images_NHWC: np.ndarray, prompted_N: np.ndarray) -> None:
        rows.append((name, judge.measure(resize_images(images_NHWC, judge.image_size), prompted_N)))

    measured("real training images", real_NHWC[:count], labels_N[:count])
    generator = Generator(t2i, config.seed)
    latents_NCHW = _latents(generator, real_NHWC)
    decoded = as_images(generator.family.decode(latents_NCHW[:count]))
    measured("their reconstructions by the autoencoder", decoded, labels_N[:count])
    captions = _captions(t2i, splits.classes, labels_N, config.seed)
    private = Samples(captions, torch.from_numpy(labels_N), real_NHWC, latents_NCHW)
    for update in range(config.rounds):
        generator.adapt(private, torch.ones(len(private)), t2i.adaptation_steps, update)
    found = measure(judge, generator, splits.classes, count, t2i.evaluation_guidance, config.seed)
    rows.append(("the same LoRA, trained on the private images themselves", GeneratorMeasures(**found)))
    measured(
        "black and white blocks at random", random_blocks(count, config.seed), np.arange(count) % len(splits.classes)
    )
    return rows


def random_blocks(count: int, seed: int) -> np.ndarray:
    """Return images (uint8, 32 x 32, RGB) of four times four blocks, each black or white at random."""
    blocks_N441 = np.random.default_rng(seed).integers(0, 2, (count, 4, 4, 1), np.uint8) * 255
    return blocks_N441.repeat(8, axis=1).repeat(8, axis=2).repeat(3, axis=3)


@torch.no_grad()
def _latents(generator: Generator, images_NHWC: np.ndarray, at_once: int = 256) -> torch.Tensor:
    """Encode images with the T2I's autoencoder."""
    vae, parts = generator.pipeline.vae, []
    for start in range(0, len(images_NHWC), at_once):
        resized = resize_images(images_NHWC[start : start + at_once], generator.image_size)
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu() * vae.config.scaling_factor)
    return torch.cat(parts)


def _captions(config: T2IConfig, classes: tuple[str, ...], labels_N: np.ndarray, seed: int) -> tuple[str, ...]:
    """Return a prompt of its class for each image."""
    most = int(np.bincount(labels_N).max())
    of_class: dict[int, list[str]] = {}
    for prompt in build_prompt_source(config, classes).per_class(most, np.random.default_rng(seed)):
        of_class.setdefault(prompt.class_index, []).append(prompt.text)
    return tuple(of_class[label].pop() for label in labels_N.tolist())

"""Which logits are worth their privacy: ``python -m benchmarks.private_logits --seeds 3``.

The demo's clients (digits, alpha 0.1) answer from a model that is itself private. Each row is one way to make it, with
the whole budget spent on it, so that it is an upper bound. Two accuracies on common test digits: of the clients'
answers to these digits, aggregated as in a run; and of a student that learns from synthetic samples alone, by their
prompts and by the aggregated answers to them. DP-SGD needs ``pip install opacus``.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits import NODES
from benchmarks.rows import spread
from fedmmkt.client_app.learning.losses import balanced_softmax_loss, distillation_loss, log_prior
from fedmmkt.client_app.learning.training import predict
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs, TaskModel, to_float
from fedmmkt.common.augmentation import augment
from fedmmkt.common.config import DataConfig, RunConfig
from fedmmkt.common.datasets import load_splits, to_examples
from fedmmkt.common.partitioning import partition_rows
from fedmmkt.common.privacy import DEFAULT_DELTA, noise_of
from fedmmkt.server_app.prompts import templates_of
from fedmmkt.server_app.rules.aggregation import coverage_mask
from fedmmkt.server_app.t2i.generator import Generator

EPSILONS = (8.0, 4.0, 1.0)
TEXT_CLIENT = 4  # It reads no images.
PRIOR = 10.0  # How many private examples the synthetic mean of a class counts for.
SAMPLE_RATE, STEPS, RATE = 0.25, 40, 0.1  # Of DP-SGD.


class Setting:
    """Images and labels of clients, of the test part and of synthetic samples; and a model of the latter alone."""

    def __init__(self, seed: int, samples: int, steps: int) -> None:
        config = RunConfig(seed=seed, data=DataConfig(dataset="digits"))
        splits = load_splits(config.data, seed)
        train, test = (to_examples(part, config.data, images=True, texts=False) for part in (splits.train, splits.test))
        self.classes, self.steps, self.seed = len(splits.classes), steps, seed
        images, labels_N = _to_tensor(train.images_NHWC), torch.from_numpy(train.labels_N)
        rows = [torch.tensor(part) for part in partition_rows(config.data, NODES, seed)]
        self.clients = [(images[part], labels_N[part]) for client, part in enumerate(rows) if client != TEXT_CLIENT]
        self.test, self.test_labels_N = _to_tensor(test.images_NHWC), torch.from_numpy(test.labels_N)
        self.prompted_N = torch.arange(samples) % self.classes
        templates = templates_of(config.t2i)
        prompts = [
            templates[row % len(templates)].format(splits.classes[label]) for row, label in enumerate(self.prompted_N)
        ]
        made = Generator(config.t2i, seed).generate(prompts, list(range(samples)), config.t2i.guidance_of(1))
        self.synthetic = _to_tensor(made.images_NHWC)
        self.public = self.student(None)

    def student(self, targets_NC: Tensor | None) -> TaskModel:
        """Train a CNN on the synthetic samples, by their prompts and by soft targets."""
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        model = build_task_model("cnn", self.classes, self.synthetic.shape[-1])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        model.train()
        for _ in range(self.steps):
            index = torch.randint(len(self.synthetic), (32,), generator=generator)
            logits_BC = model(Inputs(augment(self.synthetic[index], generator)))
            loss = F.cross_entropy(logits_BC, self.prompted_N[index])
            if targets_NC is not None:
                loss = 0.5 * loss + distillation_loss(logits_BC, targets_NC[index], 2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def accuracy(self, logits_NC: Tensor) -> float:
        """Return the accuracy on the test digits."""
        return float((logits_NC.argmax(1) == self.test_labels_N).double().mean())


Answering = Callable[[Setting, Tensor, Tensor, float], TaskModel]


def head_of_sums(setting: Setting, images_NCHW: Tensor, labels_N: Tensor, epsilon: float) -> TaskModel:
    """Make a head from noisy sums of features by class, on the encoder that has seen synthetic samples alone.

    Features have unit length, so an example changes the sums by 1; they are asked for once, for all rounds. The head
    tells classes by the nearest mean, to which the synthetic samples of the class contribute.
    """
    model = copy.deepcopy(setting.public)
    features_NF = _unit_features(model, images_NCHW)
    sums_CF = torch.zeros(setting.classes, model.feature_size).index_add(0, labels_N, features_NF)
    counts_C1 = torch.bincount(labels_N, minlength=setting.classes).float()[:, None]
    if np.isfinite(epsilon):
        # A number beside each sum: both together change by the square root of 2.
        noise = noise_of(epsilon, DEFAULT_DELTA) * 2**0.5
        sums_CF = sums_CF + noise * torch.randn_like(sums_CF)
        counts_C1 = (counts_C1 + noise * torch.randn_like(counts_C1)).clamp_min(0)
    synthetic_NF = _unit_features(model, setting.synthetic)
    means_CF = torch.zeros_like(sums_CF).index_add(0, setting.prompted_N, synthetic_NF)
    means_CF /= torch.bincount(setting.prompted_N, minlength=setting.classes)[:, None]
    means_CF = (sums_CF + PRIOR * means_CF) / (counts_C1 + PRIOR)
    variance = float((synthetic_NF - means_CF[setting.prompted_N]).square().mean())
    head = model.head.weight.data.copy_(means_CF / variance), model.head.bias.data
    head[1].copy_(-means_CF.square().sum(1) / (2 * variance))
    encoder = model.image_encoder
    assert encoder is not None
    model.image_encoder = torch.nn.Sequential(encoder, _UnitLength())
    return model


def dp_sgd(setting: Setting, images_NCHW: Tensor, labels_N: Tensor, epsilon: float) -> TaskModel:
    """Fine-tune the model of synthetic samples on private examples by DP-SGD (Opacus); infinite epsilon: no noise.

    The prior is uniform over the classes, since the true one is private.
    """
    from opacus import GradSampleModule
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer

    noise = 0.0
    if np.isfinite(epsilon):
        noise = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=DEFAULT_DELTA, sample_rate=SAMPLE_RATE, steps=STEPS, accountant="rdp"
        )
    model = copy.deepcopy(setting.public).train()
    wrapped = GradSampleModule(model)
    expected = max(1, round(SAMPLE_RATE * len(labels_N)))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), RATE),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        expected_batch_size=expected,
    )
    flat_C = log_prior(torch.ones(setting.classes))
    for _ in range(STEPS):
        drawn = torch.nonzero(torch.rand(len(labels_N)) < SAMPLE_RATE)[:, 0]
        if not len(drawn):
            continue
        logits_BC = wrapped(Inputs(images_NCHW[drawn]))
        balanced_softmax_loss(logits_BC, labels_N[drawn], flat_C).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class _UnitLength(torch.nn.Module):
    def forward(self, features_BF: Tensor) -> Tensor:
        return F.normalize(features_BF, dim=1)


@torch.no_grad()
def _unit_features(model: TaskModel, images_NCHW: Tensor) -> Tensor:
    return F.normalize(model.features(Inputs(images_NCHW)), dim=1)


def _to_tensor(images_NHWC: np.ndarray | None) -> Tensor:
    return to_float(torch.from_numpy(np.array(images_NHWC)).permute(0, 3, 1, 2).contiguous())


def measure(setting: Setting, answering: Answering, epsilon: float) -> tuple[float, float]:
    """Return the accuracy of the aggregated answers, and of a student that learned from them."""
    counts_KC, on_test, on_synthetic = [], [], []
    for client, (images_NCHW, labels_N) in enumerate(setting.clients):
        torch.manual_seed(setting.seed + client)
        model = answering(setting, images_NCHW, labels_N, epsilon)
        counts_KC.append(torch.bincount(labels_N, minlength=setting.classes))
        on_test.append(predict(model, Inputs(setting.test)))
        on_synthetic.append(predict(model, Inputs(setting.synthetic)))
    counts, nobody = torch.stack(counts_KC), torch.full((len(setting.test),), -1)
    aggregated = coverage_mask(torch.stack(on_test), counts, nobody)
    targets_NC = coverage_mask(torch.stack(on_synthetic), counts, setting.prompted_N)
    student = setting.student(targets_NC)
    return setting.accuracy(aggregated), setting.accuracy(predict(student, Inputs(setting.test)))


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.private_logits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--samples", type=int, default=400, help="synthetic samples")
    parser.add_argument("--steps", type=int, default=300, help="steps on synthetic samples")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="(opacus|torch).*")
    found: dict[str, list[tuple[float, float]]] = {}
    answerings: dict[str, Answering] = {"head of noisy sums": head_of_sums, "DP-SGD of the whole model": dp_sgd}
    for seed in range(arguments.seeds):
        setting = Setting(seed, arguments.samples, arguments.steps)
        alone = setting.accuracy(predict(setting.public, Inputs(setting.test)))
        found.setdefault("none: a model of prompts alone", []).append((alone, alone))
        print(seed, "none: a model of prompts alone", alone, flush=True)
        for name, answering in answerings.items():
            for epsilon in (np.inf, *EPSILONS):
                title = f"{name}, epsilon {epsilon:g}"
                found.setdefault(title, []).append(measure(setting, answering, epsilon))
                print(seed, title, found[title][-1], flush=True)
    print("| logits | aggregated answers | student |\n|---|---|---|")
    for name, values in found.items():
        answers, students = zip(*values, strict=True)
        print(f"| {name} | {spread(answers)} | {spread(students)} |")


if __name__ == "__main__":
    main()

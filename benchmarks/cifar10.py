"""CIFAR-10 with twenty clients of five architectures, and a T2I that is pre-trained only on a public part.

Run ``python -m benchmarks.cifar10 --data DIR``. ``DIR`` has ``train.parquet`` and ``test.parquet`` with the columns
``image`` and ``label``. If there is no T2I yet, it is trained first, with ``starter.public``. ``--quick`` uses a part
of the data and fewer steps, and takes 20 minutes on two cores. Finished runs are kept in the output folder and not
repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.rows import ACCURACY, COSTS_AND_T2I, MEMORY, PLAIN, Overrides, run_rows, spread, t2i_before, table
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, evaluate, parameter_groups, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs
from fedmmkt.common.config import DataConfig, RunConfig
from fedmmkt.common.datasets import Examples, load_splits, to_examples
from fedmmkt.starter import public

NODES = 20
ARCHITECTURES = ("cnn", "mlp", "vit", "resnet", "mobilenet")
TEMPLATES = ",".join(public.TEMPLATES)
SETTINGS: Overrides = {
    "client.models": ",".join(ARCHITECTURES),
    "client.batch-size": 32,
    "client.warmup-epochs": 3,
    "client.local-epochs": 1,
    "client.alignment-weight": 0.0,
    "t2i.prompt-templates": TEMPLATES,
    "checkpoints-kept": 0,
}
# No judge: a frozen T2I does not change, and other rows measure it at the start. Training a judge takes half a minute.
FROZEN: Overrides = {"t2i.scores": "none", "judge": False}
# This T2I already knows images like those of the clients. So it learns from the contrast of good and bad samples.
# All samples are new: variations of the samples that clients know best seemed to help the clients less.
CONTRAST: Overrides = {"t2i.scores": "consensus", "t2i.update": "negative-aware", "t2i.explore": 0.0}
VOTES = "the whole, supervised by votes"
ROWS: dict[str, Overrides] = {
    "local-only": FROZEN | PLAIN | {"client.distillation-weight": 0.0, "t2i.samples-per-round": 10},
    "plain averaging, frozen T2I (FedMD-style)": FROZEN | PLAIN | {"t2i.aggregation": "mean"},
    "the client recipe, frozen T2I": FROZEN,
    "the whole": CONTRAST,
    VOTES: {},
}
COLUMNS = (ACCURACY, *COSTS_AND_T2I, *MEMORY)


@dataclass(frozen=True)
class Profile:
    """The amount of data and the number of steps.

    Attributes
    ----------
    start : tuple of str
        Arguments of ``starter.public``: sizes of the data parts, and sizes and steps of the T2I.
    settings : dict
        Changes to the run-config of all rows.
    """

    start: tuple[str, ...]
    settings: Overrides = field(default_factory=dict)


FULL = Profile(
    start=(
        *("--public", "10000", "--test", "2000", "--latent-channels", "8"),
        *("--autoencoder-steps", "1500", "--diffusion-steps", "4500"),
    ),
    settings={"rounds": 4, "client.distillation-steps": 100},
)
QUICK = Profile(
    start=(
        *("--public", "5000", "--private", "6000", "--test", "1000", "--autoencoder", "16", "32", "48"),
        *("--unet", "32", "64", "--autoencoder-steps", "600", "--diffusion-steps", "1500"),
    ),
    settings={"rounds": 3, "client.distillation-steps": 50, "t2i.samples-per-round": 200},
)


def centralised(data: DataConfig, settings: Overrides, seed: int, folder: Path) -> list[tuple[str, float]]:
    """Train each architecture on all private data, with the epochs of a client; return accuracies by architecture."""
    kept = folder / f"seed-{seed}.json"
    if not kept.exists():
        config = RunConfig.from_flower(settings)
        splits = load_splits(data, seed)
        learned, tested = (
            _tensors(to_examples(part, data, images=True, texts=False)) for part in (splits.train, splits.test)
        )
        epochs = config.client.warmup_epochs + config.client.local_epochs * config.rounds
        rows = []
        for name in ARCHITECTURES:
            torch.manual_seed(seed)
            model = AlignedModel(build_task_model(name, len(splits.classes), data.image_size), anchor_size=0)
            optimizer = AdamW(parameter_groups(model, config.client), weight_decay=1e-3)
            order = torch.Generator().manual_seed(seed)
            train(model, optimizer, learned, None, config.client, epochs, order)
            rows.append((name, evaluate(model.task_model, tested.inputs, tested.labels_N)[0]))
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rows))
    return [(name, accuracy) for name, accuracy in json.loads(kept.read_text())]


def _tensors(examples: Examples) -> PrivateSet:
    if examples.images_NHWC is None:
        raise ValueError("CIFAR-10 has images")
    images_NCHW = torch.from_numpy(examples.images_NHWC).permute(0, 3, 1, 2).contiguous()
    return PrivateSet(Inputs(images_NCHW), torch.from_numpy(examples.labels_N))


def main() -> None:
    """Parse the command line, do the missing runs, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--quick", action="store_true", help="use a part of the data and fewer steps")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ...")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=[name for name in ROWS if name != VOTES],
        help=f"all but {VOTES!r}",
    )
    parser.add_argument("--rounds", type=int, help="number of rounds; by default that of the profile")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cifar10"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    began = time.perf_counter()
    profile, name = (QUICK, "quick") if arguments.quick else (FULL, "full")
    out = (arguments.out / name).resolve()
    start = out / "start"
    if not start.exists():
        public.main(["--dataset", str(arguments.data), "--out", str(start), *profile.start])
    cost = json.loads((start / "cost.json").read_text())
    print(
        f"T2I: {cost['parameters'] / 1e6:.1f} million parameters, seen {cost['public']} public images, "
        f"{cost['seconds'] / 60:.1f} minutes on {cost['threads']} thread(s); "
        f"clients hold {cost['private']} others, tested on {cost['test']}"
    )
    data: Overrides = {"data.dataset": str(start / "data"), "t2i.model": str(start / "model")}
    settings: Overrides = SETTINGS | profile.settings | data
    if arguments.rounds:
        settings["rounds"] = arguments.rounds
        out /= f"rounds-{arguments.rounds}"
    for alpha in arguments.alphas:
        rows = {name: ROWS[name] for name in arguments.rows}
        common = settings | {"data.alpha": alpha}
        runs = run_rows(rows, common, arguments.seeds, NODES, out / f"alpha-{alpha:g}")
        print(f"\n### alpha {alpha:g}, {arguments.seeds} seed(s)\n\n{table(runs, COLUMNS)}\n\n{t2i_before(runs)}")
    config = RunConfig.from_flower(settings).data
    bounds = [centralised(config, settings, seed, out / "centralised") for seed in range(arguments.seeds)]
    each = "; ".join(f"{rows[0][0]} {spread([accuracy for _, accuracy in rows])}" for rows in zip(*bounds, strict=True))
    mean = spread([statistics.mean(accuracy for _, accuracy in rows) for rows in bounds])
    print(f"\nCentralised, all private data, same number of epochs: {mean} ({each})")
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes for the new runs")


if __name__ == "__main__":
    main()

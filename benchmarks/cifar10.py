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

from benchmarks.references import centralised
from benchmarks.rows import (
    ACCURACY,
    COSTS_AND_T2I,
    MEMORY,
    PLAIN,
    Overrides,
    Runs,
    run_rows,
    spread,
    t2i_before,
    table,
)
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


def make_start(profile: Profile, data: Path, out: Path) -> Overrides:
    """Train the T2I on the public part if there is none yet; return the settings that name it and the clients' data."""
    if not out.exists():
        public.main(["--dataset", str(data), "--out", str(out), *profile.start])
    return {"data.dataset": str(out / "data"), "t2i.model": str(out / "model")}


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
    made = make_start(profile, arguments.data, start)
    cost = json.loads((start / "cost.json").read_text())
    print(
        f"T2I: {cost['parameters'] / 1e6:.1f} million parameters, seen {cost['public']} public images, "
        f"{cost['seconds'] / 60:.1f} minutes on {cost['threads']} thread(s); "
        f"clients hold {cost['private']} others, tested on {cost['test']}"
    )
    settings: Overrides = SETTINGS | profile.settings | made
    if arguments.rounds:
        settings["rounds"] = arguments.rounds
        out /= f"rounds-{arguments.rounds}"
    for alpha in arguments.alphas:
        rows = {name: ROWS[name] for name in arguments.rows}
        common = settings | {"data.alpha": alpha}
        runs = run_rows(rows, common, arguments.seeds, NODES, out / f"alpha-{alpha:g}")
        print(f"\n### alpha {alpha:g}, {arguments.seeds} seed(s)\n\n{table(runs, COLUMNS)}\n\n{t2i_before(runs)}")
    bounds: Runs = {
        name: [
            centralised(out / "centralised" / name / f"seed-{seed}", settings | {"seed": seed}, NODES, name)
            for seed in range(arguments.seeds)
        ]
        for name in ARCHITECTURES
    }
    of_seeds = [
        statistics.mean(run[-1]["clients"]["accuracy"] for run in runs) for runs in zip(*bounds.values(), strict=True)
    ]
    each = "; ".join(f"{name} {spread([ACCURACY.value(run) for run in runs])}" for name, runs in bounds.items())
    print(f"\nCentralised, all private data, same number of epochs: {spread(of_seeds)} ({each})")
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes for the new runs")


if __name__ == "__main__":
    main()

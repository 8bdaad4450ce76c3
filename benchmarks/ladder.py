"""One table of methods, the same rows on every dataset: ``python -m benchmarks.ladder digits mnist --seeds 3``.

From local-only training over prompt labels, FedMD and the recipe with a frozen T2I to the whole, then the whole with
logits alone and with a privacy budget; beside them FedAvg of one model (Flower's own strategy, the same partitions,
private epochs and loss) and central training. All rows of a seed have the same partitions. ``vendors`` and ``cifar10``
need ``--data``, a folder with ``emoji-vendors`` and ``cifar10``; their T2I is trained first. Tables are written to
``ladder.md`` in the output folder as they grow. Finished runs are kept there and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import cifar10, digits, harm
from benchmarks.references import centralised, fedavg, t2i_bounds
from benchmarks.rows import (
    ACCURACY,
    COSTS,
    PLAIN,
    Column,
    Lines,
    Overrides,
    Runs,
    harms,
    modality,
    row_folder,
    run_once,
    spread,
    t2i,
    table,
)

FROZEN = "the recipe, frozen T2I"
WHOLE = "the whole"
PERSONAL = Column("personal", lambda lines: lines[-1].get("evaluation", {}).get("personal"))
MEASURES = ("alignment", "frechet", "precision", "recall", "coverage")
COLUMNS = (
    ACCURACY,
    PERSONAL,
    modality("image", "image"),
    modality("text", "text"),
    modality("image+text", "image+text"),
    *map(t2i, MEASURES),
    *COSTS,
)
Run = Callable[[Path, Overrides, int], Lines]


@dataclass(frozen=True)
class Dataset:
    """A dataset of the ladder.

    Attributes
    ----------
    nodes : int
        Number of clients.
    prepare : callable
        Takes the folder of ``--data`` and one for the T2I; returns run-config overrides.
    frozen : dict
        Settings of the rows with a frozen T2I: the guidance that serves it best there.
    folder : str
        What ``--data`` must hold; empty if the data come with an installation.
    """

    nodes: int
    prepare: Callable[[Path, Path], Overrides]
    frozen: Overrides = field(default_factory=dict)
    folder: str = ""


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(digits.NODES, lambda data, start: {}, digits.FROZEN),
    "mnist": Dataset(digits.NODES, lambda data, start: {"data.dataset": "mnist"}, digits.FROZEN),
    "vendors": Dataset(
        harm.NODES,
        lambda data, start: harm.settings("vendors", start, data / "emoji-vendors", "auto"),
        folder="emoji-vendors",
    ),
    "cifar10": Dataset(
        cifar10.NODES,
        lambda data, start: (
            cifar10.SETTINGS | cifar10.QUICK.settings | cifar10.make_start(cifar10.QUICK, data / "cifar10", start)
        ),
        folder="cifar10",
    ),
}


def rows_of(dataset: Dataset) -> dict[str, Run]:
    """Return the rows of the ladder, by name, as functions of a folder, of settings and of the number of nodes."""
    frozen: Overrides = dataset.frozen | {"t2i.scores": "none"}

    def with_settings(changes: Overrides) -> Run:
        return lambda folder, settings, nodes: run_once(folder, settings | changes, nodes)

    return {
        "local-only": with_settings(frozen | digits.ALONE),
        "prompt labels alone": with_settings(frozen | {"client.distillation-weight": 0.0}),
        "FedMD (plain averaging, frozen T2I)": with_settings(frozen | PLAIN | {"t2i.aggregation": "mean"}),
        FROZEN: with_settings(frozen),
        WHOLE: with_settings({}),
        "the whole, logits alone": with_settings({"feedback": "logits"}),
        "the whole, epsilon 8": with_settings({"client.epsilon": 8}),
        "FedAvg of a CNN": partial(fedavg, model="cnn"),
        "FedAvg of a ResNet": partial(fedavg, model="resnet"),
        "centralised CNN": partial(centralised, model="cnn"),
        "centralised ResNet": partial(centralised, model="resnet"),
    }


def climb(name: str, rows: Mapping[str, Run], settings: Overrides, nodes: int, seeds: Sequence[int], out: Path) -> Runs:
    """Do the missing runs of a dataset, seed by seed; report each on stderr."""
    runs: Runs = {row: [] for row in rows}
    began = time.perf_counter()
    for seed in seeds:
        for row, run in rows.items():
            lines = run(row_folder(out, row, seed), settings | {"seed": seed}, nodes)
            runs[row].append(lines)
            found, seconds = lines[-1]["clients"]["accuracy"], time.perf_counter() - began
            print(f"{name} seed {seed} {row}: {found:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return runs


def floors_of(out: Path, seed: int) -> str:
    """Return a sentence with the sizes and floors of the T2I's measures, as a run with a judge has noted them."""
    for file in sorted(out.glob(f"*/seed-{seed}/run/config.json")):
        judge = json.loads(file.read_text(encoding="utf-8")).get("judge")
        if judge:
            floors, images = judge["floors"], judge["images"]
            told = ", ".join(f"{measure} {floors[measure]:.3g}" for measure in MEASURES if floors.get(measure))
            return (
                f"The T2I is measured on {images['generated']} images against {images['real']} real ones. Half of "
                f"these against the other half ({floors['images']} each): {told}."
            )
    return ""


def start_of(runs: Runs) -> str:
    """Return a sentence with the T2I's measures before any round."""
    starts = [run[0]["generator"] for run in runs.get(WHOLE, []) if run[0].get("generator")]
    told = (
        f"{measure} {spread([start.get(measure) for start in starts], 0 if measure == 'frechet' else 3)}"
        for measure in MEASURES
    )
    return f"The T2I before: {', '.join(told)}." if starts else ""


def bounds_of(settings: Overrides) -> str:
    """Return a table of what bounds the T2I."""
    lines = [f"| | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, measures in t2i_bounds(settings):
        cells = (spread([getattr(measures, one)], 0 if one == "frechet" else 3) for one in MEASURES)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, do the missing runs, print and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", choices=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1])
    parser.add_argument("--rounds", type=int, help="by default those of the dataset")
    parser.add_argument("--rows", nargs="+", choices=list(rows_of(DATASETS["digits"])))
    parser.add_argument("--bounds", action="store_true", help="also measure what bounds the T2I, with seed 0")
    parser.add_argument("--data", type=Path, help="folder of emoji-vendors and cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ladder"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    out, sections = arguments.out.resolve(), []
    for name in arguments.datasets:
        dataset = DATASETS[name]
        if dataset.folder and not (arguments.data and (arguments.data / dataset.folder).is_dir()):
            parser.error(f"{name}: --data is {arguments.data}; allowed: a folder that holds {dataset.folder!r}")
    for name in arguments.datasets:
        dataset = DATASETS[name]
        settings = dataset.prepare((arguments.data or Path()).resolve(), out / name / "start")
        if arguments.rounds:
            settings |= {"rounds": arguments.rounds}
        rows = {row: run for row, run in rows_of(dataset).items() if row in (arguments.rows or rows_of(dataset))}
        for alpha in arguments.alphas:
            folder = out / name / f"alpha-{alpha:g}{f'-rounds-{arguments.rounds}' if arguments.rounds else ''}"
            common: Overrides = settings | {"data.alpha": alpha}
            runs = climb(name, rows, common, dataset.nodes, range(arguments.seeds), folder)
            parts = [f"### {name}, alpha {alpha:g}, {arguments.seeds} seed(s)", table(runs, COLUMNS), start_of(runs)]
            parts.append(floors_of(folder, 0))
            parts.append(harms(runs, FROZEN, COLUMNS) if arguments.seeds > 1 and FROZEN in rows else "")
            parts.append(bounds_of(common | {"seed": 0}) if arguments.bounds else "")
            sections.append("\n\n".join(part for part in parts if part))
            print(f"\n{sections[-1]}", flush=True)
            (out / "ladder.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

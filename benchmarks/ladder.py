"""One table of methods, the same rows on every dataset: ``python -m benchmarks.ladder digits mnist --seeds 3``.

From local-only training over prompt labels, FedMD and the recipe with a frozen T2I to the whole, then the whole with
logits alone and with a privacy budget; beside them FedAvg of one model (Flower's own strategy, the same partitions,
private epochs and loss) and central training. All rows of a seed have the same partitions. The T2I is measured before
and after each run on ``--images`` images, with the guidance scale of the last round; with ``--draws`` above 1 on so
many sets of images, whose mean is taken. ``vendors`` and ``cifar10`` need ``--data``, a folder with ``emoji-vendors``
and ``cifar10``; their T2I is trained first. Tables are written to ``ladder.md`` in the output folder as they grow.
Finished runs are kept there and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import cifar10, digits, harm
from benchmarks.measured import measured_again
from benchmarks.references import centralised, fedavg, t2i_bounds
from benchmarks.rows import (
    ACCURACY,
    COSTS,
    DIGITS,
    PLAIN,
    Column,
    Overrides,
    Run,
    harms,
    modality,
    overriding,
    run_each,
    spread,
    t2i,
    t2i_before,
    table,
)
from fedmmkt.common.config import RunConfig, to_flower

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
    "digits": Dataset(digits.NODES, lambda data, start: DIGITS, digits.FROZEN),
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
    return {
        "local-only": overriding(frozen | digits.ALONE),
        "prompt labels alone": overriding(frozen | {"client.distillation-weight": 0.0}),
        "FedMD (plain averaging, frozen T2I)": overriding(frozen | PLAIN | {"t2i.aggregation": "mean"}),
        FROZEN: overriding(frozen),
        WHOLE: overriding({}),
        "the whole, logits alone": overriding({"feedback": "logits"}),
        "the whole, epsilon 8": overriding({"client.epsilon": 8}),
        "FedAvg of a CNN": partial(fedavg, model="cnn"),
        "FedAvg of a ResNet": partial(fedavg, model="resnet"),
        "centralised CNN": partial(centralised, model="cnn"),
        "centralised ResNet": partial(centralised, model="resnet"),
    }


def floors_of(out: Path, seed: int, images: int, draws: int) -> str:
    """Return a sentence with the sizes and floors of the T2I's measures, as a run with a judge has noted them."""
    for file in sorted(out.glob(f"*/seed-{seed}/run/config.json")):
        judge = json.loads(file.read_text(encoding="utf-8")).get("judge")
        if judge:
            floors, real = judge["floors"], judge["images"]["real"]
            told = ", ".join(f"{measure} {floors[measure]:.3g}" for measure in MEASURES if floors.get(measure))
            halves = f"Half of these against the other half ({floors['images']} each): {told}."
            sets = f" (mean of {draws} draws)" if draws > 1 else ""
            return f"The T2I is measured on {images} images{sets} against {real} real ones. {halves}"
    return ""


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
    parser.add_argument("--images", type=int, default=500, help="on which the T2I is measured before and after a run")
    parser.add_argument("--draws", type=int, default=1, help="sets of so many images, whose mean is taken")
    parser.add_argument("--bounds", action="store_true", help="also measure what bounds the T2I, with seed 0")
    parser.add_argument("--data", type=Path, help="folder of emoji-vendors and cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ladder"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if arguments.draws < 1:
        parser.error(f"--draws is {arguments.draws}; allowed: 1 or more")
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
            runs = measured_again(
                run_each(rows, common, arguments.seeds, dataset.nodes, folder),
                folder,
                arguments.images,
                arguments.draws,
            )
            parts = [
                f"### {name}, alpha {alpha:g}, {arguments.seeds} seed(s)",
                table(runs, COLUMNS),
                t2i_before(runs, MEASURES),
            ]
            parts.append(floors_of(folder, 0, arguments.images, arguments.draws))
            parts.append(harms(runs, FROZEN, COLUMNS) if arguments.seeds > 1 and FROZEN in rows else "")
            guidance = RunConfig.from_flower(to_flower(RunConfig()) | common).t2i.guidance[-1]
            measured = {"t2i.evaluation-samples": arguments.images, "t2i.evaluation-guidance": guidance}
            parts.append(bounds_of(common | measured | {"seed": 0}) if arguments.bounds else "")
            sections.append("\n\n".join(part for part in parts if part))
            print(f"\n{sections[-1]}", flush=True)
            (out / "ladder.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

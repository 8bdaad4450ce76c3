"""Curves of kept runs: ``python -m benchmarks.curves runs/benchmarks/emoji/alpha-0.1 --out docs/emoji.png``.

A line a row of the benchmark, by round: clients' mean accuracy and, where a judge measured it, the T2I's alignment.
Lines are means over seeds, bands one standard deviation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.rows import Lines

Curves = dict[str, list[Lines]]
MEASURES: dict[str, Callable[[dict[str, dict[str, float | None]]], float | None]] = {
    "clients' accuracy": lambda line: line["clients"]["accuracy"],
    "T2I alignment": lambda line: line["generator"]["alignment"],
}


def read_runs(folder: Path, rows: Sequence[str] = ()) -> Curves:
    """Read the kept runs below a benchmark's folder by row (all, or those named), in the order of their finishing.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    found = [path for row in rows or ("*",) for path in folder.glob(f"{row}/seed-*/done.json")]
    kept = sorted(found, key=lambda path: path.stat().st_mtime)
    if not kept:
        raise FileNotFoundError(f"{folder} holds no finished run (ROW/seed-N/done.json)")
    runs: Curves = {}
    for path in kept:
        runs.setdefault(path.parent.parent.name.replace("-", " "), []).append(json.loads(path.read_text())["lines"])
    return runs


def band(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (0 of one seed) by round; rounds that not all seeds have are left out."""
    shortest = min(map(len, values))
    array_SR = np.array([seed[:shortest] for seed in values])
    return array_SR.mean(0), array_SR.std(0, ddof=1) if len(values) > 1 else np.zeros(shortest)


def draw(runs: Curves, path: Path) -> None:
    """Draw a panel a measure, as far as runs have it."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [name for name, of in MEASURES.items() if all(of(line) is not None for run in runs.values()
                                                           for line in run[0])]  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes[0], strict=True):
        for row, seeds in runs.items():
            mean_R, deviation_R = band([[MEASURES[panel](line) or 0.0 for line in lines] for lines in seeds])
            rounds = np.arange(len(mean_R))
            axis.plot(rounds, mean_R, marker=".", label=f"{row} ({len(seeds)})")
            axis.fill_between(rounds, mean_R - deviation_R, mean_R + deviation_R, alpha=0.15)
        axis.set(xlabel="round", ylabel=panel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument(
        "runs", type=Path, help="folder of a benchmark's rows, such as runs/benchmarks/digits/alpha-0.1"
    )
    parser.add_argument("--rows", nargs="+", help="folders of rows to draw; all by default")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    try:
        draw(read_runs(arguments.runs, arguments.rows or ()), arguments.out)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

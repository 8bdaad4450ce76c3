"""Curves of kept runs: ``python -m benchmarks.curves runs/benchmarks/emoji/alpha-0.1 --out docs/emoji.png``.

It draws one line per row of the benchmark, by round: the clients' mean accuracy and, if a judge measured the T2I, its
alignment and Frechet distance. Lines are means over seeds; bands show one standard deviation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.rows import Lines

Curves = dict[str, list[Lines]]
MEASURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "clients' accuracy": lambda line: line["clients"]["accuracy"],
    "T2I alignment": lambda line: line["generator"]["alignment"],
    "T2I Frechet distance": lambda line: line["generator"]["frechet"],
}


def read_runs(folder: Path, rows: Sequence[str] = ()) -> Curves:
    """Read the finished runs in a benchmark's folder, by row, in the order in which they finished.

    ``rows`` are the folders of the rows to read; all by default.

    Raises
    ------
    FileNotFoundError
        If there is no finished run.
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
    """Return mean and standard deviation by round (0 for one seed), for the rounds that all seeds have."""
    shortest = min(map(len, values))
    array_SR = np.array([seed[:shortest] for seed in values])
    return array_SR.mean(0), array_SR.std(0, ddof=1) if len(values) > 1 else np.zeros(shortest)


def values(seeds: Sequence[Lines], measure: str) -> list[list[float]]:
    """Return a measure by seed and round; empty if it is missing in any round."""
    value_of = MEASURES[measure]
    found = [[value_of(line) for line in lines] for lines in seeds]
    whole = [[value for value in seed if value is not None] for seed in found]
    return whole if list(map(len, whole)) == list(map(len, found)) else []


def draw(runs: Curves, path: Path) -> None:
    """Draw one panel for each measure that at least one row has."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [name for name in MEASURES if any(values(seeds, name) for seeds in runs.values())]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes[0], strict=True):
        for index, (row, seeds) in enumerate(runs.items()):
            found = values(seeds, panel)
            if not found:
                continue
            mean_R, deviation_R = band(found)
            rounds, colour = np.arange(len(mean_R)), f"C{index}"
            axis.plot(rounds, mean_R, marker=".", color=colour, label=f"{row} ({len(seeds)})")
            axis.fill_between(rounds, mean_R - deviation_R, mean_R + deviation_R, color=colour, alpha=0.15)
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
    """Parse the command line and draw the curves."""
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

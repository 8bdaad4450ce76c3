"""Rows of a benchmark: overrides of the run-config that are run with several seeds, and their table.

Strategy and clients are those of ``flwr run``, but messages go directly to client processes, without SuperLink and Ray.
Each run has its own server process, so that peak memory is measured separately. Finished runs are kept in the output
folder and not repeated.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

from benchmarks import process_memory
from fedmmkt.common.config import RunConfig, Setting, to_flower
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy

Overrides = dict[str, bool | int | float | str]
Lines = list[dict[str, Any]]  # The metrics of a run, one line per round.
Runs = dict[str, list[Lines]]  # For each row, one run per seed.
Run = Callable[[Path, Overrides, int], Lines]  # Of a folder, the run-config and the number of nodes.

CLIENT_APP = "fedmmkt.client_app.app:app"

# The small handwritten digits of scikit-learn, on which most tables of docs/results.md were made.
DIGITS: Overrides = {"data.dataset": "digits"}
# Clients that use plain distillation on synthetic samples.
PLAIN: Overrides = {"client.balanced-softmax": False, "client.prompt-weight": 0.0, "client.alignment-weight": 0.0}


def run_once(folder: Path, overrides: Overrides, nodes: int, app: str = CLIENT_APP, device: str = "auto") -> Lines:
    """Run one row with one seed on simulated nodes, unless the run is kept; return its lines of metrics.

    ``device`` is the clients'.
    """
    if (lines := kept_lines(folder)) is None:
        # Not `fork`: the peak memory would then include the memory of this process.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            lines, seconds = pool.submit(_run, folder, overrides, nodes, app, device).result()
        keep(folder, lines, seconds)
    return lines


def _run(folder: Path, overrides: Overrides, nodes: int, app: str, device: str) -> tuple[Lines, float]:
    """Run once, with the server in this process and separate client processes.

    Returns the lines of metrics and the seconds. The last line also has the peak memory of server and clients.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folders = {"output-dir": str(folder / "run"), "client.state-dir": str(folder / "clients")}
    common: dict[str, Setting] = {"tracker": "", "local-only-control": False, "min-available-nodes": nodes}
    run_config = to_flower(RunConfig()) | common | folders | overrides
    node_configs: list[Any] = [
        {"partition-id": node, "num-partitions": nodes, "device": device} for node in range(nodes)
    ]
    grid = InProcessGrid(app, run_config, node_configs, workers=min(nodes, os.cpu_count() or 1))
    start = time.perf_counter()
    # A new run id, because clients must not continue from their memory of an interrupted run.
    strategy = build_strategy(RunConfig.from_flower(run_config), time.time_ns() % 2**31)
    strategy.start(grid)
    seconds = time.perf_counter() - start
    clients = [_peak_megabytes(process.pid) for process in psutil.Process().children()]
    memory = {"server": _peak_megabytes(os.getpid()), "client": max(filter(None, clients), default=None)}
    grid.close()
    lines = strategy.recorder.run_folder.read_metrics()
    return [*lines[:-1], lines[-1] | {"memory": memory}], seconds


def _peak_megabytes(pid: int) -> float | None:
    """Return the peak resident memory of a process; None if the system does not report it (not Linux)."""
    peak = process_memory.peak(pid)
    return peak / 1e6 if peak else None


def kept_lines(folder: Path) -> Lines | None:
    """Return the lines of a finished run; None if there is none."""
    done = folder / "done.json"
    kept: Lines | None = json.loads(done.read_text())["lines"] if done.exists() else None
    return kept


def keep(folder: Path, lines: Lines, seconds: float) -> None:
    """Save a finished run, so that `kept_lines` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps({"seconds": seconds, "lines": lines}))


def run_rows(rows: Mapping[str, Overrides], common: Overrides, seeds: int, nodes: int, out: Path) -> Runs:
    """Run each row with the seeds 0, 1, ..., as `run_each`; a row's overrides have priority over ``common``."""
    return run_each({name: overriding(overrides) for name, overrides in rows.items()}, common, seeds, nodes, out)


def overriding(overrides: Overrides) -> Run:
    """Return a row: FedMMKT with these overrides of the run-config."""
    return lambda folder, settings, nodes: run_once(folder, settings | overrides, nodes)


def run_each(rows: Mapping[str, Run], settings: Overrides, seeds: int, nodes: int, out: Path) -> Runs:
    """Do the missing runs of each row with the seeds 0, 1, ...; report each run on stderr.

    Parameters
    ----------
    rows : mapping
        Functions of a folder, the run-config and the number of nodes, by name of the row.
    settings : mapping
        Run-config overrides of all rows.
    seeds, nodes : int
        Numbers of seeds and of nodes.
    out : Path
        Absolute path of the folder for finished runs, each in ``<row>/seed-<seed>``.
    """
    runs: Runs = {name: [] for name in rows}
    started = time.perf_counter()
    for seed in range(seeds):
        for name, run in rows.items():
            lines = run(row_folder(out, name, seed), settings | {"seed": seed}, nodes)
            runs[name].append(lines)
            accuracy, seconds = lines[-1]["clients"]["accuracy"], time.perf_counter() - started
            print(f"{out.name} seed {seed} {name}: {accuracy:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return runs


def row_folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return out / name.replace(" ", "-").replace(",", "") / f"seed-{seed}"


@dataclass(frozen=True)
class Column:
    """A column of the table: title, function for the value of a run (None if it has none), and decimals."""

    title: str
    value: Callable[[Lines], float | None]
    decimals: int = 3
    less_is_better: bool = False


def t2i(measure: str) -> Column:
    """Return a column with a measure of the T2I after the last round."""
    is_distance = measure == "frechet"
    return Column(measure, lambda lines: lines[-1]["generator"].get(measure), 0 if is_distance else 3, is_distance)


def modality(name: str, title: str) -> Column:
    """Return a column with the accuracy of the clients of one modality."""
    return Column(title, lambda lines: lines[-1]["clients"]["by_modality"].get(name))


ACCURACY = Column("all clients", lambda lines: lines[-1]["clients"]["accuracy"])
COSTS = (
    Column("MB down", lambda lines: sum(line["bytes"]["down"] for line in lines) / 1e6, 2, True),
    Column("MB up", lambda lines: sum(line["bytes"]["up"] for line in lines) / 1e6, 2, True),
    Column("seconds", lambda lines: sum(line["seconds"]["total"] for line in lines), 0, True),
)
COSTS_AND_T2I = (
    t2i("alignment"),
    t2i("frechet"),
    *COSTS,
)
MEMORY = (
    Column("server MB", lambda lines: lines[-1].get("memory", {}).get("server"), 0),
    Column("client MB", lambda lines: lines[-1].get("memory", {}).get("client"), 0),
)


def spread(values: Sequence[float | None], decimals: int = 3) -> str:
    """Format mean and standard deviation; a dash if there is no value."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    deviation = f" ± {statistics.stdev(present):.{decimals}f}" if len(present) > 1 else ""
    return f"{statistics.mean(present):.{decimals}f}{deviation}"


def table(runs: Runs, columns: Sequence[Column]) -> str:
    """Make a Markdown table with one row per method: means and standard deviations over seeds."""
    lines = [f"| | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in runs.items():
        cells = [spread([column.value(run) for run in seeds], column.decimals) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def harms(runs: Runs, other: str, columns: Sequence[Column]) -> str:
    """Compare each row with another one, seed by seed: mean difference, and the one-sided p of a t-test for harm."""
    lines = [f"| minus {other} | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in runs.items():
        if name == other or other not in runs or len(seeds) < 2:
            continue
        cells = []
        for column in columns:
            pairs = [(column.value(one), column.value(two)) for one, two in zip(seeds, runs[other], strict=True)]
            differences = np.array([one - two for one, two in pairs if one is not None and two is not None])
            if not differences.any():
                cells.append("0" if len(differences) else "-")
                continue
            worse = "greater" if column.less_is_better else "less"
            p = stats.ttest_1samp(differences, 0, alternative=worse).pvalue if len(differences) > 1 else math.nan
            cells.append(f"{differences.mean():+.{column.decimals}f} (p {p:.2g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def t2i_before(runs: Runs, measures: Sequence[str] = ("alignment", "frechet")) -> str:
    """Return a sentence with the T2I's measures before any round, over the seeds of the last row that has them."""
    first = [[run[0]["generator"] for run in seeds] for seeds in runs.values()]
    known = [starts for starts in first if starts and all(start.get("alignment") is not None for start in starts)]
    if not known:
        return ""
    told = (
        f"{one} {spread([start.get(one) for start in known[-1]], 0 if one == 'frechet' else 3)}" for one in measures
    )
    return f"The T2I before: {', '.join(told)}."

"""What it costs to record a round of a long run with many clients: ``python -m benchmarks.record``.

It writes rounds as a run does, with made-up numbers: metrics, the report and the adapter's card, and checkpoints with
samples of the size of Stable Diffusion 1.5. The same files are also written as a whole, as if each round wrote
everything again, so that both are measured in one run. Numbers are of the last rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmmkt.common.config import RunConfig
from fedmmkt.common.files import write_text
from fedmmkt.server_app.record.checkpoint import Checkpoints, ServerState
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.history import History
from fedmmkt.server_app.report.page import write_report
from fedmmkt.server_app.t2i.samples import Samples

LAST = 5  # rounds over which the median is taken
SAMPLES, LATENTS = 400, (4, 64, 64)  # of a round; the latents of an image of 512 pixels


class Spent(NamedTuple):
    """Seconds by the clock, and of the processor."""

    wall: float
    processor: float


Row = tuple[str, list[Spent], int]  # What was done, the time of each round, and the bytes that it wrote.


def lines_of(clients: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a run; one client in a hundred does not answer."""
    rng = np.random.default_rng(0)
    names = [f"cnn-{index}" for index in range(clients)]
    for round in range(rounds):
        values = dict(zip(names, rng.uniform(0.1 + round / rounds / 2, 0.5 + round / rounds / 2, clients), strict=True))
        missing = dict.fromkeys(rng.choice(names, clients // 100, False), "no answer before the round closed")
        reports = {
            name: {"accuracy": value, "loss": 1 - value, "modality": "image", "model": "cnn", "examples": 100}
            for name, value in values.items()
            if name not in missing
        }
        mean = float(np.mean([report["accuracy"] for report in reports.values()]))
        start = 20.0 * round
        stages = {"generate": 2.0, "clients": 10.0, "aggregate": 0.1, "adapt": 8.0}
        timeline = {
            "server": [["generate", start, start + 2], ["clients", start + 2, start + 12]],
            "beside": [["measure", start + 2, start + 5]],
            "clients": [[name, start + 2, start + 3 + index % 9] for index, name in enumerate(reports)],
        }
        yield {
            "round": round,
            "clients": {"accuracy": mean, "by_modality": {"image": mean}, "per_client": reports},
            "generator": {"alignment": 0.9, "frechet": 500.0, "loss": 0.3},
            "bytes": {"down": 2_000_000, "up": 60_000},
            "seconds": {**stages, "evaluate": 0.0, "measure": 3.0, "total": 20.1, "timeline": timeline},
            "replies": {
                "received": len(reports),
                "rejected": 0,
                "missing": len(missing),
                "asked": names,
                "answered": list(reports),
                "late": [],
                "gone": [],
                "reasons": missing,
            },
        }


def measure_metrics(folder: Path, clients: int, rounds: int) -> list[Row]:
    """Record a run; return what was done in the last rounds, in how many seconds each, and its bytes."""
    run, history = RunFolder(folder), History()
    run.write_config(
        {
            "config": (RunConfig().model_dump(mode="json", by_alias=True) | {"rounds": rounds}),
            "classes": [f"class {index}" for index in range(10)],
            "run_id": "1",
        }
    )
    appended, added, page, again, whole = [], [], [], [], []
    for line in lines_of(clients, rounds):
        before = run.metrics.stat().st_size if run.metrics.exists() else 0
        appended.append(_seconds(lambda line=line: run.append_metrics(line)))  # type: ignore[misc]
        added.append(_seconds(lambda line=line: history.add(line)))  # type: ignore[misc]
        if line["round"] >= rounds - LAST:
            page.append(_seconds(lambda: write_report(folder, history)))
            again.append(_seconds(lambda: write_report(folder)))
            text = run.metrics.read_text()
            whole.append(_seconds(lambda text=text: write_text(folder / "copy", text)))  # type: ignore[misc]
    size = run.metrics.stat().st_size
    return [
        ("append to metrics", appended[-LAST:], size - before),
        ("add to what pages show", added[-LAST:], 0),
        ("write the report", page, run.report.stat().st_size),
        ("the report, with all metrics read again", again, run.report.stat().st_size),
        ("metrics, written as a whole", whole, size),
    ]


def measure_checkpoint(folder: Path, pool_rounds: int, rounds: int = 2 * LAST) -> list[Row]:
    """Write the checkpoints of some rounds; return the seconds and bytes of what is new, and of all of it."""
    run, pool = RunFolder(folder), list[Samples]()
    written, spent, whole = Checkpoints(run.checkpoints, 2), [], []
    for round in range(rounds):
        pool = [*pool, _samples(round)][-pool_rounds:]
        adapter = {"lora": torch.zeros(800_000)}
        line = {"round": round}
        state = ServerState(round, "run", (), {}, (), (), {}, adapter, pool, [], line, run.metrics_mark())
        spent.append(_seconds(lambda state=state: written.write(state)))  # type: ignore[misc]
        anew = Checkpoints(folder / f"whole-{round}", 1)
        whole.append(_seconds(lambda anew=anew, state=state: anew.write(state)))  # type: ignore[misc]
    latents = pool[-1].latents_NCHW.numel() * 4
    return [
        ("checkpoint, what is new", spent[-LAST:], latents + 3_200_000),
        ("checkpoint, all of it", whole[-LAST:], latents * len(pool) + 3_200_000),
    ]


def _samples(round: int) -> Samples:
    latents_NCHW = torch.randn(SAMPLES, *LATENTS, generator=torch.Generator().manual_seed(round))
    prompts = tuple(f"picture {index}" for index in range(SAMPLES))
    samples = Samples(prompts, torch.zeros(SAMPLES, dtype=torch.int64), np.empty((0, 0, 0, 3), np.uint8), latents_NCHW)
    return samples.scored(torch.ones(SAMPLES))


def _seconds(action: Callable[[], object]) -> Spent:
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - processor)


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--pool-rounds", type=int, default=RunConfig().t2i.pool_rounds)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_metrics(Path(folder) / "run", arguments.clients, arguments.rounds)
        rows += measure_checkpoint(Path(folder) / "checkpoints", arguments.pool_rounds)
    if arguments.json:
        print(json.dumps({name: [*_medians(spent), size] for name, spent, size in rows}))
        return
    print(f"{arguments.clients} clients, round {arguments.rounds}\n")
    print("| in a round | s | s of the processor | MB |\n|---|---|---|---|")
    for name, spent, size in rows:
        wall, processor = _medians(spent)
        print(f"| {name} | {wall:.3f} | {processor:.3f} | {size / 1e6:.2f} |")


def _medians(spent: list[Spent]) -> Spent:
    return Spent(*(statistics.median(values) for values in zip(*spent, strict=True)))


if __name__ == "__main__":
    main()

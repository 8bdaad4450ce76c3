"""Time and memory of aggregation by number of clients: ``python -m benchmarks.aggregation``.

Each rule is applied as the server applies it, in parts, and with ``--stacked`` also to the logits of all clients at
once, as the rule itself is written. Both use the same logits in one process; the ratio of their times is what counts on
a shared machine. Memory is the peak above what the process held before, so without the clients' answers. Linux only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import process_memory
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.checks import check_result
from fedmmkt.server_app.rules.streaming import aggregate


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rules", nargs="+", default=list(aggregations.names()), choices=list(aggregations.names()))
    parser.add_argument("--stacked", action="store_true", help="also at once: 14 GB for 1,000 clients")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    shape = arguments.samples, arguments.classes
    drawn = (rng.standard_normal((max(arguments.clients), 1, arguments.classes)) * 4).astype(np.float16)
    noise_NC = rng.standard_normal(shape).astype(np.float16)
    answers = [noise_NC + centre_1C for centre_1C in drawn]
    counts_KC = torch.from_numpy(rng.integers(0, 200, (len(answers), arguments.classes)))
    prompted_N = torch.from_numpy(rng.integers(-1, arguments.classes, arguments.samples))
    print("| rule | clients | s | processor s | MB | s at once | MB at once |\n|---|---|---|---|---|---|---|")
    for name in arguments.rules:
        rule = aggregations.get(name)
        check = partial(check_result, key="t2i.aggregation", name=name)
        for clients in arguments.clients:
            given = answers[:clients], counts_KC[:clients], prompted_N
            figures = [*_measured(lambda: aggregate(rule, *given, check))]  # noqa: B023  Called at once.
            at_once = [float("nan")] * 3
            if arguments.stacked:
                at_once = [*_measured(lambda: rule(_stacked(given[0]), *given[1:]))]  # noqa: B023
            shown = " | ".join(f"{figure:.3g}" for figure in (*figures, at_once[0], at_once[2]))
            print(f"| {name} | {clients} | {shown} |", flush=True)


def _stacked(logits: list[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(logits_NC).float() for logits_NC in logits])


def _measured(call: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Return wall seconds, processor seconds, and the peak memory in MB above what was held before."""
    process_memory.forget_peak()
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used, (_peak() - before) / 1e6


def _peak() -> int:
    return process_memory.peak() or 0


if __name__ == "__main__":
    main()

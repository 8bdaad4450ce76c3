"""Peak memory of server and clients as rounds and clients grow: ``python -m benchmarks.memory``.

Digits, the starter and small clients, whose learning is cut short; messages, images and logits are as large as ever.
Clients take turns in one process a core, as in a simulation; a deployed client has a process of its own.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from benchmarks.rows import MEMORY, Overrides, row_folder, run_once

BRIEF: Overrides = {
    "client.models": "cnn,text,dual",
    "client.warmup-epochs": 1,
    "client.local-epochs": 1,
    "client.distillation-steps": 5,
    "t2i.inference-steps": 2,
    "t2i.adaptation-steps": 5,
    "t2i.evaluation-samples": 50,
    "data.partitioner": "iid",
    "judge": False,
}
SIZES = ((4, 2), (4, 8), (4, 24), (4, 72), (16, 4), (64, 4))


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/memory"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| clients | rounds | server MB | client MB | MB down a client and round |\n|---|---|---|---|---|")
    for nodes, rounds in SIZES:
        folder = row_folder(arguments.out.resolve(), f"{nodes} clients {rounds} rounds", 0)
        lines = run_once(folder, BRIEF | {"rounds": rounds}, nodes)
        server, client = (column.value(lines) for column in MEMORY)
        down = lines[-2]["bytes"]["down"] / nodes / 1e6
        print(f"| {nodes} | {rounds} | {_figure(server)} | {_figure(client)} | {down:.3f} |", flush=True)


def _figure(megabytes: float | None) -> str:
    return "-" if megabytes is None else f"{megabytes:.0f}"


if __name__ == "__main__":
    main()

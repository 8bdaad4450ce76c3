"""Peak memory of server and clients for growing numbers of rounds and clients: ``python -m benchmarks.memory``.

It uses digits, the starter and small clients. Training is shortened, but messages, images and logits have their normal
size. Clients share one process per core, as in a simulation. A deployed client has its own process.
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
    """Parse the command line, do the missing runs, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/memory"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| clients | rounds | server MB | client MB | MB down per client and round |\n|---|---|---|---|---|")
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

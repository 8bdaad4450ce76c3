"""The gain of each part of the method, on digits: ``python -m benchmarks.digits --seeds 3 --alphas 0.1 0.5``.

Rows differ only in their run-config. All use the same partitions and the same number of private epochs.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from benchmarks.references import t2i_bounds
from benchmarks.rows import (
    ACCURACY,
    COSTS_AND_T2I,
    DIGITS,
    MEMORY,
    PLAIN,
    Overrides,
    modality,
    run_rows,
    spread,
    t2i_before,
    table,
)
from fedmmkt.common.config import RunConfig

NODES = 6

# A frozen T2I shows the prompted class more often with more guidance.
FROZEN: Overrides = {"t2i.scores": "none", "t2i.guidance": "3.0,1.5,1.2,1.0"}
# All weights on synthetic samples are zero, so clients do not learn from them; ten samples per round are enough.
ALONE: Overrides = {
    "client.distillation-weight": 0.0,
    "client.prompt-weight": 0.0,
    "client.alignment-weight": 0.0,
    "t2i.samples-per-round": 10,
}
ROWS: dict[str, Overrides] = {
    "local-only": FROZEN | PLAIN | ALONE,
    "local-only, the recipe's loss": FROZEN | ALONE,
    "plain averaging, frozen T2I (FedMD-style)": FROZEN | PLAIN | {"t2i.aggregation": "mean"},
    "the recipe, prompt labels alone": FROZEN | {"client.distillation-weight": 0.0},
    "the client recipe, frozen T2I": FROZEN,
    "the whole, logits only": {"feedback": "logits"},
    "the whole, no alignment loss": {"client.alignment-weight": 0.0},
    "the whole, generated ahead": {"t2i.generate-ahead": True},
    "the whole, every update kept": {"t2i.guard": 0.0},
    "the whole": {},
}
COLUMNS = (
    ACCURACY,
    modality("image", "image clients"),
    modality("text", "text"),
    modality("image+text", "image+text"),
    *COSTS_AND_T2I,
    *MEMORY,
)


def main() -> None:
    """Parse the command line, do the missing runs, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=RunConfig().rounds)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/digits"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    out = arguments.out.resolve()
    for alpha in arguments.alphas:
        runs = run_rows(
            {name: ROWS[name] for name in arguments.rows},
            DIGITS | {"rounds": arguments.rounds, "data.alpha": alpha},
            arguments.seeds,
            NODES,
            out / f"alpha-{alpha:g}",
        )
        print(f"\n### alpha {alpha:g}, {arguments.seeds} seeds, {arguments.rounds} rounds\n\n{table(runs, COLUMNS)}")
        print(f"\n{t2i_before(runs)}")
    print("\n### What bounds the T2I (seed 0)\n\n| | alignment | Frechet |\n|---|---|---|")
    for name, measures in t2i_bounds(DIGITS):
        print(f"| {name} | {spread([measures.alignment])} | {spread([measures.frechet], 0)} |")


if __name__ == "__main__":
    main()

"""Whether an adapted T2I harms either side, compared with a frozen one: ``python -m benchmarks.harm digits vendors``.

On ``digits`` the default recipe works. On ``vendors`` it is known to harm: the T2I has learned from Twitter's emoji,
and the clients hold those of another vendor, image and text. ``--emoji DIR`` is a folder with
``twitter/train.parquet``, ``noto/train.parquet`` and ``noto/test.parquet`` (columns ``image``, ``text``, ``label``).
The T2I of Twitter's emoji is trained first, which takes 40 minutes on a busy core.

The tables have paired differences from the row with a frozen T2I, with the one-sided p of a t-test for harm. Finished
runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets

from benchmarks.rows import ACCURACY, DIGITS, Lines, Overrides, Runs, harms, modality, row_folder, run_once, spread, t2i
from fedmmkt.starter import public

NODES = 6
COMMON: Overrides = {"checkpoints-kept": 0}
PRETRAIN = ["--autoencoder", "16", "32", "48", "--unet", "32", "64"]
PRETRAIN += ["--autoencoder-steps", "2500", "--diffusion-steps", "4000"]
VENDORS: Overrides = {
    "client.models": "cnn,resnet,vit,mobilenet,text,dual",
    "client.distillation-steps": 100,
    "client.alignment-weight": 0.0,
    "t2i.guidance": "2.0",
    "t2i.evaluation-guidance": 2.0,
}
FROZEN = "frozen T2I"
ROWS: dict[str, Overrides] = {
    FROZEN: {"t2i.scores": "none"},
    "every update is kept": {"t2i.guard": 0.0},
    "the clients decide, guard .125": {"t2i.guard": 0.125},
    "the clients decide, guard .25": {"t2i.guard": 0.25},
    "the clients decide, guard .5": {"t2i.guard": 0.5},
}


COLUMNS = (
    ACCURACY,
    modality("image", "image"),
    modality("text", "text"),
    modality("image+text", "image+text"),
    *map(t2i, ("alignment", "frechet", "precision", "recall", "density", "coverage")),
)


def make_vendors(emoji: Path, out: Path, device: str, seed: int = 0) -> None:
    """Train a T2I on Twitter's emoji, and write the other vendor's beside it for the clients."""
    read = {
        name: datasets.load_dataset("parquet", data_files=str(emoji / f"{name}.parquet"), split="train")
        for name in ("twitter/train", "noto/train", "noto/test")
    }
    marked = {name: rows.add_column("vendor", [name.split("/")[0]] * len(rows)) for name, rows in read.items()}
    both = out.parent / "both-vendors"
    both.mkdir(parents=True, exist_ok=True)
    train = datasets.concatenate_datasets([marked["twitter/train"], marked["noto/train"]])
    train.to_parquet(both / "train.parquet")
    marked["noto/test"].to_parquet(both / "test.parquet")
    told = ["--dataset", str(both), "--caption-column", "text", "--public", "vendor=twitter", "--out", str(out)]
    if public.main([*told, *PRETRAIN, "--device", device, "--seed", str(seed)]):
        raise SystemExit(1)


def settings(name: str, out: Path, emoji: Path, device: str) -> Overrides:
    """Return the run-config of a dataset; make its T2I if there is none yet."""
    if name == "digits":
        return DIGITS
    start = out / "start"
    if not (start / "model").exists():
        make_vendors(emoji, start, device)
    return VENDORS | {
        "data.dataset": str(start / "data"),
        "data.text-column": "text",
        "t2i.model": str(start / "model"),
        "t2i.prompts": str(start / "prompts.jsonl"),
    }


def run_all(
    rows: Sequence[str], common: Overrides, seeds: Sequence[int], out: Path, at_once: int, device: str
) -> dict[str, list[Lines]]:
    """Run each row with each seed, so many at once; return one list of lines per row."""

    def run(name: str, seed: int) -> Lines:
        overrides = COMMON | common | {"seed": seed} | ROWS[name]
        lines = run_once(row_folder(out, name, seed), overrides, NODES, device=device)
        t2i = lines[-1]["generator"]
        print(f"{out.name} seed {seed} {name}: {ACCURACY.value(lines):.3f}, {t2i}", file=sys.stderr, flush=True)
        return lines

    with ThreadPoolExecutor(at_once) as pool:
        pending = {(name, seed): pool.submit(run, name, seed) for seed in seeds for name in rows}
        return {name: [pending[name, seed].result() for seed in seeds] for name in rows}


def table(runs: Runs) -> str:
    """Make a Markdown table: means and standard deviations over seeds, after the T2I's measures at its start."""
    lines = [f"| | {' | '.join(column.title for column in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    start = [run[:1] for run in next(iter(runs.values()))]
    for name, seeds in {"at the start": start, **runs}.items():
        columns = [None if name == "at the start" and "accuracy" not in run[0]["clients"] else run for run in seeds]
        cells = [
            spread([column.value(run) for run in columns if run is not None], column.decimals) for column in COLUMNS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_round(runs: Runs) -> str:
    """Say for each run how Frechet distance and recall went, and what became of the updates, round by round."""
    told = []
    for name, seeds in runs.items():
        for seed, lines in enumerate(seeds):
            values = {measure: [line["generator"].get(measure) for line in lines] for measure in ("frechet", "recall")}
            said = {
                measure: [f"{value:.3g}" for value in found if value is not None] for measure, found in values.items()
            }
            guards = [line["guard"] for line in lines if line.get("guard")]
            said["guard"] = [f"{guard['verdict']} {guard['preference']}" for guard in guards]
            told += [f"- {name}, seed {seed}, {what}: {', '.join(texts)}" for what, texts in said.items() if texts]
    return "\n".join(told)


def main() -> None:
    """Parse the command line, do the missing runs, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", choices=["digits", "vendors"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--emoji", type=Path, default=Path("emoji-vendors"))
    parser.add_argument("--device", default="auto", help="device of pre-training")
    parser.add_argument("--client-device", default="auto", help="device of the clients")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/harm"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    for name in arguments.datasets:
        out = arguments.out.resolve() / f"{name}-alpha-{arguments.alpha:g}"
        common = settings(name, arguments.out.resolve() / name, arguments.emoji, arguments.device)
        common |= {"rounds": arguments.rounds, "data.alpha": arguments.alpha}
        runs = run_all(arguments.rows, common, range(arguments.seeds), out, arguments.at_once, arguments.client_device)
        print(f"\n### {name}, alpha {arguments.alpha:g}, {arguments.seeds} seeds, {arguments.rounds} rounds\n")
        print("\n\n".join((table(runs), harms(runs, FROZEN, COLUMNS), by_round(runs))), flush=True)


if __name__ == "__main__":
    main()

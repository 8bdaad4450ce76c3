"""What each part of the method gives, on digits: ``python -m benchmarks.digits --seeds 3 --alphas 0.1 0.5``.

Every row is run-config alone, on the same partitions and with equally many private epochs. Strategy and
clients are those of ``flwr run``; messages go to client processes directly, without SuperLink and Ray. A
finished run is kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common.config import RunConfig, T2IConfig, to_flower
from common.datasets import load_splits, to_examples
from deploy.in_process import InProcessGrid
from server_app.app import build_strategy
from server_app.evaluation import Judge
from server_app.generator import Generated, Generator

NODES = 6
Overrides = dict[str, bool | int | float | str]

# A T2I that never learns shows the prompted class more often with guidance.
FROZEN: Overrides = {"t2i.scores": "none", "t2i.guidance": "3.0,1.5,1.2,1.0"}
PLAIN: Overrides = {"client.balanced-softmax": False, "client.prompt-weight": 0.0, "client.alignment-weight": 0.0}
ROWS: dict[str, Overrides] = {
    # Without weight on anything synthetic, no client learns from it; ten samples a round are then enough.
    "local-only": FROZEN | PLAIN | {"client.distillation-weight": 0.0, "t2i.samples-per-round": 10},
    "plain averaging, frozen T2I (FedMD-style)": FROZEN | PLAIN | {"t2i.aggregation": "mean"},
    "the client recipe, frozen T2I": FROZEN,
    "the whole, logits only": {"feedback": "logits"},
    "the whole, no alignment loss": {"client.alignment-weight": 0.0},
    "the whole": {},
}


def run_once(name: str, alpha: float, seed: int, rounds: int, out: Path) -> list[dict[str, Any]]:
    """Run one row with one seed, unless it is there; return its lines of metrics."""
    folder = out / f"alpha-{alpha:g}" / name.replace(" ", "-").replace(",", "") / f"seed-{seed}"
    done = folder / "done.json"
    if not done.exists():
        changes = {"rounds": rounds, "seed": seed, "data.alpha": alpha, "tensorboard": False, "min-nodes": NODES}
        folders = {"output-dir": str(folder / "run"), "client.state-dir": str(folder / "clients")}
        run_config = to_flower(RunConfig()) | changes | folders | ROWS[name]
        nodes: list[Any] = [{"partition-id": node, "num-partitions": NODES} for node in range(NODES)]
        grid = InProcessGrid("client_app.app:app", run_config, nodes, workers=min(NODES, os.cpu_count() or 1))
        start = time.perf_counter()
        # The run id keys the clients' memory: a run that was cut short must not be continued by its clients.
        strategy = build_strategy(RunConfig.from_flower(run_config), time.time_ns() % 2**31)
        strategy.start(grid)
        grid.close()
        seconds = time.perf_counter() - start
        done.write_text(json.dumps({"seconds": seconds, "lines": strategy.run_folder.read_metrics()}))
    lines: list[dict[str, Any]] = json.loads(done.read_text())["lines"]
    return lines


def references(seed: int) -> list[tuple[str, float | None, float]]:
    """Measure what bounds the T2I: real images, the autoencoder's, and LoRA trained on the private images."""
    config = RunConfig(seed=seed)
    splits = load_splits(config.data, seed)
    train, test = (to_examples(part, config.data, images=True, texts=False) for part in (splits.train, splits.test))
    if train.images_NHWC is None or test.images_NHWC is None:
        raise ValueError("digits have images")
    judge = Judge(train.images_NHWC, train.labels_N, test.images_NHWC, test.labels_N, len(splits.classes), seed)
    rows: list[tuple[str, float | None, float]] = []

    def measured(name: str, images_NHWC: Any, labels_N: Any) -> None:
        measures = judge.measure(images_NHWC, labels_N)
        rows.append((name, measures.alignment, measures.frechet))

    t2i = T2IConfig()
    count = t2i.evaluation_samples
    measured("real training images", train.images_NHWC[:count], train.labels_N[:count])
    generator = Generator(t2i, seed)
    pixels = torch.from_numpy(train.images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        vae = generator.pipeline.vae
        latents_NCHW = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    measured(
        "their reconstructions by the autoencoder", generator._decode(latents_NCHW[:count]), train.labels_N[:count]
    )
    captions = [t2i.prompt_templates[i % len(t2i.prompt_templates)].format(splits.classes[label])
                for i, label in enumerate(train.labels_N)]  # fmt: skip
    private = Generated(tuple(captions), train.images_NHWC, latents_NCHW)
    for update in range(config.rounds):
        generator.adapt(private, torch.ones(len(private)), t2i.adaptation_steps, update)
    prompts = [t2i.prompt_templates[0].format(name) for name in splits.classes for _ in range(count // 10)]
    labels_N = torch.arange(10).repeat_interleave(count // 10).numpy()
    made = generator.generate(prompts, list(range(len(prompts))), t2i.evaluation_guidance)
    measured("the same LoRA, trained on the private images themselves", made.images_NHWC, labels_N)
    return rows


def spread(values: list[float | None], digits: int = 3) -> str:
    """Mean and standard deviation; a dash where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def table(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Make a Markdown table, a row a method, mean and standard deviation over seeds."""
    lines = [
        "| | all clients | image clients | text | image+text | alignment | Frechet | MB down | MB up | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        last = [run[-1] for run in seeds]
        clients = [line["clients"] for line in last]
        cells = [
            spread([client["accuracy"] for client in clients]),
            *(
                spread([client["by_modality"].get(modality) for client in clients])
                for modality in ("image", "text", "image+text")
            ),
            spread([line["generator"]["alignment"] for line in last]),
            spread([line["generator"]["frechet"] for line in last], 0),
            *(spread([sum(line["bytes"][way] for line in run) / 1e6 for run in seeds], 2) for way in ("down", "up")),
            spread([sum(line["seconds"]["total"] for line in run) for run in seeds], 0),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=RunConfig().rounds)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/digits"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    out = arguments.out.resolve()
    started = time.perf_counter()
    for alpha in arguments.alphas:
        runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in arguments.rows}
        for seed in range(arguments.seeds):
            for name in arguments.rows:
                lines = run_once(name, alpha, seed, arguments.rounds, out)
                runs[name].append(lines)
                seconds = time.perf_counter() - started
                accuracy = lines[-1]["clients"]["accuracy"]
                print(
                    f"alpha {alpha:g} seed {seed} {name}: {accuracy:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True
                )
        print(f"\n### alpha {alpha:g}, {arguments.seeds} seeds, {arguments.rounds} rounds\n\n{table(runs)}")
        first = [run[0]["generator"] for run in runs[arguments.rows[-1]]]
        alignment, frechet = spread([g["alignment"] for g in first]), spread([g["frechet"] for g in first], 0)
        print(f"\nThe T2I before: alignment {alignment}, Frechet {frechet}.")
    print("\n### What bounds the T2I (seed 0)\n\n| | alignment | Frechet |\n|---|---|---|")
    for name, aligned, distance in references(0):
        print(f"| {name} | {spread([aligned])} | {distance:.0f} |")


if __name__ == "__main__":
    main()

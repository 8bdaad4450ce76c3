"""The gain of each part of the method, on digits: ``python -m benchmarks.digits --seeds 3 --alphas 0.1 0.5``.

Rows differ only in their run-config. All use the same partitions and the same number of private epochs.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import (
    ACCURACY,
    COSTS_AND_T2I,
    MEMORY,
    PLAIN,
    Overrides,
    modality,
    run_rows,
    spread,
    t2i_before,
    table,
)
from fedmmkt.common.config import RunConfig, T2IConfig
from fedmmkt.common.datasets import load_splits, to_examples
from fedmmkt.server_app.prompts import templates_of
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.t2i.generator import Generator, as_images
from fedmmkt.server_app.t2i.samples import Samples

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


def references(seed: int) -> list[tuple[str, float | None, float | None]]:
    """Measure upper bounds of the T2I: real images, their reconstructions, and a LoRA trained on private images."""
    config = RunConfig(seed=seed)
    splits = load_splits(config.data, seed)
    train, test = (to_examples(part, config.data, images=True, texts=False) for part in (splits.train, splits.test))
    if train.images_NHWC is None or test.images_NHWC is None:
        raise ValueError("digits have images")
    judge = Judge(train.images_NHWC, train.labels_N, test.images_NHWC, test.labels_N, len(splits.classes), seed)
    rows: list[tuple[str, float | None, float | None]] = []

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
        decoded = as_images(generator.family.decode(latents_NCHW[:count]))
    measured("their reconstructions by the autoencoder", decoded, train.labels_N[:count])
    templates = templates_of(t2i)
    captions = [templates[i % len(templates)].format(splits.classes[label])
                for i, label in enumerate(train.labels_N)]  # fmt: skip
    private = Samples(tuple(captions), torch.from_numpy(train.labels_N), train.images_NHWC, latents_NCHW)
    for update in range(config.rounds):
        generator.adapt(private, torch.ones(len(private)), t2i.adaptation_steps, update)
    prompts = [templates[0].format(name) for name in splits.classes for _ in range(count // 10)]
    labels_N = torch.arange(10).repeat_interleave(count // 10).numpy()
    made = generator.generate(prompts, list(range(len(prompts))), t2i.evaluation_guidance)
    measured("the same LoRA, trained on the private images themselves", made.images_NHWC, labels_N)
    return rows


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
            {"rounds": arguments.rounds, "data.alpha": alpha},
            arguments.seeds,
            NODES,
            out / f"alpha-{alpha:g}",
        )
        print(f"\n### alpha {alpha:g}, {arguments.seeds} seeds, {arguments.rounds} rounds\n\n{table(runs, COLUMNS)}")
        print(f"\n{t2i_before(runs)}")
    print("\n### What bounds the T2I (seed 0)\n\n| | alignment | Frechet |\n|---|---|---|")
    for name, aligned, distance in references(0):
        print(f"| {name} | {spread([aligned])} | {distance:.0f} |")


if __name__ == "__main__":
    main()

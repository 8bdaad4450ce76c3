"""Speed of the generator class compared with the bare diffusers pipeline: ``python -m benchmarks.generation``.

Both generate uint8 images in memory, in turn, with the same prompts, seeds, batch size, steps and guidance. Only the
ratio of their median times counts, because machines differ and are shared. The generator has an adapted LoRA. The bare
pipeline is measured without a LoRA and with the same LoRA.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmmkt.common.config import T2IConfig
from fedmmkt.server_app.t2i.generator import Generator, load_pipeline


def bare(pipeline: Any, prompts: list[str], guidance: float, config: T2IConfig) -> None:
    """Generate images with plain diffusers."""
    for start in range(0, len(prompts), config.generation_batch_size):
        part = prompts[start : start + config.generation_batch_size]
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
        images = pipeline(
            part,
            num_inference_steps=config.inference_steps,
            guidance_scale=guidance,
            generator=noise,
            output_type="np",
        ).images
        (images * 255).round().astype("uint8")


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of each function, in turn, after one round that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    config = T2IConfig(model=arguments.model, generation_batch_size=100)
    prompts = [f"the digit {name}" for name in ("one", "two", "three", "four")] * (arguments.images // 4)
    seeds = list(range(len(prompts)))
    ours = Generator(config, seed=0)
    ours.adapt(ours.generate(prompts[:8], seeds[:8], 1.0), torch.ones(8), steps=2, seed=0)
    plain, adapted = load_pipeline(config.model).to(ours.device), load_pipeline(config.model).to(ours.device)
    with tempfile.TemporaryDirectory() as folder:
        ours.adapter.save(Path(folder) / "lora")
        adapted.load_lora_weights(Path(folder) / "lora")
    for pipeline in (plain, adapted):
        pipeline.set_progress_bar_config(disable=True)

    print(f"{len(prompts)} images, {config.inference_steps} steps, batches of {config.generation_batch_size}\n")
    print("| guidance | generator with LoRA, images/s | / bare without LoRA | / bare with LoRA |\n|---|---|---|---|")
    for guidance in (1.0, 2.0):
        seconds = measure(
            {
                "ours": lambda g=guidance: ours.generate(prompts, seeds, g),  # type: ignore[misc]
                "plain": lambda g=guidance: bare(plain, prompts, g, config),  # type: ignore[misc]
                "adapted": lambda g=guidance: bare(adapted, prompts, g, config),  # type: ignore[misc]
            },
            arguments.repeats,
        )
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = [f"{median['ours'] / median[name]:.2f}" for name in ("plain", "adapted")]
        print(f"| {guidance:g} | {len(prompts) / median['ours']:.0f} | time x {' | time x '.join(ratios)} |")


if __name__ == "__main__":
    main()

"""Generation through the generator class beside the bare diffusers pipeline: ``python -m benchmarks.generation``.

Both generate the same prompts with the same seeds, batch size, steps and guidance, in turn, and to uint8
images in memory; the ratio of their medians is what counts, since machines differ and are shared. The
generator carries an adapted LoRA; the bare pipeline is measured without one and with the same one loaded.
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

from common.config import T2IConfig
from server_app.generator import Generator, load_pipeline


def bare(pipeline: Any, prompts: list[str], guidance: float, config: T2IConfig) -> None:
    """Generate as anyone would with diffusers."""
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
    """Time each in turn, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    config = T2IConfig(model=arguments.model)
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

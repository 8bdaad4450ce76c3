"""Memory of the server by number of images a round: ``python -m benchmarks.round_memory``.

Each row is a run of the whole server in a process of its own: it generates images of 512 pixels, half of them new and
half variations, sends them as clients see them, aggregates the answers, learns from the samples of the last rounds, and
writes checkpoints. The pipeline is tiny, with latents as large as those of Stable Diffusion; two clients in processes
of their own answer at once with random logits. Memory is the process's peak above what it held when the
pipeline was loaded. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import process_memory
from fedmmkt.common.config import RunConfig, Setting, to_flower
from fedmmkt.deploy.in_process import InProcessGrid

HERE = Path(__file__).parent.parent
CLIENTS = 2


def save_tiny_pipeline(folder: Path) -> None:
    """Save a pipeline of random weights: 512 pixels, latents of 4 x 64 x 64, next to no channels."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "starter" / "model" / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length)  # fmt: skip
    autoencoder = AutoencoderKL(block_out_channels=(2,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=1,
                                mid_block_add_attention=False, sample_size=512)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32)  # fmt: skip
    parts = (autoencoder, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False))
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)


def run(pipeline: Path, images: int, rounds: int) -> dict[str, float]:
    """Run in this process; return its peak memory above that of the model in MB, and the seconds of a round."""
    from fedmmkt.server_app.app import build_strategy

    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Setting] = {
            **{"output-dir": folder, "rounds": rounds, "tracker": "", "judge": False, "feedback": "logits"},
            **{"learn-early": False, "min-available-nodes": CLIENTS, "t2i.model": str(pipeline)},
            **{"t2i.samples-per-round": images, "t2i.evaluation-samples": 10, "t2i.inference-steps": 1},
            **{"t2i.generation-batch-size": 4, "t2i.adaptation-batch-size": 4, "t2i.adaptation-steps": 2},
            "t2i.explore-strength": 1.0,
        }
        config = to_flower(RunConfig()) | changes
        grid = InProcessGrid("benchmarks.sampled:app", config, [{}] * CLIENTS, workers=CLIENTS)
        strategy = build_strategy(RunConfig.from_flower(config), 1)
        before, began = process_memory.held() or 0, time.monotonic()
        strategy.start(grid)
        seconds = time.monotonic() - began
        grid.close()
    peak = process_memory.peak() or 0
    return {"peak": (peak - before) / 1e6, "seconds": seconds / rounds}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_memory", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5, help="memory is largest from the fourth round on")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        folder, images = options.case
        print(json.dumps(run(Path(folder), int(images), options.rounds)))
        return 0
    print("| images a round | MB above the model | kB an image | seconds a round |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_pipeline(Path(folder))
        for images in options.images:
            command = [sys.executable, "-m", "benchmarks.round_memory", "--rounds", str(options.rounds)]
            command += ["--case", folder, str(images)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=HERE)
            told = json.loads(answer.stdout.splitlines()[-1])
            peak = told["peak"]
            print(f"| {images} | {peak:.0f} | {1e3 * peak / images:.0f} | {told['seconds']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a round by number of images: ``python -m benchmarks.round_memory``.

A tiny pipeline makes images of 512 pixels with latents as large as those of Stable Diffusion. What the server does with
them is measured round by round: it generates half anew and half as variations, encodes them for clients, keeps the
scored samples of the last rounds, and learns from them. Memory is the peak above that of the model and one image batch.
It grows linearly, so the last line says what 10,000 images take. Linux only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fedmmkt.common.config import T2IConfig
from fedmmkt.common.images import encode_images
from fedmmkt.common.progress import Progress
from fedmmkt.server_app.exploration import draw_parents, generate_or_vary
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples, sample_seeds

TOKENIZER = Path(__file__).parent.parent / "starter" / "model" / "tokenizer"
FORGET_PEAK = Path("/proc/self/clear_refs")
POOL_ROUNDS, CLIENT_SIZE, ROUNDS = 3, 32, 5


def tiny_pipeline() -> StableDiffusionPipeline:
    """Make a pipeline of random weights: 512 pixels, latents of 4 x 64 x 64, next to no channels."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length)  # fmt: skip
    autoencoder = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
                                mid_block_add_attention=False, sample_size=512)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32)  # fmt: skip
    parts = (autoencoder, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False))
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def peak_of_rounds(generator: Generator, images: int) -> float:
    """Return the peak memory of some rounds in MB, above what was held before."""
    FORGET_PEAK.write_text("5")
    before = _status("VmRSS")
    prompts = [Prompt(f"the digit {index % 10}", index % 10) for index in range(images)]
    pool: list[Samples] = []
    for server_round in range(1, ROUNDS + 1):
        seeds = sample_seeds(0, server_round, images)
        parents = draw_parents(pool[-1], prompts[: images // 2], 0) if pool else {}
        made = generate_or_vary(generator, prompts, seeds, 1.0, parents, 1.0, _silent, CLIENT_SIZE)
        encode_images(made.images_NHWC)
        pool = [*pool, made.scored(torch.ones(images))][-POOL_ROUNDS:]
        del made
        generator.adapt(pool, torch.ones(sum(map(len, pool))), 1, 0)
    return (_status("VmHWM") - before) / 1e6


def _silent(total: int) -> Progress:
    return Progress("generate", total, "images", lambda line: None)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_memory", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[50, 200, 400])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny_pipeline().save_pretrained(folder)
        config = T2IConfig(model=folder, inference_steps=1, generation_batch_size=5, adaptation_batch_size=2)
        generator = Generator(config, seed=0)
        peak_of_rounds(generator, 10)  # So that what is made once, and one batch, are held already.
        print("| images a round | MB above the model | kB an image |\n|---|---|---|")
        peaks = [0.0]
        for images in arguments.images:
            peaks.append(peak_of_rounds(generator, images))
            print(f"| {images} | {peaks[-1]:.0f} | {1e3 * peaks[-1] / images:.0f} |", flush=True)
    counts = [0, *arguments.images]
    slope = (peaks[-1] - peaks[-2]) / (counts[-1] - counts[-2])
    print(f"10,000 images: {(peaks[-1] + slope * (10_000 - counts[-1])) / 1e3:.1f} GB")


if __name__ == "__main__":
    main()

"""T2I models at their real sizes, compared with plain diffusers: ``python -m benchmarks.real_size``.

It generates images and fine-tunes a LoRA, with the generator class and with loops that users of diffusers would write.
Both use the same numbers of images and steps, the same batch size and the same layers. Each runs in its own process, so
that peak memory is measured separately. The weights are random, because the measures do not depend on them. So no hub
is needed; the pipeline is built once in the output folder (2 to 7 GB).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from benchmarks import process_memory
from fedmmkt.common.config import T2IConfig
from fedmmkt.common.devices import pick_device
from fedmmkt.server_app.t2i.families import family_of
from fedmmkt.server_app.t2i.generator import Generator, empty_caches
from fedmmkt.server_app.t2i.samples import Samples

TOKENIZER = Path(__file__).parent.parent / "starter" / "model" / "tokenizer"
# From diffusers' own configurations; the sizes of a text encoder are width, layers and heads.
CLIP_L, OPENCLIP_G = (768, 12, 12), (1280, 32, 20)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_encoder(sizes: tuple[int, int, int], activation: str, kind: type[Any] = CLIPTextModel) -> Any:
    """Make a CLIP text encoder with the real size of the vocabulary."""
    width, layers, heads = sizes
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
    )
    return kind(config)


def autoencoder(scaling_factor: float, channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Make the autoencoder that all pipelines use."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        scaling_factor=scaling_factor,
        **changes,
    )


def stable_diffusion(latent_size: int) -> StableDiffusionPipeline:
    """Make Stable Diffusion 1.5."""
    unet = UNet2DConditionModel(sample_size=latent_size, cross_attention_dim=768)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    parts = (autoencoder(0.18215), text_encoder(CLIP_L, "quick_gelu"), tokenizer, unet, scheduler)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def stable_diffusion_xl(latent_size: int) -> StableDiffusionXLPipeline:
    """Make Stable Diffusion XL."""
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77) for _ in range(2)]
    encoders = text_encoder(CLIP_L, "quick_gelu"), text_encoder(OPENCLIP_G, "gelu", CLIPTextModelWithProjection)
    scheduler = EulerDiscreteScheduler(**SCHEDULE)
    return StableDiffusionXLPipeline(
        autoencoder(0.13025), *encoders, *tokenizers, unet, scheduler, add_watermarker=False
    )


def stable_diffusion_3(latent_size: int) -> StableDiffusion3Pipeline:
    """Make Stable Diffusion 3 (medium); of its third text encoder, T5, one layer of 24."""
    transformer = SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    sizes = (CLIP_L, "quick_gelu"), (OPENCLIP_G, "gelu")
    encoders = [text_encoder(*size, CLIPTextModelWithProjection) for size in sizes]
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77) for _ in range(2)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t5 = T5EncoderModel(T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=1, vocab_size=32128))
    words = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=256)  # In place of sentence pieces.
    parts = encoders[0], tokenizers[0], encoders[1], tokenizers[1], t5, words
    vae = autoencoder(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(transformer, scheduler, vae, *parts)


MODELS: dict[str, tuple[Callable[[int], Any], int]] = {
    "sd15": (stable_diffusion, 64),
    "sdxl": (stable_diffusion_xl, 128),
    "sd3": (stable_diffusion_3, 128),
}


@dataclass(frozen=True)
class Work:
    """The work that both sides do.

    Attributes
    ----------
    config : T2IConfig
        The model, its steps and batches.
    images : int
        Images to generate.
    guidance : float
        Guidance scale of the images.
    updates : int
        Optimiser steps of the LoRA.
    """

    config: T2IConfig
    images: int
    guidance: float
    updates: int

    @property
    def prompts(self) -> list[str]:
        """One prompt per image."""
        return [f"the digit {name}" for name, _ in zip(_cycle(), range(self.images), strict=False)]


@dataclass(frozen=True)
class Cost:
    """The cost of the work.

    Speeds do not include loading, a first image and a first step. They also do not include merging the adapter, which
    happens once per round.
    """

    merge_seconds: float | None
    images_a_second: float
    updates_a_second: float
    generation_gigabytes: float
    update_gigabytes: float


def _cycle() -> Any:
    while True:
        yield from ("one", "two", "three", "four")


def ours(work: Work) -> Cost:
    """Generate images and fine-tune with the generator class."""
    generator = Generator(work.config, seed=0)
    seeds = list(range(work.images))
    generator.adapt(generator.generate(work.prompts[:1], seeds[:1], work.guidance), torch.ones(1), 1, 0)

    def generate() -> Samples:
        return generator.generate(work.prompts, seeds, work.guidance)

    _, merge, _ = _measured(generator.adapter.merge, generator.device)
    made, seconds, generation = _measured(generate, generator.device)
    _, adapted, update = _measured(
        lambda: generator.adapt(made, torch.ones(len(made)), work.updates, 0), generator.device
    )
    return Cost(merge, work.images / seconds, work.updates / adapted, generation, update)


def bare(work: Work) -> Cost:
    """Generate images and fine-tune with plain diffusers and peft."""
    config = work.config
    device = pick_device(config.device[0])
    dtype = getattr(torch, config.dtype)
    pipeline = DiffusionPipeline.from_pretrained(config.model, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline, config.model)(pipeline, device)
    denoiser = family.denoiser

    def generate(count: int = work.images) -> None:
        for start in range(0, count, config.generation_batch_size):
            part = work.prompts[start : start + config.generation_batch_size]
            noise = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
            pipeline(part, num_inference_steps=config.inference_steps, guidance_scale=work.guidance, generator=noise)

    generate(1)
    _, seconds, generation = _measured(generate, device)

    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    layers = [end for group in config.lora_targets for end in family.lora_groups.get(group, ())]
    denoiser.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=layers))
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    with torch.no_grad():
        states = family.encode(work.prompts[:1])
    batch, at_once = config.adaptation_batch_size, config.adaptation_micro_batch_size
    states = {name: tensor.expand(at_once, *tensor.shape[1:]) for name, tensor in states.items()}
    shape = denoiser.config.in_channels, denoiser.config.sample_size, denoiser.config.sample_size

    def update(steps: int = work.updates) -> None:
        denoiser.train()
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(batch // at_once):
                noisy, times_B, target = noised(pipeline, torch.randn(at_once, *shape, device=device))
                predicted = family.predict(noisy.to(dtype), times_B, states)
                (F.mse_loss(predicted.float(), target) * at_once / batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    update(1)
    _, adapted, learned = _measured(update, device)
    return Cost(None, work.images / seconds, work.updates / adapted, generation, learned)


def noised(pipeline: Any, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise at random times; return the noisy latents, the times and what the denoiser is to predict."""
    noise, count = torch.randn_like(latents), len(latents)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        sigma = torch.rand(count, 1, 1, 1, device=latents.device)
        return (1 - sigma) * latents + sigma * noise, 1000 * sigma.flatten(), noise - latents
    times_B = torch.randint(1000, (count,), device=latents.device)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return scheduler.add_noise(latents, noise, times_B), times_B, noise


def _measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Return the result of a function, its seconds, and the peak memory in GB: of the GPU, else of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        process_memory.forget_peak()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return result, time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 1e9
    seconds = time.perf_counter() - start
    peak = process_memory.peak()
    return result, seconds, peak / 1e9 if peak else float("nan")


def main() -> None:
    """Parse the command line, build missing pipelines, measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pixels", type=int, help="side of the images; the model's own by default")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps per image")
    parser.add_argument("--updates", type=int, default=5, help="optimiser steps")
    parser.add_argument("--generation-batch", type=int, default=4)
    parser.add_argument("--adaptation-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/real-size"))
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(
        f"{name}, {arguments.dtype}, {arguments.steps} steps per image, batches of {arguments.generation_batch}; "
        f"updates of {arguments.adaptation_batch} samples, {arguments.micro_batch} at once\n"
    )
    print("| model | | images/s | updates/s | GB, generation | GB, update | s, merge |\n|---|---|---|---|---|---|---|")
    for model in arguments.models:
        make, side = MODELS[model]
        latent_size = arguments.pixels // 8 if arguments.pixels else side
        folder = (arguments.out / f"{model}-{8 * latent_size}-{arguments.dtype}").resolve()
        if not (folder / "model_index.json").exists():
            print(f"building {folder}", file=sys.stderr, flush=True)
            torch.set_default_dtype(getattr(torch, arguments.dtype))
            with device:  # Random weights of this size take minutes on a CPU.
                pipeline = make(latent_size)
            torch.set_default_dtype(torch.float32)
            pipeline.save_pretrained(folder)
            del pipeline
            empty_caches()
        config = T2IConfig(
            model=str(folder),
            device=(str(device),),
            dtype=arguments.dtype,
            inference_steps=arguments.steps,
            generation_batch_size=arguments.generation_batch,
            adaptation_batch_size=arguments.adaptation_batch,
            adaptation_micro_batch_size=arguments.micro_batch,
        )
        work = Work(config, arguments.images, arguments.guidance, arguments.updates)
        for title, run in (("bare diffusers", bare), ("the generator class", ours)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                cost = pool.submit(run, work).result()
            speeds = f"{cost.images_a_second:.3g} | {cost.updates_a_second:.3g}"
            memory = f"{cost.generation_gigabytes:.1f} | {cost.update_gigabytes:.1f}"
            merge = "-" if cost.merge_seconds is None else f"{cost.merge_seconds:.2g}"
            print(f"| {model}, {8 * latent_size} pixels | {title} | {speeds} | {memory} | {merge} |", flush=True)


if __name__ == "__main__":
    main()

"""Training of a small Stable Diffusion pipeline from scratch on captioned images: autoencoder, text encoder, U-Net."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fedmmkt.common.progress import Progress

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
VOCABULARY = 512
NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a pipeline; the defaults are those of the starter.

    Attributes
    ----------
    autoencoder : tuple of int
        Channels of the autoencoder's levels, multiples of eight. Each level except the first halves the side.
    latent_channels : int
        Channels of the latents.
    unet : tuple of int
        Channels of the U-Net's two levels, multiples of eight.
    """

    autoencoder: tuple[int, ...] = (16, 32, 48)
    latent_channels: int = 4
    unet: tuple[int, int] = (32, 64)


def pretrain(
    images_NCHW: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    architecture: Architecture,
    autoencoder_steps: int,
    diffusion_steps: int,
    seed: int,
    device: str = "cpu",
) -> StableDiffusionPipeline:
    """Train a whole pipeline from scratch; the time depends on the steps and on the U-Net's channels.

    Parameters
    ----------
    images_NCHW : torch.Tensor
        float32 in [-1, 1]; square, with sides that are a multiple of eight pixels.
    captions : list of str
        One caption per image.
    tokenizer : CLIPTokenizer
        A tokenizer from `build_tokenizer`.
    architecture : Architecture
        Sizes of the pipeline.
    autoencoder_steps, diffusion_steps : int
        Optimiser steps, with batches of 32 and of 64 images.
    seed : int
        Seed of all random choices.
    device : str
        Device of the training. The returned pipeline is on the CPU.
    """
    vae = train_autoencoder(images_NCHW.to(device), architecture, autoencoder_steps, seed)
    latents_NCHW = encode(vae, images_NCHW.to(device)) * vae.config.scaling_factor
    unet, text_encoder = train_diffusion(latents_NCHW, captions, tokenizer, architecture, diffusion_steps, seed)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to("cpu")


def build_tokenizer(captions: Iterable[str], length: int) -> CLIPTokenizer:
    """Train a byte-pair tokenizer like CLIP's on captions; it cuts and pads texts to ``length`` tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(captions, trainer)
    content = json.loads(bpe.to_str())["model"]
    vocabulary = dict(content["vocab"])
    for symbol in ALPHABET:
        vocabulary.setdefault(f"{symbol}</w>", len(vocabulary))
    merges = [tuple(pair) for pair in content["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` batches of indices; each epoch has a new random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    start = 0
    for _ in range(steps):
        if start + size > count:
            order, start = torch.randperm(count, generator=generator), 0
        yield order[start : start + size]
        start += size


_tell = partial(print, flush=True)  # The output may be a log file.


def train_autoencoder(images_NCHW: Tensor, architecture: Architecture, steps: int, seed: int) -> AutoencoderKL:
    """Train the autoencoder with L1, L2 and a small KL loss, and set its scaling factor for unit variance."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(architecture.autoencoder),
        up_block_types=("UpDecoderBlock2D",) * len(architecture.autoencoder),
        block_out_channels=architecture.autoencoder,
        layers_per_block=1,
        latent_channels=architecture.latent_channels,
        norm_num_groups=8,
        sample_size=images_NCHW.shape[-1],
    ).to(images_NCHW.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=warm_up(steps, 0.1))
    progress = Progress("autoencoder", steps, "steps", _tell)
    for step, index in enumerate(batches(len(images_NCHW), 32, steps, seed), start=1):
        batch = images_NCHW[index]
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(restored, batch) + F.mse_loss(restored, batch) + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, f"loss {loss.item():.4f}")
    latents_NCHW = encode(vae.eval(), images_NCHW[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents_NCHW.std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images_NCHW: Tensor) -> Tensor:
    """Encode images to latents (posterior means, unscaled)."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images_NCHW.split(256)])


def warm_up(steps: int, part: float) -> float:
    """Return the part of the steps in which the learning rate rises: ``part``, but at least two steps."""
    return max(part, 2 / steps)


def train_diffusion(
    latents_NCHW: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    architecture: Architecture,
    steps: int,
    seed: int,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train U-Net and text encoder together with the v-prediction loss, with 10% empty captions."""
    length = tokenizer.model_max_length
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=latents_NCHW.shape[-1],
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        block_out_channels=architecture.unet,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    device = latents_NCHW.device
    unet, text_encoder = unet.to(device), text_encoder.to(device)
    noise_scheduler = DDPMScheduler(**NOISE)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=warm_up(steps, 0.05))
    tokens_NL = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids.to(device)
    empty_L = tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids[0].to(device)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("diffusion", steps, "steps", _tell)
    for step, index in enumerate(batches(len(latents_NCHW), 64, steps, seed), start=1):
        latents = latents_NCHW[index]
        dropped_N1 = torch.rand(len(index), 1, generator=generator).to(device) < 0.1
        states = text_encoder(torch.where(dropped_N1, empty_L, tokens_NL[index])).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps_N = torch.randint(1000, (len(index),), generator=generator).to(device)
        predicted = unet(noise_scheduler.add_noise(latents, noise, timesteps_N), timesteps_N, states).sample
        loss = F.mse_loss(predicted, noise_scheduler.get_velocity(latents, noise, timesteps_N))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress(step, f"loss {loss.item():.4f}")
    average.copy_to(parameters)
    return unet.eval(), text_encoder.eval()


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in half precision.

    The text encoder's configuration asks for single precision, because transformers would compute in the saved one.
    diffusers computes in single precision by default.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    config_file = folder / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def draw_samples(folder: Path, prompts: list[str], columns: int = 8) -> None:
    """Save a grid of samples beside the saved model, one row per prompt, generated with plain diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    repeated = [prompt for prompt in prompts for _ in range(columns)]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(repeated, num_inference_steps=12, guidance_scale=3.0, generator=generator).images
    make_image_grid(images, rows=len(prompts), cols=columns).save(folder / "samples.png")

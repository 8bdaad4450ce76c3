"""The server's text-to-image model: a diffusers pipeline that generates, is adapted by LoRA, and is saved."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from common.config import ConfigError, T2IConfig
from common.devices import pick_devices
from server_app.adaptation import get_update, rewards
from server_app.adapter import Adapter
from server_app.families import Conditioning, Family, family_of

logger = logging.getLogger("flwr")

# Latent positions computed at once where the configuration names no number of samples, and the most samples.
GENERATED_AT_ONCE, MOST_GENERATED = 25_600, 100
LEARNED_AT_ONCE = 8192
LARGE_IMAGE = 512  # Pixels a side; from here on the autoencoder decodes one image after the other.
WEIGHTS_PART = 0.6  # Of a GPU's free memory; activations and what updates need take the rest.


@dataclass(frozen=True)
class Generated:
    """Images and what the generator needs to learn from them.

    Attributes
    ----------
    prompts : tuple of str
        One a sample.
    images_NHWC : numpy.ndarray
        uint8 RGB.
    latents_NCHW : torch.Tensor
        The denoised latents that they were decoded from, in the denoiser's scale, on the CPU.
    """

    prompts: tuple[str, ...]
    images_NHWC: np.ndarray
    latents_NCHW: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def join(cls, parts: Sequence[Generated]) -> Generated:
        """Put samples one after the other."""
        return cls(
            tuple(prompt for part in parts for prompt in part.prompts),
            np.concatenate([part.images_NHWC for part in parts]),
            torch.cat([part.latents_NCHW for part in parts]),
        )

    def select(self, index: np.ndarray) -> Generated:
        """Return some of the samples."""
        prompts = tuple(self.prompts[i] for i in index)
        return Generated(prompts, self.images_NHWC[index], self.latents_NCHW[torch.from_numpy(index)])

    def without_images(self) -> Generated:
        """Return what `Generator.adapt` needs, which is little beside the images."""
        return Generated(self.prompts, np.empty((len(self), 0, 0, 3), np.uint8), self.latents_NCHW)


class Generator:
    """A diffusers text-to-image pipeline with one LoRA adapter; `families` says of which kinds.

    It encodes prompts and learns on the first of its devices, and generates on all of them.

    Parameters
    ----------
    config : T2IConfig
        Which model, its adapter, and how it generates.
    seed : int
        Seed of the adapter's initial weights and of the updates' noise.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, is no text-to-image pipeline, or has none of the LoRA targets; or if
        ``t2i.adapter`` is no adapter of it.
    """

    def __init__(self, config: T2IConfig, seed: int) -> None:
        self.config = config
        self.device, *others = pick_devices(config.device)
        self.pipeline = load_pipeline(config.model, _precision(config, self.device))
        self.family = family_of(self.pipeline, config.model, self.device)
        self.denoiser = self.family.denoiser
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        if self.pipeline.vae.dtype == torch.float16:
            self.pipeline.vae.float()  # Some autoencoders overflow in it.
        self.families = [self.family, *self._place(others)]
        self.adapter = Adapter(self.family, self.families[1:], config, seed)
        self.empty = self.family.encode_empty()
        if config.adapter:
            self.adapter.load(Path(config.adapter).expanduser())

    def _place(self, others: Sequence[torch.device]) -> list[Family]:
        """Put the pipeline where it computes, saving memory as configured; return copies on the other devices."""
        config = self.config
        offloads = config.offload == "model" or (config.offload == "auto" and self._would_fill(self.device))
        used = [] if offloads else [d for d in others if config.offload == "none" or not self._would_fill(d)]
        twins = [self.family.twin(device) for device in used]  # While all is still in main memory.
        if offloads:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        else:
            self.pipeline.to(self.device)
        if len(used) < len(others):
            logger.warning("The T2I generates on %d of %d devices: its weights would fill a device, or are offloaded.",
                           1 + len(used), 1 + len(others))  # fmt: skip
        for family in (self.family, *twins):
            for pipeline in filter(None, (family.pipeline, family.image_to_image)):
                pipeline.set_progress_bar_config(disable=True)
            if config.attention_slicing:
                family.pipeline.enable_attention_slicing()
            if self.image_size >= LARGE_IMAGE:
                family.pipeline.vae.enable_slicing()
            if config.vae_tiling:
                family.pipeline.vae.enable_tiling()
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        return twins

    def _would_fill(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return would_fill(self.pipeline, free)

    @property
    def image_size(self) -> int:
        """Pixels a side of what it generates."""
        return self.family.image_size

    @property
    def anchor_size(self) -> int:
        """Dimension of `text_embeddings`."""
        return int(self.empty["prompt_embeds"].shape[-1])

    @property
    def can_vary(self) -> bool:
        """Whether `vary` can be called: not all families have it."""
        return self.family.image_to_image is not None

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Generated:
        """Generate one image a prompt.

        Parameters
        ----------
        prompts, seeds : sequence
            One a sample; a sample depends on its own prompt and seed only.
        guidance : float
            Classifier-free guidance scale; at 1 and below there is none, at half the cost.
        progress : callable
            Is told how many images are done.
        """
        return self._denoise(lambda family, part: family.pipeline, prompts, seeds, guidance, progress)

    def vary(
        self, parents_NCHW: Tensor, prompts: Sequence[str], seeds: Sequence[int], guidance: float, strength: float
    ) -> Generated:
        """Generate variations of samples: noise them part of the way and denoise them (SDEdit, arXiv 2108.01073).

        For families that `can_vary`.

        Parameters
        ----------
        parents_NCHW : torch.Tensor
            Latents of the samples to vary.
        prompts, seeds, guidance
            As in `generate`.
        strength : float
            How much of the way, in (0, 1]; at 1 little of the parents is left.
        """
        return self._denoise(
            lambda family, part: partial(
                family.image_to_image, image=parents_NCHW[part].to(family.device), strength=strength
            ),
            prompts,
            seeds,
            guidance,
            lambda done: None,
        )

    def _denoise(
        self,
        sampler: Callable[[Family, slice], Callable[..., Any]],
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object],
    ) -> Generated:
        size = self.config.generation_batch_size or min(MOST_GENERATED, self._at_once(GENERATED_AT_ONCE))
        size = min(size, math.ceil(len(prompts) / len(self.families)))
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        conditioning = self._conditioning(prompts)
        self.adapter.merge()

        @torch.no_grad()
        def make(family: Family, part: slice) -> Generated:
            given, empty = conditioning(torch.arange(len(prompts))[part])
            negative = {f"negative_{name}": tensor for name, tensor in empty.items()} if guidance > 1 else {}
            latents_NCHW = sampler(family, part)(
                **{name: tensor.to(family.device) for name, tensor in (given | negative).items()},
                **family.call,
                guidance_scale=guidance,
                num_inference_steps=self.config.inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="latent",
            ).images
            return Generated(tuple(prompts[part]), as_images(family.decode(latents_NCHW)), latents_NCHW.float().cpu())

        made: list[Generated] = []
        for one in _side_by_side(make, self.families, parts):
            made.append(one)
            progress(sum(map(len, made)))
        return Generated.join(made)

    def adapt(self, samples: Generated, scores_N: Tensor, steps: int, seed: int) -> float:
        """Fine-tune the adapter on scored samples.

        Parameters
        ----------
        samples : Generated
            The samples; their images are not used.
        scores_N : torch.Tensor
            Not negative; what a score means is up to ``t2i.update``. If all are zero, nothing is learned.
        steps : int
            Optimiser steps.
        seed : int
            Seed of the order, the noise and the dropped captions.

        Returns
        -------
        float
            Mean loss.
        """
        self.adapter.unmerge()
        if not steps or not bool(scores_N.any()):
            return 0.0
        rule, config = get_update(self.config.update), self.config
        self.denoiser.to(self.device)  # Where it is not while it is offloaded.
        parameters = self.adapter.parameters
        optimizer = torch.optim.AdamW(parameters, lr=config.adaptation_learning_rate, weight_decay=1e-4)
        # Without the decline the adapter of the last round is a draw from noisy steps.
        decline = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        chances_N = scores_N.double() if rule.draws_by_score else torch.ones(len(samples)).double()
        rewards_N = rewards(scores_N)
        conditioning = self._conditioning(samples.prompts)
        before = [parameter.detach().clone() for parameter in parameters] if rule.needs_reference else []
        at_once = config.adaptation_micro_batch_size or self._at_once(LEARNED_AT_ONCE)
        total = 0.0
        self.denoiser.train()
        for _ in range(steps):
            index = torch.multinomial(chances_N, config.adaptation_batch_size, True, generator=generator)
            clean = samples.latents_NCHW[index].to(self.device)
            noisy, times_B, target = self.family.noised(clean, generator)
            dropped_B11 = (torch.rand(len(index), 1, 1, generator=generator) < config.caption_dropout).to(self.device)
            noisy = noisy.to(self.denoiser.dtype)
            optimizer.zero_grad()
            for part in torch.arange(len(index)).split(at_once):
                given, empty = conditioning(index[part])
                given = {name: _where(dropped_B11[part], empty[name], tensor) for name, tensor in given.items()}
                reference = self._predict_as(before, parameters, noisy[part], times_B[part], given) if before else None
                predicted = self.family.predict(noisy[part], times_B[part], given)
                loss_B = rule.loss(predicted, target[part], reference, rewards_N[index[part]].to(self.device))
                loss = loss_B.sum() / len(index)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decline.step()
        self.denoiser.eval()
        return total / steps

    def _at_once(self, positions: int) -> int:
        """Return how many samples have so many latent positions together."""
        return max(1, positions // self.denoiser.config.sample_size**2)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> np.ndarray:
        """Return unit text embeddings of the T2I's own encoder, float16 (N, D).

        The mean over tokens, less the mean over prompts, which is what all prompts share.
        """
        states = self._encode(list(prompts))
        states_NLD = states["prompt_embeds"].float()
        mask_NL = states.get("prompt_attention_mask")
        if mask_NL is None:
            states_ND = states_NLD.mean(1)
        else:
            mask_NL1 = mask_NL.unsqueeze(-1)
            states_ND = (states_NLD * mask_NL1).sum(1) / mask_NL1.sum(1).clamp_min(1)
        if len(prompts) > 1:
            states_ND = states_ND - states_ND.mean(0)
        return F.normalize(states_ND, dim=1).cpu().numpy().astype(np.float16)

    def _conditioning(self, prompts: Sequence[str]) -> Callable[[Tensor], tuple[Conditioning, Conditioning]]:
        """Encode distinct prompts once; give the conditioning of some samples, and as many of the empty prompt."""
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        rows_N = torch.tensor([row[prompt] for prompt in prompts])
        states = self._encode(distinct)

        def conditioning(index: Tensor) -> tuple[Conditioning, Conditioning]:
            rows = rows_N[index].to(self.device)
            given = {name: tensor[rows] for name, tensor in states.items()}
            empty = {name: tensor.expand(len(index), *tensor.shape[1:]) for name, tensor in self.empty.items()}
            return given, empty

        return conditioning

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        parts = [self.family.encode(prompts[start : start + 256]) for start in range(0, len(prompts), 256)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _predict_as(
        self,
        before: list[Tensor],
        parameters: list[torch.nn.Parameter],
        noisy: Tensor,
        times_B: Tensor,
        given: Conditioning,
    ) -> Tensor:
        """Predict with the adapter as it was before the update; tensors change places, nothing is copied."""
        now = [parameter.data for parameter in parameters]
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old
        predicted = self.family.predict(noisy, times_B, given)
        for parameter, new in zip(parameters, now, strict=True):
            parameter.data = new
        return predicted


def _side_by_side(
    make: Callable[[Family, slice], Generated], families: Sequence[Family], parts: Sequence[slice]
) -> Iterator[Generated]:
    """Make parts in order, on the families' devices in turn; each device makes its own one after the other."""
    if len(families) == 1:
        yield from (make(families[0], part) for part in parts)
        return
    threads = [ThreadPoolExecutor(1) for _ in families]
    try:
        futures = [
            threads[index % len(families)].submit(make, families[index % len(families)], part)
            for index, part in enumerate(parts)
        ]
        for future in futures:
            yield future.result()
    finally:
        for thread in threads:
            thread.shutdown(cancel_futures=True)


def as_images(pixels_NCHW: Tensor) -> np.ndarray:
    """Return pixels in [-1, 1], as a family decodes them, as uint8 images, channels last."""
    images_NCHW = (pixels_NCHW.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return images_NCHW.permute(0, 2, 3, 1).cpu().numpy()


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline from a folder or the hub; `ConfigError` if that cannot be."""
    key = "run-config key 't2i.model'"
    path = _starter_folder() if model == "starter" else Path(model).expanduser()
    is_local = path.exists() or model.startswith(("/", "~", "."))
    if is_local and not (path / "model_index.json").is_file():
        raise ConfigError(
            f"{key} is {model!r}, and {path} holds no model_index.json; "
            "allowed: 'starter', a diffusers pipeline folder, or a hub id"
        )
    try:
        return DiffusionPipeline.from_pretrained(path if is_local else model, dtype=dtype)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "; a folder that diffusers saved is whole if it loads with DiffusionPipeline.from_pretrained"
        if not is_local:
            remedy = (
                f" (HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')}); allowed: 'starter', a folder, or "
                "a hub id that this machine can reach (a gated one needs `hf auth login`) or has in its cache"
            )
        raise ConfigError(f"{key} is {model!r}, which diffusers cannot load: {reason}{remedy}") from None


def would_fill(pipeline: Any, free: int) -> bool:
    """Tell whether a pipeline's weights take more than `WEIGHTS_PART` of the free bytes of a device."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.parameters())
    return bool(weights > WEIGHTS_PART * free)


def _precision(config: T2IConfig, device: torch.device) -> torch.dtype:
    """Choose the precision of frozen weights; by default full on a CPU and for the starter, half on a GPU."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cpu" or config.model == "starter":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


def _where(dropped_B11: Tensor, empty: Tensor, given: Tensor) -> Tensor:
    """Choose by sample between conditioning of any number of dimensions."""
    return torch.where(dropped_B11.view(-1, *[1] * (given.dim() - 1)), empty, given)


def _starter_folder() -> Path:
    try:
        return Path(str(resources.files("starter"))) / "model"
    except ModuleNotFoundError:
        raise ConfigError(
            "run-config key 't2i.model' is 'starter', whose weights come with the installed package; "
            "install fedmmkt on this machine (pip install .) or name another model"
        ) from None

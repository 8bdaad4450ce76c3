"""The server's text-to-image model: a diffusers pipeline that generates, is adapted by LoRA, and is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F

from common.config import ConfigError, T2IConfig
from common.devices import pick_device
from common.files import replaced_folder
from server_app.adaptation import get_update, rewards

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
# Layer names in a Stable Diffusion U-Net, by what they do.
LORA_GROUPS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    "convolution": ("conv1", "conv2", "conv_shortcut"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "time": ("linear_1", "linear_2", "time_emb_proj"),
}


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
    """A diffusers Stable Diffusion pipeline with one LoRA adapter.

    Parameters
    ----------
    config : T2IConfig
        Which model, its adapter, and how it generates.
    seed : int
        Seed of the adapter's initial weights and of the updates' noise.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, is no text-to-image pipeline, or has none of the LoRA targets.
    """

    def __init__(self, config: T2IConfig, seed: int) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.pipeline = load_pipeline(config.model).to(self.device)
        self.image_to_image = StableDiffusionImg2ImgPipeline(
            **self.pipeline.components, requires_safety_checker=False
        )  # The same parts, not copies.
        for pipeline in (self.pipeline, self.image_to_image):
            pipeline.set_progress_bar_config(disable=True)
        self.seed = seed
        self.unet = self.pipeline.unet
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.unet):
            part.requires_grad_(False).eval()
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=_lora_layers(self.unet, config.lora_targets),
        )
        self.unet.add_adapter(lora)
        # The schedule that the model was trained with, whatever sampler it is served with.
        self.noise_scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def image_size(self) -> int:
        """Pixels a side of what it generates."""
        return int(self.unet.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def anchor_size(self) -> int:
        """Dimension of `text_embeddings`."""
        return int(self.pipeline.text_encoder.config.hidden_size)

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
        return self._denoise(self.pipeline, prompts, seeds, guidance, progress, lambda part: {})

    def vary(
        self, parents_NCHW: Tensor, prompts: Sequence[str], seeds: Sequence[int], guidance: float, strength: float
    ) -> Generated:
        """Generate variations of samples: noise them part of the way and denoise them (SDEdit, arXiv 2108.01073).

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
            self.image_to_image,
            prompts,
            seeds,
            guidance,
            lambda done: None,
            lambda part: {"image": parents_NCHW[part].to(self.device), "strength": strength},
        )

    @torch.no_grad()
    def _denoise(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object],
        extra: Callable[[slice], dict[str, Any]],
    ) -> Generated:
        images, latents = [], []
        size = self.config.generation_batch_size
        text = self._conditioning(prompts)
        with self._merged_adapter():
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                text_BLD, empty_BLD = text(torch.arange(len(prompts))[part])
                latent = pipeline(
                    prompt_embeds=text_BLD,
                    negative_prompt_embeds=empty_BLD if guidance > 1 else None,
                    guidance_scale=guidance,
                    num_inference_steps=self.config.inference_steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    output_type="latent",
                    **extra(part),
                ).images
                images.append(self._decode(latent))
                latents.append(latent.float().cpu())
                progress(start + len(latent))
        return Generated(tuple(prompts), np.concatenate(images), torch.cat(latents))

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
        if not steps or not bool(scores_N.any()):
            return 0.0
        rule, config = get_update(self.config.update), self.config
        parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.adaptation_learning_rate, weight_decay=1e-4)
        # Without the decline the adapter of the last round is a draw from noisy steps.
        decline = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        chances_N = scores_N.double() if rule.draws_by_score else torch.ones(len(samples)).double()
        rewards_N = rewards(scores_N)
        conditioning = self._conditioning(samples.prompts)
        before = [parameter.detach().clone() for parameter in parameters] if rule.needs_reference else []
        total = 0.0
        self.unet.train()
        for _ in range(steps):
            index = torch.multinomial(chances_N, config.adaptation_batch_size, True, generator=generator)
            clean = samples.latents_NCHW[index].to(self.device)
            noise = torch.randn(clean.shape, generator=generator).to(self.device)
            last = int(self.noise_scheduler.config.num_train_timesteps)
            times_B = torch.randint(last, (len(index),), generator=generator).to(self.device)
            dropped_B11 = (torch.rand(len(index), 1, 1, generator=generator) < config.caption_dropout).to(self.device)
            text_BLD, empty_BLD = conditioning(index)
            text_BLD = torch.where(dropped_B11, empty_BLD, text_BLD)
            noisy = self.noise_scheduler.add_noise(clean, noise, times_B)
            reference = self._predict_as(before, parameters, noisy, times_B, text_BLD) if before else None
            predicted = self.unet(noisy, times_B, text_BLD).sample
            target = self._target(clean, noise, times_B)
            loss = rule.loss(predicted, target, reference, rewards_N[index].to(self.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decline.step()
            total += float(loss.detach())
        self.unet.eval()
        return total / steps

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> np.ndarray:
        """Return unit text embeddings of the T2I's own encoder, float16 (N, D).

        The mean over tokens, less the mean over prompts, which is what all prompts share.
        """
        states_ND = self._encode(list(prompts)).float().mean(1)
        if len(prompts) > 1:
            states_ND = states_ND - states_ND.mean(0)
        return F.normalize(states_ND, dim=1).cpu().numpy().astype(np.float16)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the adapter's tensors by name, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(self.unet).items()}

    def save_adapter(self, folder: Path) -> None:
        """Save the adapter so that ``pipeline.load_lora_weights(folder)`` loads it; the folder is replaced whole.

        peft's names are kept as they are: diffusers' own conversion loses tensors where convolutions and
        attention are both targets.

        Raises
        ------
        OSError
            If the disk is full; the folder is then what it was.
        """
        with replaced_folder(folder) as temporary:
            type(self.pipeline).save_lora_weights(
                temporary,
                unet_lora_layers=self.adapter_state(),
                weight_name=WEIGHT_NAME,
                unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
            )

    def load_adapter(self, folder: Path) -> None:
        """Load an adapter that `save_adapter` saved, in place of the present one.

        Raises
        ------
        ConfigError
            If its tensors are not those of this model and LoRA configuration.
        """
        from safetensors.torch import load_file

        path = folder / WEIGHT_NAME
        state = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
        self.load_adapter_state(state, str(path))

    def load_adapter_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over what `adapter_state` returned; ``source`` names it in the error, as in `load_adapter`."""
        from peft import set_peft_model_state_dict

        present = self.adapter_state()
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in present.items()}:
            raise ConfigError(f"{source} is an adapter of another model, or of other LoRA targets or rank")
        set_peft_model_state_dict(self.unet, dict(state))

    def _conditioning(self, prompts: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Encode distinct prompts once; give the text states of some samples, and as many of the empty prompt."""
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        rows_N = torch.tensor([row[prompt] for prompt in prompts])
        states_ULD, empty_1LD = self._encode(distinct), self._encode([""])

        def conditioning(index: Tensor) -> tuple[Tensor, Tensor]:
            return states_ULD[rows_N[index].to(self.device)], empty_1LD.expand(len(index), -1, -1)

        return conditioning

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        parts = [prompts[start : start + 256] for start in range(0, len(prompts), 256)]
        return torch.cat([self.pipeline.encode_prompt(part, self.device, 1, False)[0] for part in parts])

    def _decode(self, latent: Tensor) -> np.ndarray:
        decoded = self.pipeline.vae.decode(latent / self.pipeline.vae.config.scaling_factor).sample
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def _target(self, clean: Tensor, noise: Tensor, times_B: Tensor) -> Tensor:
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        return self.noise_scheduler.get_velocity(clean, noise, times_B) if kind == "v_prediction" else clean

    @torch.no_grad()
    def _predict_as(
        self, before: list[Tensor], parameters: list[torch.nn.Parameter], noisy: Tensor, times_B: Tensor, text: Tensor
    ) -> Tensor:
        """Predict with the adapter as it was before the update; tensors change places, nothing is copied."""
        now = [parameter.data for parameter in parameters]
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old
        predicted: Tensor = self.unet(noisy, times_B, text).sample
        for parameter, new in zip(parameters, now, strict=True):
            parameter.data = new
        return predicted

    @contextmanager
    def _merged_adapter(self) -> Iterator[None]:
        """Generate at the bare model's speed; the base weights come back bit for bit."""
        layers = [layer for layer in self.unet.modules() if isinstance(layer, BaseTunerLayer)]
        base = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        for layer in layers:
            layer.merge()
        try:
            yield
        finally:
            for layer, weight in zip(layers, base, strict=True):
                # Not unmerge(), which computes each layer's update again only to subtract it, inexactly.
                layer.merged_adapters.clear()
                layer.get_base_layer().weight.data.copy_(weight)


def load_pipeline(model: str) -> Any:
    """Load a Stable Diffusion pipeline in single precision; `ConfigError` if that cannot be."""
    key = "run-config key 't2i.model'"
    path = _starter_folder() if model == "starter" else Path(model).expanduser()
    is_local = path.exists() or model.startswith(("/", "~", "."))
    if is_local and not (path / "model_index.json").is_file():
        raise ConfigError(
            f"{key} is {model!r}, and {path} holds no model_index.json; "
            "allowed: 'starter', a diffusers pipeline folder, or a hub id"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(path if is_local else model, dtype=torch.float32)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        hint = "" if is_local else f" (HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')})"
        raise ConfigError(f"{key} is {model!r}, which diffusers cannot load{hint}: {error}") from None
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise ConfigError(f"{key} is {model!r}, a {type(pipeline).__name__}; allowed: a StableDiffusionPipeline")
    return pipeline


def _starter_folder() -> Path:
    try:
        return Path(str(resources.files("starter"))) / "model"
    except ModuleNotFoundError:
        raise ConfigError(
            "run-config key 't2i.model' is 'starter', whose weights come with the installed package; "
            "install fedmmkt on this machine (pip install .) or name another model"
        ) from None


def _lora_layers(unet: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """List the layers that the targets name, each a group of `LORA_GROUPS` or the end of layer names."""
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    chosen: list[str] = []
    for target in targets:
        endings = LORA_GROUPS.get(target, (target,))
        found = [name for name in layers if any(name == end or name.endswith("." + end) for end in endings)]
        if not found:
            raise ConfigError(
                f"run-config key 't2i.lora-targets' has {target!r}, which names no layer of the model; "
                f"allowed: {', '.join(LORA_GROUPS)}, or the end of a layer's name such as {layers[-1]!r}"
            )
        chosen += found
    return sorted(set(chosen))

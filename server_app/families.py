"""Families of text-to-image models: what differs between them, and nothing else.

A family says how prompts become conditioning, how the denoiser is called, how clean latents are noised and what
it should then predict, which layers a LoRA may take, and how its adapter is saved. `Generator` does the rest.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from common.config import ConfigError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
LATENT_CHANNELS = 4  # By which diffusers' image to image of Stable Diffusion tells latents from images.
LORA_GROUPS = ("attention", "convolution", "feed-forward", "time")
# What prompts become: keyword arguments of the pipeline, samples first.
Conditioning = dict[str, Tensor]


class Family(ABC):
    """Diffusion with a noise schedule, on a U-Net or a transformer; the base of all families.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Of one of the classes in ``pipelines``.
    device : torch.device
        Where it computes.

    Attributes
    ----------
    pipelines : tuple of str
        Names of diffusers' pipeline classes.
    variations : str
        Name of diffusers' image-to-image pipeline; empty if there is none.
    denoiser_name : str
        The pipeline's component that is adapted.
    lora_groups : dict of str to tuple of str
        Ends of layer names by what the layers do.
    image_to_image : diffusers.DiffusionPipeline or None
        A pipeline of the same parts that varies images.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    variations: ClassVar[str] = ""
    denoiser_name: ClassVar[str] = "transformer"
    lora_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed-forward": ("ff.net.0.proj", "ff.net.2"),
        "time": ("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    }

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.image_size = int(self.denoiser.config.sample_size * pipeline.vae_scale_factor)
        self.call: dict[str, Any] = {}
        self.noise_scheduler = self._noise_scheduler()
        self.image_to_image = self._image_to_image()

    def twin(self, device: torch.device) -> Self:
        """Copy what generates from encoded prompts, and no text encoder, to another device."""
        pipeline = copy.copy(self.pipeline)
        for name, part in self.pipeline.components.items():
            if name in (self.denoiser_name, "vae"):
                pipeline.register_modules(**{name: copy.deepcopy(part).to(device)})
            elif isinstance(part, torch.nn.Module):
                pipeline.register_modules(**{name: None})
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # It counts the steps of one call.
        return type(self)(pipeline, device)

    def _image_to_image(self) -> Any:
        import diffusers

        return getattr(diffusers, self.variations)(**self.pipeline.components) if self.variations else None

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts."""

    def encode_empty(self) -> Conditioning:
        """Encode the prompt that says nothing, from which guidance leads away."""
        return self.encode([""])

    @abstractmethod
    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the denoiser."""

    def noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise clean latents to random times.

        Returns
        -------
        tuple of torch.Tensor
            The noisy latents, their times, and what the denoiser should predict of them.
        """
        schedule = self.noise_scheduler
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        last = int(schedule.config.num_train_timesteps)
        times_B = torch.randint(last, (len(clean),), generator=generator).to(clean.device)
        kind = schedule.config.prediction_type
        if kind == "epsilon":
            target = noise
        else:
            target = schedule.get_velocity(clean, noise, times_B) if kind == "v_prediction" else clean
        return schedule.add_noise(clean, noise, times_B), times_B, target

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample

    def add_adapter(self, lora: Any) -> None:
        """Give the denoiser a LoRA named ``default``."""
        self.denoiser.add_adapter(lora)

    def save_adapter(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Save the adapter so that ``pipeline.load_lora_weights(folder)`` of plain diffusers loads it.

        peft's names are kept as they are: diffusers' own conversion loses tensors where convolutions and
        attention are both targets.
        """
        metadata = self.denoiser.peft_config["default"].to_dict()
        name = self.denoiser_name
        named: dict[str, Any] = {f"{name}_lora_layers": dict(state), f"{name}_lora_adapter_metadata": metadata}
        type(self.pipeline).save_lora_weights(folder, weight_name=WEIGHT_NAME, **named)

    def load_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Read the tensors that `save_adapter` saved."""
        from safetensors.torch import load_file

        state = load_file(folder / WEIGHT_NAME)
        return {name.removeprefix(f"{self.denoiser_name}."): tensor for name, tensor in state.items()}

    def _noise_scheduler(self) -> Any:
        """Make the schedule that the model was trained with, whatever sampler it is served with."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipeline.scheduler.config)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a U-Net that attends to CLIP's text states."""

    pipelines = ("StableDiffusionPipeline",)
    variations = "StableDiffusionImg2ImgPipeline"
    denoiser_name = "unet"
    lora_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
        "convolution": ("conv1", "conv2", "conv_shortcut"),
        "feed-forward": ("ff.net.0.proj", "ff.net.2"),
        "time": ("linear_1", "linear_2", "time_emb_proj"),
    }

    def _image_to_image(self) -> Any:
        from diffusers import StableDiffusionImg2ImgPipeline

        if not self._takes_latents():
            return None
        return StableDiffusionImg2ImgPipeline(**self.pipeline.components, requires_safety_checker=False)

    def _takes_latents(self) -> bool:
        """Whether image to image knows latents as such: those of these families do so by four channels alone."""
        return bool(self.pipeline.vae.config.latent_channels == LATENT_CHANNELS)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts to CLIP's states."""
        return {"prompt_embeds": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the U-Net."""
        predicted: Tensor = self.denoiser(noisy, times_B, conditioning["prompt_embeds"]).sample
        return predicted


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (arXiv 2307.01952): two text encoders, and the image's size as a condition."""

    pipelines = ("StableDiffusionXLPipeline",)
    variations = "StableDiffusionXLImg2ImgPipeline"

    def _image_to_image(self) -> Any:
        return Family._image_to_image(self) if self._takes_latents() else None

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts to the states of both encoders, and the pooled ones of the second."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_empty(self) -> Conditioning:
        """Encode the prompt that says nothing, which for this family is zeros where its configuration says so."""
        empty = self.encode([""])
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()} if zeros else empty

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the U-Net for an image of the usual size, not cropped."""
        size = float(self.image_size)
        sizes_B6 = noisy.new_tensor([[size, size, 0, 0, size, size]]).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": sizes_B6}
        predicted: Tensor = self.denoiser(noisy, times_B, conditioning["prompt_embeds"], added_cond_kwargs=added).sample
        return predicted


class _Flow(Family):
    """Rectified flow (arXiv 2209.03003): straight paths from data to noise, whose velocity is predicted."""

    def noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Mix clean latents with noise, at times drawn as in Stable Diffusion 3 (arXiv 2403.03206, eq. 19, 23)."""
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        drawn_B = torch.randn(len(clean), generator=generator).sigmoid().to(clean.device)
        config = self.pipeline.scheduler.config
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        sigma_B = shift * drawn_B / (1 + (shift - 1) * drawn_B)
        sigma = sigma_B.view(-1, *[1] * (clean.dim() - 1))
        return (1 - sigma) * clean + sigma * noise, sigma_B * config.num_train_timesteps, noise - clean

    def _noise_scheduler(self) -> Any:
        return None


class StableDiffusion3(_Flow):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over image and text tokens together."""

    pipelines = ("StableDiffusion3Pipeline",)
    variations = "StableDiffusion3Img2ImgPipeline"
    lora_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **Family.lora_groups,
        "attention": (*Family.lora_groups["attention"], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "feed-forward": (*Family.lora_groups["feed-forward"], "ff_context.net.0.proj", "ff_context.net.2"),
    }

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts to the states of all encoders, and CLIP's pooled ones."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the transformer."""
        predicted: Tensor = self.denoiser(
            noisy,
            timestep=times_B,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
        ).sample
        return predicted


class _Masked(Family):
    """Transformers that attend to the states of one language model, with a mask."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        super().__init__(pipeline, device)
        # The prompt is given encoded; images are made at the model's own size.
        self.call = {"negative_prompt": None, "use_resolution_binning": False,
                     "height": self.image_size, "width": self.image_size}  # fmt: skip

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts to the language model's states and their mask."""
        return self._encoded(prompts)

    def _encoded(self, prompts: list[str], **options: Any) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=self.device, **options)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _call_transformer(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning, **options: Any) -> Tensor:
        predicted: Tensor = self.denoiser(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=times_B,
            **options,
        ).sample
        # Some predict the variance too, which stays as it was trained.
        has_variance = self.denoiser.config.out_channels == 2 * noisy.shape[1]
        return predicted.chunk(2, dim=1)[0] if has_variance else predicted


class PixArt(_Masked):
    """PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692): a diffusion transformer on T5's states."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the transformer."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:  # As the pipeline has it: models of 1024 pixels are told the size.
            size = float(self.image_size)
            added = {
                "resolution": noisy.new_full((len(noisy), 2), size),
                "aspect_ratio": noisy.new_ones(len(noisy), 1),
            }
        return self._call_transformer(noisy, times_B, conditioning, added_cond_kwargs=added)

    def add_adapter(self, lora: Any) -> None:
        """Give the transformer a LoRA; its class lacks diffusers' own method."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(lora, self.denoiser, "default")
        self.denoiser.peft_config = {"default": lora}

    def save_adapter(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Save the adapter in peft's format: ``PeftModel.from_pretrained(pipeline.transformer, folder)`` loads it.

        diffusers loads no LoRA into a PixArt pipeline itself.
        """
        from safetensors.torch import save_file

        self.denoiser.peft_config["default"].save_pretrained(folder)
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def load_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Read the tensors that `save_adapter` saved."""
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


class Sana(_Masked, _Flow):
    """Sana (arXiv 2410.10629): a linear-attention transformer on Gemma's states, with a deep autoencoder."""

    pipelines = ("SanaPipeline",)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts after the instruction that the pipeline puts before them."""
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encoded(prompts, complex_human_instruction=instruction)

    def encode_empty(self) -> Conditioning:
        """Encode the prompt that says nothing, without the instruction."""
        return self._encoded([""])

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the transformer."""
        return self._call_transformer(noisy, times_B * self.denoiser.config.timestep_scale, conditioning)


FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, PixArt, Sana)


def family_of(pipeline: Any, model: str, device: torch.device) -> Family:
    """Return the family of a pipeline.

    Raises
    ------
    ConfigError
        If it is of none.
    """
    name = type(pipeline).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            return family(pipeline, device)
    allowed = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ConfigError(f"run-config key 't2i.model' is {model!r}, a {name}; allowed: {allowed}")

"""Families of text-to-image models; they contain only what differs between models.

A family defines how prompts are encoded, how the denoiser is called, how noise is added to clean latents, what the
denoiser should predict, which layers can get a LoRA, and how the adapter is saved. `Generator` does the rest.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from fedmmkt.common.config import ConfigError
from fedmmkt.common.registry import Registry
from fedmmkt.server_app.t2i.noising import LEARNED, UnknownTrainingError, check_flow, noised, training_schedule

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
LATENT_CHANNELS = 4  # diffusers' image-to-image for Stable Diffusion takes inputs with 4 channels as latents.
LORA_GROUPS = ("attention", "convolution", "feed-forward", "time")
# Encoded prompts, as keyword arguments of the pipeline; the first dimension of each tensor is the sample.
Conditioning = dict[str, Tensor]


class Family(ABC):
    """Diffusion with a noise schedule, on a U-Net or a transformer; the base class of all families.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        An instance of one of the classes in ``pipelines``.
    device : torch.device
        Device of the computation.

    Attributes
    ----------
    pipelines : tuple of str
        Names of the diffusers pipeline classes of this family.
    denoiser_name : str
        Name of the pipeline component that gets the LoRA.
    lora_groups : dict of str to tuple of str
        Ends of layer names, grouped by the function of the layers.
    image_to_image : diffusers.DiffusionPipeline or None
        A pipeline with the same components that varies images; None if there is none.
    call : dict
        More arguments for each call of the pipeline.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
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

    def copy_to(self, device: torch.device) -> Self:
        """Copy the parts that generate images from encoded prompts to another device, without text encoders."""
        generating = (self.denoiser_name, "vae")
        modules = {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        copied = {name: copy.deepcopy(modules[name]).to(device) if name in generating else None for name in modules}
        return self._with(copied, device)

    def twin(self) -> Self:
        """Return a family with the same weights and a sampler of its own, which another thread can use."""
        return self._with({}, self.device)

    def _with(self, modules: Mapping[str, Any], device: torch.device) -> Self:
        """Return a family with some other modules, and a scheduler of its own, since it counts the steps of a call."""
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**modules, scheduler=copy.deepcopy(pipeline.scheduler))
        return type(self)(pipeline, device)

    def _image_to_image(self) -> Any:
        from diffusers import AutoPipelineForImage2Image

        try:
            return AutoPipelineForImage2Image.from_pipe(self.pipeline)
        except ValueError:  # diffusers has none for this pipeline.
            return None

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts."""

    def encode_empty(self) -> Conditioning:
        """Encode the empty prompt, for classifier-free guidance."""
        return self.encode([""])

    @abstractmethod
    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction for noisy latents at the given times."""

    def noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise to clean latents, for random times.

        Returns
        -------
        tuple of torch.Tensor
            The noisy latents, their times, and the target for the denoiser.
        """
        return noised(self.noise_scheduler, clean, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]."""
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode(self.unscaled(latents.to(vae.dtype))).sample
        return decoded

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """Encode images in [-1, 1] to latents in the denoiser's scale, the inverse of `decode`."""
        vae = self.pipeline.vae
        found = vae.encode(images_NCHW.to(vae.dtype))[0]
        latents = found if isinstance(found, Tensor) else found.mode()
        # `unscaled` is affine in each channel, so two of its values tell the inverse.
        shift = self.unscaled(torch.zeros_like(latents))
        scaled: Tensor = (latents - shift) / (self.unscaled(torch.ones_like(latents)) - shift)
        return scaled

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents in the scale of the autoencoder, as the family's pipeline in diffusers does."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def add_adapter(self, lora: Any) -> None:
        """Add a LoRA named ``default`` to the denoiser."""
        self.denoiser.add_adapter(lora)

    def save_adapter(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Save the adapter so that plain diffusers can load it with ``pipeline.load_lora_weights(folder)``.

        The tensors keep peft's names: diffusers' own conversion loses tensors if both convolutions and attention are
        targets.
        """
        metadata = self.denoiser.peft_config["default"].to_dict()
        name = self.denoiser_name
        named: dict[str, Any] = {f"{name}_lora_layers": dict(state), f"{name}_lora_adapter_metadata": metadata}
        type(self.pipeline).save_lora_weights(folder, weight_name=WEIGHT_NAME, **named)

    def load_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors that `save_adapter` saved."""
        from safetensors.torch import load_file

        state = load_file(folder / WEIGHT_NAME)
        return {name.removeprefix(f"{self.denoiser_name}."): tensor for name, tensor in state.items()}

    def _noise_scheduler(self) -> Any:
        """Return the noise schedule of the model's training, for any sampler of the pipeline.

        None if it is not known, for a family that overrides `noised`.

        Raises
        ------
        ConfigError
            If it is not known, and `noised` needs it.
        """
        try:
            return training_schedule(self.pipeline.scheduler)
        except UnknownTrainingError as error:
            if type(self).noised is Family.noised:
                raise self._refused(error, f"{', '.join(LEARNED)}, or what EDM does") from None
            return None

    def _refused(self, error: UnknownTrainingError, allowed: str) -> ConfigError:
        return ConfigError(
            f"run-config key 't2i.model' is {str(self.pipeline.name_or_path)!r}, but {error}; allowed for a "
            f"{type(self.pipeline).__name__}: a model that learned to predict {allowed}; or a family of your own in "
            "'t2i.family'"
        )


families: Registry[type[Family]] = Registry(
    "T2I family", "t2i.family", ("pipeline", "device"), base=Family, also="auto"
)
"""The families of T2I models: subclasses of `Family`."""


@families.register("stable-diffusion")
class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a U-Net with cross-attention to CLIP's text states."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    lora_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
        "convolution": ("conv1", "conv2", "conv_shortcut"),
        "feed-forward": ("ff.net.0.proj", "ff.net.2"),
        "time": ("linear_1", "linear_2", "time_emb_proj"),
    }

    def _image_to_image(self) -> Any:
        # These pipelines distinguish latents from images only by the number of channels.
        takes_latents = self.pipeline.vae.config.latent_channels == LATENT_CHANNELS
        return super()._image_to_image() if takes_latents else None

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents in the scale of the autoencoder; this pipeline knows no shift."""
        scaled: Tensor = latents / self.pipeline.vae.config.scaling_factor
        return scaled

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with CLIP."""
        return {"prompt_embeds": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the U-Net."""
        predicted: Tensor = self.denoiser(noisy, times_B, conditioning["prompt_embeds"]).sample
        return predicted


@families.register("stable-diffusion-xl")
class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (arXiv 2307.01952): two text encoders, conditioned on the image size."""

    pipelines = ("StableDiffusionXLPipeline",)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents in the scale of the autoencoder, by the mean and deviation of each channel if it has both."""
        config = self.pipeline.vae.config
        statistics = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        mean, deviation = (None if value is None else latents.new_tensor(value).view(-1, 1, 1) for value in statistics)
        if mean is None or deviation is None:
            return super().unscaled(latents)
        return latents * deviation / config.scaling_factor + mean

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with both text encoders; add the pooled states of the second one."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_empty(self) -> Conditioning:
        """Encode the empty prompt; the result is all zeros if the pipeline's configuration says so."""
        empty = self.encode([""])
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()} if zeros else empty

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the U-Net, conditioned on an uncropped image of the usual size."""
        size = float(self.image_size)
        sizes_B6 = noisy.new_tensor([[size, size, 0, 0, size, size]]).expand(len(noisy), -1)
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": sizes_B6}
        predicted: Tensor = self.denoiser(noisy, times_B, conditioning["prompt_embeds"], added_cond_kwargs=added).sample
        return predicted


class FlowFamily(Family):
    """Rectified flow (arXiv 2209.03003): straight paths from data to noise; the velocity is predicted."""

    def noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Mix clean latents with noise; times are drawn as in Stable Diffusion 3 (arXiv 2403.03206, eq. 19, 23)."""
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        drawn_B = compute_density_for_timestep_sampling("logit_normal", len(clean), 0.0, 1.0, generator=generator)
        drawn_B = drawn_B.to(clean.device)
        config = self.pipeline.scheduler.config
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        sigma_B = shift * drawn_B / (1 + (shift - 1) * drawn_B)
        sigma = sigma_B.view(-1, *[1] * (clean.dim() - 1))
        return (1 - sigma) * clean + sigma * noise, sigma_B * config.num_train_timesteps, noise - clean

    def _noise_scheduler(self) -> Any:
        """Return None; the times of a flow need no schedule.

        Raises
        ------
        ConfigError
            If the model did not learn a flow, and `noised` takes it for one.
        """
        try:
            check_flow(self.pipeline.scheduler)
        except UnknownTrainingError as error:
            if type(self).noised is FlowFamily.noised:
                raise self._refused(error, "a flow's velocity (FlowMatch..., flow_prediction)") from None


@families.register("stable-diffusion-3")
class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a joint transformer over image and text tokens."""

    pipelines = ("StableDiffusion3Pipeline",)
    lora_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **Family.lora_groups,
        "attention": (*Family.lora_groups["attention"], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "feed-forward": (*Family.lora_groups["feed-forward"], "ff_context.net.0.proj", "ff_context.net.2"),
    }

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with all text encoders; add CLIP's pooled states."""
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


class MaskedFamily(Family):
    """Transformers with cross-attention to the states of one language model, with an attention mask."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        super().__init__(pipeline, device)
        # Prompts are passed in encoded form. Images have the model's own size.
        self.call = {"negative_prompt": None, "use_resolution_binning": False,
                     "height": self.image_size, "width": self.image_size}  # fmt: skip

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the language model; return its states and the attention mask."""
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
        # Some models also predict the variance; this half of the output is not used.
        has_variance = self.denoiser.config.out_channels == 2 * noisy.shape[1]
        return predicted.chunk(2, dim=1)[0] if has_variance else predicted


@families.register("pixart")
class PixArt(MaskedFamily):
    """PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692): a diffusion transformer with T5 as text encoder."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents in the scale of the autoencoder; this pipeline knows no shift."""
        scaled: Tensor = latents / self.pipeline.vae.config.scaling_factor
        return scaled

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the transformer."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:  # As in the pipeline: 1024-pixel models get the size.
            size = float(self.image_size)
            added = {
                "resolution": noisy.new_full((len(noisy), 2), size),
                "aspect_ratio": noisy.new_ones(len(noisy), 1),
            }
        return self._call_transformer(noisy, times_B, conditioning, added_cond_kwargs=added)

    def add_adapter(self, lora: Any) -> None:
        """Add a LoRA to the transformer with peft, because its class lacks diffusers' own method."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(lora, self.denoiser, "default")
        self.denoiser.peft_config = {"default": lora}

    def save_adapter(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Save the adapter in peft's format: ``PeftModel.from_pretrained(pipeline.transformer, folder)`` loads it.

        diffusers itself cannot load a LoRA into a PixArt pipeline.
        """
        from safetensors.torch import save_file

        self.denoiser.peft_config["default"].save_pretrained(folder)
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def load_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors that `save_adapter` saved."""
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@families.register("sana")
class Sana(MaskedFamily, FlowFamily):
    """Sana (arXiv 2410.10629): a linear-attention transformer with Gemma as text encoder and a deep autoencoder."""

    pipelines = ("SanaPipeline",)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the instruction that the pipeline puts in front of them."""
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encoded(prompts, complex_human_instruction=instruction)

    def encode_empty(self) -> Conditioning:
        """Encode the empty prompt, without the instruction."""
        return self._encoded([""])

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Call the transformer."""
        return self._call_transformer(noisy, times_B * self.denoiser.config.timestep_scale, conditioning)


def family_of(pipeline: Any, model: str) -> type[Family]:
    """Return the registered family of a pipeline; see `family_called`."""
    return family_called(type(pipeline).__name__, model)


def family_called(name: str, model: str) -> type[Family]:
    """Return the registered family of a pipeline's class; ``model`` is where the pipeline comes from.

    Raises
    ------
    ConfigError
        If no registered family supports the pipeline.
    """
    registered = [families.get(family) for family in families.names()]
    for family in registered:
        if name in family.pipelines:
            return family
    allowed = ", ".join(name for family in registered for name in family.pipelines)
    raise ConfigError(
        f"run-config key 't2i.model' is {model!r}, a {name}; allowed: {allowed}, or any with a family of your own in "
        "'t2i.family'"
    )

"""The server's text-to-image model: a diffusers pipeline that generates images and is fine-tuned with LoRA."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fedmmkt.common.augmentation import warp
from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.common.devices import cpu_threads, pick_devices
from fedmmkt.common.images import resize_images
from fedmmkt.common.progress import Progress
from fedmmkt.server_app.rules.updates import Supervised, UpdateRule, rewards
from fedmmkt.server_app.t2i.adapter import Adapter
from fedmmkt.server_app.t2i.conditioning import PromptEncoder
from fedmmkt.server_app.t2i.families import Conditioning, Family, family_of
from fedmmkt.server_app.t2i.noising import DISTILLED
from fedmmkt.server_app.t2i.pipeline_folder import cannot_load, local_folder, variant_to_load
from fedmmkt.server_app.t2i.samples import NO_CLASS, Samples, latents_of

logger = logging.getLogger("flwr")

# Default batch sizes, as latent positions (samples x height x width), and the largest number of samples.
GENERATED_AT_ONCE, MOST_GENERATED = 25_600, 100
# On a CPU, two threads that make this many samples each, or more, are faster than two that make each sample together.
LEAST_A_HALF = 25
LEARNED_AT_ONCE = 8192
LEARNED_BY_ONE_THREAD = 4096  # Latent positions of a step, up to which a small denoiser learns on one thread.
LARGE_IMAGE = 512  # Side in pixels from which the autoencoder decodes images one by one.
WEIGHTS_PART = 0.6  # Largest fraction of a GPU's free memory for weights; activations and updates need the rest.


class Generator:
    """A diffusers text-to-image pipeline of a registered family, with one LoRA adapter.

    It encodes prompts and trains the adapter on its first device. It generates images on all its devices.

    Parameters
    ----------
    config : T2IConfig
        Names the model, its adapter and the settings of generation.
    seed : int
        Seed of the adapter's initial weights.
    family : type, optional
        The `Family` of this model; by default the registered family of its pipeline.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, is not a text-to-image pipeline, or has none of the LoRA targets; or if
        ``t2i.adapter`` does not fit the model.
    """

    def __init__(self, config: T2IConfig, seed: int, family: type[Family] | None = None) -> None:
        self.config = config
        self.device, *others = pick_devices(config.device)
        self.pipeline = load_pipeline(config.model, _precision(config, self.device))
        self.family = (family or family_of(self.pipeline, config.model))(self.pipeline, self.device)
        self.denoiser = self.family.denoiser
        if (sampler := type(self.pipeline.scheduler).__name__) in DISTILLED:
            logger.warning("The T2I's %s is for models that were distilled to few steps; updates teach it as if it was "
                           "not, and may undo that", sampler)  # fmt: skip
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        if self.pipeline.vae.dtype == torch.float16:
            self.pipeline.vae.float()  # Some autoencoders overflow in float16.
        copies = self._to_devices(others)
        # Two threads of a CPU make half of the images each, if these are small. One thread makes the halves in turn, so
        # that the last digits of images do not depend on the number of threads.
        is_small = self._batch_size >= 2 * LEAST_A_HALF
        self._in_halves = self.device.type == "cpu" and not others and config.offload != "model" and is_small
        twins = [self.family.twin()] if self._in_halves and torch.get_num_threads() > 1 else []
        self.families = [self.family, *copies, *twins]  # They generate at the same time.
        for generating in self.families:
            self._set_up(generating)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.adapter = Adapter(self.family, copies, config, seed)
        self.encoder = PromptEncoder(self.family)
        self._fitting: dict[str, int] = {}  # How many samples fit the device's memory, by stage; learned by trying.
        if config.adapter:
            self.adapter.load(Path(config.adapter).expanduser())

    def _to_devices(self, others: Sequence[torch.device]) -> list[Family]:
        """Move the pipeline to its device, or have it offloaded; return copies on other devices."""
        config = self.config
        offloads = config.offload == "model" or (config.offload == "auto" and self._would_fill(self.device))
        used = [] if offloads else [d for d in others if config.offload == "none" or not self._would_fill(d)]
        copies = [self.family.copy_to(device) for device in used]  # Before the original leaves main memory.
        if offloads:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        else:
            self.pipeline.to(self.device)
        if len(used) < len(others):
            logger.warning("The T2I generates on %d of %d devices: its weights would fill a device, or are offloaded.",
                           1 + len(used), 1 + len(others))  # fmt: skip
        return copies

    def _set_up(self, family: Family) -> None:
        """Have a family's pipelines save memory as configured, and show no progress of their own."""
        for pipeline in filter(None, (family.pipeline, family.image_to_image)):
            pipeline.set_progress_bar_config(disable=True)
        if self.config.attention_slicing:
            family.pipeline.enable_attention_slicing()
        if self.image_size >= LARGE_IMAGE:
            family.pipeline.vae.enable_slicing()
        if self.config.vae_tiling:
            family.pipeline.vae.enable_tiling()

    def _would_fill(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return would_fill(self.pipeline, free)

    @property
    def image_size(self) -> int:
        """Side of the generated images, in pixels."""
        return self.family.image_size

    @property
    def images_at_once(self) -> int:
        """Number of images that all devices, or the threads of a CPU, together make at once."""
        return self._batch_size * len(self.families)

    @property
    def can_vary(self) -> bool:
        """Whether `vary_parts` can be called with the configured strength; some families cannot denoise variations."""
        return self.family.image_to_image is not None or not self.config.explore_strength

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object] = lambda done: None,
        image_size: int | None = None,
    ) -> Samples:
        """Generate one image per prompt.

        Parameters
        ----------
        prompts, seeds : sequence
            One of each per sample. A sample depends only on its own prompt and seed.
        guidance : float
            Classifier-free guidance scale. At 1 and below there is no guidance, and generation costs half as much.
        progress : callable
            Called with the number of finished images.
        image_size : int, optional
            Side in pixels to which images are resized as they are made, so that larger ones need no memory.
        """
        return Samples.gather(self.generate_parts(prompts, seeds, guidance, progress, image_size), len(prompts))

    def generate_parts(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object] = lambda done: None,
        image_size: int | None = None,
    ) -> Iterator[tuple[range, Samples]]:
        """Generate as `generate` does; yield samples as they are made, with their positions."""
        return self._denoise(lambda family, part: family.pipeline, prompts, seeds, guidance, progress, image_size)

    def vary_parts(
        self,
        parents: Sequence[Tensor] | Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object] = lambda done: None,
        image_size: int | None = None,
    ) -> Iterator[tuple[range, Samples]]:
        """Make variations of samples: warp them by ``t2i.explore-warp``, and denoise them by ``t2i.explore-strength``.

        To denoise is to add some noise and take it away again (SDEdit, arXiv 2108.01073). Only if `can_vary` is true.
        Variations are yielded as they are made, with their positions.

        Parameters
        ----------
        parents : sequence of torch.Tensor
            Latents of each sample to vary.
        prompts, seeds, guidance, progress, image_size
            As in `generate`. A seed also decides how its parent is warped.
        """
        # Less noise than that of one denoising step would leave no step to make.
        strength = min(1.0, max(self.config.explore_strength, 1.01 / self.config.inference_steps))

        def sampler(family: Family, part: slice) -> Callable[..., Any]:
            latents_NCHW = torch.stack(list(parents[part])).to(family.device)
            if amount := self.config.explore_warp:
                warped_NCHW = warp(family.decode(latents_NCHW).float().clamp(-1, 1), seeds[part], amount)
                latents_NCHW = family.encode_images(warped_NCHW).to(latents_NCHW.dtype)
            if not self.config.explore_strength:
                return lambda **_: SimpleNamespace(images=latents_NCHW)
            return partial(family.image_to_image, image=latents_NCHW, strength=strength)

        return self._denoise(sampler, prompts, seeds, guidance, progress, image_size)

    def _denoise(
        self,
        sampler: Callable[[Family, slice], Callable[..., Any]],
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        progress: Callable[[int], object],
        image_size: int | None,
    ) -> Iterator[tuple[range, Samples]]:
        parts_at_once = 2 if self._in_halves else len(self.families)
        least = LEAST_A_HALF if self._in_halves else 1
        size = min(self._batch_size, max(least, math.ceil(len(prompts) / parts_at_once)))
        parts = [slice(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        conditioning = self.encoder.conditioning(prompts)
        self.adapter.merge()

        def make(family: Family, part: slice) -> Samples:
            count = part.stop - part.start
            if count <= self._fitting.get("generate", count):
                try:
                    return make_at_once(family, part)
                except torch.OutOfMemoryError as error:
                    self._learn_size("generate", count, error)
            empty_caches()  # Here the error is gone, and with it what it held.
            middle = part.start + count // 2
            return Samples.join([make(family, slice(part.start, middle)), make(family, slice(middle, part.stop))])

        @torch.no_grad()
        def make_at_once(family: Family, part: slice) -> Samples:
            encoded, empty = conditioning(torch.arange(len(prompts))[part])
            negative = {f"negative_{name}": tensor for name, tensor in empty.items()} if guidance > 1 else {}
            latents_NCHW = sampler(family, part)(
                **{name: tensor.to(family.device) for name, tensor in (encoded | negative).items()},
                **family.call,
                guidance_scale=guidance,
                num_inference_steps=self.config.inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="latent",
            ).images
            part_prompts = tuple(prompts[part])
            no_class_N = torch.full((len(part_prompts),), NO_CLASS)
            images_NHWC = as_images(family.decode(latents_NCHW))
            if image_size is not None:
                images_NHWC = resize_images(images_NHWC, image_size)
            return Samples(part_prompts, no_class_N, images_NHWC, latents_NCHW.float().cpu())

        for part, samples in zip(parts, _on_all_devices(make, self.families, parts), strict=True):
            yield range(part.start, part.stop), samples
            progress(part.stop)

    def adapt(
        self,
        samples: Samples | Sequence[Samples],
        scores_N: Tensor,
        steps: int,
        seed: int,
        rule: UpdateRule | None = None,
        rate_factor: float = 1.0,
    ) -> float | None:
        """Fine-tune the adapter on scored samples.

        Parameters
        ----------
        samples : Samples or sequence of Samples
            The samples, as one or in parts, which are not joined; their images are not used.
        scores_N : torch.Tensor
            Not negative. The rule defines what a score means. If all scores are zero, nothing is learned.
        steps : int
            Optimiser steps.
        seed : int
            Seed of the sample order, the noise and the caption dropout.
        rule : UpdateRule, optional
            The loss; `Supervised` by default.
        rate_factor : float
            Factor of ``t2i.adaptation-learning-rate``.

        Returns
        -------
        float or None
            Mean loss over the steps. None if the update diverged (the loss, a gradient, the adapter or what it predicts
            was NaN or infinite): the adapter is then as it was before, bit for bit, and the log has a warning.
        """
        self.adapter.unmerge()
        if not steps or not bool(scores_N.any()):
            return 0.0
        self.denoiser.to(self.device)  # An offloaded denoiser is in main memory.
        before = [parameter.detach().clone() for parameter in self.adapter.parameters]
        self.denoiser.train()
        parts = [samples] if isinstance(samples, Samples) else list(samples)
        with cpu_threads(self._threads_of_an_update()):
            try:
                total, diverged = _watched(self._steps(parts, scores_N, steps, seed, rule, before, rate_factor), steps)
            finally:
                self.denoiser.eval()
        if not diverged and not self.adapter.is_finite():
            diverged = f"loss {total / steps:.4g}, but an adapter that is not finite at step {steps}"
        if diverged:
            self._undo(before, diverged)
            return None
        return total / steps

    def _steps(
        self,
        parts: Sequence[Samples],
        scores_N: Tensor,
        steps: int,
        seed: int,
        rule: UpdateRule | None,
        before: list[Tensor],
        rate_factor: float,
    ) -> Iterator[tuple[list[float], float]]:
        """Make the steps of an update; yield the losses of each step's parts, and the norm of its gradients.

        At the end, yield no loss, and the norm of what the adapted denoiser predicts. ``before`` is the adapter before
        the update.
        """
        config, rule = self.config, rule or Supervised()
        parameters = self.adapter.parameters
        rate = config.adaptation_learning_rate * rate_factor
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, fused=True)
        # Without this decay, the noise of the last steps would stay in the final adapter.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        chances_N = scores_N.double() if rule.draws_by_score else torch.ones(len(scores_N)).double()
        rewards_N = rewards(scores_N)
        conditioning = self.encoder.conditioning([prompt for part in parts for prompt in part.prompts])
        at_once = config.adaptation_micro_batch_size or self._at_once(LEARNED_AT_ONCE)
        at_once = min(at_once, config.adaptation_batch_size, self._fitting.get("adapt", at_once))
        # In half precision, small gradients become zero on their way back, unless the loss is scaled up.
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.denoiser.dtype == torch.float16)
        for _ in range(steps):
            index = torch.multinomial(chances_N, config.adaptation_batch_size, True, generator=generator)
            clean = latents_of(parts, index).to(self.device)
            noisy, times_B, target = self.family.noised(clean, generator)
            dropped_B11 = (torch.rand(len(index), 1, 1, generator=generator) < config.caption_dropout).to(self.device)
            noisy = noisy.to(self.denoiser.dtype)

            def backward(
                at_once: int,
                index: Tensor = index,
                noisy: Tensor = noisy,
                times_B: Tensor = times_B,
                target: Tensor = target,
                dropped_B11: Tensor = dropped_B11,
            ) -> list[float]:
                """Add up the gradients of a step, in parts; return their losses."""
                optimizer.zero_grad()
                losses: list[float] = []
                for part in torch.arange(len(index)).split(at_once):
                    encoded = self._dropped(conditioning(index[part]), dropped_B11[part])
                    reference = None
                    if rule.needs_reference:
                        reference = self._predict_as(before, parameters, noisy[part], times_B[part], encoded)
                    predicted = self.adapter.predict(noisy[part], times_B[part], encoded)
                    loss_B = rule.loss(predicted, target[part], reference, rewards_N[index[part]].to(self.device))
                    loss = loss_B.sum() / len(index)
                    scaler.scale(loss).backward()
                    losses.append(float(loss.detach()))
                return losses

            while True:
                try:
                    losses = backward(at_once)
                except torch.OutOfMemoryError as error:
                    at_once = self._learn_size("adapt", at_once, error)
                else:
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    if bool(norm.isfinite()) or scaler.get_scale() <= 1 or not math.isfinite(sum(losses)):
                        break
                    scaler.update()  # The scaled gradients overflowed: the same step again, with a smaller scale.
                empty_caches()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            yield losses, float(norm)
        part = torch.arange(len(index)).split(at_once)[-1]
        encoded = self._dropped(conditioning(index[part]), dropped_B11[part])
        with torch.no_grad():
            yield [], float(self.family.predict(noisy[part], times_B[part], encoded).float().norm())

    @staticmethod
    def _dropped(conditioning: tuple[Conditioning, Conditioning], dropped_B11: Tensor) -> Conditioning:
        """Replace the conditioning of dropped captions by that of the empty prompt."""
        encoded, empty = conditioning
        return {name: _where(dropped_B11, empty[name], tensor) for name, tensor in encoded.items()}

    def _learn_size(self, stage: str, count: int, error: torch.OutOfMemoryError) -> int:
        """Return half of a number of samples that did not fit the device's memory, which it is from now on, and warn.

        Raises
        ------
        ConfigError
            If it was one sample.
        """
        key = {"generate": "generation-batch-size", "adapt": "adaptation-micro-batch-size"}[stage]
        if count <= 1:
            savings = "t2i.gradient-checkpointing" if stage == "adapt" else "t2i.vae-tiling"
            raise ConfigError(
                f"run-config key 't2i.model' is {self.config.model!r}, which does not fit the memory of {self.device} "
                f"with one sample at once ({str(error).splitlines()[0]:.200}); allowed: {savings}=true, "
                't2i.attention-slicing=true, t2i.offload="model", or another t2i.device'
            ) from None
        self._fitting[stage] = count // 2
        logger.warning("  %-9s out of memory with %s samples at once; the run goes on with %s. 't2i.%s' = %s saves the "
                       "attempt", stage, count, count // 2, key, count // 2)  # fmt: skip
        return count // 2

    def _undo(self, before: list[Tensor], diverged: str) -> None:
        """Restore the adapter from before an update that diverged, and warn."""
        for parameter, old in zip(self.adapter.parameters, before, strict=True):
            parameter.data.copy_(old)
        rate = self.config.adaptation_learning_rate
        remedy = f"lower run-config key 't2i.adaptation-learning-rate', which is {rate:g}"
        if self.denoiser.dtype == torch.float16:  # Its largest number is 65,504.
            remedy += ", or set 't2i.dtype' to 'bfloat16' or 'float32'"
        logger.warning("  adapt     the update diverged (%s); the adapter stays as it was before. %s",
                       diverged, f"If it happens again, {remedy}.")  # fmt: skip

    def _threads_of_an_update(self) -> int:
        """Return 1 if more threads would be no faster, so that clients on the same machine have the others."""
        positions = self.config.adaptation_batch_size * self.denoiser.config.sample_size**2
        return 1 if self.adapter.is_small and positions <= LEARNED_BY_ONE_THREAD else torch.get_num_threads()

    @property
    def _batch_size(self) -> int:
        return self.config.generation_batch_size or min(MOST_GENERATED, self._at_once(GENERATED_AT_ONCE))

    def _at_once(self, positions: int) -> int:
        """Return how many samples have this many latent positions in total, at least 1."""
        return max(1, positions // self.denoiser.config.sample_size**2)

    @torch.no_grad()
    def _predict_as(
        self,
        before: list[Tensor],
        parameters: list[torch.nn.Parameter],
        noisy: Tensor,
        times_B: Tensor,
        encoded: Conditioning,
    ) -> Tensor:
        """Predict with the adapter as it was before the update; tensors are swapped, not copied."""
        current = [parameter.data for parameter in parameters]
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old
        predicted = self.family.predict(noisy, times_B, encoded)
        for parameter, new in zip(parameters, current, strict=True):
            parameter.data = new
        return predicted


def _watched(made: Iterable[tuple[list[float], float]], steps: int) -> tuple[float, str]:
    """Make the steps of `Generator._steps` until one diverges; return the sum of losses, and what diverged."""
    total, progress = 0.0, Progress("adapt", steps, "steps")
    for step, (losses, norm) in enumerate(made, start=1):
        for loss in losses:  # Not `sum`, which rounds otherwise from Python 3.12 on.
            total += loss
        if not math.isfinite(total + norm):
            what = f"loss {sum(losses):.4g}, gradients" if losses else f"loss {total / steps:.4g}, then predictions"
            return total, f"{what} of norm {norm:.4g} at step {min(step, steps)} of {steps}"
        progress(step)
    return total, ""


def _on_all_devices(
    make: Callable[[Family, slice], Samples], families: Sequence[Family], parts: Sequence[slice]
) -> Iterator[Samples]:
    """Make the parts on the families' devices in turn and yield them in order; each device makes one at a time.

    Devices share the CPU's threads. A new thread of Python gets as many as were last set, in whichever thread; so the
    caller's number is set again at the end.
    """
    if len(families) == 1:
        yield from (make(families[0], part) for part in parts)
        return
    of_caller = torch.get_num_threads()
    share = partial(torch.set_num_threads, max(1, of_caller // max(1, min(len(families), len(parts)))))
    threads = [ThreadPoolExecutor(1, initializer=share) for _ in families]

    def begin(index: int) -> Future[Samples]:
        return threads[index % len(families)].submit(make, families[index % len(families)], parts[index])

    try:
        # A server that is told to stop waits for what has begun, so that is one part a device.
        begun = deque(begin(index) for index in range(min(len(families), len(parts))))
        for following in range(len(families), len(families) + len(parts)):
            made = begun.popleft().result()
            if following < len(parts):
                begun.append(begin(following))
            yield made
    finally:
        for thread in threads:
            thread.shutdown(cancel_futures=True)
        torch.set_num_threads(of_caller)


def empty_caches() -> None:
    """Give unused memory of the GPUs back, so that parts of another size fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_images(pixels_NCHW: Tensor) -> np.ndarray:
    """Convert decoded pixels in [-1, 1] (N, C, H, W) to uint8 images (N, H, W, C)."""
    images_NCHW = (pixels_NCHW.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return images_NCHW.permute(0, 2, 3, 1).cpu().numpy()


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline from a folder or the hub.

    Raises
    ------
    ConfigError
        If the pipeline cannot be loaded.
    """
    folder = local_folder(model)
    try:
        return _load_from_hub(model, dtype) if folder is None else _load_folder(folder, dtype)
    except Exception as error:  # diffusers, transformers and tokenizers raise anything, plain `Exception` too.
        raise cannot_load(model, error) from None


def _load_folder(path: Path, dtype: torch.dtype) -> Any:
    variant = variant_to_load(path)
    if variant:
        logger.info("The T2I's folder %s has weights of the variant %s; these are loaded.", path, variant)
    return DiffusionPipeline.from_pretrained(path, dtype=dtype, variant=variant)


def _load_from_hub(model: str, dtype: torch.dtype) -> Any:
    """Load the plain weights, else those of the variant fp16; some repositories have these alone."""
    try:
        return DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # The first error says more.
            pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, variant="fp16")
            logger.info("The T2I %s has no plain weights; those of the variant fp16 are loaded.", model)
            return pipeline
        raise


def would_fill(pipeline: Any, free: int) -> bool:
    """Return whether a pipeline's weights need more than `WEIGHTS_PART` of a device's ``free`` bytes."""
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


def _where(dropped_B11: Tensor, empty: Tensor, encoded: Tensor) -> Tensor:
    """Choose between two tensors per sample; they may have any number of dimensions."""
    return torch.where(dropped_B11.view(-1, *[1] * (encoded.dim() - 1)), empty, encoded)

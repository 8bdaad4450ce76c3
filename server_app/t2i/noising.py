"""What a denoiser was trained to predict, by its pipeline's scheduler: the training's noise, times and targets."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

LEARNED = ("epsilon", "v_prediction", "sample")
EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
EDM_LEARNED = ("epsilon", "v_prediction")  # Both are the paper's network; of `v_prediction` the sign is the other one.
EDM_MEAN, EDM_STD = -1.2, 1.2  # Of the logarithm of the noise's scale in training (arXiv 2206.00364, table 1).
# Samplers of models that were distilled to few steps, after which they do not predict noise alone.
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


class UnknownTrainingError(ValueError):
    """It is not known what a model was trained to predict; the text names its scheduler and the reason."""


def training_schedule(scheduler: Any) -> Any:
    """Return the noise schedule of a model's training, for any sampler of its pipeline.

    It is a scheduler of EDM for models that were trained in that way, else a DDPMScheduler.

    Raises
    ------
    UnknownTrainingError
        If the scheduler does not tell a schedule and a target that `noised` knows.
    """
    config, kind = scheduler.config, scheduler.config.get("prediction_type")
    if isinstance(scheduler, EDM):
        if kind not in EDM_LEARNED:
            raise _unknown(scheduler, f"has prediction_type {kind!r}")
        return type(scheduler).from_config(config)
    if kind not in LEARNED:
        raise _unknown(scheduler, f"has prediction_type {kind!r}" if kind else "does not say what the model predicts")
    if config.get("use_flow_sigmas") or config.get("timestep_type", "discrete") != "discrete":
        raise _unknown(scheduler, "has use_flow_sigmas, or continuous times")
    if (schedule := _ddpm(config)) is None or not _equal(schedule, scheduler):
        raise _unknown(scheduler, f"has a noise schedule of its own ({config.get('beta_schedule')!r})")
    return schedule


def check_flow(scheduler: Any) -> None:
    """Check that a model was trained to predict a flow's velocity, from data to noise.

    Raises
    ------
    UnknownTrainingError
        If its scheduler is not one of rectified flow.
    """
    config, kind = scheduler.config, scheduler.config.get("prediction_type")
    if not type(scheduler).__name__.startswith("FlowMatch") and kind != "flow_prediction":
        raise _unknown(scheduler, f"has prediction_type {kind!r}" if kind else "does not say what the model predicts")
    if config.get("invert_sigmas"):
        raise _unknown(scheduler, "has invert_sigmas")


def noised(schedule: Any, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to clean latents, for random times.

    Parameters
    ----------
    schedule : diffusers.SchedulerMixin
        A schedule from `training_schedule`.
    clean : torch.Tensor
        Clean latents (B, ...).
    generator : torch.Generator
        Draws noise and times, on the CPU.

    Returns
    -------
    tuple of torch.Tensor
        The denoiser's input, its times (B,), and its target.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    if isinstance(schedule, EDM):
        return _edm_noised(schedule, clean, noise, generator)
    last = int(schedule.config.num_train_timesteps)
    times_B = torch.randint(last, (len(clean),), generator=generator).to(clean.device)
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        target = noise
    else:
        target = schedule.get_velocity(clean, noise, times_B) if kind == "v_prediction" else clean
    return schedule.add_noise(clean, noise, times_B), times_B, target


def _edm_noised(
    schedule: Any, clean: Tensor, noise: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise as EDM does (arXiv 2206.00364, eq. 7 and table 1).

    With the paper's weights, its loss is the plain squared error between the network's output and this target: what
    c_skip and c_out make into the clean latents.
    """
    sigma_B = (EDM_MEAN + EDM_STD * torch.randn(len(clean), generator=generator)).exp().to(clean.device)
    sigma = sigma_B.view(-1, *[1] * (clean.dim() - 1))
    data = float(schedule.config.sigma_data)
    sign = -1 if schedule.config.prediction_type == "v_prediction" else 1
    target = sign * (sigma / data * clean - data * noise) / (sigma**2 + data**2).sqrt()
    return schedule.precondition_inputs(clean + sigma * noise, sigma), schedule.precondition_noise(sigma_B), target


def _ddpm(config: Any) -> Any:
    """Return the DDPMScheduler with the same schedule of noise, or None if it has none like it."""
    try:
        # Also what is a default of the sampler's class, since that of DDPMScheduler may be another.
        return DDPMScheduler.from_config({key: value for key, value in config.items() if key != "_use_default_values"})
    except NotImplementedError:  # diffusers raises it for a `beta_schedule` that DDPMScheduler does not have.
        return None


def _equal(schedule: Any, scheduler: Any) -> bool:
    ours, theirs = schedule.alphas_cumprod, getattr(scheduler, "alphas_cumprod", None)
    return theirs is not None and theirs.shape == ours.shape and torch.allclose(theirs.float().cpu(), ours, atol=1e-5)


def _unknown(scheduler: Any, problem: str) -> UnknownTrainingError:
    return UnknownTrainingError(f"its scheduler, {type(scheduler).__name__}, {problem}")

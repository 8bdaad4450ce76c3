"""What a denoiser learns is what it was trained to predict, whatever samples it."""

import diffusers
import pytest
import torch

from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.noising import UnknownTrainingError, check_flow, noised, training_schedule
from tests import tiny_pipelines

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded():
    return torch.Generator().manual_seed(0)


def saved(kind, scheduler, folder):
    pipeline = tiny_pipelines.PIPELINES[kind]()
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return T2IConfig(model=str(folder), inference_steps=2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("data", [0.5, 1.0])
@pytest.mark.parametrize("sampler", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_a_model_trained_as_edm_learns_what_the_paper_makes_into_the_clean_latents(sampler, data, kind):
    """With c_in, c_noise, c_skip and c_out of arXiv 2206.00364, table 1, and its distribution of noise."""
    scheduler = sampler(sigma_data=data, prediction_type=kind)
    clean = torch.randn(4000, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * data

    inputs, times_B, target = noised(training_schedule(scheduler), clean, seeded())

    sigma_B = (4 * times_B).exp()
    sigma = sigma_B.view(-1, 1, 1, 1)
    noisy = inputs * (sigma**2 + data**2).sqrt()
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    sign = {"epsilon": 1, "v_prediction": -1}[kind]
    assert torch.allclose(c_skip * noisy + sign * c_out * target, clean, atol=1e-4)
    assert torch.allclose(scheduler.precondition_outputs(noisy, target, sigma), clean, atol=1e-4)
    assert sigma_B.log().mean() == pytest.approx(-1.2, abs=0.1)
    assert sigma_B.log().std() == pytest.approx(1.2, abs=0.1)
    assert ((noisy - clean) / sigma).std() == pytest.approx(1, abs=0.02)
    assert inputs.std() == pytest.approx(1, abs=0.05)  # What c_in is for.
    assert target.std() == pytest.approx(1, abs=0.05)  # What c_out is for.


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_targets_of_diffusion(kind):
    schedule = training_schedule(diffusers.EulerDiscreteScheduler(**TRAINED, prediction_type=kind))
    clean = torch.randn(8, 4, 2, 2, generator=seeded())

    inputs, times_B, target = noised(schedule, clean, seeded())

    kept = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().mul(-1).add(1).cumprod(0)[times_B].view(-1, 1, 1, 1)
    noise = (inputs - kept.sqrt() * clean) / (1 - kept).sqrt()
    expected = {"epsilon": noise, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean, "sample": clean}
    assert torch.allclose(target, expected[kind], atol=1e-3)


@pytest.mark.parametrize(
    "sampler",
    ["DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
     "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LCM", "TCD"],
)  # fmt: skip
def test_any_sampler_has_the_schedule_of_its_training(sampler, tmp_path):
    """Also where the folder names none, and the defaults of classes differ."""
    kind = getattr(diffusers, f"{sampler}Scheduler")
    kind().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(f'{{"_class_name": "{sampler}Scheduler"}}')
    for scheduler in (kind(**TRAINED), kind.from_pretrained(tmp_path)):
        assert torch.allclose(training_schedule(scheduler).alphas_cumprod, scheduler.alphas_cumprod, atol=1e-5)


def test_a_schedule_down_to_pure_noise_is_learned_as_such():
    scheduler = diffusers.DDIMScheduler(**TRAINED, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert training_schedule(scheduler).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
        diffusers.UniPCMultistepScheduler(**FLOW),
    ],
)
def test_samplers_of_flows_are_known_as_such(scheduler):
    check_flow(scheduler)
    with pytest.raises(UnknownTrainingError, match=type(scheduler).__name__):
        training_schedule(scheduler)


@pytest.mark.parametrize(
    ("kind", "scheduler", "problem"),
    [
        ("sdxl", diffusers.DPMSolverMultistepScheduler(**FLOW), "has prediction_type 'flow_prediction'"),
        ("sdxl", diffusers.FlowMatchEulerDiscreteScheduler(), "does not say what the model predicts"),
        ("sdxl", diffusers.EDMEulerScheduler(prediction_type="sample"), "has prediction_type 'sample'"),
        ("sd-v", diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
         "has use_flow_sigmas, or continuous times"),
        ("sd-epsilon", diffusers.DDIMScheduler(prediction_type="score"), "has prediction_type 'score'"),
        ("sd-epsilon", diffusers.CMStochasticIterativeScheduler(), "does not say what the model predicts"),
        ("sd-epsilon", diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0), r"has .* of its own \('scaled_linear'\)"),
        ("sd-epsilon", diffusers.HeunDiscreteScheduler(beta_schedule="exp"), r"has a noise schedule of .* \('exp'\)"),
        ("pixart-alpha", diffusers.DPMSolverMultistepScheduler(**FLOW), "has prediction_type 'flow_prediction'"),
        ("sd3", diffusers.DDIMScheduler(), "has prediction_type 'epsilon'"),
        ("sd3", diffusers.EDMEulerScheduler(), "has prediction_type 'epsilon'"),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has invert_sigmas"),
        ("sana", diffusers.SCMScheduler(), "has prediction_type 'trigflow'"),
    ],
)  # fmt: skip
def test_what_is_learned_in_another_way_is_refused(kind, scheduler, problem, tmp_path):
    config = saved(kind, scheduler, tmp_path)
    name = type(scheduler).__name__
    expected = rf"'t2i.model' is '{tmp_path}', but its scheduler, {name}, {problem}; allowed for a \w+: .*'t2i.family'"
    with pytest.raises(ConfigError, match=expected):
        Generator(config, seed=0)


def test_sana_with_a_solver_of_flows_is_taken(tmp_path):
    generator = Generator(saved("sana", diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0), tmp_path), 0)
    clean = torch.ones(5, 4, 16, 16)

    noisy, times_B, target = generator.family.noised(clean, seeded())

    sigma = (times_B / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(noisy, clean + sigma * target, atol=1e-5)


def test_a_model_distilled_to_few_steps_is_warned_of(tmp_path, caplog):
    caplog.set_level("WARNING", "flwr")
    Generator(saved("sd-epsilon", diffusers.LCMScheduler(), tmp_path), 0)
    assert "LCMScheduler is for models that were distilled to few steps" in caplog.text

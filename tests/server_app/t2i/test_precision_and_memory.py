"""Half precision learns what full precision does, and too little memory makes batches smaller, not runs shorter."""

import numpy as np
import pytest
import torch

from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.server_app.rules.updates import UpdateRule, squared_error_B
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples
from tests import tiny_pipelines

FAST = T2IConfig(inference_steps=2, device=("cpu",))
PROMPTS = ["the digit one", "the digit two", "the digit three", "the digit four"]


class Faint(UpdateRule):
    """Give a small gradient to each value of the prediction, as a loss over large images does."""

    def loss(self, predicted, target, reference, reward_B):
        return squared_error_B(predicted, target) * 1e-5


def samples():
    latents_NCHW = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images_NHWC = np.zeros((8, 0, 0, 3), np.uint8)
    return Samples(("the digit one",) * 8, torch.zeros(8, dtype=torch.int64), images_NHWC, latents_NCHW)


def first_gradient(model, dtype, monkeypatch):
    """Return the gradient of an update's first step, before it is clipped."""
    settings = {"model": str(model), "dtype": dtype, "adaptation_batch_size": 8}
    generator = Generator(FAST.model_copy(update=settings), seed=0)
    kept = []

    def clip(parameters, most):
        kept.append(torch.cat([parameter.grad.flatten().double() for parameter in parameters]))
        return kept[-1].norm()

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    generator.adapt(samples(), torch.ones(8), 1, 0, Faint())
    return kept[-1]


@pytest.mark.parametrize("make", [tiny_pipelines.stable_diffusion, tiny_pipelines.stable_diffusion_xl])
def test_the_gradient_in_half_precision_is_that_of_full_precision(make, tmp_path, monkeypatch):
    """Without a scaled loss, most of it is zero in float16."""
    make().save_pretrained(tmp_path)
    full = first_gradient(tmp_path, "float32", monkeypatch)
    half = first_gradient(tmp_path, "float16", monkeypatch)

    assert float(full @ half / (full.norm() * half.norm())) >= 0.999
    assert float(half.norm() / full.norm()) == pytest.approx(1, abs=0.01)


def test_a_scale_that_overflows_is_lowered_and_no_step_is_lost(tmp_path, monkeypatch):
    tiny_pipelines.stable_diffusion().save_pretrained(tmp_path)
    scales = []
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, 2.0**40, enabled=enabled))
    update = real.update
    monkeypatch.setattr(real, "update", lambda self: (update(self), scales.append(self.get_scale()))[0])
    settings = {"model": str(tmp_path), "dtype": "float16", "adaptation_batch_size": 4}
    generator = Generator(FAST.model_copy(update=settings), seed=0)
    before = {name: tensor.clone() for name, tensor in generator.adapter.state().items()}

    assert generator.adapt(samples(), torch.ones(8), 3, 0) > 0

    assert 1 < scales[-1] < 2.0**40
    assert len(scales) > 3  # The three steps, and those that were made again.
    assert any(not torch.equal(before[name], tensor) for name, tensor in generator.adapter.state().items())


class Small:
    """Call a function, but raise as a full GPU does if it gets more samples than fit."""

    def __init__(self, call, most, count):
        self.call, self.most, self.count, self.sizes = call, most, count, []

    def __call__(self, *arguments, **named):
        size = self.count(*arguments, **named)
        self.sizes.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.call(*arguments, **named)


def test_generation_that_does_not_fit_goes_on_with_smaller_batches(monkeypatch, caplog):
    generator = Generator(FAST, seed=0)
    whole = generator.generate(PROMPTS, range(4), 1.5)
    decode = Small(generator.family.decode, 2, len)
    monkeypatch.setattr(generator.family, "decode", decode)
    counts = []

    made = [generator.generate(PROMPTS, range(4), 1.5, counts.append) for _ in range(2)]

    assert decode.sizes == [4, 2, 2, 2, 2]  # The second time it is known what fits.
    assert counts == [4, 4]
    assert all(one.prompts == whole.prompts for one in made)
    assert all(np.abs(one.images_NHWC.astype(int) - whole.images_NHWC).max() <= 1 for one in made)
    (record,) = caplog.records
    assert (
        "generate  out of memory with 4 samples at once; the run goes on with 2. 't2i.generation-batch-size' = 2"
        in (record.getMessage())
    )


def test_an_update_that_does_not_fit_is_the_same_in_smaller_parts(monkeypatch, caplog):
    losses, states = [], []
    for most in (32, 8):
        generator = Generator(FAST, seed=0)
        predict = Small(generator.family.predict, most, lambda noisy, *rest: len(noisy))
        monkeypatch.setattr(generator.family, "predict", predict)
        losses.append(generator.adapt(samples(), torch.ones(8), 2, 0))
        states.append(generator.adapter.state())

    assert predict.sizes == [32, 16, *[8] * 9]  # Two steps of four parts, and the last part once more.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-4) for name in states[0])
    assert [record.getMessage()[:61] for record in caplog.records] == [
        "  adapt     out of memory with 32 samples at once; the run go",
        "  adapt     out of memory with 16 samples at once; the run go",
    ]


@pytest.mark.parametrize("stage", ["decode", "predict"])
def test_memory_that_does_not_hold_one_sample_ends_the_run_with_what_to_set(stage, monkeypatch):
    generator = Generator(FAST, seed=0)
    monkeypatch.setattr(generator.family, stage, Small(None, 0, lambda first, *rest: len(first)))
    calls = {
        "decode": lambda: generator.generate(PROMPTS, range(4), 1.5),
        "predict": lambda: generator.adapt(samples(), torch.ones(8), 2, 0),
    }

    with pytest.raises(ConfigError, match=r"'starter', which does not fit .* with one sample .*t2i\.offload=\"model\""):
        calls[stage]()

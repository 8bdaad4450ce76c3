"""The T2I model on a GPU does what it does on a CPU; skipped where there is none."""

import logging

import numpy as np
import pytest
import torch

from fedmmkt.common.config import T2IConfig
from fedmmkt.server_app.t2i.generator import Generator
from tests import tiny_pipelines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

PROMPTS = [f"the digit {name}" for name in ("one", "two", "three", "four")] * 4
SEEDS = list(range(len(PROMPTS)))


def make(folder, device, **settings):
    config = T2IConfig(model=str(folder), inference_steps=3, adaptation_batch_size=8, device=(device,))
    return Generator(config.model_copy(update={"dtype": "float32"} | settings), seed=0)


@pytest.fixture(params=["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "pixart", "sana"])
def folder(request, tmp_path):
    getattr(tiny_pipelines, request.param)().save_pretrained(tmp_path)
    return tmp_path


def test_images_and_updates_are_those_of_a_cpu(folder):
    made, learned = {}, {}
    for device in ("cpu", "cuda"):
        generator = make(folder, device)
        made[device] = generator.generate(PROMPTS, SEEDS, 2.0)
        generator.adapt(made["cpu"], torch.ones(len(PROMPTS)), 3, 0)
        learned[device] = {name: tensor.cpu() for name, tensor in generator.adapter.state().items()}

    difference = made["cpu"].images_NHWC.astype(int) - made["cuda"].images_NHWC.astype(int)
    assert np.abs(difference).mean() < 1  # Of 255.
    assert learned["cpu"].keys() == learned["cuda"].keys()
    one, other = (torch.cat([tensor.flatten() for tensor in learned[device].values()]) for device in made)
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.95


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_update_in_half_precision_stays_finite_and_moves(tmp_path, dtype):
    tiny_pipelines.stable_diffusion().save_pretrained(tmp_path)
    generator = make(tmp_path, "cuda", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in generator.adapter.state().items()}

    loss = generator.adapt(generator.generate(PROMPTS, SEEDS, 1.0), torch.ones(len(PROMPTS)), 5, 0)

    after = generator.adapter.state()
    assert np.isfinite(loss)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_too_little_memory_makes_batches_smaller_and_not_the_run_shorter(tmp_path, caplog):
    tiny_pipelines.stable_diffusion().save_pretrained(tmp_path)
    generator = make(tmp_path, "cuda", generation_batch_size=4096, adaptation_batch_size=8)
    prompts = ["the digit one"] * 4096
    part = generator.generate(prompts[:8], list(range(8)), 1.0)
    held = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 64 * 2**20) / total)
    try:
        with caplog.at_level(logging.WARNING, logger="flwr"):
            whole = generator.generate(prompts, list(range(len(prompts))), 1.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert len(whole) == len(prompts)
    assert np.abs(whole.images_NHWC[:8].astype(int) - part.images_NHWC.astype(int)).mean() < 1
    assert "memory" in caplog.text

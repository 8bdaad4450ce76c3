"""A T2I family of the user's own, as `docs/bring-your-own.md` shows it, on a tiny pipeline of another class."""

import re

import diffusers
import numpy as np
import pytest
import torch
import transformers

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.t2i.generator import Generator
from tests import ROOT, tiny_pipelines

PAGE = (ROOT / "docs" / "bring-your-own.md").read_text()


@pytest.fixture
def aura(tmp_path, monkeypatch):
    """Save a tiny AuraFlow pipeline and the page's family, and return the settings that name both."""
    torch.manual_seed(0)
    text = transformers.UMT5Config(
        vocab_size=len(tiny_pipelines.WORDS) + 4, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4
    )
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    parts = (tiny_pipelines.word_tokenizer(), transformers.UMT5EncoderModel(text), tiny_pipelines.autoencoder())
    diffusers.AuraFlowPipeline(*parts, transformer, scheduler).save_pretrained(tmp_path / "aura")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class AuraFlow" in code]
    (tmp_path / "my_family.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return {"t2i__model": str(tmp_path / "aura"), "t2i__family": "my_family:AuraFlow"}


def test_a_family_of_ones_own_generates_learns_and_is_saved(aura, tiny_run, make_grid, tmp_path):
    run_config = tiny_run(rounds=1, client__models="mlp", t2i__samples_per_round=10, **aura)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2))
    assert strategy.recorder.run_folder.read_metrics()[-1]["generator"]["loss"] > 0

    own = Generator(strategy.config.t2i, 0, type(strategy.generator.family))
    own.adapter.load(tmp_path / "run" / "lora")
    made = own.generate(["the digit one"], [3], 2.0).images_NHWC[0]
    plain = diffusers.AuraFlowPipeline.from_pretrained(tmp_path / "aura")
    plain.load_lora_weights(tmp_path / "run" / "lora")
    plain.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    theirs = plain(
        "the digit one", guidance_scale=2.0, num_inference_steps=3, generator=noise, height=16, width=16,
        output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(made / 255 - theirs).max() <= 0.5 / 255 + 1e-3


def test_without_a_family_of_ones_own_the_pipeline_is_refused_with_the_way_on(aura, tiny_run):
    run_config = tiny_run(t2i__model=aura["t2i__model"])
    with pytest.raises(ConfigError, match=r"AuraFlowPipeline; allowed: .* with a family of your own in 't2i.family'"):
        build_strategy(RunConfig.from_flower(run_config), 1)

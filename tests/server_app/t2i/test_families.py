"""Each family of T2I models, end to end on a tiny pipeline of its real classes."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel

from fedmmkt.common.augmentation import warp
from fedmmkt.common.config import RunConfig, T2IConfig
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.t2i.generator import Generator, as_images, would_fill
from fedmmkt.server_app.t2i.samples import Samples
from tests import tiny_pipelines
from tests.server_app.t2i import variations

PROMPTS = ["the digit three", "the digit seven", "the digit three"]
SEEDS = [1, 2, 3]
VARYING = ("sd-epsilon", "sd-v", "sdxl", "playground", "sd3")


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tiny_pipelines.save(kind, tmp_path_factory.mktemp("pipeline") / kind)


def settings(folder, **changes):
    return T2IConfig(model=folder, inference_steps=3, lora_rank=2, **changes)


def plain(pipeline, guidance):
    """Generate with diffusers alone, from the prompts themselves."""
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    size = {}
    if type(pipeline).__name__.startswith(("PixArt", "Sana")):
        side = pipeline.transformer.config.sample_size * 2
        size = {"use_resolution_binning": False, "clean_caption": False, "height": side, "width": side}
    made = pipeline(PROMPTS, guidance_scale=guidance, num_inference_steps=3, generator=noise, output_type="np", **size)
    return made.images


def close(ours_NHWC, theirs_NHWC):
    return np.abs(ours_NHWC / 255 - theirs_NHWC).max() <= 0.5 / 255 + 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_generates_what_plain_diffusers_generates(folder, guidance):
    generator = Generator(settings(folder), seed=0)
    ours = generator.generate(PROMPTS, SEEDS, guidance)
    side = 2 * generator.denoiser.config.sample_size
    assert generator.image_size == side
    assert ours.images_NHWC.shape == (3, side, side, 3)
    assert ours.latents_NCHW.shape == (3, 4, side // 2, side // 2)
    assert close(ours.images_NHWC, plain(DiffusionPipeline.from_pretrained(folder), guidance))
    assert not np.array_equal(ours.images_NHWC[0], ours.images_NHWC[2])
    alone = generator.generate(PROMPTS[1:2], SEEDS[1:2], guidance)
    assert np.abs(ours.images_NHWC[1].astype(int) - alone.images_NHWC[0]).max() <= 1


@pytest.mark.parametrize("lacking", ["", "latents_mean", "latents_std"])
def test_latents_are_decoded_by_channel_just_where_plain_diffusers_does(lacking, tmp_path):
    """Pixel for pixel; diffusers scales by channel only with both mean and deviation."""
    pipeline = tiny_pipelines.playground()
    if lacking:
        pipeline.vae.register_to_config(**{lacking: None})
    pipeline.save_pretrained(tmp_path)

    ours = Generator(settings(str(tmp_path)), seed=0).generate(PROMPTS, SEEDS, 3.0).images_NHWC

    theirs = plain(DiffusionPipeline.from_pretrained(tmp_path), 3.0)
    assert np.array_equal(ours, (theirs * 255).round().astype(np.uint8))


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl", "sd3", "pixart-alpha", "pixart-sigma"])
def test_a_shift_of_latents_is_undone_just_where_plain_diffusers_does(kind, tmp_path):
    pipeline = tiny_pipelines.PIPELINES[kind]()
    statistics = {"latents_mean": [1.0, -1.0, 2.0, 0.5], "latents_std": [2.0, 1.5, 0.5, 1.0]}
    pipeline.vae.register_to_config(shift_factor=0.7, **({} if kind == "sdxl" else statistics))
    pipeline.save_pretrained(tmp_path)

    ours = Generator(settings(str(tmp_path)), seed=0).generate(PROMPTS, SEEDS, 1.0).images_NHWC

    assert close(ours, plain(DiffusionPipeline.from_pretrained(tmp_path), 1.0))


def test_adapting_lowers_the_loss_and_the_adapter_round_trips_through_plain_diffusers(kind, folder, tmp_path):
    generator = Generator(settings(folder, adaptation_learning_rate=1e-2, adaptation_batch_size=16), seed=0)
    side = generator.denoiser.config.sample_size
    latents_NCHW = torch.randn(4, 4, side, side, generator=torch.Generator().manual_seed(0)) * 0.5
    images_NHWC = np.zeros((4, 2 * side, 2 * side, 3), np.uint8)
    samples = Samples(("the digit one",) * 4, torch.zeros(4, dtype=torch.int64), images_NHWC, latents_NCHW)
    before = generator.generate(PROMPTS, SEEDS, 2.0).images_NHWC
    first = generator.adapt(samples, torch.ones(4), steps=4, seed=0)
    generator.adapt(samples, torch.ones(4), steps=60, seed=1)
    assert generator.adapt(samples, torch.ones(4), steps=4, seed=0) < first
    adapted = generator.generate(PROMPTS, SEEDS, 2.0).images_NHWC
    assert not np.array_equal(adapted, before)
    assert all(tensor.dtype == torch.float32 for tensor in generator.adapter.state().values())

    generator.adapter.save(tmp_path / "lora")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if kind.startswith("pixart"):  # Which diffusers itself loads no LoRA into.
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "lora")
    else:
        pipeline.load_lora_weights(tmp_path / "lora")
    assert close(adapted, plain(pipeline, 2.0))
    other = Generator(settings(folder), seed=5)
    other.adapter.load(tmp_path / "lora")
    assert np.array_equal(other.generate(PROMPTS, SEEDS, 2.0).images_NHWC, adapted)


def test_some_families_denoise_variations(kind, folder):
    generator = Generator(settings(folder, explore_warp=0, explore_strength=0.4), seed=0)
    assert generator.can_vary == (kind in VARYING)
    if not generator.can_vary:
        return
    parents = generator.generate(PROMPTS, SEEDS, 1.0)
    near, far = (
        variations(generator, parents, PROMPTS, [7, 8, 9], 1.0, explore_strength=strength) for strength in (0.4, 1.0)
    )
    distances = [(made.latents_NCHW - parents.latents_NCHW).abs().mean() for made in (near, far)]
    assert 0 < distances[0] < distances[1]


def test_every_family_warps_samples(kind, folder):
    """The parents' images are warped, each by its own seed; the latents are those of the image that is shown."""
    generator = Generator(settings(folder), seed=0)
    family = generator.family
    assert generator.can_vary
    parents = generator.generate(PROMPTS, SEEDS, 1.0)

    still, warped = (variations(generator, parents, PROMPTS, [7, 8, 9], 1.0, explore_warp=amount) for amount in (0, 1))
    alone = Samples.gather(generator.vary_parts(parents.latents_NCHW[1:2], PROMPTS[1:2], [8], 1.0), 1)

    with torch.no_grad():
        expected_NCHW = family.encode_images(warp(family.decode(parents.latents_NCHW).clamp(-1, 1), [7, 8, 9], 1.0))
        shown_NHWC = as_images(family.decode(warped.latents_NCHW))
    assert torch.equal(still.latents_NCHW, parents.latents_NCHW)
    assert torch.allclose(warped.latents_NCHW, expected_NCHW, atol=1e-4)
    assert torch.allclose(warped.latents_NCHW[1], alone.latents_NCHW[0], atol=1e-4)
    assert np.abs(warped.images_NHWC.astype(int) - shown_NHWC).max() <= 1


@pytest.mark.parametrize("kind", tiny_pipelines.PIPELINES)
def test_images_are_encoded_in_the_scale_in_which_they_are_decoded(kind, tmp_path):
    """The autoencoder is asked for latents, and they are scaled by the inverse of what decoding does."""
    pipeline = tiny_pipelines.PIPELINES[kind]()
    statistics = {"latents_mean": [1.0, -1.0, 2.0, 0.5], "latents_std": [2.0, 1.5, 0.5, 1.0]}
    shifts = {} if kind == "sana" else {"shift_factor": 0.7, **(statistics if kind == "sdxl" else {})}
    pipeline.vae.register_to_config(**shifts)
    pipeline.save_pretrained(tmp_path)
    family = Generator(settings(str(tmp_path)), seed=0).family
    images_NCHW = torch.rand(2, 3, family.image_size, family.image_size) * 2 - 1

    with torch.no_grad():
        latents_NCHW = family.encode_images(images_NCHW)
        found = pipeline.vae.encode(images_NCHW)
    plain_NCHW = found.latent if kind == "sana" else found.latent_dist.mode()

    assert torch.allclose(family.unscaled(latents_NCHW), plain_NCHW, atol=1e-4)


def test_prompts_have_embeddings_of_unit_length(folder):
    generator = Generator(settings(folder), seed=0)
    embeddings_ND = generator.encoder.text_embeddings(["the digit one", "a picture of the number two"]).astype(float)
    assert embeddings_ND.shape == (2, generator.encoder.embedding_size)
    assert np.linalg.norm(embeddings_ND, axis=1) == pytest.approx(np.ones(2), abs=1e-2)


def test_memory_savers_change_little(folder):
    plain_one = Generator(settings(folder), seed=0)
    saving = Generator(
        settings(
            folder,
            dtype="bfloat16",
            offload="model",
            gradient_checkpointing=True,
            attention_slicing=True,
            vae_tiling=True,
        ),
        seed=0,
    )
    samples = plain_one.generate(PROMPTS, SEEDS, 1.0)
    losses = [generator.adapt(samples, torch.ones(3), steps=2, seed=0) for generator in (plain_one, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert saving.denoiser.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in saving.adapter.state().values())
    assert np.isfinite(saving.generate(PROMPTS, SEEDS, 2.0).latents_NCHW).all()
    assert np.isfinite(variations(saving, samples, PROMPTS, SEEDS, 2.0).latents_NCHW).all()


def test_devices_make_together_what_one_makes_alone(folder):
    one, three = (Generator(settings(folder, device=("cpu",) * count), seed=0) for count in (1, 3))
    samples = one.generate(PROMPTS, SEEDS, 2.0)
    done = []

    alone, together = [], []
    for generator, made in ((one, alone), (three, together)):
        made.append(generator.generate(PROMPTS, SEEDS, 2.0, done.append))
        generator.adapt(samples, torch.ones(3), steps=2, seed=0)
        made.append(generator.generate(PROMPTS, SEEDS, 2.0))
        if generator.family.image_to_image is not None:
            made.append(variations(generator, samples, PROMPTS, SEEDS, 2.0, explore_strength=0.5))

    assert done == [3, 1, 2, 3]
    assert len({id(family.denoiser) for family in three.families}) == 3
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.prompts == theirs.prompts
        assert np.abs(ours.images_NHWC.astype(int) - theirs.images_NHWC).max() <= 1
    assert not np.array_equal(together[1].images_NHWC, together[0].images_NHWC)


def test_a_part_that_fails_on_one_device_fails_the_whole(folder):
    generator = Generator(settings(folder, device=("cpu", "cpu")), seed=0)
    generator.families[1].pipeline.scheduler = None
    with pytest.raises(AttributeError):
        generator.generate(PROMPTS, SEEDS, 1.0)


def test_a_pipeline_is_offloaded_where_its_weights_would_fill_the_device(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(parameter.numel() * 4 for module in modules for parameter in module.parameters())

    assert would_fill(pipeline, weights)
    assert would_fill(pipeline, int(weights / 0.61))
    assert not would_fill(pipeline, int(weights / 0.59))


@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_a_federation_runs_by_configuration_alone(kind, tiny_run, make_grid, tmp_path):
    """With a family that denoises variations, and one that does not."""
    folder = tiny_pipelines.save(kind, tmp_path / kind)
    run_config = tiny_run(t2i__model=folder, client__models="mlp", rounds=2, t2i__samples_per_round=10)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2))
    line = strategy.recorder.run_folder.read_metrics()[-1]
    assert line["replies"]["received"] == 2
    assert line["generator"]["loss"] > 0


def test_a_family_that_denoises_makes_new_samples_where_latents_have_other_channels(tiny_run, make_grid, tmp_path):
    tiny_pipelines.stable_diffusion(latent_channels=8).save_pretrained(tmp_path / "wide")
    settings = {"t2i__explore_strength": 0.5, "t2i__samples_per_round": 10, "client__models": "mlp"}
    run_config = tiny_run(t2i__model=str(tmp_path / "wide"), **settings)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=2))

    assert not strategy.generator.can_vary
    assert strategy.recorder.run_folder.read_metrics()[-1]["generator"]["loss"] > 0

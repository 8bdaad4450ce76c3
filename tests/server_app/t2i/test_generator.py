"""The T2I model: the real starter pipeline, and its adapter through plain diffusers."""

import json
import math
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fedmmkt.common.config import ConfigError, RunConfig, T2IConfig
from fedmmkt.common.devices import cpu_threads
from fedmmkt.common.images import resize_images
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.rules.updates import UpdateRule, squared_error_B, updates
from fedmmkt.server_app.t2i.families import LORA_GROUPS, WEIGHT_NAME
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples
from tests import ROOT, tiny_pipelines
from tests.server_app.t2i import variations

STARTER = ROOT / "starter" / "model"
PROMPTS = ["the digit three", "the digit seven", "the digit three"]
SEEDS = [1, 2, 3]
FAST = T2IConfig(inference_steps=3)


@pytest.fixture(scope="module")
def generator():
    return Generator(FAST, seed=0)


@pytest.fixture
def adapted():
    generator = Generator(FAST, seed=0)
    samples = generator.generate(PROMPTS, SEEDS, 1.0)
    generator.adapt(samples, torch.ones(3), steps=4, seed=0)
    return generator


def plain(pipeline, guidance):
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    made = pipeline(PROMPTS, guidance_scale=guidance, num_inference_steps=3, generator=noise, output_type="np")
    return made.images


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_generates_what_plain_diffusers_generates(generator, guidance):
    ours = generator.generate(PROMPTS, SEEDS, guidance).images_NHWC
    theirs = plain(DiffusionPipeline.from_pretrained(STARTER), guidance)
    assert ours.shape == (3, 32, 32, 3)
    assert np.abs(ours / 255 - theirs).max() <= 0.5 / 255 + 1e-4


def test_two_threads_of_a_cpu_make_what_one_makes(capfd):
    prompts, seeds = ["the digit three", "the digit seven"] * 30, range(60)
    with cpu_threads(1):
        one = Generator(FAST, seed=0)
        alone = one.generate(prompts, seeds, 1.0)
    with cpu_threads(3):
        three, done = Generator(FAST, seed=0), []

        together = three.generate(prompts, seeds, 1.0, done.append)
        varied = variations(three, together, prompts, seeds, 1.0, explore_strength=0.5)

        assert torch.get_num_threads() == 3
        assert [threads_of_a_new_thread() for _ in range(2)] == [3, 3]
    assert (len(one.families), len(three.families)) == (1, 2)
    assert three.families[0].denoiser is three.families[1].denoiser
    assert done == [30, 60]
    assert torch.equal(alone.latents_NCHW, together.latents_NCHW)
    assert varied.prompts == tuple(prompts)
    assert "it/s" not in capfd.readouterr().err  # Nor does a pipeline show progress of its own.


def test_a_thread_begins_a_part_when_it_has_made_the_one_before():
    """A server that is told to stop would else make all parts first."""
    with cpu_threads(2):
        generator, begun, seen = Generator(T2IConfig(inference_steps=1, generation_batch_size=50), seed=0), [], []
        for family in generator.families:
            family.decode = lambda latents, decode=family.decode: begun.append(len(latents)) or decode(latents)

        generator.generate(["the digit one"] * 300, range(300), 1.0, lambda done: seen.append((done, len(begun))))

    assert begun == [50] * 6
    assert [done for done, _ in seen] == [50, 100, 150, 200, 250, 300]
    assert all(done // 50 <= parts <= done // 50 + 2 for done, parts in seen)


def threads_of_a_new_thread():
    """Return how many threads torch uses in a thread that begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("update", ["supervised", "negative-aware"])
def test_an_update_through_joined_weights_is_that_of_plain_lora(update, adapted):
    samples, scores_N = adapted.generate(PROMPTS, SEEDS, 1.0), torch.tensor([0.0, 1.0, 2.0])
    start = {name: tensor.clone() for name, tensor in adapted.adapter.state().items()}
    states, losses = [], []
    for joins in (True, False):
        generator = Generator(FAST, seed=0)
        generator.adapter.load_state(start, "the start")
        assert generator.adapter._joins
        generator.adapter._joins = joins
        weights = {name: tensor.clone() for name, tensor in generator.denoiser.state_dict().items()}
        losses.append(generator.adapt(samples, scores_N, 2, 0, updates.get(update)()))
        states.append(generator.adapter.state())
        after = generator.denoiser.state_dict()
        assert all(torch.equal(after[name], weights[name]) for name in weights if "lora" not in name)
        assert not any(layer.merged for layer in generator.adapter._layers().values())

    moved = torch.cat([(states[1][name] - start[name]).flatten() for name in start])
    apart = torch.cat([(states[0][name] - states[1][name]).flatten() for name in start])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert apart.norm() < 0.02 * moved.norm()  # AdamW makes whole steps of gradients that are rounding errors.


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"offload": "model"}])
def test_weights_are_not_joined_where_that_would_change_the_update(changes):
    generator = Generator(FAST.model_copy(update=changes), seed=0)

    assert not generator.adapter._joins
    assert generator.adapt(generator.generate(PROMPTS, SEEDS, 1.0), torch.ones(3), steps=1, seed=0) > 0


def test_a_small_update_leaves_the_other_threads_to_clients(adapted):
    samples, threads = adapted.generate(PROMPTS, SEEDS, 1.0), []
    predict = adapted.family.predict
    adapted.family.predict = lambda *inputs: threads.append(torch.get_num_threads()) or predict(*inputs)
    with cpu_threads(3):
        for batch_size in (64, 65):  # Of 8 x 8 latent positions a sample.
            adapted.config = FAST.model_copy(update={"adaptation_batch_size": batch_size})
            adapted.adapt(samples, torch.ones(3), steps=1, seed=0)

            assert torch.get_num_threads() == 3
    assert threads == [1, 1, 3, 3]


def test_a_sample_depends_on_its_own_prompt_and_seed_only(generator):
    together = generator.generate(PROMPTS, SEEDS, 1.5)
    alone = generator.generate(PROMPTS[1:2], SEEDS[1:2], 1.5)
    assert np.abs(together.images_NHWC[1].astype(int) - alone.images_NHWC[0]).max() <= 1
    assert not np.array_equal(together.images_NHWC[0], together.images_NHWC[2])


def test_variations_stay_near_their_parents_and_strength_one_does_not(generator):
    parents = generator.generate(PROMPTS, SEEDS, 1.5)
    near, far = (
        variations(generator, parents, PROMPTS, [7, 8, 9], 1.5, explore_warp=0, explore_strength=strength)
        for strength in (0.4, 1.0)
    )

    def distance(made):
        return np.abs(made.images_NHWC.astype(float) - parents.images_NHWC).mean()

    assert 0 < distance(near) < distance(far)


@pytest.mark.parametrize("targets", [("attention",), ("convolution", "attention"), tuple(LORA_GROUPS)])
def test_the_adapter_round_trips_through_plain_diffusers(tmp_path, targets):
    generator = Generator(FAST.model_copy(update={"lora_targets": targets, "lora_rank": 3}), seed=0)
    samples = generator.generate(PROMPTS, SEEDS, 1.0)
    generator.adapt(samples, torch.ones(3), steps=3, seed=0)
    generator.adapter.save(tmp_path / "lora")

    pipeline = StableDiffusionPipeline.from_pretrained(STARTER)
    pipeline.load_lora_weights(tmp_path / "lora")

    (name,) = pipeline.unet.peft_config
    loaded, saved = get_peft_model_state_dict(pipeline.unet, adapter_name=name), generator.adapter.state()
    assert set(loaded) == set(saved)
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    adapted_images = generator.generate(PROMPTS, SEEDS, 1.5).images_NHWC
    assert np.abs(adapted_images / 255 - plain(pipeline, 1.5)).max() <= 0.5 / 255 + 1e-4
    assert not np.array_equal(adapted_images, Generator(FAST, 0).generate(PROMPTS, SEEDS, 1.5).images_NHWC)


def test_a_run_may_begin_with_a_saved_adapter(adapted, tmp_path):
    adapted.adapter.save(tmp_path / "lora")

    other = Generator(FAST.model_copy(update={"adapter": str(tmp_path / "lora")}), seed=5)

    first, second = (g.generate(PROMPTS, SEEDS, 1.0).images_NHWC for g in (adapted, other))
    assert np.array_equal(first, second)


def test_an_adapter_of_another_rank_is_refused(adapted, tmp_path):
    adapted.adapter.save(tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"an adapter of another model, or .*, than t2i.model 'starter'.*lora-rank 2"):
        Generator(FAST.model_copy(update={"adapter": str(tmp_path / "lora"), "lora_rank": 2}), seed=0)


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    tiny_pipelines.stable_diffusion().save_pretrained(tmp_path / "model")
    Generator(FAST.model_copy(update={"model": str(tmp_path / "model")}), seed=0).adapter.save(tmp_path / "lora")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/lora is an adapter of another model.* 'starter'"):
        Generator(FAST.model_copy(update={"adapter": str(tmp_path / "lora")}), seed=0)


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_an_adapter_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / WEIGHT_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"'t2i.adapter' is '{tmp_path}', which holds no adapter that can be read"):
        Generator(FAST.model_copy(update={"adapter": str(tmp_path)}), seed=0)


def test_an_update_begins_with_the_base_weights_bit_for_bit(adapted):
    def base():
        return {k: v.clone() for k, v in adapted.denoiser.state_dict().items() if "lora_" not in k}

    before = base()
    samples = adapted.generate(PROMPTS, SEEDS, 1.5)
    adapted.adapt(samples, torch.zeros(3), steps=1, seed=0)  # Teaches nothing, but learns on the base weights.
    after = base()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapting_lowers_the_loss_on_the_same_samples(generator):
    own = Generator(T2IConfig(inference_steps=3, adaptation_learning_rate=2e-3), seed=0)
    latents_NCHW = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    images_NHWC = np.zeros((8, 32, 32, 3), np.uint8)
    samples = Samples(("the digit one",) * 8, torch.zeros(8, dtype=torch.int64), images_NHWC, latents_NCHW)
    first = own.adapt(samples, torch.ones(8), steps=8, seed=0)
    own.adapt(samples, torch.ones(8), steps=30, seed=1)
    assert own.adapt(samples, torch.ones(8), steps=8, seed=0) < 0.9 * first


def test_the_negative_aware_update_starts_from_the_adapter_as_it_was(adapted):
    """In its first step prediction and reference are the same, so every reward gives the plain squared error."""
    samples = adapted.generate(PROMPTS, SEEDS, 1.0)
    state = adapted.adapter.state()
    losses = []
    for update, scores_N in (("supervised", torch.ones(3)), ("negative-aware", torch.tensor([0.0, 1.0, 2.0]))):
        generator = Generator(FAST.model_copy(update={"adaptation_batch_size": 64}), seed=0)
        set_peft_model_state_dict(generator.denoiser, state)
        losses.append(generator.adapt(samples, scores_N, 1, 0, updates.get(update)()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_equal_scores_teach_the_negative_aware_update_nothing(adapted):
    samples = adapted.generate(PROMPTS, SEEDS, 1.0)
    state = adapted.adapter.state()
    moved = {}
    for update in ("supervised", "negative-aware"):
        generator = Generator(FAST, seed=0)
        generator.adapter.load_state(state, "the same")
        generator.adapt(samples, torch.ones(3), 5, 0, updates.get(update)())
        made = generator.generate(PROMPTS, SEEDS, 1.0)
        moved[update] = float((made.latents_NCHW - samples.latents_NCHW).square().mean())
    # Not quite nothing: AdamW makes steps of rounding errors.
    assert moved["negative-aware"] < 0.1 * moved["supervised"]


@pytest.mark.parametrize("update", ["supervised", "reward", "negative-aware"])
def test_a_step_in_parts_is_the_step_in_one(update, adapted):
    samples = adapted.generate(PROMPTS, SEEDS, 1.0)
    losses, latents = [], []
    for at_once in (0, 5):  # 32 samples a step: in one, or in six parts of five and one of two.
        generator = Generator(FAST.model_copy(update={"adaptation_micro_batch_size": at_once}), 0)
        losses.append(generator.adapt(samples, torch.tensor([0.0, 1.0, 2.0]), 3, 0, updates.get(update)()))
        latents.append(generator.generate(PROMPTS, SEEDS, 1.0).latents_NCHW)
    moved = (latents[0] - samples.latents_NCHW).square().mean()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (latents[0] - latents[1]).square().mean() < 1e-3 * moved


def test_images_are_resized_as_they_are_made(generator):
    whole = generator.generate(PROMPTS, SEEDS, 1.0)

    small = generator.generate(PROMPTS, SEEDS, 1.0, image_size=8)

    assert np.array_equal(small.images_NHWC, resize_images(whole.images_NHWC, 8))
    assert torch.equal(small.latents_NCHW, whole.latents_NCHW)


def test_by_default_samples_at_once_suit_their_size(tmp_path):
    def sizes(generator, images):
        counts, learned = [], []
        generator.generate(["the digit one"] * images, range(images), 1.0, counts.append)
        predict = generator.family.predict
        generator.family.predict = lambda noisy, *rest: learned.append(len(noisy)) or predict(noisy, *rest)
        generator.adapt(generator.generate(PROMPTS, SEEDS, 1.0), torch.ones(3), steps=1, seed=0)
        return counts, learned

    tiny_pipelines.stable_diffusion(sample_size=24).save_pretrained(tmp_path / "larger")
    larger = Generator(T2IConfig(model=str(tmp_path / "larger"), inference_steps=1, adaptation_batch_size=16), seed=0)

    # The last part is predicted once more at the end, to see whether the update diverged.
    assert sizes(Generator(T2IConfig(inference_steps=1), seed=0), 260) == ([100, 200, 260], [32, 32])
    # 25,600 and 8,192 latent positions, of 24 x 24 a sample.
    assert sizes(larger, 130) == ([44, 88, 130], [14, 2, 2])


def test_samples_without_score_teach_nothing(generator):
    before = generator.adapter.state()
    samples = generator.generate(PROMPTS, SEEDS, 1.0)
    assert generator.adapt(samples, torch.zeros(3), steps=5, seed=0) == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.adapter.state().items())


class Broken(UpdateRule):
    """Give a loss that is not finite in its fourth step."""

    def __init__(self, factor):
        self.factor, self.step = factor, 0

    def loss(self, predicted, target, reference, reward_B):
        self.step += 1
        return squared_error_B(predicted, target) * (self.factor if self.step == 4 else 1)


@pytest.mark.parametrize(
    ("changes", "steps", "rule"),
    [
        ({"adaptation_learning_rate": 1.0}, 10, None),
        ({"adaptation_learning_rate": 10.0}, 2, None),  # Loss and adapter are finite; what it predicts is not.
        ({}, 6, Broken(float("nan"))),
        ({}, 6, Broken(float("inf"))),
        ({}, 4, Broken(1e38)),  # A finite loss, but the gradients overflow.
        ({"adaptation_learning_rate": 10.0, "adaptation_micro_batch_size": 5}, 6, updates.get("negative-aware")()),
    ],
)
def test_an_update_that_diverges_leaves_the_adapter_bit_for_bit_and_warns(changes, steps, rule, caplog):
    caplog.set_level("WARNING", "flwr")
    generator = Generator(FAST.model_copy(update=changes), seed=0)
    own = Generator(FAST, seed=0)  # Teaches the adapter something first, as an earlier round does.
    samples = own.generate(PROMPTS, SEEDS, 1.0)
    own.adapt(samples, torch.ones(3), steps=3, seed=0)
    generator.adapter.load_state(own.adapter.state(), "the same")
    before, images_NHWC = generator.adapter.state(), generator.generate(PROMPTS, SEEDS, 1.5).images_NHWC

    assert generator.adapt(samples, torch.tensor([1.0, 2.0, 3.0]), steps, 0, rule) is None

    after = generator.adapter.state()
    assert all(before[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in after.items())
    assert np.array_equal(generator.generate(PROMPTS, SEEDS, 1.5).images_NHWC, images_NHWC)
    assert not generator.denoiser.training
    (record,) = caplog.records
    rate = f"{generator.config.adaptation_learning_rate:g}"
    assert re.search(rf"update diverged \(loss .* at step \d+ of {steps}\); the adapter stays", record.message)
    assert f"lower run-config key 't2i.adaptation-learning-rate', which is {rate}." in record.message


def test_an_update_after_one_that_diverged_learns_as_if_that_had_not_been():
    samples = Generator(FAST, seed=0).generate(PROMPTS, SEEDS, 1.0)
    losses = []
    for rules in ((None,), (Broken(float("nan")), None)):
        generator = Generator(FAST, seed=0)
        losses.append([generator.adapt(samples, torch.ones(3), 5, 1, rule) for rule in rules][-1])
    assert losses[0] == losses[1]


def test_a_run_goes_on_after_an_update_that_diverged(tiny_run, make_grid, caplog):
    caplog.set_level("WARNING", "flwr")
    run_config = tiny_run(client__models="mlp", t2i__adaptation_learning_rate=10.0, t2i__adaptation_steps=5)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    before = strategy.generator.adapter.state()

    strategy.start(make_grid(run_config, nodes=2))

    folder = strategy.recorder.run_folder
    assert caplog.text.count("the update diverged") == 2
    assert [line["generator"]["loss"] for line in folder.read_metrics()] == [None, None, None]
    assert not re.search("NaN|Infinity", folder.metrics.read_text())
    assert folder.report.exists()
    saved = load_file(folder.lora / WEIGHT_NAME)
    assert all(torch.equal(before[name], saved[f"unet.{name}"]) for name in before)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), 1e300, np.float32(2), torch.tensor(3.0)])
def test_records_are_json_whatever_a_strategy_of_ones_own_gives_as_loss(loss, tiny_run, make_grid):
    """As a subclass's `adapt_generator` may do."""
    run_config = tiny_run(client__models="mlp", rounds=1, t2i__samples_per_round=10)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.adapt_generator = lambda server_round, pool: loss

    strategy.start(make_grid(run_config, nodes=2))

    folder = strategy.recorder.run_folder
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics.read_text().splitlines()]
    assert lines[1]["generator"]["loss"] == (float(loss) if math.isfinite(loss) else None)
    assert "LoRA" in folder.report.read_text() or not math.isfinite(loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_values_that_are_not_finite_is_refused(value, adapted, tmp_path):
    adapted.adapter.save(tmp_path / "lora")
    file = tmp_path / "lora" / WEIGHT_NAME
    state = load_file(file)
    name = sorted(state)[3]
    state[name].view(-1)[0] = value
    save_file(state, file)

    with pytest.raises(ConfigError, match=rf"'t2i.adapter': {tmp_path}/lora has NaN or infinite values in 1 of \d+ "):
        Generator(FAST.model_copy(update={"adapter": str(tmp_path / "lora")}), seed=0)
    own = {key.removeprefix("unet."): tensor for key, tensor in state.items()}
    with pytest.raises(ConfigError, match=r"the checkpoint of round 3 has NaN .* such as '.*': .*; allowed: finite"):
        adapted.adapter.load_state(own, "the checkpoint of round 3")


def test_text_embeddings_tell_classes_apart(generator):
    embeddings_ND = generator.encoder.text_embeddings(["the digit one", "the number one", "the digit two"]).astype(
        float
    )
    assert np.linalg.norm(embeddings_ND, axis=1) == pytest.approx(np.ones(3), abs=1e-2)
    assert embeddings_ND[0] @ embeddings_ND[1] > embeddings_ND[0] @ embeddings_ND[2] + 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, r"'t2i.model' is '/no/such/folder'.*is no folder"),
        ({"model": "nobody/nothing"}, r"'t2i.model' is 'nobody/nothing', which diffusers cannot load: .*hf auth login"),
        ({"lora_targets": ("attention", "nose")}, r"'t2i.lora-targets' has 'nose'.*allowed: attention, convolution"),
        ({"device": ("warp",)}, r"device 'warp' cannot be used"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        Generator(FAST.model_copy(update=changes), seed=0)


def test_a_folder_that_holds_another_kind_of_pipeline_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4, layers_per_block=1)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unconditional")
    with pytest.raises(
        ConfigError, match=r"a DDPMPipeline; allowed: PixArtAlphaPipeline, .*StableDiffusionPipeline, Stable"
    ):
        Generator(FAST.model_copy(update={"model": str(tmp_path / "unconditional")}), seed=0)


def test_a_full_disk_leaves_the_old_adapter(adapted, tmp_path):
    """In a process of its own, files may grow to 64 kB: saving fails as it does on a full disk."""
    adapted.adapter.save(tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from fedmmkt.common.config import T2IConfig; from fedmmkt.server_app.t2i.generator import Generator\n"
        "generator = Generator(T2IConfig(), 3)\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "generator.adapter.save(Path(sys.argv[1]))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "lora")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]

"""Champion and challenger with the real starter model and real clients."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmmkt.common.config import RunConfig
from fedmmkt.common.payloads import DistillationPayload
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.guard import NO_TRIAL, Arms, GuardState, Trial
from fedmmkt.server_app.strategy import placeholder_report
from fedmmkt.server_app.t2i.samples import Samples, sample_seeds
from fedmmkt.server_app.trial import Guard, log_verdict, varied

HARM = {
    "t2i__guard": 0.125,
    "t2i__adaptation_learning_rate": 0.1,
    "t2i__adaptation_steps": 12,
    "t2i__samples_per_round": 120,
}

NOBODY = torch.zeros(40, dtype=torch.bool)


def states_equal(some, others):
    return all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture
def strategy(tiny_run):
    return build_strategy(RunConfig.from_flower(tiny_run()), 1)


@pytest.fixture
def challenger(strategy):
    torch.manual_seed(0)
    return {name: 0.3 * torch.randn_like(tensor) for name, tensor in strategy.generator.adapter.state().items()}


def test_both_make_their_part_of_a_batch_in_the_order_of_the_prompts(strategy, challenger):
    generator, prompts = strategy.generator, strategy.make_prompts(1)
    strategy.ledger.guard = GuardState(Trial(challenger))
    guard = Guard(0.25, generator, strategy.ledger)
    before = {name: tensor.clone() for name, tensor in generator.adapter.state().items()}

    def generate(part, new=False):
        return generator.generate([prompt.text for prompt in part], sample_seeds(0, 1, len(part)), 1.0)

    batch, arms = guard.generate(prompts, 0, generate)

    made_N = arms.made_N
    assert int(made_N.sum()) == 22  # Of 30; a quarter is the champion's.
    assert batch.prompts == tuple(prompt.text for prompt in prompts)
    assert states_equal(generator.adapter.state(), before)
    by_champion = generate([prompt for prompt, made in zip(prompts, made_N, strict=True) if not made])
    assert torch.allclose(batch.latents_NCHW[~made_N], by_champion.latents_NCHW, atol=1e-4)
    generator.adapter.load_state(challenger, "the challenger")
    by_challenger = generate([prompt for prompt, made in zip(prompts, made_N, strict=True) if made])
    assert torch.allclose(batch.latents_NCHW[made_N], by_challenger.latents_NCHW, atol=1e-4)


def test_after_an_update_was_taken_back_the_next_makes_the_smaller_part(strategy, challenger):
    strategy.ledger.guard = GuardState(Trial(challenger), 0.5, trusted=False)
    guard = Guard(0.2, strategy.generator, strategy.ledger)
    prompts = strategy.make_prompts(1)

    _, arms = guard.generate(prompts, 0, lambda part, new: strategy.generate(1, part, []))

    assert int(arms.made_N.sum()) == 6


def test_a_batch_of_one_sample_is_the_champions(strategy, challenger):
    strategy.ledger.guard = GuardState(Trial(challenger))
    guard, prompts = Guard(0.25, strategy.generator, strategy.ledger), strategy.make_prompts(1)[:1]

    batch, arms = guard.generate(prompts, 0, lambda part, new: strategy.generate(1, part, []))

    assert batch.prompts == (prompts[0].text,)
    assert arms.made_N.tolist() == [False]


def test_each_adapter_varies_the_first_part_of_what_it_makes():
    made_N = torch.tensor([True, False, True, True, False, True, True])

    varied_N = varied((made_N, ~made_N), 0.5)

    assert varied_N.tolist() == [True, True, True, False, False, False, False]  # Two of five, one of two.
    assert not bool(varied((made_N, ~made_N), 0.0).any())


@pytest.mark.parametrize(
    ("share", "number", "trusted", "explores"),
    [(0.25, 0, True, False), (0.25, 1, True, True), (0.25, 2, False, False), (0.0, 0, True, True)],
)
def test_the_t2i_varies_samples_if_clients_accepted_its_last_update(strategy, share, number, trusted, explores):
    strategy.ledger.guard = GuardState(number=number, trusted=trusted)
    strategy.guard.share = share
    prompts = strategy.make_prompts(1)
    first = strategy.generate(1, prompts, [])
    pool = [replace(first, scores_N=torch.ones(len(prompts)))]

    batch, new = strategy.generate(2, prompts, pool), strategy.generate(2, prompts, [])

    alike = (batch.latents_NCHW - new.latents_NCHW).abs().flatten(1).amax(1).lt(1e-3).tolist()
    assert (not all(alike)) == explores
    assert all(alike[15:])  # The first half of 30 samples may be variations.


@pytest.mark.parametrize(("strength", "counts"), [(0.5, True), (0.0, False)])
def test_variations_that_no_adapter_denoises_say_nothing_of_either(strategy, challenger, strength, counts):
    """Votes go to the challenger's variations, which are all of class 0, and to the champion's new samples."""
    generator = strategy.generator
    generator.config = generator.config.model_copy(update={"explore_strength": strength})
    made_N, prompted_N = torch.arange(40) % 2 == 1, torch.arange(40) // 20
    varied_N = varied((made_N, ~made_N), 0.5)
    ledger = strategy.ledger
    ledger.arms, ledger.guard = Arms(made_N, challenger, 1, NOBODY), GuardState(Trial(challenger), number=1)
    ledger.pool = [Samples(("",) * 40, prompted_N, np.zeros((40, 0, 0, 3), np.uint8), torch.zeros(40, 4, 8, 8))]
    votes_N = torch.where(varied_N, 100.0 * made_N, 1.0 * ~made_N)
    logits_NC, counts_C = np.zeros((40, 2), np.float16), np.array([5, 5])
    payload = DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=counts_C, votes_N=votes_N.numpy())
    answer = Answer(placeholder_report("image"), payload)

    judged = Guard(0.25, generator, ledger, explore=0.5).judge([answer], prompted_N, None)

    # Where both count, the two preferences are as clear, and balance.
    assert judged["preference"]["votes"] == (pytest.approx(0, abs=1e-6) if counts else pytest.approx(-4.36, abs=0.01))


def test_once_the_t2i_is_adapted_the_unadapted_one_makes_a_part_of_new_images(strategy, challenger):
    generator, prompts = strategy.generator, strategy.make_prompts(1)
    first = strategy.generate(1, prompts, [])
    pool = [replace(first, scores_N=torch.ones(len(prompts)))]
    strategy.ledger.pool = pool
    guard = strategy.guard = Guard(0.25, generator, strategy.ledger, explore=1.0, most_base=0.5)
    strategy.ledger.guard = GuardState(Trial(challenger), base_worth=0.2, number=1)
    assert guard.base_share == 0  # The champion is the unadapted T2I.
    generator.adapter.load_state(challenger, "the champion")

    made = strategy.ahead.make(2, [])

    prompts, batch, arms = made.prompts, made.samples, made.arms
    assert int(arms.base_N.sum()) == 6  # A fifth of 30.
    assert int(arms.made_N.sum()) == 18  # Three quarters of the rest.
    assert not bool((arms.base_N & arms.made_N).any())
    assert states_equal(generator.adapter.state(), challenger)
    generator.adapter.load_state(generator.adapter.unadapted, "no adapter")
    assert generator.adapter.is_unadapted
    by_base = strategy.generate(2, [prompt for prompt, base in zip(prompts, arms.base_N, strict=True) if base], [])
    assert torch.allclose(batch.latents_NCHW[arms.base_N], by_base.latents_NCHW, atol=1e-4)


@pytest.mark.parametrize(("number", "share", "most"), [(0, 0.25, 0.5), (1, 0.0, 0.5), (1, 0.25, 0.0)])
def test_the_unadapted_t2i_makes_no_part(strategy, challenger, number, share, most):
    """Of a run that starts with an adapter, one in which every update is kept, and one that wants none of it."""
    strategy.generator.adapter.load_state(challenger, "the champion")
    strategy.ledger.guard = GuardState(number=number)
    guard = Guard(share, strategy.generator, strategy.ledger, most_base=most)

    assert guard.base_share == 0


@pytest.mark.parametrize(("count", "parts"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (1, 1, 2))])
def test_in_a_small_batch_champion_and_challenger_come_first(strategy, challenger, count, parts):
    strategy.generator.adapter.load_state(challenger, "the champion")
    strategy.ledger.guard = GuardState(Trial(challenger), number=1)
    guard = Guard(0.25, strategy.generator, strategy.ledger, most_base=0.5)
    prompts = strategy.make_prompts(1)[:count]

    _, arms = guard.generate(prompts, 0, lambda part, new: strategy.generate(1, part, []))

    assert tuple(int(part_N.sum()) for part_N in (arms.champion_N, arms.made_N, arms.base_N)) == parts


@pytest.mark.parametrize(
    ("adapted", "bases", "variations", "share"), [(True, 10, (10, 15), 0.375), (False, 0, (0, 10), 0)]
)
def test_what_the_unadapted_t2i_makes_follows_from_the_scores(strategy, challenger, adapted, bases, variations, share):
    """Its new samples have score 1, those of adapted ones 3. If it is the champion, the champion's samples are its."""
    generator, ledger = strategy.generator, strategy.ledger
    if adapted:
        generator.adapter.load_state(challenger, "the champion")
    made_N, base_N = torch.arange(40) >= 20, torch.arange(40) < bases
    prompted_N = torch.zeros(40, dtype=torch.int64)
    scores_N = torch.where(base_N if adapted else ~made_N, 1.0, 3.0)
    scores_N[slice(*variations)], scores_N[20:30] = 99.0, 99.0  # Variations, the first half of what each adapter makes.
    samples = Samples(("",) * 40, prompted_N, np.zeros((40, 0, 0, 3), np.uint8), torch.zeros(40, 4, 8, 8), scores_N)
    ledger.pool, ledger.arms = [samples], Arms(made_N, challenger, 1, base_N)
    ledger.guard = GuardState(Trial(challenger), number=1)

    judged = Guard(0.25, generator, ledger, explore=0.5, most_base=0.5).judge([], prompted_N, None)

    assert ledger.guard.base_worth == 0.375  # Halfway from 1/2 to 1 / (1 + 3).
    assert judged["base_share"] == share


@pytest.mark.parametrize(
    ("verdict", "z", "rounds", "said"),
    [
        ("accepted", 2.0, 1, "is accepted: clients prefer its images (votes +2.0 sd)"),
        ("undecided", 1.0, 1, "waits: not clear yet (votes +1.0 sd), round 1 of at most 3"),
        ("taken back", -2.0, 1, "clients prefer the images before it (votes -2.0 sd)"),
        ("taken back", 1.0, 3, "clients do not clearly prefer its images in 3 rounds (votes +1.0 sd)"),
    ],
)
def test_the_log_says_what_was_decided_and_why(caplog, verdict, z, rounds, said):
    judged = {"verdict": verdict, "preference": {"votes": z}, "rounds": rounds, "step": 0.5, "base_share": 0.0}

    with caplog.at_level("INFO"):
        log_verdict(judged)

    assert said in caplog.text


@pytest.mark.parametrize("feedback", ["logits+votes", "logits"])
def test_an_update_made_to_harm_is_taken_back(tiny_run, make_grid, feedback, caplog):
    changes = HARM | {"rounds": 3, "client__models": "cnn,mlp", "client__warmup_epochs": 8, "feedback": feedback}
    run_config = tiny_run(**changes)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    before = {name: tensor.clone() for name, tensor in strategy.generator.adapter.state().items()}

    strategy.start(make_grid(run_config, nodes=2))

    assert states_equal(strategy.generator.adapter.state(), before)
    lines = strategy.recorder.run_folder.read_metrics()
    assert "guard" not in lines[1]
    verdicts = [line["guard"] for line in lines[2:]]
    assert all(verdict["verdict"] == "taken back" for verdict in verdicts)
    assert [verdict["step"] for verdict in verdicts] == [1 / 2, 1 / 4]
    assert set(verdicts[0]["preference"]) == {"votes", "agreement"} - ({"votes"} if feedback == "logits" else set())
    assert "the T2I's update is taken back: clients prefer the images before it" in caplog.text
    sizes = [len(samples) for samples in strategy.ledger.pool]
    assert sizes == [120, 15, 105]  # A refused challenger's samples teach nobody; the second made the smaller part.


def test_an_update_made_to_harm_is_taken_back_with_three_liars_among_ten(tiny_run, make_grid):
    """Liars name other classes, vote for what shows their class least, and claim a thousand times their images."""
    changes = HARM | {"rounds": 2, "client__models": "cnn,mlp", "client__warmup_epochs": 8, "min_available_nodes": 10}
    liars = {"extra.attack": "inflated", "extra.liars": "0,1,2", "extra.honest-rounds": 0}
    run_config = tiny_run(**changes) | liars
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    before = {name: tensor.clone() for name, tensor in strategy.generator.adapter.state().items()}

    strategy.start(make_grid(run_config, nodes=10, app="benchmarks.robustness:app"))

    assert states_equal(strategy.generator.adapter.state(), before)
    lines = strategy.recorder.run_folder.read_metrics()
    assert [line["guard"]["verdict"] for line in lines[2:]] == ["taken back"]


def test_without_the_guard_the_same_update_is_kept(tiny_run, make_grid):
    run_config = tiny_run(**HARM | {"t2i__guard": 0.0}, rounds=1, min_available_nodes=1, client__models="mlp")
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    before = {name: tensor.clone() for name, tensor in strategy.generator.adapter.state().items()}

    strategy.start(make_grid(run_config, nodes=1))

    assert not states_equal(strategy.generator.adapter.state(), before)
    assert strategy.ledger.guard == NO_TRIAL


def test_a_frozen_t2i_has_nothing_on_trial(tiny_run, make_grid):
    run_config = tiny_run(t2i__guard=0.125, t2i__scores="none", min_available_nodes=1, client__models="mlp")
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=1))

    assert all("guard" not in line for line in strategy.recorder.run_folder.read_metrics())


def test_prompts_without_classes_are_compared_too(tiny_run, make_grid, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the digit {name}"}) + "\n" for name in ("one", "two")))
    settings = {"t2i__guard": 0.25, "t2i__explore": 0.0, "min_available_nodes": 1, "client__models": "mlp"}
    run_config = tiny_run(t2i__prompts=str(prompts), **settings)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=1))

    preference = strategy.recorder.run_folder.read_metrics()[2]["guard"]["preference"]
    assert set(preference) == {"votes", "agreement"}
    assert all(z != 0 for z in preference.values())


def test_a_resumed_run_goes_on_with_its_trial(tiny_run, make_grid):
    changes = {"t2i__guard": 0.25, "min_available_nodes": 1, "client__models": "mlp"}

    def run(run_config, run_id):
        strategy = build_strategy(RunConfig.from_flower(run_config), run_id)
        strategy.start(make_grid(run_config, nodes=1))
        return strategy

    whole = run(tiny_run(name="whole", **changes), 1)
    run(tiny_run(name="cut", rounds=1, **changes), 2)
    resumed = run(tiny_run(name="cut", **changes) | {"resume-from": tiny_run(name="cut")["output-dir"]}, 3)

    verdicts = [strategy.recorder.run_folder.read_metrics()[2]["guard"] for strategy in (whole, resumed)]
    assert verdicts[0]["preference"] == verdicts[1]["preference"]
    assert states_equal(whole.generator.adapter.state(), resumed.generator.adapter.state())
    assert resumed.ledger.guard.step == whole.ledger.guard.step

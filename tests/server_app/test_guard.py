"""The guard's decisions, with hand-computed evidence."""

import numpy as np
import pytest
import torch

from fedmmkt.server_app.guard import (
    PATIENCE,
    SMALLEST_STEP,
    Evidence,
    GuardState,
    Opinion,
    Trial,
    after_round,
    centred_ranks,
    compare,
    decide,
    spread_part,
    worth_of_base,
)

BETTER, WORSE, EVEN = Evidence(30, 100), Evidence(-30, 100), Evidence(5, 100)


def opinion(*rows):
    values_KN = torch.tensor(rows, dtype=torch.float64)
    return Opinion(values_KN, torch.ones_like(values_KN))


def test_equal_values_share_a_rank():
    ranks = centred_ranks(torch.tensor([[5.0, 0.0, 0.0, 7.0]]))

    assert ranks[0].tolist() == pytest.approx([3 / 5 - 0.5, 1.5 / 5 - 0.5, 1.5 / 5 - 0.5, 4 / 5 - 0.5])


def test_the_evidence_is_that_of_the_rank_test_by_hand():
    challenger = torch.tensor([False, False, True, True])

    found = compare(opinion([1, 2, 3, 4]), challenger, torch.zeros(4, dtype=torch.int64))

    # Ranks 1 to 4 of 5, centred: -.3, -.1, .1, .3. The challenger has .1 + .3; variance 2 * 2 / (4 * 3) * .2.
    assert found.effect == pytest.approx(0.4)
    assert found.variance == pytest.approx(0.2 / 3)
    assert found.z == pytest.approx(0.4 / np.sqrt(0.2 / 3))


def test_samples_are_compared_within_their_class_alone():
    # The challenger drew a class that gets many votes; within each class both are alike.
    challenger = torch.tensor([False, True, False, True, True, True])
    group = torch.tensor([0, 0, 1, 1, 2, 2])

    assert compare(opinion([1, 1, 50, 50, 90, 95]), challenger, group) == Evidence()


def test_evidence_without_a_preference_is_standard_normal_even_if_all_clients_see_the_same():
    rng = np.random.default_rng(0)
    z = []
    for _ in range(400):
        seen = torch.from_numpy(np.repeat(rng.exponential(size=(1, 60)), 5, axis=0))  # Five clients, one taste.
        made = torch.zeros(60, dtype=torch.bool)
        made[torch.from_numpy(rng.permutation(60)[:50])] = True
        z.append(compare(Opinion(seen, torch.ones(5, 60)), made, torch.arange(60) % 3).z)

    assert np.mean(z) == pytest.approx(0, abs=0.15)
    assert np.std(z) == pytest.approx(1, abs=0.1)


def test_noise_of_private_votes_makes_the_same_preference_less_clear():
    rng = np.random.default_rng(0)
    made = torch.from_numpy(rng.permutation(np.arange(200) < 100))
    votes = torch.from_numpy(rng.poisson(np.where(made, 4.0, 2.0), size=(4, 200))).double()
    noised = votes + 8 * torch.from_numpy(rng.normal(size=(4, 200)))
    group, weights = torch.arange(200) % 10, torch.ones(4, 200)

    clear, unclear = compare(Opinion(votes, weights), made, group), compare(Opinion(noised, weights), made, group)

    assert clear.z > 8
    assert 0 < unclear.z < clear.z / 2


def test_liars_with_huge_votes_count_no_more_than_their_ranks():
    rng = np.random.default_rng(0)
    made = torch.from_numpy(rng.permutation(np.arange(100) < 50))
    honest = torch.from_numpy(rng.poisson(np.where(made, 4.0, 1.0), size=(7, 100))).double()
    liars = 1e6 * (~made).double().expand(3, 100)  # They know which are which, and vote for the others.

    found = compare(Opinion(torch.cat([honest, liars]), torch.ones(10, 100)), made, torch.zeros(100))

    assert found.z > 1.645


@pytest.mark.parametrize(
    ("votes", "agreement", "rounds", "verdict"),
    [
        (BETTER, EVEN, 1, "accepted"),
        (EVEN, BETTER, 1, "accepted"),
        (WORSE, EVEN, 1, "taken back"),
        (EVEN, WORSE, 1, "taken back"),
        (BETTER, WORSE, 1, "undecided"),
        (EVEN, EVEN, PATIENCE - 1, "undecided"),
        (EVEN, EVEN, PATIENCE, "taken back"),  # Both lean towards it, neither clearly.
        (Evidence(-8, 100), EVEN, PATIENCE, "taken back"),
        (BETTER, WORSE, PATIENCE, "taken back"),  # Equally clear.
        (Evidence(-20, 100), Evidence(56, 100), PATIENCE, "accepted"),  # The clearer one decides.
        (Evidence(-20, 100), Evidence(56, 100), PATIENCE - 1, "undecided"),
        (BETTER, EVEN, PATIENCE, "accepted"),
    ],
)
def test_votes_and_agreement_are_looked_at_apart(votes, agreement, rounds, verdict):
    assert decide({"votes": votes, "agreement": agreement}, rounds) == verdict


def test_logits_alone_decide_and_nobody_s_word_keeps_no_update():
    assert decide({"agreement": BETTER}, 1) == "accepted"
    assert decide({}, 1) == "undecided"
    assert decide({}, PATIENCE) == "taken back"


def test_evidence_adds_up_over_rounds():
    made = torch.tensor([True, False])
    state = GuardState(Trial({"a": torch.ones(1)}, made=(made,)))

    state, first, _ = after_round(state, {"votes": Evidence(14, 100)})
    state = GuardState(state.trial.with_batch(made))
    after, second, evidence = after_round(state, {"votes": Evidence(14, 100)})

    assert (first, second) == ("undecided", "accepted")  # 1.4 sd, then 28 / sqrt(200) = 1.98 sd.
    assert evidence["votes"] == Evidence(28, 200)
    assert after.trial is None


def test_the_step_is_halved_with_each_update_taken_back_and_grows_again():
    made, steps, state = torch.tensor([True, False]), [], GuardState()
    for found in [WORSE] * 8 + [BETTER] * 2:
        trial = Trial({}, made=(made,))
        state, _, _ = after_round(GuardState(trial, state.step, state.trusted), {"votes": found})
        steps.append((state.step, state.trusted))

    assert steps[:3] == [(1 / 2, False), (1 / 4, False), (1 / 8, False)]
    assert steps[7] == (SMALLEST_STEP, False)
    assert steps[8:] == [(2 * SMALLEST_STEP, True), (4 * SMALLEST_STEP, True)]


def test_the_champion_s_part_is_spread_over_classes():
    group = np.random.default_rng(0).permutation(np.arange(400) % 10)

    part = spread_part(group.tolist(), 0.125, seed=3)

    assert len(set(part.tolist())) == len(part) == 50
    assert np.bincount(group[part]).tolist() == [5] * 10
    assert not np.array_equal(part, spread_part(group.tolist(), 0.125, seed=4))


@pytest.mark.parametrize(("count", "share", "made"), [(2, 0.125, 1), (2, 0.875, 1), (3, 0.5, 2), (8, 0.125, 1)])
def test_both_have_a_part_in_a_small_batch(count, share, made):
    assert len(spread_part([0] * count, share, seed=0)) == made


def test_the_worth_of_the_unadapted_model_is_its_part_of_the_mean_scores():
    scores_N = torch.tensor([1.0, 3.0, 6.0, 100.0])
    base_N, adapted_N = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])

    assert worth_of_base(0.75, scores_N, base_N, adapted_N) == 0.5  # Halfway from 3/4 to 2 / (2 + 6).
    assert worth_of_base(0.75, torch.zeros(4), base_N, adapted_N) == 0.75
    assert worth_of_base(0.75, scores_N, base_N, base_N & adapted_N) == 0.75  # The adapted one made nothing.


def test_the_state_survives_a_checkpoint():
    trial = Trial({"lora.a": torch.rand(2, 3)}, {"votes": Evidence(1.5, 4)}, (torch.tensor([True, False]),))
    state = GuardState(trial, 0.25, trusted=False, number=3, base_worth=0.125)

    again = GuardState.from_parts(state.to_json(), state.tensors())

    assert (again.step, again.trusted, again.trial.evidence) == (0.25, False, trial.evidence)
    assert torch.equal(again.trial.challenger["lora.a"], trial.challenger["lora.a"])
    assert [made.tolist() for made in again.trial.made] == [[True, False]]
    assert again.base_worth == 0.125
    assert GuardState.from_parts(GuardState().to_json(), {}) == GuardState()


def test_the_state_of_a_checkpoint_from_before_the_unadapted_model_had_a_part_is_read():
    before = {name: value for name, value in GuardState(number=3).to_json().items() if name != "base_worth"}

    assert GuardState.from_parts(before, {}) == GuardState(number=3)


@pytest.mark.parametrize("found", [BETTER, WORSE])
def test_the_worth_of_the_unadapted_model_outlives_a_trial(found):
    state, _, _ = after_round(GuardState(Trial({}, made=(torch.ones(2),)), base_worth=0.125), {"votes": found})

    assert (state.trial, state.base_worth) == (None, 0.125)

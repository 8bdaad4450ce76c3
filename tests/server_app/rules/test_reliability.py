"""Who is relied on, with correlations computed by hand: clients that know much, that know nothing, that lie."""

import numpy as np
import pytest

from fedmmkt.common.payloads import DistillationPayload
from fedmmkt.server_app.rules.reliability import Judgement, Standing, judge_answers, weighed

CLASSES = ("cat", "dog", "elk", "fox")
PROMPTED_N = np.repeat(np.arange(4), 100)  # A standard error of 0.05.
SURE = 20


def naming(named_N, counts_C=(10, 10, 10, 10), votes_N=None):
    """Answer with one sure class for each sample: p is 0 or 1."""
    logits_NC = np.zeros((len(named_N), 4), np.float16)
    logits_NC[np.arange(len(named_N)), named_N] = SURE
    votes_N = None if votes_N is None else np.asarray(votes_N, np.float32)
    return DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=np.array(counts_C), votes_N=votes_N)


def constant(logits_C, counts_C):
    logits_NC = np.tile(np.array(logits_C, np.float16), (400, 1))
    return DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=np.array(counts_C))


def mistaken(of_each):
    """Name the prompted class, but for so many samples of each class, which are named as the next class."""
    wrong_N = np.arange(400) % 100 < of_each
    return np.where(wrong_N, (PROMPTED_N + 1) % 4, PROMPTED_N)


def judge(payloads, known=None, prompted_N=PROMPTED_N):
    return judge_answers(payloads, prompted_N, known or {}, CLASSES)


def honest(count=3):
    return {f"honest-{index}": naming(PROMPTED_N) for index in range(count)}


RIGHT, NEXT = PROMPTED_N, (PROMPTED_N + 1) % 4
KNOWN = {name: Standing() for name in ("honest-0", "honest-1", "honest-2", "one")}


# ---------------------------------------------------------------------- first answers


def test_who_clearly_knows_its_classes_at_first_counts_whole():
    """60 of 100 right: (0.6 / 4 - 1 / 16) / (3 / 16) is 0.47, and a standard error of the mean of four 0.025."""
    answer = naming(mistaken(40))

    judged = judge(honest() | {"one": answer})

    assert {name: one.standing for name, one in judged.items()} == dict.fromkeys(judged, Standing())
    assert weighed(answer, judged["one"]) is answer


def test_who_shows_little_at_first_counts_in_proportion():
    """28 of 100 right: (0.28 / 4 - 1 / 16) / (3 / 16) is 0.04, 1.6 standard errors; the weight grows from 1 to 4."""
    judged = judge(honest() | {"one": naming(mistaken(72))})

    assert judged["one"].standing.weight == pytest.approx(0.6 / 3)
    assert judged["one"].standing.trust == 1
    assert judged["one"].standing.reason == (
        "its first answer does not show yet that it knows its classes (0.04, 1.6 standard errors above chance)"
    )
    assert weighed(naming(mistaken(72)), judged["one"]).class_counts_C.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "answer",
    [
        constant([SURE, 0, 0, 0], [30, 0, 0, 0]),  # It knows one class alone, and sees it everywhere.
        constant([0, 0, 0, 0], [10, 10, 10, 10]),
        naming(np.tile([0, 1, 2, 3], 100)),  # At chance: the correlation is 0.
        naming(mistaken(79)),  # 21 of 100 right, so slightly below chance.
    ],
)
def test_who_shows_nothing_at_first_has_no_weight_but_keeps_its_trust(answer):
    judged = judge(honest() | {"one": answer})

    assert (judged["one"].standing.weight, judged["one"].standing.trust) == (0, 1)
    assert weighed(answer, judged["one"]) is None


def test_if_nobody_shows_anything_at_first_all_count_whole():
    judged = judge({name: naming(np.tile([0, 1, 2, 3], 100)) for name in ("a", "b")})

    assert {name: one.standing for name, one in judged.items()} == {"a": Standing(), "b": Standing()}
    assert {one.excess for one in judged.values()} == {0}  # Nobody counts for more than the median client.


def test_who_says_other_classes_at_first_is_left_out():
    """p is 0 on the prompted class and 1 on a third of the rest: (0 - 1/4 * 1/4) / (3/16) is -1/3."""
    judged = judge(honest() | {"one": naming(NEXT)})

    assert judged["one"].standing == Standing(0.0, 0.0, True, "its answers contradict the prompts (-0.33)")
    assert weighed(naming(NEXT), judged["one"]) is None
    assert all(judged[name].standing == Standing() for name in honest())


def test_how_far_first_answers_may_count_for_more_than_the_median_depends_on_what_they_know():
    judged = judge({"right": naming(RIGHT), "random": naming(np.tile([0, 1, 2, 3], 100))})

    assert (judged["right"].excess, judged["random"].excess) == (0.4, 0.0)


# ---------------------------------------------------------------------- later answers


def test_who_still_knows_nothing_when_the_others_do_is_left_out():
    judged = judge(honest() | {"one": naming(np.tile([0, 1, 2, 3], 100))}, KNOWN)

    # Two standard errors may be bad luck; with four classes they are half as large: 0 + 2 * 0.05 / 2 of 1.
    assert judged["one"].standing.trust == pytest.approx(0.05)
    assert judged["one"].standing.weight == 0
    assert judged["one"].standing.reason == "its answers fit the prompts by 0.00, those of most clients by 1.00"
    assert judged["honest-0"].standing == Standing()


def test_a_weak_client_counts_whole():
    """52 of 100 right: (0.52 / 4 - 1 / 16) / (3 / 16) is 0.36."""
    judged = judge(honest() | {"one": naming(mistaken(48))}, KNOWN)

    assert judged["one"].standing.trust == pytest.approx(0.36 + 0.05)
    assert judged["one"].standing.weight == 1


def test_a_client_is_compared_on_the_classes_that_it_holds_alone():
    """It is right about foxes, and calls everything else a cat."""
    named_N = np.where(PROMPTED_N == 3, 3, 0)

    judged = judge(honest() | {"one": naming(named_N, (0, 0, 0, 9))}, KNOWN)

    assert judged["one"].standing == Standing()
    assert not judged["one"].left_out_C.any()


def test_a_class_that_nobody_recognises_is_held_against_nobody():
    named_N = np.where(PROMPTED_N == 3, 0, PROMPTED_N)  # The T2I model draws foxes like cats.
    payloads = {name: naming(named_N) for name in KNOWN}

    judged = judge(payloads, KNOWN)

    assert all(one.standing.weight == 1 and not one.left_out_C.any() for one in judged.values())


def test_a_lie_about_one_class_costs_the_voice_on_that_class():
    named_N = np.where(PROMPTED_N == 3, 0, PROMPTED_N)

    judged = judge(honest() | {"one": naming(named_N, (7, 7, 7, 7))}, KNOWN)

    assert judged["one"].left_out_C.tolist() == [False, False, False, True]
    assert judged["one"].standing.reason == "its answers contradict the prompts on fox"
    assert judged["one"].excess == 0
    assert weighed(naming(named_N, (7, 7, 7, 7)), judged["one"]).class_counts_C.tolist() == [7, 7, 7, 0]


def test_trust_falls_at_once_and_comes_back_slowly():
    weights, known = [], dict(KNOWN)
    for named_N in (RIGHT, NEXT, RIGHT, RIGHT, RIGHT):
        known = {name: one.standing for name, one in judge(honest() | {"one": naming(named_N)}, known).items()}
        weights.append(known["one"].weight)

    # Trust after the lie is -1/3 + 0.05; then a quarter of what is missing to 1 comes back each time.
    trust = [-0.28333, 0.0375, 0.278125, 0.45859]
    assert weights == pytest.approx([1, 0, 0, (trust[2] - 0.25) / 0.15, 1], abs=1e-3)


def test_if_nobody_were_left_all_count():
    judged = judge({"a": naming(NEXT), "b": naming(NEXT)})

    assert all(one.standing == Standing() and one.excess == 0 for one in judged.values())


def test_many_liars_do_not_move_what_others_are_compared_with():
    payloads = honest() | {f"liar-{index}": naming(NEXT, (10**9,) * 4) for index in range(5)}
    known = {name: Standing() for name in payloads}

    judged = judge(payloads, known)

    assert {name: one.standing.weight for name, one in judged.items()} == dict.fromkeys(honest(), 1) | {
        f"liar-{index}": 0 for index in range(5)
    }


# ---------------------------------------------------------------------- prompts without a class


def test_nobody_is_judged_by_samples_whose_prompts_name_no_class():
    payloads = honest() | {"one": naming(NEXT)}
    half_N = np.where(np.arange(400) % 2, PROMPTED_N, -1)

    judged, unjudged = judge(payloads, KNOWN, half_N), judge(payloads, KNOWN, np.full(400, -1))

    assert [judged[name].standing.weight for name in payloads] == [1, 1, 1, 0]
    assert [(one.standing.weight, one.excess) for one in unjudged.values()] == [(1, 1)] * 4


# ---------------------------------------------------------------------- votes


def votes_for(place):
    """One vote for one sample of each class."""
    votes_N = np.zeros(400)
    votes_N[np.arange(4) * 100 + place] = 1
    return votes_N


def test_votes_for_samples_that_do_not_show_the_prompt_do_not_count():
    """Four of each class do not; the honest vote for others."""
    sights_N = mistaken(4)
    payloads = {f"honest-{index}": naming(sights_N, votes_N=votes_for(10)) for index in range(3)}
    wrong_N = sum(votes_for(place) for place in range(4))

    judged = judge(payloads | {"one": naming(sights_N, votes_N=wrong_N)})

    assert judged["one"].standing.weight == 1
    assert not judged["one"].standing.votes
    assert judged["one"].standing.reason.startswith("its votes are for samples in which clients do not see the prompt")
    assert weighed(payloads["honest-0"], judged["honest-0"]) is payloads["honest-0"]
    answer = weighed(naming(sights_N, votes_N=wrong_N), judged["one"])
    assert answer.votes_N is None
    assert answer.class_counts_C.tolist() == [10] * 4


def test_votes_unlike_those_of_the_others_do_not_count():
    payloads = {f"honest-{index}": naming(RIGHT, votes_N=votes_for(10) + votes_for(11 + index)) for index in range(4)}

    judged = judge(payloads | {"one": naming(RIGHT, votes_N=sum(votes_for(place) for place in range(5)))})

    assert [judged[name].standing.votes for name in judged] == [True] * 4 + [False]
    assert judged["one"].standing.reason.startswith("its votes are like those of the others by -0.")


# ---------------------------------------------------------------------- what counts of an answer


def test_a_part_of_a_voice_is_a_part_of_counts_and_votes():
    answer = naming(RIGHT, (10, 5, 0, 0), votes_N=np.full(400, 0.5))

    part = weighed(answer, Judgement(Standing(0.325, 0.5), np.zeros(4, bool)))

    assert part.class_counts_C.tolist() == [5, 3, 0, 0]  # Rounded up, so that no held class is lost.
    assert part.votes_N.tolist() == [0.25] * 400


def noisy_votes(seed, favourites, noise=4.0):
    """Vote without logits for some samples of each class, with noise."""
    votes_N = np.where(np.arange(400) % 100 < favourites, 20, 0) + np.random.default_rng(seed).normal(0, noise, 400)
    return DistillationPayload(
        batch_id="b", class_counts_C=np.full(4, 50), votes_N=votes_N.astype(np.float32), votes_noise=noise
    )


def test_votes_with_noise_are_compared_by_what_is_not_noise():
    """Three agree; the fourth has noise alone, as a client with few images has; none is blamed for that."""
    payloads = {f"honest-{seed}": noisy_votes(seed, favourites=10) for seed in range(3)}

    judged = judge(payloads | {"one": noisy_votes(3, favourites=0)})

    assert {name: one.standing for name, one in judged.items()} == dict.fromkeys(judged, Standing())


def test_little_noise_is_no_excuse_for_other_votes():
    payloads = {f"honest-{seed}": noisy_votes(seed, favourites=10) for seed in range(3)}
    against_N = np.where(np.arange(400) % 100 < 10, 0, 20).astype(np.float32)
    liar = noisy_votes(3, 0).model_copy(update={"votes_N": against_N, "votes_noise": 0.1})

    judged = judge(payloads | {"one": liar})

    assert [judged[name].standing.votes for name in (*payloads, "one")] == [True, True, True, False]
    assert weighed(liar, judged["one"]).votes_N is None


def without_logits(votes_N, noise=3.0):
    counts_C = np.array([25, 25, 25, 25])
    votes_N = np.asarray(votes_N, np.float32)
    return DistillationPayload(batch_id="b", class_counts_C=counts_C, votes_N=votes_N, votes_noise=noise)


def test_without_logits_only_votes_that_are_like_the_others_may_count_for_more_than_the_median_client():
    """Who sends no logits could otherwise escape the question whether it knows anything, and outvote the others."""
    rng = np.random.default_rng(0)
    liked_N = 20.0 * (np.arange(400) % 4 == 0)
    payloads = {name: without_logits((liked_N + rng.normal(0, 3, 400)).clip(min=-20)) for name in ("a", "b", "c")}
    payloads["liar"] = without_logits(100.0 * (np.arange(400) % 100 == 50))
    payloads["silent"] = DistillationPayload(batch_id="b", class_counts_C=np.array([1, 1, 1, 1]), counts_noise=1.0)

    judged = judge(payloads)

    assert {name: one.excess for name, one in judged.items()} == {"a": 0.4, "b": 0.4, "c": 0.4, "liar": 0, "silent": 0}
    assert all(one.standing == Standing() for name, one in judged.items() if name != "liar")

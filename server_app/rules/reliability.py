"""How far the clients' answers can be relied on, by what the server's own prompts say and by what other clients say.

The server knows which class a prompt names. So it can tell whether a client's probability of a class is higher on the
samples that were prompted for it: the correlation of the two, class by class. A client is measured on the classes that
it claims to hold, against what clients reach on these classes. So one or two classes, a weak model, or a class that
the T2I model draws badly are no reason for suspicion. A client counts less if it is clearly worse than the others
allow, or if its first answer does not show yet that it knows its classes; every other client has weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import softmax

from fedmmkt.common.payloads import DistillationPayload

NONE, FULL = 0.25, 0.4  # Agreement relative to the others up to which a client has no weight, and from which it has 1.
MODEST, LARGE = 0.6, 0.9  # The same, on its worst class, for how far it may count for more than the median client.
CONTRARY = 3.5  # Standard errors below chance at which a first answer is a lie.
UNSHOWN = 1.0  # Standard errors above chance up to which a first answer has no weight, since it shows nothing.
INFORMED, FIRST = 4.0, 0.4  # The same, from which its weight is 1, and how far it then may count for more.
CERTAIN = 2.0  # Standard errors by which an answer may be better than measured.
RECOVERY = 0.25  # Part of lost trust that comes back in a round.
UNLIKE = 3.0  # Standard errors below chance at which votes are against what the clients see.
NOT_SHOWN = "its first answer does not show yet that it knows its classes"
LEAST_SPREAD = 1e-6  # Standard deviation below which probabilities are constant.


@dataclass(frozen=True)
class Standing:
    """What a client counts for, and what the server remembers of it for the next round.

    Attributes
    ----------
    trust : float
        Agreement with the prompts relative to the other clients, up to 1. It falls at once and comes back slowly.
    weight : float
        What the client counts for, between 0 and 1.
    votes : bool
        Whether its votes count.
    reason : str
        Why it does not count whole; empty if it does.
    """

    trust: float = 1.0
    weight: float = 1.0
    votes: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """What a client's answer to one batch counts for.

    Attributes
    ----------
    standing : Standing
        The client's standing after this batch.
    left_out_C : numpy.ndarray
        bool; the classes on which the client does not count, since its answers contradict the prompts there.
    excess : float
        Between 0 and 1: how far the client may count for more than the median client.
    """

    standing: Standing
    left_out_C: np.ndarray
    excess: float = 1.0


@dataclass
class _Answer:
    """A client's answer to a batch, as far as it is measured."""

    payload: DistillationPayload
    standing: Standing | None  # None in its first answer.
    correlation_C: np.ndarray | None = None
    share_C: np.ndarray = field(default_factory=lambda: np.zeros(0))


def judge_answers(
    payloads: Mapping[str, DistillationPayload],
    prompted_N: np.ndarray,
    known: Mapping[str, Standing],
    classes: Sequence[str],
) -> dict[str, Judgement]:
    """Judge the clients' answers to one batch, before it is aggregated.

    A client that answers for the first time has not learned from the others yet. Its answers may be at chance; then
    nothing tells it from a liar, and it does not count beside those that show what they know. It is a lie only if it
    says other classes than the prompts, clearly below chance. From its second answer on, a client is compared with the
    median of those that are above chance. Who sends no logits may count for more than the median client only if its
    votes are clearly like those of the others: nothing else tells who it is.

    Parameters
    ----------
    payloads : mapping of str to DistillationPayload
        The answers by client, in the order in which sums are made. Answers without logits are not judged by them.
    prompted_N : numpy.ndarray
        int64; the class that each prompt names, -1 if it names none. By such samples nobody is judged: the consensus of
        the other clients, which could take the prompt's place, belongs to whoever is surest or most numerous.
    known : mapping of str to Standing
        The standing of each client that has answered, and learned from, an earlier batch.
    classes : sequence of str
        Names of the classes, for the reasons.

    Returns
    -------
    dict of str to Judgement
        One for each answer. If none were left, all count whole, since there is nothing to compare with, but none of
        them for more than the median client.
    """
    samples = int((prompted_N >= 0).sum())
    answers = {name: _Answer(payload, known.get(name)) for name, payload in payloads.items()}
    for answer in answers.values():
        _measure(answer, prompted_N)
    reference_C = _reference_C([one for one in answers.values() if one.standing is not None], samples)
    judged = {name: _judged(answer, reference_C, samples, classes) for name, answer in answers.items()}
    if not any(judgement.standing.weight for judgement in judged.values()):
        nothing_C = np.zeros(len(classes), bool)
        return {name: Judgement(Standing(), nothing_C, judgement.excess) for name, judgement in judged.items()}
    doubtful, alike = _judged_votes(answers, judged, prompted_N)
    for name, reason in doubtful.items():
        judgement = judged[name]
        standing = Standing(judgement.standing.trust, judgement.standing.weight, False, reason)
        judged[name] = Judgement(standing, judgement.left_out_C, judgement.excess)
    for name, answer in answers.items():
        if answer.payload.logits_NC is None:
            judged[name] = replace(judged[name], excess=FIRST if name in alike else 0.0)
    return judged


def weighed(payload: DistillationPayload, judgement: Judgement) -> DistillationPayload | None:
    """Return what counts of an answer; None if nothing does. An answer that counts whole is returned as it is."""
    weight, left_out_C = judgement.standing.weight, judgement.left_out_C
    counts_C = np.where(left_out_C, 0, payload.class_counts_C)
    if not weight or not counts_C.any():
        return None
    changes: dict[str, np.ndarray | float | None] = {}
    if weight < 1 or left_out_C.any():
        changes["class_counts_C"] = np.ceil(counts_C * weight).astype(np.int64)
    if payload.votes_N is not None and (weight < 1 or not judgement.standing.votes):
        changes["votes_N"] = (payload.votes_N * weight).astype(np.float32) if judgement.standing.votes else None
        changes["votes_noise"] = (payload.votes_noise or 0) * weight or None
    return payload.model_copy(update=changes) if changes else payload


# ---------------------------------------------------------------------- logits


def _probabilities_NC(payload: DistillationPayload) -> np.ndarray:
    assert payload.logits_NC is not None  # It is asked of answers with logits alone.
    return softmax(payload.logits_NC.astype(np.float64), axis=1)


def _measure(answer: _Answer, prompted_N: np.ndarray) -> None:
    """Correlate a client's probability of each class with whether a sample was prompted for it."""
    named_N = prompted_N >= 0
    payload = answer.payload
    if payload.logits_NC is None or not named_N.any():
        return
    labels_n, probabilities_nC = prompted_N[named_N], _probabilities_NC(payload)[named_N]
    samples, classes = probabilities_nC.shape
    part_C = np.bincount(labels_n, minlength=classes) / samples
    hit_C = np.bincount(labels_n, weights=probabilities_nC[np.arange(samples), labels_n], minlength=classes) / samples
    spread_C = probabilities_nC.std(0)
    scale_C = spread_C * np.sqrt(part_C * (1 - part_C))
    varies_C = (spread_C > LEAST_SPREAD) & (scale_C > 0)
    covariance_C = hit_C - probabilities_nC.mean(0) * part_C
    answer.correlation_C = np.where(varies_C, covariance_C / np.where(varies_C, scale_C, 1), 0.0)
    answer.share_C = _shares(payload.class_counts_C * (part_C > 0) * (part_C < 1))


def _reference_C(answers: Collection[_Answer], samples: int) -> np.ndarray | None:
    """Return the median correlation of the clients that are above chance, for each class; NaN where none is."""
    found = [answer.correlation_C for answer in answers if answer.correlation_C is not None]
    if not found:
        return None
    correlation_KC = np.stack(found)
    above_KC = np.where(correlation_KC > CERTAIN / math.sqrt(samples), correlation_KC, np.nan)
    known_C = ~np.isnan(above_KC).all(0)
    return np.where(known_C, np.nanmedian(np.where(known_C, above_KC, 0), axis=0), np.nan)


def _judged(answer: _Answer, reference_C: np.ndarray | None, samples: int, classes: Sequence[str]) -> Judgement:
    """Judge a client by its correlations."""
    before = answer.standing or Standing()
    nothing_C = np.zeros(len(classes), bool)
    if answer.correlation_C is None or not answer.share_C.any():
        return Judgement(Standing(before.trust, ramp(before.trust, NONE, FULL), reason=before.reason), nothing_C)
    noise = 1 / math.sqrt(samples)
    if answer.standing is None:
        return _judged_first(answer, noise)
    if reference_C is None:
        return Judgement(before, nothing_C)
    is_known_C = ~np.isnan(reference_C)
    share_C = _shares(answer.share_C * is_known_C)
    if not share_C.any():
        return Judgement(before, nothing_C)
    reference_C = np.where(is_known_C, reference_C, 1.0)
    reached, others = float(share_C @ answer.correlation_C), float(share_C @ reference_C)
    best = min(1.0, (reached + CERTAIN * noise * math.sqrt(share_C @ share_C)) / others)
    trust = best if best <= before.trust else before.trust + RECOVERY * (best - before.trust)
    best_C = np.where(share_C > 0, (answer.correlation_C + CERTAIN * noise) / reference_C, np.inf)
    left_out_C = best_C < NONE
    weight, reason = ramp(trust, NONE, FULL), ""
    if weight < 1:
        reason = f"its answers fit the prompts by {_told(reached)}, those of most clients by {others:.2f}"
        reason += "" if best < FULL else ", and did not in rounds before"
    elif left_out_C.any():
        names = [name for name, is_left_out in zip(classes, left_out_C, strict=True) if is_left_out]
        reason = f"its answers contradict the prompts on {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    return Judgement(Standing(trust, weight, True, reason), left_out_C, ramp(min(trust, best_C.min()), MODEST, LARGE))


def _judged_first(answer: _Answer, noise: float) -> Judgement:
    correlation_C = np.zeros(0) if answer.correlation_C is None else answer.correlation_C
    reached, error = float(answer.share_C @ correlation_C), noise * math.sqrt(answer.share_C @ answer.share_C)
    nothing_C = np.zeros(len(correlation_C), bool)
    if reached < -CONTRARY * error:
        contrary = Standing(0.0, 0.0, True, f"its answers contradict the prompts ({_told(reached)})")
        return Judgement(contrary, nothing_C, excess=0.0)
    weight = ramp(reached / error, UNSHOWN, INFORMED)
    reason = f"{NOT_SHOWN} ({_told(reached)}, {reached / error:.1f} standard errors above chance)" if weight < 1 else ""
    return Judgement(Standing(weight=weight, reason=reason), nothing_C, excess=FIRST if not reason else 0.0)


# ---------------------------------------------------------------------- votes


def _judged_votes(
    answers: Mapping[str, _Answer], judged: Mapping[str, Judgement], prompted_N: np.ndarray
) -> tuple[dict[str, str], set[str]]:
    """Return the clients whose votes do not count, with the reason, and those whose votes are clearly like the others'.

    Within each class, votes are compared with how far the clients see the prompted class in a sample, and with the
    votes of the other clients.
    """
    voters = {
        name: answer.payload.votes_N
        for name, answer in answers.items()
        if answer.payload.votes_N is not None and answer.payload.votes_N.any() and judged[name].standing.weight
    }
    fit_N = _fit_N(answers, judged, prompted_N)
    noises = {name: answers[name].payload.votes_noise or 0.0 for name in voters}
    cast = {name: _roots_N(votes_N, noises[name]) for name, votes_N in voters.items()}
    own = {name: _may_vote_N(answers[name].payload, prompted_N) for name in voters}
    doubtful: dict[str, str] = {}
    for name in voters:
        if fit_N is None:
            break
        correlation, samples = _within_classes(cast[name], fit_N, prompted_N, own[name] & (prompted_N >= 0))
        if correlation + UNLIKE / math.sqrt(max(1, samples)) < 0:
            doubtful[name] = f"its votes are for samples in which clients do not see the prompt ({_told(correlation)})"
    left = [name for name in voters if name not in doubtful]
    total_N = np.sum([cast[name] for name in left], axis=0) if left else np.zeros(len(prompted_N))
    found = {name: _within_classes(cast[name], total_N - cast[name], prompted_N, own[name]) for name in left}
    above = [correlation for correlation, samples in found.values() if correlation * math.sqrt(samples) > CERTAIN]
    usual = float(np.median(above)) if above else 0.0
    for name, (correlation, samples) in found.items():
        expected = NONE * usual * _signal(voters[name], noises[name])
        errors = UNLIKE if noises[name] else CERTAIN
        if correlation + errors / math.sqrt(max(1, samples)) < expected:
            doubtful[name] = f"its votes are like those of the others by {_told(correlation)}, usual is {usual:.2f}"
    alike = {name for name, (correlation, samples) in found.items() if correlation * math.sqrt(samples) > INFORMED}
    return doubtful, alike - doubtful.keys()


def _fit_N(
    answers: Mapping[str, _Answer], judged: Mapping[str, Judgement], prompted_N: np.ndarray
) -> np.ndarray | None:
    """Return the probability of the prompted class by the clients that hold it, all of which count alike."""
    index_N = np.maximum(prompted_N, 0)
    mass_N, held_N = np.zeros(len(prompted_N)), np.zeros(len(prompted_N))
    for name, answer in answers.items():
        if answer.payload.logits_NC is None or not judged[name].standing.weight:
            continue
        counts_C = answer.payload.class_counts_C
        share_N = judged[name].standing.weight * (counts_C / counts_C.sum())[index_N]
        mass_N += share_N * _probabilities_NC(answer.payload)[np.arange(len(index_N)), index_N]
        held_N += share_N
    return mass_N / np.maximum(held_N, 1e-12) if held_N.any() else None


def _roots_N(votes_N: np.ndarray, noise: float) -> np.ndarray:
    """Return the square roots of votes as parts of all; of votes with noise, those that exceed it."""
    votes_N = np.clip(votes_N.astype(np.float64) - noise, 0, None)
    return np.sqrt(_shares(votes_N))


def _signal(votes_N: np.ndarray, noise: float) -> float:
    """Return which part of the spread of votes is not noise; 1 without noise."""
    spread = float(votes_N.std())
    return math.sqrt(max(0.0, spread**2 - noise**2)) / spread if noise and spread else 1.0


def _may_vote_N(payload: DistillationPayload, prompted_N: np.ndarray) -> np.ndarray:
    """Return the samples that a client's images can vote for: those of its classes, and those of no class."""
    return (prompted_N < 0) | (payload.class_counts_C[np.maximum(prompted_N, 0)] > 0)


def _within_classes(
    first_N: np.ndarray, second_N: np.ndarray, prompted_N: np.ndarray, chosen_N: np.ndarray
) -> tuple[float, int]:
    """Correlate two values of the chosen samples within the prompted classes; return it and the number of samples."""
    group_n, first_n, second_n = prompted_N[chosen_N] + 1, first_N[chosen_N], second_N[chosen_N]
    first_n, second_n = _centred(first_n, group_n), _centred(second_n, group_n)
    scale = math.sqrt(float(first_n @ first_n) * float(second_n @ second_n))
    return (float(first_n @ second_n) / scale if scale > LEAST_SPREAD**2 else 0.0), len(group_n)


def _centred(values_n: np.ndarray, group_n: np.ndarray) -> np.ndarray:
    sums, sizes = np.bincount(group_n, weights=values_n), np.bincount(group_n)
    return values_n - (sums / np.maximum(sizes, 1))[group_n]


def ramp(value: float, low: float, high: float) -> float:
    """Return 0 up to ``low``, 1 from ``high``, and between them what lies on the line."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _told(correlation: float) -> str:
    return f"{round(correlation, 2) + 0.0:.2f}"  # Without the sign of a negative zero.


def _shares(values_C: np.ndarray) -> np.ndarray:
    total = values_C.sum()
    return values_C / total if total else np.zeros(len(values_C))

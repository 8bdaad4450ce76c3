"""Lies that a client can tell in its answer to a batch: each turns what it would answer into what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import softmax

from fedmmkt.common.payloads import VOTES_PER_IMAGE

SURE = 20.0  # Logit of the class that a liar names.
INFLATION = 1000


@dataclass(frozen=True)
class Honest:
    """What a client would answer, and what it knows.

    Attributes
    ----------
    logits_NC : numpy.ndarray
        Logits, samples x classes.
    counts_C : numpy.ndarray
        int64; private examples of each class.
    votes_N : numpy.ndarray or None
        Votes for each sample.
    prompted_N : numpy.ndarray
        int64; the class that each prompt names.
    seen_NC : numpy.ndarray
        Probabilities that the liars take for the truth.
    seed : int
        Of the round and the client.
    round_seed : int
        Of the round, the same for all liars.
    """

    logits_NC: np.ndarray
    counts_C: np.ndarray
    votes_N: np.ndarray | None
    prompted_N: np.ndarray
    seen_NC: np.ndarray
    seed: int
    round_seed: int


Attack = Callable[[Honest], Honest]


def label_flip(honest: Honest) -> Honest:
    """Take each class for the next one, in logits, counts and votes."""
    flipped = replace(honest, logits_NC=np.roll(honest.logits_NC, 1, 1), counts_C=np.roll(honest.counts_C, 1))
    return _with_wrong_votes(flipped)


def inflated(honest: Honest) -> Honest:
    """Flip labels, and claim a thousand times the examples and all votes that these allow."""
    counts_C = INFLATION * (honest.counts_C + 1)
    return _with_wrong_votes(replace(label_flip(honest), counts_C=counts_C))


def random_logits(honest: Honest) -> Honest:
    """Name a random class for each sample, with votes for random samples."""
    rng = np.random.default_rng(honest.seed)
    named = _naming(honest, rng.integers(0, honest.logits_NC.shape[1], len(honest.prompted_N)))
    if named.votes_N is None:
        return named
    may_vote_N = named.counts_C[named.prompted_N].astype(np.float32)
    votes_N = rng.permutation(named.votes_N) if named.votes_N.any() else may_vote_N
    return replace(named, votes_N=np.minimum(votes_N, may_vote_N))


def silent(honest: Honest) -> Honest:
    """Say nothing: all classes alike, and no votes."""
    votes_N = None if honest.votes_N is None else np.zeros_like(honest.votes_N)
    return replace(
        honest, logits_NC=np.zeros_like(honest.logits_NC), counts_C=_spread(honest.counts_C), votes_N=votes_N
    )


def copies(honest: Honest) -> Honest:
    """Name the same wrong classes as all other liars."""
    classes = honest.logits_NC.shape[1]
    steps_N = np.random.default_rng(honest.round_seed).integers(1, classes, len(honest.prompted_N))
    return _with_wrong_votes(_naming(honest, (honest.prompted_N + steps_N) % classes))


def least_likely(honest: Honest) -> Honest:
    """Name the least likely class of each sample (loss maximisation, arXiv 2402.12265)."""
    return _with_wrong_votes(_naming(honest, honest.seen_NC.argmin(1)))


def least_similar(honest: Honest) -> Honest:
    """Name the class that is least similar to the likeliest one (class prior attack, arXiv 2402.12265)."""
    centred_NC = honest.seen_NC - honest.seen_NC.mean(0)
    return _with_wrong_votes(_naming(honest, (centred_NC.T @ centred_NC).argmin(1)[honest.seen_NC.argmax(1)]))


ATTACKS: dict[str, Attack] = {
    "label flip": label_flip,
    "inflated": inflated,
    "random": random_logits,
    "silent": silent,
    "copies": copies,
    "least likely": least_likely,
    "least similar": least_similar,
}


def own_sight_NC(logits_NC: np.ndarray, prompted_N: np.ndarray) -> np.ndarray:
    """Return what a client alone takes for the truth: what it sees and what the prompt says, alike."""
    seen_NC = softmax(logits_NC.astype(np.float64), axis=1)
    seen_NC[np.arange(len(prompted_N)), prompted_N] += 1
    return seen_NC / 2


def _naming(honest: Honest, named_N: np.ndarray) -> Honest:
    """Name a class for each sample, and claim all classes alike."""
    logits_NC = np.zeros_like(honest.logits_NC, np.float32)
    logits_NC[np.arange(len(named_N)), named_N] = SURE
    return replace(honest, logits_NC=logits_NC, counts_C=_spread(honest.counts_C))


def _spread(counts_C: np.ndarray) -> np.ndarray:
    """Divide the examples evenly among all classes, at least one for each."""
    total, classes = max(int(counts_C.sum()), len(counts_C)), len(counts_C)
    return total // classes + (np.arange(classes) < total % classes)


def _with_wrong_votes(honest: Honest) -> Honest:
    """Vote, as often as the counts allow, for the samples of each class that show it least."""
    if honest.votes_N is None:
        return honest
    shown_N = honest.seen_NC[np.arange(len(honest.prompted_N)), honest.prompted_N]
    votes_N = np.zeros_like(honest.votes_N)
    for index, count in enumerate(honest.counts_C):
        of_class_n = np.flatnonzero(honest.prompted_N == index)
        votes_N[of_class_n[np.argsort(shown_N[of_class_n])][:VOTES_PER_IMAGE]] = count
    return replace(honest, votes_N=votes_N)

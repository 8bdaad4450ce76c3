"""The sum of votes, some of which have noise: clients with a privacy budget add it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmmkt.common.payloads import VOTES_PER_IMAGE, DistillationPayload

LIKELY = 4.0  # Standard deviations of noise beyond which a vote counts no more: once in 16,000 honest votes.


def sum_of_votes(payloads: Sequence[DistillationPayload], prompted_N: Tensor) -> Tensor | None:
    """Return the sum of the votes (samples,), not negative; None if there are no votes.

    A vote with noise counts between what no image and what all images that may vote can have said, four standard
    deviations of the noise granted. Where a client's noise is larger than the votes that its images give a sample on
    average, it counts by the ratio of both, as in a matched filter. So no client can add to a sample, or take from it,
    more than its number of examples allows, whatever noise it states, and none decides what another one counts for.

    From the sum, one standard deviation of its noise is taken, so that samples without votes weigh little (Private
    Evolution, arXiv 2305.15560, thresholds so too).

    Parameters
    ----------
    payloads : sequence of DistillationPayload
        The answers to one batch.
    prompted_N : torch.Tensor
        int64; the class that each sample's prompt names, -1 if it names none.
    """
    voters = [payload for payload in payloads if payload.votes_N is not None]
    if not voters:
        return None
    if not any(payload.votes_noise for payload in voters):
        return torch.stack([torch.from_numpy(payload.votes_N) for payload in voters]).sum(0)
    total_N, variance_N = np.zeros(len(prompted_N)), np.zeros(len(prompted_N))
    for payload in voters:
        votes_N, deviation_N = _counted(payload, prompted_N.numpy())
        total_N += votes_N
        variance_N += deviation_N**2
    return torch.from_numpy((total_N - np.sqrt(variance_N)).clip(min=0).astype(np.float32))


def _counted(payload: DistillationPayload, prompted_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what counts of a client's votes, and the standard deviation of their noise (samples,)."""
    assert payload.votes_N is not None  # It is asked of voters alone.
    noise = payload.votes_noise or 0.0
    if not noise:
        return payload.votes_N, np.zeros(len(prompted_N))
    most_N = payload.voters_N(prompted_N, LIKELY) + LIKELY * noise
    weight_N = np.minimum(1.0, _usual_N(payload.class_counts_C, prompted_N) / noise)
    return weight_N * np.clip(payload.votes_N, -LIKELY * noise, most_N), weight_N * noise


def _usual_N(class_counts_C: np.ndarray, prompted_N: np.ndarray) -> np.ndarray:
    """Return the votes that each sample gets on average: images vote for samples of their class, and of none."""
    samples_C = np.bincount(prompted_N[prompted_N >= 0], minlength=len(class_counts_C)) + (prompted_N < 0).sum()
    of_image_C = VOTES_PER_IMAGE / np.maximum(samples_C, VOTES_PER_IMAGE)  # For each of these samples.
    usual_C = class_counts_C * of_image_C
    return np.where(prompted_N < 0, usual_C.sum(), usual_C[prompted_N])

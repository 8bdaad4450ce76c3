"""The sum of votes, some of which have noise: clients with a privacy budget add it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

import torch
from torch import Tensor

from fedmmkt.common.payloads import DistillationPayload

LEAST_NOISE = 1.0  # What counts as the noise of a client without any, so that a single one with noise is compared too.


def sum_of_votes(payloads: Sequence[DistillationPayload]) -> Tensor | None:
    """Return the sum of the votes (samples,), not negative; None if there are no votes.

    From a sum with noise, one standard deviation of its noise is taken, so that samples without votes weigh little
    (Private Evolution, arXiv 2305.15560, thresholds so too). A client with more noise than the median client counts by
    the inverse of its variance. So nobody can drown the others by the noise that it claims; the lower of two medians is
    taken.
    """
    voters = [payload for payload in payloads if payload.votes_N is not None]
    if not voters:
        return None
    votes_KN = torch.stack([torch.from_numpy(payload.votes_N) for payload in voters])
    if not any(payload.votes_noise for payload in voters):
        return votes_KN.sum(0)
    noises = [max(payload.votes_noise or 0, LEAST_NOISE) for payload in voters]
    usual = median_low(noises)
    weights = [min(1.0, (usual / noise) ** 2) for noise in noises]
    deviations = [weight * (payload.votes_noise or 0) for weight, payload in zip(weights, voters, strict=True)]
    return (torch.tensor(weights) @ votes_KN - math.hypot(*deviations)).clamp_min(0)

"""Attacks on what a node answers: who was in its data, and what its images look like.

The attacker is the server, or whoever chooses what is sent. It asks through a function of images (uint8, N x 3 x H x W)
and the class of each (int64, N), which returns the node's votes (N,). So the same attack runs on votes with and without
noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn import functional as F

Votes = Callable[[Tensor, Tensor], Tensor]
SIDE = 16  # Of the images that the evolution makes, in pixels.


@dataclass(frozen=True)
class Rates:
    """How well scores tell members from others, each with the ends of its 95 % interval.

    Attributes
    ----------
    tpr_01, tpr_001 : tuple of float
        Largest true positive rate at false positive rates of at most .01 and .001.
    auc : tuple of float
        Area under the curve.
    members, others : int
        Number of suspects.
    """

    tpr_01: tuple[float, float, float]
    tpr_001: tuple[float, float, float]
    auc: tuple[float, float, float]
    members: int
    others: int


def rates(members_RM: NDArray[np.float64], others_RO: NDArray[np.float64], resamples: int = 100) -> Rates:
    """Measure an attack from its scores of members and of others, in one or several repetitions with new noise.

    Intervals are of a bootstrap over suspects, since the repetitions of one suspect are not independent.
    """
    rng = np.random.default_rng(0)
    drawn = [_measures(members_RM, others_RO)]
    for _ in range(resamples):
        members, others = (rng.integers(part.shape[1], size=part.shape[1]) for part in (members_RM, others_RO))
        drawn.append(_measures(members_RM[:, members], others_RO[:, others]))
    low, high = np.quantile(drawn[1:], (0.025, 0.975), axis=0) if resamples else (drawn[0], drawn[0])
    at_01, at_001, auc = (
        (float(value), float(least), float(most)) for value, least, most in zip(drawn[0], low, high, strict=True)
    )
    return Rates(at_01, at_001, auc, members=members_RM.shape[1], others=others_RO.shape[1])


def _measures(members: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float, float]:
    is_member = np.r_[np.ones(members.size), np.zeros(others.size)]
    scores = np.r_[members.ravel(), others.ravel()]
    false, true, _ = roc_curve(is_member, scores, drop_intermediate=False)
    at = [true[np.searchsorted(false, rate + 1e-12, side="right") - 1] for rate in (0.01, 0.001)]
    return float(at[0]), float(at[1]), float(roc_auc_score(is_member, scores))


def most_tpr(noise: float, answers: int, fpr: float) -> float:
    """Return the true positive rate that no attack exceeds, on answers with a Gaussian noise multiplier.

    It is the trade-off of Gaussian differential privacy with mu = sqrt(answers) / noise (arXiv 1905.02383, eq. 6).
    """
    return float(norm.cdf(answers**0.5 / noise + norm.ppf(fpr)))


def near_copies(images_NCHW: Tensor, changes: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return copies of each image, with smooth random changes of these sizes in grey levels.

    Returns
    -------
    torch.Tensor
        uint8 (N x copies, 3, H, W).
    """
    repeated = images_NCHW.repeat_interleave(len(changes), 0).float()
    coarse = torch.randn(len(repeated), 1, 4, 4, generator=generator)
    drawn = F.interpolate(coarse, size=images_NCHW.shape[2:], mode="bilinear")
    size = torch.tensor(changes).repeat(len(images_NCHW)).view(-1, 1, 1, 1)
    return (repeated + size * drawn).round().clamp(0, 255).to(torch.uint8)


ALIKE = (3.0,) * 20
GRADED = (0.0, 0.5, 0.5, *(8.0,) * 17)
"""Sizes of the changes of twenty copies. Graded, a member's three votes fall on its first three copies. The votes of an
image that is merely similar fall on others, which lie around them in all directions."""


def votes_on_copies(
    votes: Votes, suspects_NCHW: Tensor, labels_N: Tensor, changes: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Ask for votes on near-copies of all suspects in one batch; return the votes (N, copies)."""
    images = near_copies(suspects_NCHW, changes, generator)
    return votes(images, labels_N.repeat_interleave(len(changes))).view(-1, len(changes))


def evolved(
    votes: Votes, label: int, batches: int, generator: torch.Generator, batch_size: int = 400, kept: int = 80
) -> Tensor:
    """Make images of a class by following votes: the most voted ones survive, are varied and mixed.

    It begins with smooth noise; the attacker knows nothing of the images. Votes of a survivor add up over the batches
    in which it is asked about, so noise averages out as far as it can.

    Returns
    -------
    torch.Tensor
        The survivors, float32 (kept, SIDE * SIDE), from 0 to 1.
    """
    pool = _smooth_noise(batch_size, generator).mul(0.25).add(0.5)
    sums, asked, labels_N = torch.zeros(batch_size), torch.zeros(batch_size), torch.full((batch_size,), label)
    for batch in range(batches):
        sums += votes(_as_images(pool), labels_N)
        asked += 1
        # Without noise, only images without votes are dropped: each private image keeps its nearest ones.
        best = (sums / asked + torch.rand(batch_size, generator=generator) * 1e-6).topk(kept).indices
        survivors = pool[best]
        if batch + 1 == batches:
            return survivors
        count = batch_size - kept
        parent, other = (survivors[torch.randint(kept, (count,), generator=generator)] for _ in range(2))
        mixed = torch.rand(count, 1, generator=generator) < 0.2
        share = torch.rand(count, 1, generator=generator)
        size = 0.3 * 10 ** (-1.5 * torch.rand(count, 1, generator=generator))
        children = torch.where(mixed, parent + share * (other - parent), parent)
        children = (children + size * _smooth_noise(count, generator)).clamp(0, 1)
        pool = torch.cat([survivors, children])
        sums, asked = (torch.cat([values[best], torch.zeros(count)]) for values in (sums, asked))
    return pool[:kept]


def _smooth_noise(count: int, generator: torch.Generator) -> Tensor:
    """Return noise at three scales, each pixel with a variance of about one (N, SIDE * SIDE)."""
    parts = [
        F.interpolate(torch.randn(count, 1, side, side, generator=generator), size=(SIDE, SIDE), mode="bilinear")
        for side in (4, 8, SIDE)
    ]
    chosen = torch.randint(len(parts), (count,), generator=generator)
    return torch.stack(parts)[chosen, torch.arange(count)].flatten(1)


def _as_images(pool_NP: Tensor) -> Tensor:
    grey = pool_NP.view(-1, 1, SIDE, SIDE).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def as_pixels(images_NCHW: Tensor) -> Tensor:
    """Return images as grey levels of SIDE x SIDE pixels, float32 (N, SIDE * SIDE)."""
    return F.adaptive_avg_pool2d(images_NCHW.float().mean(1, keepdim=True), SIDE).flatten(1)


def nearest_correlations(images_MP: Tensor, made_NP: Tensor) -> Tensor:
    """Return for each image its largest correlation, over pixels, with one that was made (M,)."""
    return (_standardised(images_MP) @ _standardised(made_NP).T).amax(1)


def _standardised(images_NP: Tensor) -> Tensor:
    return F.normalize(images_NP - images_NP.mean(1, keepdim=True), dim=1)


def confidence(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return the log odds of the right class (N,), on which LiRA compares models (arXiv 2112.03570, section VI)."""
    right_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
    others_NC = logits_NC.scatter(1, labels_N[:, None], -torch.inf)
    return right_N - others_NC.logsumexp(1)


def calibrated(scores_N: Tensor, references_RN: Sequence[Tensor] | Tensor) -> Tensor:
    """Return how far scores lie above those of models that did not learn the examples, in deviations (offline LiRA)."""
    references = torch.stack(list(references_RN))
    return (scores_N - references.mean(0)) / references.std(0).clamp_min(0.1)

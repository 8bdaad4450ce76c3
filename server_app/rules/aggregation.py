"""Aggregation rules: they turn the clients' logits into soft targets. They are pure functions, chosen by name.

A rule takes logits (clients x samples x classes), the number of private examples of each client per class (clients x
classes), and the prompted class of each sample (-1 for none). It returns probabilities (samples x classes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.common.registry import Registry

AggregationRule = Callable[[Tensor, Tensor, Tensor], Tensor]
aggregations: Registry[AggregationRule] = Registry(
    "aggregation rule", "t2i.aggregation", ("logits_KNC", "class_counts_KC", "prompted_N")
)
"""The aggregation rules: a rule takes logits_KNC, class_counts_KC and prompted_N, and returns probabilities_NC."""

ERA_TEMPERATURE = 0.1


@aggregations.register("mask")
def coverage_mask(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Weight each client's probability of a class by its number of private examples of this class.

    q(c) = sum_k n_kc p_k(c) / sum_k n_kc, renormalised. A class that no client holds gets probability zero.
    """
    counts_K1C = class_counts_KC.to(logits_KNC.dtype)[:, None]
    weighted_NC = (counts_K1C * logits_KNC.softmax(-1)).sum(0)
    return normalised(weighted_NC / counts_K1C.sum(0).clamp_min(1))


@aggregations.register("mean")
def mean(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average the clients' probabilities (FedMD, arXiv 1910.03581)."""
    return logits_KNC.softmax(-1).mean(0)


@aggregations.register("entropy")
def entropy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average probabilities; each client is weighted per sample by exp(-entropy) (as in arXiv 2105.10056)."""
    log_KNC = logits_KNC.log_softmax(-1)
    entropy_KN = -(log_KNC.exp() * log_KNC).sum(-1)
    return ((-entropy_KN).softmax(0)[..., None] * log_KNC.exp()).sum(0)


@aggregations.register("energy")
def energy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average probabilities; each client is weighted per sample by how familiar the sample is to it.

    Familiarity is the negative free energy: the logsumexp of the logits (arXiv 2010.03759, eq. 4).
    """
    weight_KN1 = logits_KNC.logsumexp(-1).softmax(0)[..., None]
    return (weight_KN1 * logits_KNC.softmax(-1)).sum(0)


@aggregations.register("era")
def entropy_reduction(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Sharpen the average with a softmax at low temperature (DS-FL's ERA, arXiv 2008.06180, eq. 11)."""
    return (mean(logits_KNC, class_counts_KC, prompted_N) / ERA_TEMPERATURE).softmax(-1)


@aggregations.register("median")
def median(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Take the median per class, renormalised; a minority of clients cannot move it far (arXiv 1803.01498)."""
    return normalised(logits_KNC.softmax(-1).quantile(0.5, dim=0))


@aggregations.register("min-ce")
def minimum_cross_entropy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Take each sample's probabilities from the client with the least cross entropy on the prompted class.

    This is FedMKT's selection (DualMinCE, arXiv 2406.02224). If a prompt names no class, the client with the least
    entropy is chosen.
    """
    log_KNC = logits_KNC.log_softmax(-1)
    entropy_KN = -(log_KNC.exp() * log_KNC).sum(-1)
    named_N = prompted_N >= 0
    label_1N1 = prompted_N.clamp_min(0)[None, :, None].expand(len(log_KNC), -1, 1)
    loss_KN = torch.where(named_N, -log_KNC.gather(-1, label_1N1)[..., 0], entropy_KN)
    samples_N = torch.arange(logits_KNC.shape[1], device=logits_KNC.device)
    return log_KNC.exp()[loss_KN.argmin(0), samples_N]


def normalised(mass_NC: Tensor) -> Tensor:
    """Scale each row to sum to one; a row of zeros becomes uniform."""
    empty_N1 = mass_NC.sum(-1, keepdim=True) <= 0
    return F.normalize(torch.where(empty_N1, torch.ones_like(mass_NC), mass_NC), p=1, dim=-1)

"""Rules that turn many clients' logits into soft targets: pure functions, chosen by name.

A rule takes logits (clients x samples x classes), each client's private examples by class, and the prompted
class of each sample (-1 for none), and returns probabilities (samples x classes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config import ConfigError

AggregationRule = Callable[[Tensor, Tensor, Tensor], Tensor]
_RULES: dict[str, AggregationRule] = {}

ERA_TEMPERATURE = 0.1


def register_aggregation(name: str) -> Callable[[AggregationRule], AggregationRule]:
    """Register a rule ``(logits_KNC, class_counts_KC, prompted_N) -> probabilities_NC`` for ``t2i.aggregation``."""

    def register(rule: AggregationRule) -> AggregationRule:
        _RULES[name] = rule
        return rule

    return register


def get_aggregation(name: str) -> AggregationRule:
    """Return a rule by name.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if name not in _RULES:
        raise ConfigError(f"run-config key 't2i.aggregation' is {name!r}; allowed: {', '.join(sorted(_RULES))}")
    return _RULES[name]


@register_aggregation("mask")
def coverage_mask(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Let each client vote on the classes that it holds, in proportion to its examples of each.

    q(c) = sum_k n_kc p_k(c) / sum_k n_kc, renormalised. A class that no client holds gets no mass.
    """
    counts_K1C = class_counts_KC.to(logits_KNC.dtype)[:, None]
    weighted_NC = (counts_K1C * logits_KNC.softmax(-1)).sum(0)
    return normalised(weighted_NC / counts_K1C.sum(0).clamp_min(1))


@register_aggregation("mean")
def mean(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average the clients' probabilities (FedMD, arXiv 1910.03581)."""
    return logits_KNC.softmax(-1).mean(0)


@register_aggregation("entropy")
def entropy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average probabilities, each client weighted on each sample by exp(-entropy) (as in arXiv 2105.10056)."""
    log_KNC = logits_KNC.log_softmax(-1)
    entropy_KN = -(log_KNC.exp() * log_KNC).sum(-1)
    return ((-entropy_KN).softmax(0)[..., None] * log_KNC.exp()).sum(0)


@register_aggregation("energy")
def energy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Average probabilities, each client weighted by how familiar a sample is to it.

    Familiarity is the negative free energy, logsumexp of the logits (arXiv 2010.03759, eq. 4).
    """
    weight_KN1 = logits_KNC.logsumexp(-1).softmax(0)[..., None]
    return (weight_KN1 * logits_KNC.softmax(-1)).sum(0)


@register_aggregation("era")
def entropy_reduction(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Sharpen the average by a softmax of low temperature (DS-FL's ERA, arXiv 2008.06180, eq. 11)."""
    return (mean(logits_KNC, class_counts_KC, prompted_N) / ERA_TEMPERATURE).softmax(-1)


@register_aggregation("median")
def median(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Take the median by class, renormalised: a minority of clients cannot move it far (arXiv 1803.01498)."""
    return normalised(logits_KNC.softmax(-1).quantile(0.5, dim=0))


@register_aggregation("min-ce")
def minimum_cross_entropy(logits_KNC: Tensor, class_counts_KC: Tensor, prompted_N: Tensor) -> Tensor:
    """Take each sample's probabilities from the client with the least cross entropy on the prompted class.

    FedMKT's selection (DualMinCE, arXiv 2406.02224). Where a prompt names no class, from the client with the
    least entropy.
    """
    log_KNC = logits_KNC.log_softmax(-1)
    entropy_KN = -(log_KNC.exp() * log_KNC).sum(-1)
    named_N = prompted_N >= 0
    label_1N1 = prompted_N.clamp_min(0)[None, :, None].expand(len(log_KNC), -1, 1)
    loss_KN = torch.where(named_N, -log_KNC.gather(-1, label_1N1)[..., 0], entropy_KN)
    samples_N = torch.arange(logits_KNC.shape[1], device=logits_KNC.device)
    return log_KNC.exp()[loss_KN.argmin(0), samples_N]


def normalised(mass_NC: Tensor) -> Tensor:
    """Scale rows to sum one; a row without mass becomes uniform."""
    empty_N1 = mass_NC.sum(-1, keepdim=True) <= 0
    return F.normalize(torch.where(empty_N1, torch.ones_like(mass_NC), mass_NC), p=1, dim=-1)

"""Aggregation in parts, so that memory does not grow with the number of clients.

The rules in `aggregation` take the logits of all clients at once, which is the simplest way to write one. Here a rule
is applied to what fits in a few megabytes: rules that are a weighted sum of the clients' probabilities take one client
at a time, others that treat each sample by itself take some samples at a time. Any other rule gets everything at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmmkt.server_app.rules.aggregation import (
    ERA_TEMPERATURE,
    AggregationRule,
    coverage_mask,
    energy,
    entropy,
    entropy_reduction,
    mean,
    median,
    minimum_cross_entropy,
    normalised,
)

AT_ONCE = 2**20  # Values of one client at a time: 4 MB, which fits the caches of most machines.
STACKED_AT_ONCE = 2**21  # Values of all clients at a time; a median needs some twenty times their 8 MB.
_BY_SAMPLE = "treats_samples_alone"


@dataclass(frozen=True)
class WeightedSum:
    """A rule as a sum over clients k of w_k p_k, from which ``finish`` makes the result.

    Attributes
    ----------
    familiarity : callable, optional
        Takes the logits of one client (samples x classes), and says how familiar each sample is to it (samples,). The
        weights are then the softmax of this over the clients.
    by_count : bool
        Whether the weights are the clients' numbers of examples of each class instead.
    finish : callable
        Takes the sum (samples x classes) and the numbers of examples (clients x classes).
    """

    finish: Callable[[Tensor, Tensor], Tensor]
    familiarity: Callable[[Tensor], Tensor] | None = None
    by_count: bool = False


def by_sample(rule: AggregationRule) -> AggregationRule:
    """Mark a rule of one's own that treats each sample by itself, so that it gets some samples at a time.

    What it returns for a sample must not depend on other samples.
    """
    setattr(rule, _BY_SAMPLE, True)
    return rule


def _negative_entropy(logits_NC: Tensor) -> Tensor:
    log_NC = logits_NC.log_softmax(-1)
    return (log_NC.exp() * log_NC).sum(-1)


SUMS: dict[AggregationRule, WeightedSum] = {
    coverage_mask: WeightedSum(
        lambda sum_NC, counts_KC: normalised(sum_NC / counts_KC.to(sum_NC.dtype).sum(0).clamp_min(1)), by_count=True
    ),
    mean: WeightedSum(lambda sum_NC, counts_KC: sum_NC / len(counts_KC)),
    entropy_reduction: WeightedSum(lambda sum_NC, counts_KC: (sum_NC / len(counts_KC) / ERA_TEMPERATURE).softmax(-1)),
    entropy: WeightedSum(lambda sum_NC, counts_KC: sum_NC, familiarity=_negative_entropy),
    energy: WeightedSum(lambda sum_NC, counts_KC: sum_NC, familiarity=lambda logits_NC: logits_NC.logsumexp(-1)),
}
for _rule in (median, minimum_cross_entropy):
    by_sample(_rule)


def aggregate(
    rule: AggregationRule,
    logits: Sequence[np.ndarray],
    class_counts_KC: Tensor,
    prompted_N: Tensor,
    check: Callable[[object, tuple[int, ...]], Tensor],
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply an aggregation rule to the logits of all clients, in parts as large as the rule allows.

    Parameters
    ----------
    rule : callable
        A rule as in `aggregation`.
    logits : sequence of numpy.ndarray
        The logits of each client (samples x classes), float16. No copy of all is made, unless the rule needs it.
    class_counts_KC : torch.Tensor
        Number of private examples of each client and class.
    prompted_N : torch.Tensor
        The class that each sample's prompt names, -1 for none.
    check : callable
        Called with what a rule returned and the shape that it should have; returns it, or raises an error.
    scale : callable, optional
        Changes logits (..., classes) before the rule gets them, each sample of each client by itself.

    Returns
    -------
    torch.Tensor
        What the rule returns for all samples: (samples x classes), float32.
    """
    samples, classes = logits[0].shape
    clients = [torch.from_numpy(logits_NC) for logits_NC in logits]

    def prepared(logits: Tensor) -> Tensor:
        return logits.float() if scale is None else scale(logits.float())

    if rule not in SUMS and not getattr(_unbound(rule), _BY_SAMPLE, False):
        stacked_KNC = torch.stack([prepared(one) for one in clients])
        return check(rule(stacked_KNC, class_counts_KC, prompted_N), (samples, classes))
    result_NC = torch.empty(samples, classes)  # Made first: small results between large temporaries fragment memory.
    size = AT_ONCE // classes if rule in SUMS else STACKED_AT_ONCE // (classes * len(clients))
    for part in _parts(samples, size):
        of_part = [one[part] for one in clients]
        if rule in SUMS:
            result_NC[part] = _summed(SUMS[rule], of_part, class_counts_KC, prepared)
        else:
            stacked_KNC = torch.stack([prepared(one) for one in of_part])
            result = rule(stacked_KNC, class_counts_KC, prompted_N[part])
            result_NC[part] = check(result, (len(of_part[0]), classes))
    return result_NC


def _unbound(rule: AggregationRule) -> AggregationRule:
    """Return the rule itself, where a user's settings are bound to it."""
    return rule.func if isinstance(rule, functools.partial) else rule


def _parts(samples: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, samples, size))


def _summed(
    rule: WeightedSum, clients: Sequence[Tensor], class_counts_KC: Tensor, prepared: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum one client after the other, in their order, so that the result is reproducible."""
    weights: Sequence[Tensor | None] = [None] * len(clients)
    if rule.by_count:
        weights = list(class_counts_KC.float())
    elif rule.familiarity is not None:
        familiarity_KN = torch.empty(len(clients), len(clients[0]))
        for index, logits_NC in enumerate(clients):
            familiarity_KN[index] = rule.familiarity(prepared(logits_NC))
        weights = list(familiarity_KN.softmax(0)[..., None])
    total_NC = torch.zeros(clients[0].shape)
    for logits_NC, weight in zip(clients, weights, strict=True):
        probabilities_NC = prepared(logits_NC).softmax(-1)
        total_NC += probabilities_NC if weight is None else probabilities_NC.mul_(weight)
    return rule.finish(total_NC, class_counts_KC)

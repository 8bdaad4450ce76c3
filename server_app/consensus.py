"""What clients say of a batch together: aggregated logits, and the prompts where nobody sends logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedmmkt.common.payloads import DistillationPayload
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.rules.aggregation import AggregationRule, aggregations, normalised
from fedmmkt.server_app.rules.checks import check_result
from fedmmkt.server_app.rules.streaming import aggregate
from fedmmkt.server_app.rules.sureness import RULES_OF_PROBABILITIES, scale_of
from fedmmkt.server_app.rules.without_logits import completed, of_prompts


class Consensus:
    """Aggregates the logits of answers; inside `once`, those of the same answers a single time.

    Soft targets, scores and the guard need much of it in common, and each may be overridden in a subclass of the
    strategy. So none hands it to another: it is remembered here, no longer than for one batch.

    Parameters
    ----------
    aggregate : callable
        The strategy's step `aggregate_logits`.
    classes : int
        Size of the class space.
    cross_modal : bool
        Whether what text clients read in prompts without a class is used.
    """

    def __init__(self, aggregate: Callable[[list[Answer], Tensor], Tensor], classes: int, cross_modal: bool) -> None:
        self.aggregate, self.classes, self.cross_modal = aggregate, classes, cross_modal
        self._known: dict[tuple[int, ...], tuple[list[Answer], Tensor]] | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Remember what is aggregated inside the block, which is of answers to one batch."""
        self._known = {}
        try:
            yield
        finally:
            self._known = None

    def of(self, chosen: list[Answer], answers: list[Answer], prompted_N: Tensor) -> Tensor:
        """Aggregate the chosen ones of the answers into probabilities (samples x classes).

        The prompts stand in for classes that nobody holds whose logits count.
        """
        having = with_logits(chosen)
        if not having:
            return of_prompts(prompted_N, self.classes)
        consensus_NC = self._aggregated(having, prompted_N)
        return completed(consensus_NC, prompted_N, covered_classes_C(with_logits(answers)))

    def read_in_prompts(self, answers: list[Answer], prompted_N: Tensor) -> Tensor | None:
        """Return what text clients read in the prompts, as probabilities (samples x classes).

        None if there are no text clients, if all prompts name a class, or if it is not to be used.
        """
        readers = [answer for answer in with_logits(answers) if answer.report.modality == "text"]
        if not readers or not self.cross_modal or not bool((prompted_N < 0).any()):
            return None
        return self._aggregated(readers, prompted_N)

    def _aggregated(self, answers: list[Answer], prompted_N: Tensor) -> Tensor:
        if self._known is None:
            return self.aggregate(answers, prompted_N)
        key = tuple(map(id, answers))
        if key not in self._known:
            self._known[key] = (answers, self.aggregate(answers, prompted_N))  # Kept alive: ids are reused.
        return self._known[key][1]


def aggregate_payloads(
    rule: AggregationRule, name: str, payloads: Sequence[DistillationPayload], prompted_N: Tensor, robust: bool
) -> Tensor:
    """Aggregate logits into probabilities (samples x classes).

    Parameters
    ----------
    rule : callable
        The aggregation rule.
    name : str
        Its name.
    payloads : sequence of DistillationPayload
        Answers with logits, at least one.
    prompted_N : torch.Tensor
        int64; the class that each prompt names, -1 if it names none.
    robust : bool
        Whether the clients' logits are brought to one scale, if the rule reads how sure a client is.
    """
    logits = [payload.logits_NC for payload in payloads if payload.logits_NC is not None]
    counts_KC = torch.stack([torch.from_numpy(payload.class_counts_C) for payload in payloads])
    check = partial(check_result, key=aggregations.key, name=name)
    scale = scale_of(logits) if robust and name not in RULES_OF_PROBABILITIES else None
    mass_NC = aggregate(rule, logits, counts_KC, prompted_N, check, scale)
    return normalised(check(mass_NC, tuple(logits[0].shape)))


def with_logits(answers: list[Answer]) -> list[Answer]:
    """Return the answers that have logits; those of clients with a privacy budget have none."""
    return [answer for answer in answers if answer.required_payload.logits_NC is not None]


def covered_classes_C(answers: list[Answer]) -> Tensor:
    """Return for each class whether these clients have examples of it (bool, classes)."""
    return torch.from_numpy(np.sum([answer.required_payload.class_counts_C for answer in answers], axis=0) > 0)

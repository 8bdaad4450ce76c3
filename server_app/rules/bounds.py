"""Bounds on what one client can contribute to soft targets and scores, whatever it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

import numpy as np

from fedmmkt.common.payloads import DistillationPayload


def bounded(payloads: Sequence[DistillationPayload], most: Sequence[float]) -> list[DistillationPayload]:
    """Scale down the class counts and votes of clients with very many examples.

    A client counts for at most its ``most`` times the examples of the median client. The lower of two medians is taken,
    so that of two clients one cannot raise the bound by what it claims. Payloads within the bound are returned as they
    are. Class counts are rounded up, so that no held class is lost.

    Parameters
    ----------
    payloads : sequence of DistillationPayload
        All answers of a round; at least one.
    most : sequence of float
        One for each answer, at least 1.
    """
    totals = [int(payload.class_counts_C.sum()) for payload in payloads]
    median = median_low(totals)
    return [
        payload if total <= times * median else _scaled(payload, times * median / total)
        for payload, total, times in zip(payloads, totals, most, strict=True)
    ]


def _scaled(payload: DistillationPayload, factor: float) -> DistillationPayload:
    changes: dict[str, np.ndarray | float] = {
        "class_counts_C": np.ceil(payload.class_counts_C * factor).astype(np.int64),
    }
    if payload.votes_N is not None:
        changes["votes_N"] = (payload.votes_N * factor).astype(np.float32)
    for name in ("counts_noise", "votes_noise"):
        if (noise := getattr(payload, name)) is not None:
            changes[name] = noise * factor
    return payload.model_copy(update=changes)

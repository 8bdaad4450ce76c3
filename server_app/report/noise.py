"""What counts as a change: differences of accuracies against the noise of a finite test set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "within noise", ""]


@dataclass(frozen=True)
class Share:
    """A share of samples, such as an accuracy, and its standard error; None if the number of samples is not known."""

    value: float
    error: float | None = None


def share(value: float, samples: int | None) -> Share:
    """Return a share of ``samples`` with its standard error.

    The error is that of a binomial distribution. Two successes and two failures are added (Agresti and Coull, 1998), so
    that a share of 0 or 1 has an error too.
    """
    if not samples:
        return Share(value)
    total = samples + 4
    adjusted = (value * samples + 2) / total
    return Share(value, math.sqrt(adjusted * (1 - adjusted) / total))


def mean_share(shares: Sequence[Share]) -> Share | None:
    """Return the mean; its error is the mean error, which bounds it even if all are of the same test set."""
    if not shares:
        return None
    errors = [one.error for one in shares if one.error is not None]
    value = sum(one.value for one in shares) / len(shares)
    return Share(value, sum(errors) / len(errors) if len(errors) == len(shares) else None)


def verdict(before: Share | None, after: Share | None) -> Verdict:
    """Judge a change; it counts if it exceeds two standard errors of the difference. Empty if that is not known."""
    if before is None or after is None or before.error is None or after.error is None:
        return ""
    difference, noise = after.value - before.value, 2 * math.hypot(before.error, after.error)
    return "within noise" if abs(difference) <= noise else "better" if difference > 0 else "worse"

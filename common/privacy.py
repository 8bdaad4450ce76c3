"""The accounting of differential privacy: what the answers of a node cost, and how much noise a budget asks for.

The unit is one example: two sets of examples are neighbours if one of them has one example more. Every answer is a
Gaussian mechanism: a vector to which one example contributes at most 1 (L2 norm), plus noise of a standard deviation
that is called its *noise multiplier*. So the whole accounting is one recipe: the Renyi differential privacy of composed
Gaussian mechanisms, turned into an epsilon at a given delta (`dp_accounting`). The discrete Gaussian mechanism has the
same Renyi differential privacy (arXiv 2004.00010, theorem 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

MECHANISM = "discrete Gaussian noise"
UNIT = "one example, added or removed"
COUNTS_SHARE = 0.1  # Part of a run's budget that is spent on the class counts; the rest is for its rounds of votes.
DEFAULT_DELTA = 1e-5
LARGEST_EPSILON = 1000.0


@dataclass(frozen=True)
class Budget:
    """What a node may spend on its data.

    Attributes
    ----------
    epsilon, delta : float
        The guarantee that holds for all its answers together.
    runs : int
        The number of runs among which it is divided.
    """

    epsilon: float
    delta: float = DEFAULT_DELTA
    runs: int = 1


@dataclass(frozen=True)
class Plan:
    """The noise multipliers of a run's answers; `plan_of` makes it.

    Attributes
    ----------
    counts : float
        Of the class counts, which are answered once.
    votes : float
        Of the votes of each round.
    """

    counts: float
    votes: float

    @property
    def precision(self) -> float:
        """The precision that the whole run may spend; see `precision_of`."""
        return float(self.counts**-2 / COUNTS_SHARE)


def epsilon_of(noises: Iterable[float], delta: float) -> float:
    """Return the epsilon of answers with these noise multipliers, at a delta.

    It is that of the one answer with their `precision_of`.
    """
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    precision = precision_of(noises)
    return float(RdpAccountant().compose(GaussianDpEvent(precision**-0.5)).get_epsilon(delta)) if precision else 0.0


def precision_of(noises: Iterable[float]) -> float:
    """Return the sum of the inverse squares of noise multipliers.

    Answers with the same sum have the same Renyi differential privacy, order by order: alpha / 2 times this sum. So
    budgets are divided by it.
    """
    return sum(noise**-2 for noise in noises)


@lru_cache(maxsize=256)
def most_precision(epsilon: float, delta: float) -> float:
    """Return the largest sum of inverse squared noise multipliers that a budget allows."""
    low, high = 0.0, 1.0
    while epsilon_of([high**-0.5], delta) < epsilon:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of([middle**-0.5], delta) <= epsilon else (low, middle)
    return low


def noise_of(epsilon: float, delta: float, answers: int = 1) -> float:
    """Return the noise multiplier of each of a number of equal answers that together spend a budget."""
    return math.sqrt(answers / most_precision(epsilon, delta))


def plan_of(precision: float, rounds: int) -> Plan:
    """Return the noise of a run of so many rounds that may spend a precision; see `most_precision`."""
    votes = (1 - COUNTS_SHARE) * precision / rounds
    return Plan(counts=(COUNTS_SHARE * precision) ** -0.5, votes=votes**-0.5)

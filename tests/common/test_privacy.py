"""The accounting against closed forms: Renyi divergence of Gaussians (arXiv 1702.07476), and GDP (arXiv 1905.02383)."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedmmkt.common.privacy import (
    COUNTS_SHARE,
    epsilon_of,
    most_precision,
    noise_of,
    plan_of,
    precision_of,
)


def renyi_epsilon(precision, delta):
    """Convert alpha * precision / 2 by arXiv 2004.00010, proposition 12, with the best of many orders."""
    alphas = 1 + np.geomspace(1e-3, 1e4, 200_000)
    found = alphas * precision / 2 + np.log1p(-1 / alphas) - np.log(delta * alphas) / (alphas - 1)
    return float(found.min())


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize("noises", [[1.0], [2.0] * 9, [0.7, 3.0, 3.0], [20.0]])
def test_epsilon_is_that_of_renyi_divergence(noises, delta):
    by_hand = renyi_epsilon(sum(1 / noise**2 for noise in noises), delta)

    # dp_accounting takes the best of a hundred orders, so it is never below, and little above.
    assert by_hand * (1 - 1e-6) <= epsilon_of(noises, delta) <= by_hand * 1.03


def test_epsilon_is_not_below_what_is_possible():
    """The exact delta of Gaussian mechanisms with total mu: Phi(-e/mu + mu/2) - exp(e) Phi(-e/mu - mu/2)."""
    mu, delta = math.sqrt(9) / 2.0, 1e-5

    def excess(epsilon):
        return norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2) - delta

    exact = brentq(excess, 0, 50)

    assert exact <= epsilon_of([2.0] * 9, delta) <= exact + 0.7


def test_nothing_answered_costs_nothing():
    assert epsilon_of([], 1e-5) == 0


def test_noise_spends_the_whole_budget_and_no_more():
    for epsilon in (0.5, 1, 8, 100):
        noise = noise_of(epsilon, 1e-5, answers=8)

        assert epsilon * (1 - 1e-6) <= epsilon_of([noise] * 8, 1e-5) <= epsilon


def test_plan_divides_a_budget():
    precision = most_precision(8, 1e-5)

    plan = plan_of(precision, rounds=8)

    assert plan.counts**-2 == pytest.approx(COUNTS_SHARE * precision)
    assert precision_of([plan.counts] + [plan.votes] * 8) == pytest.approx(precision)
    assert epsilon_of([plan.counts] + [plan.votes] * 8, 1e-5) == pytest.approx(8)

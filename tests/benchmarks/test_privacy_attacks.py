"""The attacks of `benchmarks.privacy` find what is there to be found, and nothing else."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from benchmarks.privacy_attacks import (
    GRADED,
    SIDE,
    as_pixels,
    calibrated,
    confidence,
    evolved,
    most_tpr,
    near_copies,
    nearest_correlations,
    rates,
    votes_on_copies,
)
from fedmmkt.client_app.answers import private_votes


def voting(images_MCHW, labels_M):
    return lambda images, labels: torch.from_numpy(private_votes(images_MCHW, labels_M, images, labels)).float()


def blobs(count, seed):
    small = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
    return small.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8).expand(-1, 3, -1, -1)


def test_rates_of_scores_that_overlap_in_one_pair():
    members, others = np.array([[3.0, 2.0, 1.0]]), np.array([[1.5, 0.0, 0.0]])

    measured = rates(members, others, resamples=0)

    assert measured.tpr_01[0] == pytest.approx(2 / 3)  # Above 1.5, the best of the others, are two of three.
    assert measured.auc[0] == pytest.approx(8 / 9)  # One of nine pairs is in the wrong order.
    assert (measured.members, measured.others) == (3, 3)


def test_rates_of_chance_have_an_interval_that_holds_chance():
    rng = np.random.default_rng(0)

    measured = rates(rng.normal(size=(5, 400)), rng.normal(size=(5, 400)))

    assert measured.tpr_01[1] <= 0.01 <= measured.tpr_01[2]
    assert measured.auc[1] <= 0.5 <= measured.auc[2]


def test_no_attack_exceeds_the_trade_off_of_its_noise():
    assert most_tpr(noise=2.0, answers=4, fpr=0.01) == pytest.approx(norm.cdf(1 + norm.ppf(0.01)))


def test_copies_change_by_their_sizes():
    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)

    copies = near_copies(images, (0.0, 20.0), torch.Generator().manual_seed(0)).float()

    assert copies.shape == (4, 3, 8, 8)
    assert copies[::2].eq(100).all()
    assert 5 < copies[1].std() < 30
    assert copies[1, 0].equal(copies[1, 2])  # Grey stays grey.


def test_graded_copies_find_every_member_without_noise():
    private, others = blobs(30, seed=1), blobs(30, seed=2)
    labels = torch.zeros(60, dtype=torch.int64)
    suspects = torch.cat([private, others])

    found = votes_on_copies(voting(private, labels[:30]), suspects, labels, GRADED, torch.Generator().manual_seed(0))

    assert found[:30, :3].sum(1).tolist() == [3] * 30
    assert found[30:, :3].sum(1).tolist() == [0] * 30


def test_evolution_comes_nearer_to_a_private_image_than_without_information():
    private = blobs(1, seed=1)
    of_chance = torch.Generator().manual_seed(1)

    made = evolved(voting(private, torch.tensor([0])), 0, 40, torch.Generator().manual_seed(0), 100, 20)
    blind = evolved(
        lambda images, labels: torch.rand(len(images), generator=of_chance),
        *(0, 40, torch.Generator().manual_seed(0), 100, 20),
    )

    pixels = as_pixels(private)
    assert made.shape == (20, SIDE * SIDE)
    assert nearest_correlations(pixels, made)[0] > 0.6
    assert nearest_correlations(pixels, blind)[0] < 0.5


def test_correlation_ignores_brightness_and_contrast():
    image = torch.tensor([[0.0, 1.0, 2.0]])

    found = nearest_correlations(image, torch.tensor([[2.0, 1.0, 0.0], [5.0, 7.0, 9.0]]))

    assert found.tolist() == pytest.approx([1.0])


def test_confidence_is_the_log_odds_of_the_right_class():
    logits = torch.log(torch.tensor([[0.8, 0.1, 0.1]]))

    assert confidence(logits, torch.tensor([0])).tolist() == pytest.approx([np.log(0.8 / 0.2)], rel=1e-5)


def test_scores_are_compared_with_models_that_did_not_learn_the_example():
    references = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0])]

    found = calibrated(torch.tensor([4.0, 5.0]), references)

    assert found.tolist() == pytest.approx([2 / 2**0.5, 0.0])

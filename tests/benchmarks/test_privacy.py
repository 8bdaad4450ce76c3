"""The benchmark of privacy: its rows, its noise, and who is a member."""

import argparse
import math

import numpy as np
import pytest
import torch

from benchmarks.privacy import REPETITIONS, ROUNDS, Holdings, _noisy_sums, cifar10_rows, noise_of, row
from fedmmkt.common.privacy import COUNTS_SHARE, precision_of


def holdings():
    images = torch.randint(0, 256, (9, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])]
    return Holdings(images, torch.zeros(9, dtype=torch.int64), rows, models=[])


def test_a_row_without_a_budget_changes_no_setting():
    assert row(math.inf) == ("epsilon inf", {})
    assert row(8) == ("epsilon 8", {"client.epsilon": 8})


def test_the_noise_of_a_run_does_not_depend_on_the_number_of_batches_in_all():
    eight, many = noise_of(8, ROUNDS), noise_of(8, 200)

    assert precision_of([eight] * ROUNDS) == pytest.approx(precision_of([many] * 200))
    assert many > eight
    assert COUNTS_SHARE < 1


def test_others_are_held_by_no_more_than_other_clients():
    assert sorted(holdings().others(1, 6).tolist()) == [0, 1, 2, 6, 7, 8]


def test_a_nodes_votes_are_of_its_own_images():
    held = holdings()

    found = held.bounded_votes(1)(held.images_NCHW[:6], torch.zeros(6, dtype=torch.int64))
    noisy = held.bounded_votes(1, noise=1e-3)(held.images_NCHW[:6], torch.zeros(6, dtype=torch.int64))

    assert found.sum() == 9  # Three images with three votes each.
    assert (found[3:] > 0).all()  # Each votes for itself, too.
    assert noisy.equal(found)


def test_noisy_sums_are_over_copies_and_batches():
    votes = np.array([[1.0, 2.0], [0.0, 0.0]], dtype=np.float32)

    assert _noisy_sums(votes, 1e-3, ROUNDS, seed=0).tolist() == [[3 * ROUNDS, 0]] * REPETITIONS
    assert _noisy_sums(votes, 1e-3, 1, seed=0).tolist() == [[3, 0]] * REPETITIONS


def test_cifar10_is_left_out_with_a_reason_where_it_is_absent(tmp_path):
    told = cifar10_rows(argparse.Namespace(data=tmp_path / "none"), {}, tmp_path)

    assert told == f"CIFAR-10 is left out: {tmp_path / 'none'} has no train.parquet."

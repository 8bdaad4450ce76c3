"""How much one example changes what a node in private mode answers, and with which noise it answers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedmmkt.client_app.answers import private_votes
from fedmmkt.client_app.privacy.noise import with_noise

SIDE = 4


def images(count):
    return arrays_of.arrays(np.uint8, (count, 3, SIDE, SIDE))


@st.composite
def questions(draw):
    """Draw private images with labels, and samples with prompted classes; images are often alike."""
    privates, samples = draw(st.integers(1, 12)), draw(st.integers(1, 10))
    pool = draw(images(3))
    chosen = draw(arrays_of.arrays(np.int64, privates + samples, elements=st.integers(0, 2)))
    shifts = draw(arrays_of.arrays(np.uint8, (privates + samples, 3, SIDE, SIDE), elements=st.integers(0, 1)))
    made = torch.from_numpy(pool[chosen] // 2 + shifts)
    labels_M = torch.from_numpy(draw(arrays_of.arrays(np.int64, privates, elements=st.integers(0, 2))))
    prompted_N = torch.from_numpy(draw(arrays_of.arrays(np.int64, samples, elements=st.integers(-1, 2))))
    return made[:privates], labels_M, made[privates:], prompted_N


@settings(deadline=None, max_examples=60)
@given(questions(), st.integers(1, 3), st.data())
def test_one_example_more_or_less_changes_votes_by_its_own_and_no_other(question, neighbours, data):
    private, labels_M, synthetic, prompted_N = question
    left_out = data.draw(st.integers(0, len(private) - 1))
    kept = [row for row in range(len(private)) if row != left_out]

    votes_N = private_votes(private, labels_M, synthetic, prompted_N, neighbours)
    without_N = private_votes(private[kept], labels_M[kept], synthetic, prompted_N, neighbours)
    alone_N = private_votes(private[[left_out]], labels_M[[left_out]], synthetic, prompted_N, neighbours)

    assert np.array_equal(votes_N - without_N, alone_N)
    assert np.linalg.norm(alone_N) <= neighbours**0.5


def test_votes_go_to_the_nearest_samples_of_the_class_by_grey_levels():
    grey = torch.tensor([10, 20, 200, 90, 12]).to(torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE)
    private, labels_M = grey[:3], torch.tensor([0, 0, 1])
    synthetic = torch.stack([grey[1], grey[4], grey[3], grey[2]])
    prompted_N = torch.tensor([0, 0, 1, -1])

    votes_N = private_votes(private, labels_M, synthetic, prompted_N, neighbours=1)

    # 10 is nearest to 12; 20 to 20; of class 1, 200 is nearest to the 200 without a class.
    assert votes_N.tolist() == [1, 1, 0, 1]
    assert votes_N.dtype == np.int64
    assert private_votes(private, labels_M, synthetic, prompted_N, neighbours=9).tolist() == [2, 2, 1, 3]


def test_of_equal_distances_the_first_sample_is_nearest():
    same = torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8)

    assert private_votes(same[:1], torch.tensor([0]), same, torch.tensor([0, 0, 0]), 2).tolist() == [1, 1, 0]


def test_noise_is_not_seeded_and_meets_its_guarantee():
    import opendp.prelude as dp

    torch.manual_seed(0)
    np.random.seed(0)
    first = with_noise(np.zeros(50, np.int64), 20.0)
    torch.manual_seed(0)
    np.random.seed(0)
    second = with_noise(np.zeros(50, np.int64), 20.0)

    assert not np.array_equal(first, second)
    # OpenDP's own map: sensitivity d and scale s are zero-concentrated DP of d^2 / 2 s^2.
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    assert dp.m.make_gaussian(*space, scale=4.0).map(3**0.5) >= 3 / (2 * 4.0**2) > 0.093

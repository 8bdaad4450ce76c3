"""What one client can contribute is bounded, and honest clients are left as they are."""

import numpy as np

from fedmmkt.common.payloads import DistillationPayload
from fedmmkt.server_app.rules.bounds import bounded


def payload(counts_C, votes_N=None):
    return DistillationPayload(
        batch_id="b",
        logits_NC=np.zeros((2, len(counts_C)), np.float16),
        class_counts_C=np.array(counts_C),
        votes_N=None if votes_N is None else np.array(votes_N, np.float32),
    )


def test_clients_within_the_bound_are_the_same_objects():
    """The demo's clients hold 17 to 611 examples."""
    payloads = [payload([17, 0]), payload([100, 64]), payload([548, 63])]

    assert all(one is other for one, other in zip(bounded(payloads, [10] * 3), payloads, strict=True))


def test_counts_and_votes_beyond_the_bound_are_scaled_alike():
    """The lower median of the totals 10, 20, 10**12 and 40 is 20: at most 60 examples."""
    liar = payload([10**12 - 10**6, 10**6], votes_N=[10**6, 5 * 10**5])

    scaled = bounded([payload([10, 0]), payload([0, 20]), liar, payload([20, 20])], [3] * 4)[2]

    assert scaled.class_counts_C.tolist() == [60, 1]
    assert np.allclose(scaled.votes_N, [6e-5, 3e-5])
    assert liar.class_counts_C.sum() == 10**12


def test_of_two_clients_one_cannot_raise_the_bound():
    honest, liar = payload([10, 0]), payload([0, 10**12 - 1])

    assert bounded([honest, liar], [3, 3])[1].class_counts_C.tolist() == [0, 30]


def test_each_client_has_a_bound_of_its_own():
    large = payload([40, 0])

    scaled = bounded([payload([10, 0]), large, large, payload([0, 10])], [1, 2, 4, 1])

    assert [one.class_counts_C.tolist() for one in scaled] == [[10, 0], [20, 0], [40, 0], [0, 10]]

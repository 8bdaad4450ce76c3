"""No client outweighs the others by how sure it says it is."""

import torch

from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.sureness import scale_of

HONEST = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])  # Samples x classes.


def common_scale(logits_KNC):
    return scale_of(list(logits_KNC.numpy()))(logits_KNC)


def test_logits_of_equally_sure_clients_stay():
    logits_KNC = torch.stack([HONEST] * 3)

    assert torch.equal(common_scale(logits_KNC), logits_KNC)


def test_neither_large_logits_nor_a_constant_win_a_rule_that_reads_sureness():
    """Of three clients, the liar has a third of each sample's weight at most."""
    for lie in (HONEST.flip(1) * 1000, HONEST.flip(1) + 1000, HONEST.flip(1) * 50 + 100):
        logits_KNC = torch.stack([HONEST, HONEST, lie])
        counts_KC, prompted_N = torch.ones(3, 2), torch.tensor([0, 1, 0])
        energy = aggregations.get("energy", {})

        taken, kept = (energy(logits, counts_KC, prompted_N) for logits in (logits_KNC, common_scale(logits_KNC)))

        right_N = prompted_N[:, None]
        assert (taken.gather(1, right_N) < 0.1).all()
        assert (kept.gather(1, right_N) > 0.5).all()


def test_only_the_surest_samples_are_scaled():
    """The bound is the 95 % quantile of spreads: 1.5, for the median client. One sample is beyond it."""
    lie = torch.tensor([[1.0, 0.0], [600.0, 0.0], [0.0, 2.0]])

    scaled = common_scale(torch.stack([HONEST, HONEST, lie]))[2]

    assert torch.equal(scaled[[0, 2]], lie[[0, 2]])
    assert (scaled[1, 0] - scaled[1, 1]).item() == 3

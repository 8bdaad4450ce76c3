"""Update rules and rewards against values computed by hand."""

import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.server_app.rules.updates import UpdateRule, rewards, updates


def test_rewards_are_ranks_and_ties_share_theirs():
    # Ranks 0, 1 and twice 2.5, each half a step from the ends of [0, 1].
    assert rewards(torch.tensor([3.0, 0.0, 3.0, 1.0])).tolist() == [0.75, 0.125, 0.75, 0.375]


def test_equal_scores_are_neither_good_nor_bad():
    assert rewards(torch.ones(3)).tolist() == [0.5, 0.5, 0.5]


def test_update_losses():
    predicted, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    reference, reward_B = torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 0.0])

    supervised = updates.get("supervised")().loss(predicted, target, None, reward_B)
    weighted = updates.get("reward")().loss(predicted, target, None, reward_B)
    negative = updates.get("negative-aware")().loss(predicted, target, reference, reward_B)

    assert supervised.tolist() == pytest.approx([1, 9])
    # Rewards average one half, so twice the reward averages one.
    assert weighted.tolist() == pytest.approx([2, 0])
    # Sample 0: positive branch is the prediction, 1. Sample 1: negative branch 2 * 1 - 3 = -1, squared 1.
    assert negative.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_beta_of_the_negative_aware_update_comes_from_the_users_settings(beta):
    predicted, target, reference = torch.tensor([[3.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])

    rule = updates.get("negative-aware", {"beta": beta})()

    # The positive prediction lies beta of the way from 1 to 3, the negative one as far on the other side.
    assert rule.loss(predicted, target, reference, torch.ones(1)).item() == pytest.approx((1 + 2 * beta) ** 2)
    assert rule.loss(predicted, target, reference, torch.zeros(1)).item() == pytest.approx((1 - 2 * beta) ** 2)


def test_the_negative_aware_update_needs_a_reference():
    with pytest.raises(ValueError, match="needs the reference prediction"):
        updates.get("negative-aware")().loss(torch.ones(1, 1), torch.ones(1, 1), None, torch.ones(1))


def test_a_rule_of_the_users_own_is_found_and_what_is_none_is_refused():
    @updates.register("absolute")
    class Absolute(UpdateRule):
        def loss(self, predicted, target, reference, reward_B):
            return (predicted - target).abs().flatten(1).mean(1)

    try:
        loss_B = updates.get("absolute")().loss(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), None, torch.ones(1))
    finally:
        updates.unregister("absolute")

    assert loss_B.tolist() == [2.0]
    with pytest.raises(ConfigError, match=r"update rule 'mean', but that is a function, and no subclass of UpdateRule"):
        updates.register("mean")(torch.mean)


def test_an_unknown_rule_is_refused():
    allowed = "negative-aware, reward, supervised"
    with pytest.raises(ConfigError, match=rf"'t2i.update' is 'x', but no update rule .*; allowed: {allowed}"):
        updates.get("x")

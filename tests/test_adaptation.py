"""Score and update rules against values computed by hand."""

import pytest
import torch

from common.config import ConfigError
from server_app.adaptation import Feedback, get_scores, get_update, rewards


def feedback(votes=None):
    consensus_NC = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    return Feedback(consensus_NC, torch.tensor([0, 0, -1]), votes)


def test_agreement_is_on_the_prompted_class_or_the_likeliest():
    assert feedback().agreement_N().tolist() == pytest.approx([0.9, 0.5, 0.8])


def test_agreement_across_modalities_is_the_chance_that_both_see_one_class():
    consensus_NC = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    read_NC = torch.tensor([[0.5, 0.5], [0.3, 0.7], [1.0, 0.0]])

    agreement_N = Feedback(consensus_NC, torch.tensor([0, -1, -1]), None, read_NC).agreement_N()

    assert agreement_N.tolist() == pytest.approx([0.9, 0.2 * 0.3 + 0.8 * 0.7, 0.2])


def test_consensus_scores_average_one_within_a_class():
    scores_N = get_scores("consensus")(feedback())
    assert scores_N.tolist() == pytest.approx([0.9 / 0.7, 0.5 / 0.7, 1.0])


def test_vote_scores_are_votes_times_squared_agreement():
    scores_N = get_scores("votes")(feedback(torch.tensor([1.0, 3.0, 5.0])))
    assert scores_N.tolist() == pytest.approx([0.5 * 0.81, 1.5 * 0.25, 1.0 * 0.64])


@pytest.mark.parametrize("votes", [None, torch.zeros(3)])
def test_vote_scores_fall_back_to_agreement_where_nobody_voted(votes):
    assert torch.equal(get_scores("votes")(feedback(votes)), get_scores("consensus")(feedback()))


def test_no_scores_are_zero():
    assert not get_scores("none")(feedback()).any()


def test_rewards_are_ranks_and_ties_share_theirs():
    # Ranks 0, 1 and twice 2.5, each half a step from the ends of [0, 1].
    assert rewards(torch.tensor([3.0, 0.0, 3.0, 1.0])).tolist() == [0.75, 0.125, 0.75, 0.375]


def test_equal_scores_are_neither_good_nor_bad():
    assert rewards(torch.ones(3)).tolist() == [0.5, 0.5, 0.5]


def test_update_losses():
    predicted, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    reference, reward_B = torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 0.0])

    supervised = get_update("supervised").loss(predicted, target, None, reward_B)
    weighted = get_update("reward").loss(predicted, target, None, reward_B)
    negative = get_update("negative-aware").loss(predicted, target, reference, reward_B)

    assert supervised.tolist() == pytest.approx([1, 9])
    # Rewards average one half, so twice the reward averages one.
    assert weighted.tolist() == pytest.approx([2, 0])
    # Sample 0: positive branch is the prediction, 1. Sample 1: negative branch 2 * 1 - 3 = -1, squared 1.
    assert negative.tolist() == pytest.approx([1, 1])


def test_unknown_rules_are_refused():
    with pytest.raises(ConfigError, match=r"'t2i.scores' is 'x'; allowed: consensus, none, votes"):
        get_scores("x")
    with pytest.raises(ConfigError, match=r"'t2i.update' is 'x'; allowed: negative-aware, reward, supervised"):
        get_update("x")

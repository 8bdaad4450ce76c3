"""Score rules against values computed by hand."""

import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.server_app.rules.scores import Feedback, scores


def feedback(votes=None):
    consensus_NC = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    return Feedback(consensus_NC, torch.tensor([0, 0, -1]), votes)


def test_agreement_is_on_the_prompted_class_or_the_likeliest():
    assert feedback().agreement_N().tolist() == pytest.approx([0.9, 0.5, 0.8])


def test_agreement_across_modalities_is_the_chance_that_both_see_one_class():
    consensus_NC = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    text_consensus_NC = torch.tensor([[0.5, 0.5], [0.3, 0.7], [1.0, 0.0]])

    agreement_N = Feedback(consensus_NC, torch.tensor([0, -1, -1]), None, text_consensus_NC).agreement_N()

    assert agreement_N.tolist() == pytest.approx([0.9, 0.2 * 0.3 + 0.8 * 0.7, 0.2])


def test_consensus_scores_average_one_within_a_class():
    scores_N = scores.get("consensus")(feedback())
    assert scores_N.tolist() == pytest.approx([0.9 / 0.7, 0.5 / 0.7, 1.0])


def test_vote_scores_are_votes_times_squared_agreement():
    scores_N = scores.get("votes")(feedback(torch.tensor([1.0, 3.0, 5.0])))
    assert scores_N.tolist() == pytest.approx([0.5 * 0.81, 1.5 * 0.25, 1.0 * 0.64])


def test_samples_that_are_alone_in_their_class_are_scaled_together():
    consensus_NC = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2], [0.5, 0.3, 0.2]])
    feedback = Feedback(consensus_NC, torch.tensor([0, 0, 1, 2]), None)

    scores_N = scores.get("consensus")(feedback)

    assert scores_N.tolist() == pytest.approx([0.9 / 0.7, 0.5 / 0.7, 0.6 / 0.4, 0.2 / 0.4])


def test_votes_of_a_sample_that_is_alone_in_its_class_count_as_the_mean():
    """It gets one vote of each image of its class: 500 and 5 say how large the classes are, and nothing else."""
    consensus_NC = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2], [0.5, 0.3, 0.2]])
    votes_N = torch.tensor([1.0, 3.0, 500.0, 5.0])

    scores_N = scores.get("votes")(Feedback(consensus_NC, torch.tensor([0, 0, 1, 2]), votes_N))

    assert scores_N.tolist() == pytest.approx([0.5 * 0.81, 1.5 * 0.25, 0.36, 0.04])


@pytest.mark.parametrize("votes", [None, torch.zeros(3)])
def test_vote_scores_fall_back_to_agreement_where_nobody_voted(votes):
    assert torch.equal(scores.get("votes")(feedback(votes)), scores.get("consensus")(feedback()))


def test_no_scores_are_zero():
    assert not scores.get("none")(feedback()).any()


def test_an_unknown_rule_is_refused():
    with pytest.raises(
        ConfigError, match=r"'t2i.scores' is 'x', but no score rule .*; allowed: consensus, none, votes"
    ):
        scores.get("x")

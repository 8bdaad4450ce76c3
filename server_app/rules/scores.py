"""Score rules: they turn the clients' answers into a weight for each sample in the update of the T2I model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmmkt.common.registry import Registry


@dataclass(frozen=True)
class Feedback:
    """The combined answers of the clients to a batch.

    Attributes
    ----------
    consensus_NC : torch.Tensor
        Aggregated probabilities of the clients that judge the images.
    prompted_N : torch.Tensor
        int64 class that each prompt names, -1 for none.
    votes_N : torch.Tensor, optional
        Sum of the clients' nearest-neighbour votes, if the run uses them.
    text_consensus_NC : torch.Tensor, optional
        Aggregated probabilities of text clients, which read only the prompts. Used for prompts that name no class.
    """

    consensus_NC: Tensor
    prompted_N: Tensor
    votes_N: Tensor | None
    text_consensus_NC: Tensor | None = None

    def agreement_N(self) -> Tensor:
        """Return the probability that each image shows what its prompt says, according to the clients (N,).

        If the prompt names a class, it is the consensus probability of this class. If not, it is the probability that
        image clients see and text clients read the same class, as independent draws. This agreement across modalities
        detects pairs that do not match. Without text clients, it is the probability of the likeliest class.
        """
        named_N = self.consensus_NC.gather(1, self.prompted_N.clamp_min(0)[:, None])[:, 0]
        if self.text_consensus_NC is None:
            unnamed_N = self.consensus_NC.max(1).values
        else:
            unnamed_N = (self.consensus_NC * self.text_consensus_NC).sum(1)
        return torch.where(self.prompted_N >= 0, named_N, unnamed_N)


ScoreRule = Callable[[Feedback], Tensor]
scores: Registry[ScoreRule] = Registry("score rule", "t2i.scores", ("feedback",))
"""The score rules: a rule takes the clients' `Feedback` and returns one weight per sample, not negative."""


@scores.register("votes")
def votes(feedback: Feedback) -> Tensor:
    """Weight by votes, scaled to mean one within each prompted class, times the squared agreement with the prompt.

    Votes show how real a sample looks among samples of its class, but not whether it shows this class. The squared
    agreement keeps out samples that show another class. A sample that is alone in its class gets all votes of the
    class, whatever it shows, so its votes count as the mean and its agreement decides. Without votes (``feedback =
    "logits"``, or no image clients), the rule is `consensus`.
    """
    if feedback.votes_N is None or not bool(feedback.votes_N.any()):
        return consensus(feedback)
    votes_N = _class_normalised(feedback.votes_N, feedback.prompted_N)
    lone_votes_N = votes_N.masked_fill(_is_alone_N(feedback.prompted_N) & (feedback.prompted_N >= 0), 1.0)
    return lone_votes_N * feedback.agreement_N().clamp_min(0.02).square()


@scores.register("consensus")
def consensus(feedback: Feedback) -> Tensor:
    """Weight by the agreement with the prompt, scaled to mean one within each prompted class."""
    return _class_normalised(feedback.agreement_N(), feedback.prompted_N)


@scores.register("none")
def freeze(feedback: Feedback) -> Tensor:
    """Give every sample weight zero, so that the T2I model does not change."""
    return torch.zeros(len(feedback.prompted_N))


def _class_normalised(values_N: Tensor, prompted_N: Tensor) -> Tensor:
    """Scale values to mean one within each prompted class; classes with one sample are scaled together.

    Scaled alone, every such sample would have the same value.
    """
    index_N = prompted_N + 1
    index_N = torch.where(_is_alone_N(prompted_N), index_N.max() + 1, index_N)
    sums = torch.zeros(int(index_N.max()) + 1).index_add(0, index_N, values_N.float())
    counts = torch.bincount(index_N, minlength=len(sums))
    return values_N / (sums / counts.clamp_min(1)).clamp_min(1e-8)[index_N]


def _is_alone_N(prompted_N: Tensor) -> Tensor:
    """Return whether each sample is the only one of its prompted class."""
    return torch.bincount(prompted_N + 1)[prompted_N + 1] == 1

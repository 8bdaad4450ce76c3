"""Update rules: losses with which the LoRA of the T2I model learns from scored samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from fedmmkt.common.registry import Registry


class UpdateRule(ABC):
    """A loss on the denoiser's prediction, and its requirements.

    Attributes
    ----------
    draws_by_score : bool
        Whether samples are drawn in proportion to their scores; otherwise they are drawn uniformly.
    needs_reference : bool
        Whether the loss needs the prediction from before the update.
    """

    draws_by_score: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def loss(self, predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
        """Return the loss of each sample (B,); a step minimises their mean.

        Parameters
        ----------
        predicted, target : torch.Tensor
            The denoiser's prediction and its target, (B, ...).
        reference : torch.Tensor, optional
            The prediction from before this update, if the rule needs it.
        reward_B : torch.Tensor
            Rewards in [0, 1], with mean one half over all samples.
        """


updates: Registry[type[UpdateRule]] = Registry("update rule", "t2i.update", (), base=UpdateRule)
"""The update rules: subclasses of `UpdateRule`."""


@updates.register("supervised")
class Supervised(UpdateRule):
    """Fine-tune on samples drawn by score, a weighted form of rejection sampling (RAFT, arXiv 2304.06767)."""

    draws_by_score = True

    def loss(self, predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
        """Return the squared error."""
        return squared_error_B(predicted, target)


@updates.register("reward")
class RewardWeighted(UpdateRule):
    """Weight the likelihood of each sample by its reward (arXiv 2302.12192, eq. 3)."""

    def loss(self, predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
        """Return the weighted squared error."""
        return 2 * reward_B * squared_error_B(predicted, target)


@updates.register("negative-aware")
class NegativeAware(UpdateRule):
    """Learn towards well-scored samples and away from badly scored ones (DiffusionNFT, arXiv 2509.16117, eq. 5).

    Parameters
    ----------
    beta : float
        Distance of the two predictions in the equation from the reference.
    """

    needs_reference = True

    def __init__(self, *, beta: float = 1.0) -> None:
        self.beta = beta

    def loss(self, predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
        """Return the squared errors of the positive and the negative prediction, weighted by reward."""
        if reference is None:
            raise ValueError("the negative-aware update needs the reference prediction")
        positive = (1 - self.beta) * reference + self.beta * predicted
        negative = (1 + self.beta) * reference - self.beta * predicted
        return reward_B * squared_error_B(positive, target) + (1 - reward_B) * squared_error_B(negative, target)


def squared_error_B(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, in full precision."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def rewards(scores_N: Tensor) -> Tensor:
    """Map scores to rewards in [0, 1] by rank, with mean one half; equal scores share their mean rank.

    So a negative-aware update learns only from differences between samples: if all scores are equal, it learns nothing.
    """
    _, distinct_N, counts = scores_N.unique(sorted=True, return_inverse=True, return_counts=True)
    middles = counts.cumsum(0) - counts / 2
    return (middles[distinct_N] / len(scores_N)).float()

"""How scored samples teach the text-to-image model: scores of samples, and losses of the LoRA update.

A score rule turns what clients answered into a weight per sample; an update rule is a loss on the denoising
prediction. Both are registered under a name that run-config can choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from common.config import ConfigError

NEGATIVE_AWARE_BETA = 1.0
_Rule = TypeVar("_Rule")


@dataclass(frozen=True)
class Feedback:
    """What the clients together say of a batch.

    Attributes
    ----------
    consensus_NC : torch.Tensor
        Probabilities by the clients whose word on images counts.
    prompted_N : torch.Tensor
        int64 prompted class, -1 for none.
    votes_N : torch.Tensor, optional
        Sum of the clients' nearest-neighbour votes, where the run asks for them.
    read_NC : torch.Tensor, optional
        Probabilities by clients that see the prompts alone: what they read in those that name no class.
    """

    consensus_NC: Tensor
    prompted_N: Tensor
    votes_N: Tensor | None
    read_NC: Tensor | None = None

    def agreement_N(self) -> Tensor:
        """Chance that the image shows what its prompt says, in the clients' eyes.

        The consensus probability of the prompted class. Where the prompt names none, the probability that what
        image clients see and what text clients read is of one class, each independently: the agreement across
        modalities by which a wrong pair is known. Where nobody reads, the probability of the likeliest class.
        """
        named_N = self.consensus_NC.gather(1, self.prompted_N.clamp_min(0)[:, None])[:, 0]
        if self.read_NC is None:
            unnamed_N = self.consensus_NC.max(1).values
        else:
            unnamed_N = (self.consensus_NC * self.read_NC).sum(1)
        return torch.where(self.prompted_N >= 0, named_N, unnamed_N)


ScoreRule = Callable[[Feedback], Tensor]
_SCORE_RULES: dict[str, ScoreRule] = {}


def register_scores(name: str) -> Callable[[ScoreRule], ScoreRule]:
    """Register a rule ``feedback -> weights_N`` (not negative) for ``t2i.scores``."""

    def register(rule: ScoreRule) -> ScoreRule:
        _SCORE_RULES[name] = rule
        return rule

    return register


def get_scores(name: str) -> ScoreRule:
    """Return a score rule by name; ``ConfigError`` if there is none."""
    return _get(_SCORE_RULES, "t2i.scores", name)


@register_scores("votes")
def votes(feedback: Feedback) -> Tensor:
    """Votes, made to average one within each prompted class, times the squared agreement on that class.

    Votes say how real a sample looks among those of its class, not that it is of the class: squared, the
    agreement keeps out samples that show another one. Without votes (``feedback = "logits"``, or no client sees
    images) the agreement alone.
    """
    if feedback.votes_N is None or not bool(feedback.votes_N.any()):
        return consensus(feedback)
    return _class_normalised(feedback.votes_N, feedback.prompted_N) * feedback.agreement_N().clamp_min(0.02).square()


@register_scores("consensus")
def consensus(feedback: Feedback) -> Tensor:
    """The agreement on the prompted class, made to average one within each class."""
    return _class_normalised(feedback.agreement_N(), feedback.prompted_N)


@register_scores("none")
def none(feedback: Feedback) -> Tensor:
    """No sample teaches: the T2I model stays as it is."""
    return torch.zeros(len(feedback.prompted_N))


def _class_normalised(values_N: Tensor, prompted_N: Tensor) -> Tensor:
    index_N = prompted_N + 1
    sums = torch.zeros(int(index_N.max()) + 1).index_add(0, index_N, values_N.float())
    counts = torch.bincount(index_N, minlength=len(sums))
    return values_N / (sums / counts.clamp_min(1)).clamp_min(1e-8)[index_N]


@dataclass(frozen=True)
class UpdateRule:
    """A loss of the LoRA update, and what it needs.

    Attributes
    ----------
    loss : callable
        ``(predicted, target, reference, reward_B) -> loss_B``; the first three are the denoiser's prediction,
        its target and the prediction before this update, all (B, ...); rewards lie in [0, 1] and average one half.
        A step descends the mean.
    draws_by_score : bool
        Whether samples are drawn in proportion to their score, rather than all alike.
    needs_reference : bool
        Whether ``reference`` is computed.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    draws_by_score: bool
    needs_reference: bool = False


_UPDATE_RULES: dict[str, UpdateRule] = {}


def register_update(name: str, rule: UpdateRule) -> UpdateRule:
    """Register an update rule for ``t2i.update``."""
    _UPDATE_RULES[name] = rule
    return rule


def get_update(name: str) -> UpdateRule:
    """Return an update rule by name; ``ConfigError`` if there is none."""
    return _get(_UPDATE_RULES, "t2i.update", name)


def _squared_error_B(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def _supervised(predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
    return _squared_error_B(predicted, target)


def _reward_weighted(predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
    return 2 * reward_B * _squared_error_B(predicted, target)


def _negative_aware(predicted: Tensor, target: Tensor, reference: Tensor | None, reward_B: Tensor) -> Tensor:
    if reference is None:
        raise ValueError("the negative-aware update needs the reference prediction")
    positive = (1 - NEGATIVE_AWARE_BETA) * reference + NEGATIVE_AWARE_BETA * predicted
    negative = (1 + NEGATIVE_AWARE_BETA) * reference - NEGATIVE_AWARE_BETA * predicted
    return reward_B * _squared_error_B(positive, target) + (1 - reward_B) * _squared_error_B(negative, target)


# Fine-tuning on well-scored samples: rejection sampling as in RAFT (arXiv 2304.06767), by weight.
register_update("supervised", UpdateRule(_supervised, draws_by_score=True))
# Reward-weighted likelihood (arXiv 2302.12192, eq. 3).
register_update("reward", UpdateRule(_reward_weighted, draws_by_score=False))
# DiffusionNFT (arXiv 2509.16117, eq. 5): away from badly scored samples too.
register_update("negative-aware", UpdateRule(_negative_aware, draws_by_score=False, needs_reference=True))


def rewards(scores_N: Tensor) -> Tensor:
    """Map scores to rewards in [0, 1] by rank, ties sharing their mean rank, so that rewards average one half.

    A negative-aware update then learns from what tells samples apart: equal scores teach nothing.
    """
    _, distinct_N, counts = scores_N.unique(sorted=True, return_inverse=True, return_counts=True)
    middles = counts.cumsum(0) - counts / 2
    return (middles[distinct_N] / len(scores_N)).float()


def _get(rules: dict[str, _Rule], key: str, name: str) -> _Rule:
    if name not in rules:
        raise ConfigError(f"run-config key {key!r} is {name!r}; allowed: {', '.join(sorted(rules))}")
    return rules[name]

"""Soft targets where clients send no logits, because they have a privacy budget: the prompts say the class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.common.config import ConfigError


def of_prompts(prompted_N: Tensor, classes: int) -> Tensor:
    """Return the class that each prompt names as probabilities (samples x classes).

    Raises
    ------
    ConfigError
        If a prompt names no class.
    """
    if unnamed := int((prompted_N < 0).sum()):
        raise ConfigError(
            f"{unnamed} of {len(prompted_N)} prompts name no class, and no client sends logits, since all have a "
            "privacy budget; allowed: prompts that name a class ('t2i.prompts'), or a client that sends logits"
        )
    return F.one_hot(prompted_N, classes).float()


def completed(probabilities_NC: Tensor, prompted_N: Tensor, covered_C: Tensor) -> Tensor:
    """Replace the probabilities of samples whose prompt names a class that nobody who sent logits holds.

    Parameters
    ----------
    probabilities_NC : torch.Tensor
        Aggregated probabilities.
    prompted_N : torch.Tensor
        int64 class that each prompt names, -1 for none.
    covered_C : torch.Tensor
        bool; the classes of which those who sent logits hold examples.
    """
    open_N = (prompted_N >= 0) & ~covered_C[prompted_N]
    named_NC = F.one_hot(prompted_N.clamp_min(0), probabilities_NC.shape[1]).to(probabilities_NC.dtype)
    return torch.where(open_N[:, None], named_NC, probabilities_NC)

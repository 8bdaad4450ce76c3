"""Soft targets where clients send no logits, because they have a privacy budget: the prompts say the class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.common.config import ConfigError
from fedmmkt.common.payloads import ClientReport
from fedmmkt.server_app.prompts import Prompt


def check_prompts(prompts: Sequence[Prompt], clients: Sequence[ClientReport]) -> None:
    """Check that clients can learn from prompts, before images are generated for them.

    Raises
    ------
    ConfigError
        If all clients have a privacy budget, so that none sends logits, and a prompt names no class.
    """
    if clients and all(client.is_private for client in clients):
        _check_named(torch.tensor([prompt.class_index for prompt in prompts]))


def of_prompts(prompted_N: Tensor, classes: int) -> Tensor:
    """Return the class that each prompt names as probabilities (samples x classes).

    Raises
    ------
    ConfigError
        If a prompt names no class.
    """
    _check_named(prompted_N)
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


def _check_named(prompted_N: Tensor) -> None:
    if unnamed := int((prompted_N < 0).sum()):
        raise ConfigError(
            f"{unnamed} of {len(prompted_N)} prompts name no class, and no client sends logits, since all have a "
            "privacy budget; allowed: prompts that name a class ('t2i.prompts'), or a client that sends logits"
        )

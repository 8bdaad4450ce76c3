"""One scale for all clients' logits, so that none outweighs the others by how sure it says it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# These rules average or rank probabilities: how sure a client is gives it no more than one voice.
RULES_OF_PROBABILITIES = frozenset({"mask", "mean", "era", "median"})
SUREST = 0.95  # Quantile of a client's samples that shows how sure it gets.


def scale_of(clients: Sequence[np.ndarray]) -> Callable[[Tensor], Tensor]:
    """Return a function that bounds logits: no client is surer of a sample than the median one at its surest.

    Two measures are bounded: the spread of a sample's logits, which makes probabilities sharp, by scaling them; and
    their logsumexp, on which a client can win by adding a constant, by shifting them. Logits within the bounds stay.
    The function takes the logits of any clients and samples (..., classes). The bounds are found one client at a time,
    so that the logits of all need not be held in full precision.

    Parameters
    ----------
    clients : sequence of numpy.ndarray
        Logits of each client, samples x classes.
    """
    spread_K, level_K = torch.empty(len(clients)), torch.empty(len(clients))
    for index, logits_NC in enumerate(clients):
        spread_K[index] = _spread(torch.from_numpy(logits_NC).float())[..., 0].quantile(SUREST)
    most_spread = spread_K.median()
    for index, logits_NC in enumerate(clients):
        narrowed_NC = _narrowed(torch.from_numpy(logits_NC).float(), most_spread)
        level_K[index] = narrowed_NC.logsumexp(-1).quantile(SUREST)
    most_level = level_K.median()

    def scale(logits: Tensor) -> Tensor:
        narrowed = _narrowed(logits, most_spread)
        excess = (narrowed.logsumexp(-1, keepdim=True) - most_level).clamp_min(0)
        return torch.where(excess > 0, narrowed - excess, narrowed)

    return scale


def _spread(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()


def _narrowed(logits: Tensor, most_spread: Tensor) -> Tensor:
    mean = logits.mean(-1, keepdim=True)
    factor = (most_spread / _spread(logits).clamp_min(1e-12)).clamp_max(1)
    return torch.where(factor < 1, mean + (logits - mean) * factor, logits)

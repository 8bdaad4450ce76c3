"""One scale for all clients' logits, so that none outweighs the others by how sure it says it is."""

from __future__ import annotations

import torch
from torch import Tensor

# These rules average or rank probabilities: how sure a client is gives it no more than one voice.
RULES_OF_PROBABILITIES = frozenset({"mask", "mean", "era", "median"})
SUREST = 0.95  # Quantile of a client's samples that shows how sure it gets.


def common_scale(logits_KNC: Tensor) -> Tensor:
    """Bound logits, so that no client is surer of any sample than the median client is of its surest ones.

    Two measures are bounded: the spread of a sample's logits, which makes probabilities sharp, by scaling them; and
    their logsumexp, on which a client can win by adding a constant, by shifting them. Logits within the bounds stay.

    Parameters
    ----------
    logits_KNC : torch.Tensor
        Logits, clients x samples x classes.
    """
    mean_KN1 = logits_KNC.mean(-1, keepdim=True)
    spread_KN1 = (logits_KNC - mean_KN1).square().mean(-1, keepdim=True).sqrt()
    factor_KN1 = (_bound(spread_KN1) / spread_KN1.clamp_min(1e-12)).clamp_max(1)
    scaled_KNC = torch.where(factor_KN1 < 1, mean_KN1 + (logits_KNC - mean_KN1) * factor_KN1, logits_KNC)
    level_KN1 = scaled_KNC.logsumexp(-1, keepdim=True)
    excess_KN1 = (level_KN1 - _bound(level_KN1)).clamp_min(0)
    return torch.where(excess_KN1 > 0, scaled_KNC - excess_KN1, scaled_KNC)


def _bound(measure_KN1: Tensor) -> Tensor:
    return measure_KN1[..., 0].quantile(SUREST, dim=1).median()

"""Learning where nobody sends logits, so that soft targets are the classes that prompts name, right or wrong.

A T2I does not always draw what its prompt says. The client's own model, which has seen private images of some classes
and synthetic ones of all, notices some of this. So it learns from a mixture of the prompt and its own prediction
(bootstrapping, arXiv 1412.6596), and more often from samples in which it sees the prompted class (as in co-teaching,
arXiv 1804.06872, but by its own loss). Nothing of this leaves the client.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedmmkt.client_app.learning.training import SyntheticSet

OWN_SHARE = 0.5  # Part of a soft target that the client's own prediction makes up.
LEAST_SEEN = 0.02  # Smallest probability of the prompted class by which a sample is drawn.


def names_prompts_alone(probabilities_NC: np.ndarray, prompted_N: np.ndarray) -> bool:
    """Return whether the soft targets of a batch are the classes that its prompts name, and nothing else."""
    is_named = bool(len(prompted_N)) and bool((prompted_N >= 0).all())
    return is_named and bool((probabilities_NC[np.arange(len(prompted_N)), prompted_N] == 1).all())


def with_own_sight(synthetic: SyntheticSet, own_NC: Tensor, alone_N: Tensor) -> SyntheticSet:
    """Mix the client's own predictions into soft targets that are prompts alone, and draw such samples by them.

    Within each prompted class, the samples are drawn as often as before on average, in proportion to the probability
    that the client gives to the class.

    Parameters
    ----------
    synthetic : SyntheticSet
        The samples, with their soft targets and weights.
    own_NC : torch.Tensor
        The client's own probabilities.
    alone_N : torch.Tensor
        bool; the samples whose soft targets are prompts alone.
    """
    mixed_NC = (1 - OWN_SHARE) * synthetic.probabilities_NC + OWN_SHARE * own_NC
    prompted_N = synthetic.prompted_N.clamp_min(0)
    seen_N = own_NC.gather(1, prompted_N[:, None])[:, 0].clamp_min(LEAST_SEEN)
    sums_C, counts_C = (
        torch.bincount(prompted_N[alone_N], weights, minlength=own_NC.shape[1]) for weights in (seen_N[alone_N], None)
    )
    mean_C = sums_C / counts_C.clamp_min(1)
    factor_N = (seen_N / mean_C.clamp_min(LEAST_SEEN)[prompted_N]).to(synthetic.weights_N)
    return replace(
        synthetic,
        probabilities_NC=torch.where(alone_N[:, None], mixed_NC, synthetic.probabilities_NC),
        weights_N=torch.where(alone_N.to(factor_N.device), synthetic.weights_N * factor_N, synthetic.weights_N),
    )

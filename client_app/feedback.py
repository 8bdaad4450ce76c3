"""What a client answers about synthetic samples: logits, and votes of its private images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 3
VOTE_PIXELS = 16


def to_payload_logits(logits_NC: Tensor) -> np.ndarray:
    """Centre logits by sample and store them in half precision, within its range."""
    centred = logits_NC - logits_NC.mean(dim=1, keepdim=True)
    return centred.clamp(-6e4, 6e4).cpu().numpy().astype(np.float16)


def nearest_neighbour_votes(
    private_MCHW: Tensor,
    labels_M: Tensor,
    synthetic_NCHW: Tensor,
    prompted_N: Tensor,
    neighbours: int = NEIGHBOURS,
) -> Tensor:
    """Let each private image vote for the synthetic images that are nearest to it.

    A nearest-neighbour histogram as in Private Evolution (arXiv 2305.15560, algorithm 1), within the private
    image's own class where prompts name classes. All that leaves the client is one count per sample.

    Parameters
    ----------
    private_MCHW, synthetic_NCHW : torch.Tensor
        float32 in [-1, 1], of one size.
    labels_M, prompted_N : torch.Tensor
        int64; a synthetic sample whose prompt names no class (-1) may be anybody's neighbour.

    Returns
    -------
    torch.Tensor
        float32 (N,); a private image gives each of its ``neighbours`` nearest one vote.
    """
    private_MD, synthetic_ND = _vote_features(private_MCHW), _vote_features(synthetic_NCHW)
    votes_N = torch.zeros(len(synthetic_ND))
    for label in labels_M.unique():
        candidates = torch.nonzero((prompted_N == label) | (prompted_N < 0))[:, 0]
        if not len(candidates):
            continue
        distances = torch.cdist(private_MD[labels_M == label], synthetic_ND[candidates])
        nearest = distances.topk(min(neighbours, len(candidates)), largest=False).indices
        votes_N += torch.bincount(candidates[nearest].flatten().cpu(), minlength=len(votes_N))
    return votes_N


def _vote_features(images_NCHW: Tensor) -> Tensor:
    """Flatten images of at most `VOTE_PIXELS` a side: small shifts matter less, and so do costs."""
    size = min(VOTE_PIXELS, images_NCHW.shape[-1])
    return F.adaptive_avg_pool2d(images_NCHW, size).flatten(1)

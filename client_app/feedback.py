"""What a client answers about synthetic samples: logits, and votes of its private images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.task_models import to_float

NEIGHBOURS = 3
VOTE_PIXELS = 16
CHUNK = 256


def to_payload_logits(logits_NC: Tensor) -> np.ndarray:
    """Store logits in half precision, within its range."""
    return logits_NC.clamp(-6e4, 6e4).cpu().numpy().astype(np.float16)


def nearest_neighbour_votes(
    private_MF: Tensor,
    labels_M: Tensor,
    synthetic_NF: Tensor,
    prompted_N: Tensor,
    neighbours: int = NEIGHBOURS,
) -> Tensor:
    """Let each private image vote for the synthetic images that are nearest to it.

    A nearest-neighbour histogram as in Private Evolution (arXiv 2305.15560, algorithm 1), within the private
    image's own class where prompts name classes. All that leaves the client is one count per sample.

    Parameters
    ----------
    private_MF, synthetic_NF : torch.Tensor
        Features of `vote_features`.
    labels_M, prompted_N : torch.Tensor
        int64; a synthetic sample whose prompt names no class (-1) may be anybody's neighbour.

    Returns
    -------
    torch.Tensor
        float32 (N,); a private image gives each of its ``neighbours`` nearest one vote.
    """
    votes_N = torch.zeros(len(synthetic_NF))
    for label in labels_M.unique():
        candidates = torch.nonzero((prompted_N == label) | (prompted_N < 0))[:, 0]
        if not len(candidates):
            continue
        distances = torch.cdist(private_MF[labels_M == label], synthetic_NF[candidates])
        nearest = distances.topk(min(neighbours, len(candidates)), largest=False).indices
        votes_N += torch.bincount(candidates[nearest].flatten().cpu(), minlength=len(votes_N))
    return votes_N


@torch.no_grad()
def vote_features(encoder: nn.Module, private_MCHW: Tensor, synthetic_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Describe private and synthetic images by their pixels and by the client's own image encoder.

    Pixels, at most `VOTE_PIXELS` a side, tell how an image looks; the encoder what the client has learned to
    see. Both are scaled to the same mean squared distance from the private mean.

    Parameters
    ----------
    encoder : torch.nn.Module
        Maps images to features.
    private_MCHW, synthetic_NCHW : torch.Tensor
        uint8, or float32 in [-1, 1]; of one size.
    """
    encoder.eval()
    described = []
    for describe in (_pixels, encoder):
        private, synthetic = (
            torch.cat([describe(to_float(chunk)) for chunk in images.split(CHUNK)])
            for images in (private_MCHW, synthetic_NCHW)
        )
        spread = (private - private.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-6)
        described.append((private / spread, synthetic / spread))
    privates, synthetics = zip(*described, strict=True)
    return torch.cat(privates, 1), torch.cat(synthetics, 1)


def _pixels(images_NCHW: Tensor) -> Tensor:
    size = min(VOTE_PIXELS, images_NCHW.shape[-1])
    return F.adaptive_avg_pool2d(images_NCHW, size).flatten(1)

"""A client's answer to synthetic samples: logits, and votes of its private images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.learning.batches import call_on_rows
from fedmmkt.client_app.models.task_model import to_float
from fedmmkt.common.payloads import LARGEST_LOGIT, VOTES_PER_IMAGE

VOTE_PIXELS = 16
CHUNK = 256
# Of the squared distance, beside the encoder's features.
PIXEL_PART, STYLE_PART = 0.25, 0.1
PUBLIC_PART = 4.0  # Of a public encoder's features, if the run has one.
DETAILS, FAINT = 3, 1e-6  # Sizes of detail, and the energy below which there is none.
FLAT = 1e-3  # Length of an image's pixels about their mean, in [-1, 1], below which it shows nothing.


def to_payload_logits(logits_NC: Tensor) -> np.ndarray:
    """Convert logits to float16, clamped to its range."""
    return logits_NC.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).cpu().numpy().astype(np.float16)


def grey_levels(images_NCHW: Tensor) -> Tensor:
    """Return pixels of uint8 images, at most `VOTE_PIXELS` per side, from 0 to 255."""
    return _pixels(images_NCHW.double())


def nearest_neighbour_votes(
    private_MF: Tensor,
    labels_M: Tensor,
    synthetic_NF: Tensor,
    prompted_N: Tensor,
    neighbours: int = VOTES_PER_IMAGE,
) -> Tensor:
    """Let each private image vote for the nearest synthetic images.

    This is the nearest-neighbour histogram of Private Evolution (arXiv 2305.15560, algorithm 1). If a prompt names a
    class, only private images of that class can vote for its sample. Only one count per sample leaves the client.

    Parameters
    ----------
    private_MF, synthetic_NF : torch.Tensor
        Features from `vote_features`.
    labels_M, prompted_N : torch.Tensor
        int64 classes. Every private image can vote for a sample whose prompt names no class (-1).
    neighbours : int
        Number of samples that each private image votes for.

    Returns
    -------
    torch.Tensor
        Votes per sample, float32 (N,).
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


def private_votes(
    private_MCHW: Tensor,
    labels_M: Tensor,
    synthetic_NCHW: Tensor,
    prompted_N: Tensor,
    neighbours: int = VOTES_PER_IMAGE,
    encode: Callable[[Tensor], Tensor] = grey_levels,
) -> NDArray[np.int64]:
    """Let each private image vote as `nearest_neighbour_votes`, but so that it changes no vote of another image.

    An image's votes depend on this image, its label and the synthetic samples alone. Distances are exact, so not even
    rounding depends on other images. So one image more or less changes the votes by at most the square root of
    ``neighbours`` (L2 norm).

    Parameters
    ----------
    private_MCHW, synthetic_NCHW : torch.Tensor
        uint8 images.
    labels_M, prompted_N : torch.Tensor
        int64 classes. Every private image can vote for a sample whose prompt names no class (-1).
    neighbours : int
        Number of samples that each private image votes for.
    encode : callable
        Turns images into features, each image by itself: the grey levels of pixels, or an encoder that has never seen
        private data. Features are rounded to whole numbers, and may be up to 10**4.

    Returns
    -------
    numpy.ndarray
        Votes per sample, int64 (N,).
    """
    synthetic_NF, votes_N = encode(synthetic_NCHW).double().round().cpu(), torch.zeros(len(prompted_N)).long()
    labels_M, prompted_N = labels_M.cpu(), prompted_N.cpu()
    for label in labels_M.unique():
        candidates = torch.nonzero((prompted_N == label) | (prompted_N < 0))[:, 0]
        count, samples_nF = len(candidates), synthetic_NF[candidates]
        for voters in torch.nonzero(labels_M == label)[:, 0].split(CHUNK) if count else ():
            features_mF = encode(private_MCHW[voters.to(private_MCHW.device)]).double().round().cpu()
            # Sums of whole numbers below 2**53 are exact in any order. Of equal distances, the first sample is nearest.
            distances_mn = samples_nF.square().sum(1) - 2 * features_mF @ samples_nF.T
            order_mn = distances_mn * count + torch.arange(count)
            nearest_mk = order_mn.topk(min(neighbours, count), largest=False).indices
            votes_N += torch.bincount(candidates[nearest_mk].flatten(), minlength=len(votes_N))
    return votes_N.numpy()


@torch.no_grad()
def vote_features(
    encoder: nn.Module,
    private_MCHW: Tensor,
    synthetic_NCHW: Tensor,
    public: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return features of private and synthetic images: pixels, an image encoder, style, and a public encoder if given.

    Pixels, at most `VOTE_PIXELS` per side, show how an image looks. Each image's mean is taken away and its length made
    one, so that the squared distance is two less twice the normalised cross-correlation: brightness and contrast do not
    count. By plain distances the palest sample is nearest to everybody, and the T2I fades. The encoder shows what tells
    the client's classes apart, and `style_of` how images are drawn. All kinds of features are scaled to the same mean
    squared distance from their mean; then they count by `PIXEL_PART`, `STYLE_PART`, and the encoder by 1.

    Parameters
    ----------
    encoder : torch.nn.Module
        Maps images to features.
    private_MCHW, synthetic_NCHW : torch.Tensor
        uint8, or float32 in [-1, 1]; all of the same size.
    public : tuple of torch.Tensor, optional
        Features of both in a public image encoder. They are compared by centred cosine, which no sample is near to
        just because it is near the middle: the mean of the private images is taken away, and each length made one.
    """
    encoder.eval()
    images = private_MCHW, synthetic_NCHW
    found = [
        (_of_both(_patterns, images), PIXEL_PART),
        (_of_both(encoder, images), 1.0),
        (_by_spread(*_of_both(style_of, images)), STYLE_PART),
    ]
    if public is not None:
        found.append((_directions(*public), PUBLIC_PART))
    features = []
    for (private, synthetic), part in found:
        spread = (private - private.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-6)
        scale = part**0.5 / spread
        features.append([(private * scale).to(private_MCHW.device), (synthetic * scale).to(private_MCHW.device)])
    privates, synthetics = zip(*features, strict=True)
    return torch.cat(privates, 1), torch.cat(synthetics, 1)


def style_of(images_NCHW: Tensor) -> Tensor:
    """Return how images are drawn, whatever they show: brightness, contrast, and detail of three sizes (N, 5).

    Detail is the logarithm of the energy in a band of the image's Laplacian pyramid (Burt and Adelson, 1983). In so few
    dimensions nothing is near everything, so a blurred sample is near blurred images alone.
    """
    grey_N1HW = images_NCHW.mean(1, keepdim=True)
    features = [grey_N1HW.mean((1, 2, 3)), grey_N1HW.std((1, 2, 3))]
    for _ in range(DETAILS):
        blurred_N1HW = F.avg_pool2d(F.pad(grey_N1HW, (1, 1, 1, 1), mode="replicate"), 3, 1)
        energy_N = (grey_N1HW - blurred_N1HW).square().mean((1, 2, 3))
        features.append(energy_N.clamp_min(FAINT).log() / 2)  # Of the amplitude.
        grey_N1HW = F.avg_pool2d(blurred_N1HW, 2) if min(blurred_N1HW.shape[-2:]) > 1 else blurred_N1HW
    return torch.stack(features, 1)


def _by_spread(private_MF: Tensor, synthetic_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each feature by its standard deviation over the private images."""
    spread_F = private_MF.std(0, correction=0).clamp_min(1e-3)
    return private_MF / spread_F, synthetic_NF / spread_F


def _directions(private_MF: Tensor, synthetic_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of features from the mean of the private images."""
    mean_F = private_MF.mean(0)
    return F.normalize(private_MF - mean_F, dim=1), F.normalize(synthetic_NF - mean_F, dim=1)


def _of_both(extract: Callable[[Tensor], Tensor], images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return features of private and of synthetic images."""
    return _extracted(extract, images[0]), _extracted(extract, images[1])


def _extracted(extract: Callable[[Tensor], Tensor], images_NCHW: Tensor) -> Tensor:
    chunks = torch.arange(len(images_NCHW)).split(CHUNK)
    return torch.cat([call_on_rows(lambda index: extract(to_float(images_NCHW[index])), chunk) for chunk in chunks])


def _patterns(images_NCHW: Tensor) -> Tensor:
    pixels_NF = _pixels(images_NCHW)
    return F.normalize(pixels_NF - pixels_NF.mean(1, keepdim=True), dim=1, eps=FLAT)


def _pixels(images_NCHW: Tensor) -> Tensor:
    size = min(VOTE_PIXELS, images_NCHW.shape[-1])
    return F.adaptive_avg_pool2d(images_NCHW, size).flatten(1)

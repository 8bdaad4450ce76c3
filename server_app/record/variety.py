"""Precision, recall, density and coverage of generated images: whether they look real, and how various they are.

The Frechet distance and the alignment see a fading into averages late: all images may be well recognised, and alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

NEIGHBOURS = 5  # As in arXiv 2002.09797; fewer if there are fewer images.
MOST = 2000  # Images of either kind that are compared; of more, a sample, for all are compared with all.


@dataclass(frozen=True)
class Variety:
    """Measures of generated images against real ones, by balls around images that reach to their k-th neighbour.

    Attributes
    ----------
    precision : float
        Fraction of the generated images within a real image's ball (arXiv 1904.06991).
    recall : float
        Fraction of the real images within a generated image's ball (arXiv 1904.06991).
    density : float
        Number of real images' balls that hold a generated image, over k; may exceed 1 (arXiv 2002.09797).
    coverage : float
        Fraction of the real images whose ball holds a generated image (arXiv 2002.09797).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def variety(generated_NF: np.ndarray, real_MF: np.ndarray, neighbours: int = NEIGHBOURS) -> Variety | None:
    """Measure generated images by their features; None if there are fewer than two of either.

    Parameters
    ----------
    generated_NF, real_MF : numpy.ndarray
        Features of the images.
    neighbours : int
        The k of all measures; fewer if there are not more images than that.
    """
    generated_NF, real_MF = _sample(generated_NF), _sample(real_MF)
    k = min(neighbours, len(generated_NF) - 1, len(real_MF) - 1)
    if k < 1:
        return None
    distances_MN = cdist(real_MF, generated_NF)
    in_real_MN = distances_MN <= _radii(real_MF, k)[:, None]
    in_generated_MN = distances_MN <= _radii(generated_NF, k)
    return Variety(
        precision=float(in_real_MN.any(0).mean()),
        recall=float(in_generated_MN.any(1).mean()),
        density=float(in_real_MN.sum(0).mean() / k),
        coverage=float(in_real_MN.any(1).mean()),
    )


def _sample(features_NF: np.ndarray) -> np.ndarray:
    """Return at most `MOST` rows, drawn at random and always the same."""
    if len(features_NF) <= MOST:
        return features_NF
    return features_NF[np.random.default_rng(0).permutation(len(features_NF))[:MOST]]


def _radii(features_NF: np.ndarray, k: int) -> np.ndarray:
    """Return each image's distance to its k-th nearest other image."""
    radii: np.ndarray = np.partition(cdist(features_NF, features_NF), k, axis=1)[:, k]  # Position 0 is the image.
    return radii

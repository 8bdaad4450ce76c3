"""The noise of a node's answers, from OpenDP, which draws it from the operating system's secure randomness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def with_noise(values_N: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    """Add discrete Gaussian noise (arXiv 2004.00010) to whole numbers; no seed decides it.

    If one example changes the values by at most ``d`` (L2 norm), the result has the Renyi differential privacy of a
    Gaussian mechanism with noise multiplier ``scale / d``.

    Parameters
    ----------
    values_N : numpy.ndarray
        int64.
    scale : float
        Standard deviation of the noise; above zero.
    """
    import opendp.prelude as dp

    dp.enable_features("contrib")  # OpenDP's name for mechanisms with a proof in its repository.
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    return np.array(dp.m.make_gaussian(*space, scale=scale)(values_N.tolist()), dtype=np.int64)

"""Measures of generated images in the features of a public network, beside those of the judge.

The judge has learned from the private dataset, so it sees what tells its classes apart. A public network sees what
people see, and has learned from neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from fedmmkt.common.image_encoders import encoded, public_encoder
from fedmmkt.server_app.record.variety import variety


@dataclass(frozen=True)
class PublicMeasures:
    """Measures in a public network's features.

    Attributes
    ----------
    encoder : str
        The network. Only measures of one network compare.
    kernel_distance : float
        Squared maximum mean discrepancy to the real images, with the kernel of arXiv 1801.01401 (eq. 4), which few
        images do not bias. About 0 for real images.
    precision, recall, density, coverage : float
        As in `Variety`.
    """

    encoder: str
    kernel_distance: float
    precision: float
    recall: float
    density: float
    coverage: float


class PublicJudge:
    """Measures images in the features of a public network.

    Parameters
    ----------
    encoder : str
        Name of a registered image encoder.
    real_NHWC : numpy.ndarray
        uint8 RGB, the real images; at least two.
    device : torch.device
        Where features are computed.

    Raises
    ------
    ConfigError
        If there is no such encoder, or it is not installed.
    """

    def __init__(self, encoder: str, real_NHWC: np.ndarray, device: torch.device) -> None:
        self.encoder, self.device = encoder, device
        self._network = find_network(encoder)
        self.real_NF = self._embed(real_NHWC)

    def measure(self, images_NHWC: np.ndarray) -> PublicMeasures | None:
        """Measure images (uint8 RGB) against the real ones; None if there are fewer than two."""
        return self._measured(self._embed(images_NHWC), self.real_NF)

    def floors(self) -> PublicMeasures | None:
        """Return the measures of one half of the real images against the other."""
        order = np.random.default_rng(0).permutation(len(self.real_NF))
        return self._measured(*(self.real_NF[half] for half in np.array_split(order, 2)))

    def _measured(self, features_NF: np.ndarray, real_MF: np.ndarray) -> PublicMeasures | None:
        various = variety(features_NF, real_MF)
        if various is None:
            return None
        return PublicMeasures(self.encoder, kernel_distance(features_NF, real_MF), **asdict(various))

    def _embed(self, images_NHWC: np.ndarray) -> np.ndarray:
        return encoded(self._network, torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), self.device).numpy()


def find_network(name: str) -> nn.Module:
    """Return the network that ``judge-encoder`` names.

    Raises
    ------
    ConfigError
        If there is none, or it is not installed.
    """
    return public_encoder(name, "run-config key 'judge-encoder'")


def kernel_distance(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy with a cubic kernel (KID, arXiv 1801.01401, eq. 4)."""
    first_NF, second_MF = first_NF.astype(np.float64), second_MF.astype(np.float64)
    size = first_NF.shape[1]

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        values: np.ndarray = (left @ right.T / size + 1) ** 3
        return values

    def among(features: np.ndarray) -> float:
        values, count = kernel(features, features), len(features)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))

    return among(first_NF) + among(second_MF) - 2 * float(kernel(first_NF, second_MF).mean())

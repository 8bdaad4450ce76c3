"""The judge, a classifier that measures the T2I model.

It is trained centrally on the real training data, which only a simulation has. It only measures: its results never
reach the training of clients or of the T2I model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.common.augmentation import augment
from fedmmkt.common.progress import Progress

FEATURES = 64
JUDGE_EPOCHS = 25
JUDGE_EXAMPLES = 200_000  # Seen in the whole training; a large dataset gets fewer epochs.


@dataclass(frozen=True)
class GeneratorMeasures:
    """The judge's measures of generated images.

    Attributes
    ----------
    alignment : float or None
        Fraction of the samples in which the judge recognises the prompted class; None if no prompt names a class.
    frechet : float or None
        Frechet distance between the judge's features of these images and of the real test images; None if there are
        fewer than two of either.
    """

    alignment: float | None
    frechet: float | None


class Judge:
    """A small convolutional classifier, with its features of the real test images.

    Parameters
    ----------
    train_NHWC, test_NHWC : numpy.ndarray
        uint8 RGB images, all of one size.
    train_labels_N, test_labels_N : numpy.ndarray
        int64 class indices.
    classes : int
        Size of the class space.
    seed : int
        Seed of the training.

    Attributes
    ----------
    accuracy : float
        Its accuracy on the real test images.
    real_images : dict of int to numpy.ndarray
        The first test image of each class (height x width x RGB, uint8), to show beside generated images.
    """

    def __init__(
        self,
        train_NHWC: np.ndarray,
        train_labels_N: np.ndarray,
        test_NHWC: np.ndarray,
        test_labels_N: np.ndarray,
        classes: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(1024, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, classes)
        self.real_images = {
            index: test_NHWC[np.argmax(test_labels_N == index)] for index in np.unique(test_labels_N).tolist()
        }
        self._train(_to_float(train_NHWC), torch.from_numpy(train_labels_N), seed)
        test_features_NF = self.embed(test_NHWC)
        self.accuracy = float(
            (self.head(test_features_NF).argmax(1) == torch.from_numpy(test_labels_N)).double().mean()
        )
        self.test_features_NF = test_features_NF.numpy()

    def measure(self, images_NHWC: np.ndarray, prompted_N: np.ndarray) -> GeneratorMeasures:
        """Measure generated images (uint8, of the judge's image size) against their prompted classes."""
        features_NF = self.embed(images_NHWC)
        with torch.no_grad():
            recognised_N = self.head(features_NF).argmax(1).numpy()
        named_N = prompted_N >= 0
        alignment = float((recognised_N == prompted_N)[named_N].mean()) if named_N.any() else None
        has_spread = min(len(features_NF), len(self.test_features_NF)) > 1
        frechet = frechet_distance(features_NF.numpy(), self.test_features_NF) if has_spread else None
        return GeneratorMeasures(alignment, frechet)

    def _train(self, images_NCHW: Tensor, labels_N: Tensor, seed: int) -> None:
        network = nn.Sequential(self.features, self.head)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(seed)
        epochs = judge_epochs(len(labels_N))
        progress = Progress("judge", epochs, "epochs of training")
        for epoch in range(epochs):
            for index in torch.randperm(len(labels_N), generator=generator).split(64):
                loss = F.cross_entropy(network(augment(images_NCHW[index], generator)), labels_N[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress(epoch + 1)
        network.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images_NHWC: np.ndarray) -> Tensor:
        """Return features (N, F) of uint8 images of the judge's image size."""
        chunks = range(0, len(images_NHWC), 512)
        return torch.cat([self.features(_to_float(images_NHWC[start : start + 512])) for start in chunks])


def judge_epochs(examples: int) -> int:
    """Return the number of training epochs: 25, fewer above 8,000 examples, at least one."""
    return max(1, min(JUDGE_EPOCHS, JUDGE_EXAMPLES // examples))


def frechet_distance(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """Return the Frechet distance of two Gaussians fitted to features (FID, arXiv 1706.08500, eq. 6)."""
    difference_F = first_NF.mean(0, dtype=np.float64) - second_MF.mean(0, dtype=np.float64)
    first_FF, second_FF = np.cov(first_NF, rowvar=False), np.cov(second_MF, rowvar=False)
    # Trace of the square root of the product, from eigenvalues: sqrtm fails if a feature is always zero.
    roots_F = np.sqrt(np.clip(linalg.eigvals(first_FF @ second_FF).real, 0, None))
    trace = np.trace(first_FF) + np.trace(second_FF) - 2 * roots_F.sum()
    return max(0.0, float(difference_F @ difference_F + trace))


def _to_float(images_NHWC: np.ndarray) -> Tensor:
    return (torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()

"""The judge, a classifier that measures the T2I model.

It is trained centrally on the real training data, which only a simulation has. It only measures: its results never
reach the training of clients or of the T2I model.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.common.augmentation import augment
from fedmmkt.common.files import write_atomically
from fedmmkt.common.images import resize_images
from fedmmkt.common.progress import Progress
from fedmmkt.server_app.record.public_measures import PublicJudge
from fedmmkt.server_app.record.variety import variety

logger = logging.getLogger("flwr")

FEATURES = 64
LARGEST_SIDE = 64  # Of the judge's images in pixels: larger ones cost much, and show it little more.
TRAINING = 1  # To be raised with each change of the network or of its training, so that no old judge is taken.
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
    precision, recall, density, coverage : float or None
        As in `Variety`, with the same features; None where there is no Frechet distance.
    public : dict or None
        `PublicMeasures`, if the judge has a public network beside it.
    """

    alignment: float | None
    frechet: float | None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    public: dict[str, Any] | None = None


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
    device : torch.device, optional
        Where it is trained and measures; by default the CPU. Its images stay in main memory, but for a batch.
    cache : Path, optional
        Folder of trained judges. One that was trained on the same images and labels, with the same seed on the same
        kind of device, is taken from there.
    public_encoder : str
        A public network in whose features it also measures; empty for none.

    Attributes
    ----------
    image_size : int
        Side of the images that it sees, in pixels: that of the given images, at most `LARGEST_SIDE`.
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
        device: torch.device | None = None,
        cache: Path | None = None,
        public_encoder: str = "",
    ) -> None:
        self.device = device or torch.device("cpu")
        self.image_size = min(train_NHWC.shape[1], LARGEST_SIDE)
        train_NHWC = resize_images(train_NHWC, self.image_size)
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
        self._network = nn.Sequential(self.features, self.head).to(self.device)
        file = cache / f"{self._key(train_NHWC, train_labels_N, seed)}.safetensors" if cache else None
        if file is None or not self._load(file):
            self._train(train_NHWC, torch.from_numpy(train_labels_N), seed)
            if file is not None:
                self._save(file)
        self._network.eval().requires_grad_(False)
        test_features_NF = self.embed(test_NHWC)
        self.accuracy = float((self._recognised_N(test_features_NF) == torch.from_numpy(test_labels_N)).double().mean())
        self.test_features_NF = test_features_NF.numpy()
        small_NHWC = resize_images(test_NHWC, self.image_size)
        self.public = PublicJudge(public_encoder, small_NHWC, self.device) if public_encoder else None

    def measure(self, images_NHWC: np.ndarray, prompted_N: np.ndarray) -> GeneratorMeasures:
        """Measure generated images (uint8, of one size) against their prompted classes."""
        features_NF = self.embed(images_NHWC)
        recognised_N = self._recognised_N(features_NF).numpy()
        named_N = prompted_N >= 0
        alignment = float((recognised_N == prompted_N)[named_N].mean()) if named_N.any() else None
        has_spread = min(len(features_NF), len(self.test_features_NF)) > 1
        frechet = frechet_distance(features_NF.numpy(), self.test_features_NF) if has_spread else None
        various = variety(features_NF.numpy(), self.test_features_NF)
        public = self.public.measure(images_NHWC) if self.public else None
        found = asdict(various) if various else {}
        return GeneratorMeasures(alignment, frechet, **found, public=asdict(public) if public else None)

    def floors(self) -> dict[str, Any]:
        """Return what the measures are for real images: one half of the test images against the other.

        A distance of few images is larger, so the number of images is among them.
        """
        order = np.random.default_rng(0).permutation(len(self.test_features_NF))
        first, second = (self.test_features_NF[half] for half in np.array_split(order, 2))
        various = variety(first, second)
        found = {"images": len(first), "frechet": frechet_distance(first, second) if len(second) > 1 else None}
        public = self.public.floors() if self.public else None
        return found | (asdict(various) if various else {}) | ({"public": asdict(public)} if public else {})

    @torch.no_grad()
    def _recognised_N(self, features_NF: Tensor) -> Tensor:
        """Return the class that the judge sees in each image, by its features, on the CPU."""
        recognised_N: Tensor = self.head(features_NF.to(self.device)).argmax(1).cpu()
        return recognised_N

    def _train(self, images_NHWC: np.ndarray, labels_N: Tensor, seed: int) -> None:
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(seed)
        epochs, done = judge_epochs(len(labels_N)), 0
        progress = Progress("judge", epochs * len(labels_N), "images of its training")
        for _ in range(epochs):
            for index in torch.randperm(len(labels_N), generator=generator).split(64):
                images_BCHW = augment(_to_float(images_NHWC[index.numpy()]), generator).to(self.device)
                loss = F.cross_entropy(self._network(images_BCHW), labels_N[index].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress(done := done + len(index))

    @torch.no_grad()
    def embed(self, images_NHWC: np.ndarray) -> Tensor:
        """Return features (N, F) of uint8 images of one size, on the CPU."""
        chunks = (images_NHWC[start : start + 512] for start in range(0, len(images_NHWC), 512))
        small = (_to_float(resize_images(chunk, self.image_size)).to(self.device) for chunk in chunks)
        return torch.cat([self.features(images_BCHW).cpu() for images_BCHW in small])

    def _key(self, train_NHWC: np.ndarray, train_labels_N: np.ndarray, seed: int) -> str:
        """Return a text that differs if anything that the training depends on does."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        settings = (TRAINING, seed, self.head.out_features, train_NHWC.shape, kind, torch.get_num_threads())
        digest = hashlib.sha256(repr((*settings, torch.__version__, np.__version__)).encode())
        digest.update(np.ascontiguousarray(train_NHWC).data)
        digest.update(np.ascontiguousarray(train_labels_N).data)
        return digest.hexdigest()

    def _load(self, file: Path) -> bool:
        """Load a trained judge; return whether there is one that can be used."""
        try:
            self._network.load_state_dict(load_file(file))
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError, RuntimeError) as error:
            logger.warning("The kept judge %s cannot be used (%s), and is trained anew", file, str(error)[:200])
            return False
        logger.info("The judge was trained before, and is taken from %s", file)
        return True

    def _save(self, file: Path) -> None:
        state = {name: tensor.cpu() for name, tensor in self._network.state_dict().items()}
        try:
            write_atomically(file, lambda temporary: save_file(state, temporary))
        except OSError as error:
            logger.warning("The trained judge could not be kept, and the run goes on: %s", error)


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

"""The network by which a client's private images vote: small, convolutional, trained on them alone, and then fixed.

What the client's own model sees is no good guide where it reads pixels or patches: to such features, blurred and pale
samples are near everybody, and a T2I that learns from their votes fades. Nor does a model stay the same: it learns from
the T2I's samples too. `docs/results.md` has what each kind of features makes of a T2I.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.kept_tensors import fingerprint, kept_or_made
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, parameter_groups, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs, to_float
from fedmmkt.common.config import ClientConfig

ARCHITECTURE, VERSION = "cnn", 1
SIDE = 32  # Of the images that it reads, in pixels; larger ones are made smaller.
MOST_IMAGES = 5_000  # That it is trained on: more cost much, and its features need them little.


class VoteNetwork(nn.Module):
    """Maps images of any size, uint8 or in [-1, 1], to features (B, F)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images to features."""
        features_BF: Tensor = self.encoder(_small(to_float(images_BCHW)))
        return features_BF


def vote_network(
    images_MCHW: Tensor, labels_M: Tensor, classes: int, config: ClientConfig, seed: int, file: Path
) -> VoteNetwork:
    """Return the vote network of a client's private images, trained, or as it was kept.

    Parameters
    ----------
    images_MCHW, labels_M : torch.Tensor
        The private images (uint8) and their classes.
    classes : int
        Size of the class space.
    config : ClientConfig
        Learning rate, batch size, augmentation and loss are those of the client's model, and so are the epochs of its
        first round (``client.warmup-epochs``).
    seed : int
        Seed of weights and training.
    file : Path
        Where the network is kept.
    """
    learning = (config.warmup_epochs, config.learning_rate, config.batch_size)
    settings = (VERSION, classes, seed, *learning, config.augmentation, config.balanced_softmax)
    key = fingerprint(settings, images_MCHW, labels_M)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AlignedModel(build_task_model(ARCHITECTURE, classes, SIDE), 0).to(images_MCHW.device)
        encoder = model.task_model.image_encoder
        if encoder is None:
            raise TypeError(f"the model {ARCHITECTURE!r} has no image encoder")

        def trained() -> dict[str, Tensor]:
            draws = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(labels_M), generator=draws)[:MOST_IMAGES].to(images_MCHW.device)
            small_MCHW = torch.cat([_small(to_float(part)) for part in images_MCHW[chosen].split(256)])
            private = PrivateSet(Inputs(small_MCHW), labels_M[chosen])
            optimizer = AdamW(parameter_groups(model, config), weight_decay=1e-3)
            train(model, optimizer, private, None, config, config.warmup_epochs, draws)
            return {name: tensor.detach().cpu().clone() for name, tensor in encoder.state_dict().items()}

        encoder.load_state_dict(kept_or_made(file, key, trained))
    return VoteNetwork(encoder).eval().requires_grad_(False)


def _small(images_BCHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images_BCHW, SIDE) if max(images_BCHW.shape[-2:]) > SIDE else images_BCHW

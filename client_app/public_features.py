"""Features of a client's images in the run's public image encoder, with which its private images vote.

Those of private images are kept on the node's disk, so that a round costs those of the synthetic images alone.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmmkt.client_app.kept_tensors import fingerprint, kept_or_made
from fedmmkt.client_app.models.building import TRANSFORMERS
from fedmmkt.common.config import ConfigError, NodeConfig
from fedmmkt.common.image_encoders import encoded, public_encoder

FEATURES = "features"


class PublicFeatures:
    """Features in a public image encoder.

    Parameters
    ----------
    name : str
        A registered encoder, ``module:name``, or ``transformers:`` with a folder or hub id.
    node : NodeConfig
        A node with data of its own takes no code or model that the run names, unless it says ``run-models=true``.
    file : Path
        Where features of private images are kept.
    device : torch.device
        Where they are computed.

    Raises
    ------
    ConfigError
        If the node does not take the encoder, or it cannot be loaded.
    """

    def __init__(self, name: str, node: NodeConfig, file: Path, device: torch.device) -> None:
        if ":" in name and node.has_own_data and not node.run_models:
            raise ConfigError(
                f"run-config key 'client.vote-encoder' names {name!r}; allowed on a node with data of its own: "
                "built-in encoders, or any with the node-config key 'run-models=true'"
            )
        self.name, self.file, self.device = name, file, device
        self.encoder = find_encoder(name)

    def of(self, images_NCHW: Tensor) -> Tensor:
        """Return the features of uint8 images (N, F), on the CPU."""
        return encoded(self.encoder, images_NCHW, self.device)

    def of_private(self, images_MCHW: Tensor) -> Tensor:
        """Return the features of private images, from the disk if they are there."""
        key = fingerprint(self.name, images_MCHW)
        return kept_or_made(self.file, key, lambda: {FEATURES: self.of(images_MCHW)})[FEATURES]


def find_encoder(name: str) -> nn.Module:
    """Return the encoder that ``client.vote-encoder`` names.

    Raises
    ------
    ConfigError
        If there is none, or it cannot be loaded.
    """
    return _of_transformers(name) if name.startswith(TRANSFORMERS) else public_encoder(name)


@lru_cache(maxsize=4)
def _of_transformers(name: str) -> nn.Module:
    from fedmmkt.client_app.models.pretrained import build_transformers_model  # Slow to import.

    model = build_transformers_model(name.removeprefix(TRANSFORMERS), ("0", "1"), 224)
    if model.image_encoder is None:
        raise ConfigError(f"run-config key 'client.vote-encoder' is {name!r}, which reads no images")
    return model.image_encoder.eval().requires_grad_(False)

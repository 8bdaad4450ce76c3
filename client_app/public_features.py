"""Features of a client's images in the run's public image encoder, with which its private images vote.

Those of private images are kept on the node's disk, so that a round costs those of the synthetic images alone.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from logging import getLogger
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedmmkt.client_app.models.building import TRANSFORMERS
from fedmmkt.client_app.models.task_model import to_float
from fedmmkt.common.config import ConfigError, NodeConfig
from fedmmkt.common.files import private_folder, write_atomically
from fedmmkt.common.image_encoders import public_encoder

CHUNK = 128
KEY, FEATURES = "of", "features"

logger = getLogger("flwr")


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
                f"run-config key 'client.vote-encoder' names {name!r}; allowed on a node with data of its own: built-in "
                "encoders, or any with the node-config key 'run-models=true'"
            )
        self.name, self.file, self.device = name, file, device
        self.encoder = _of_transformers(name) if name.startswith(TRANSFORMERS) else public_encoder(name)

    def of(self, images_NCHW: Tensor) -> Tensor:
        """Return the features of uint8 images (N, F), on the CPU."""
        self.encoder.to(self.device)
        with torch.no_grad():
            parts = [self.encoder(to_float(part.to(self.device))).float().cpu() for part in images_NCHW.split(CHUNK)]
        return torch.cat(parts)

    def of_private(self, images_MCHW: Tensor) -> Tensor:
        """Return the features of private images, from the disk if they are there."""
        key = self._key(images_MCHW)
        try:
            with safe_open(self.file, framework="pt") as kept:
                if (kept.metadata() or {}).get(KEY) == key:
                    found: Tensor = kept.get_tensor(FEATURES)
                    return found
        except (OSError, SafetensorError):  # There are none yet, or they are damaged.
            pass
        features_MF = self.of(images_MCHW)
        try:
            private_folder(self.file.parent)
            write_atomically(self.file, lambda temporary: save_file({FEATURES: features_MF}, temporary, {KEY: key}))
        except OSError as error:
            logger.warning("Features of private images could not be kept, and are made again each round: %s", error)
        return features_MF

    def _key(self, images_MCHW: Tensor) -> str:
        digest = hashlib.sha256(repr((self.name, tuple(images_MCHW.shape))).encode())
        digest.update(images_MCHW.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@lru_cache(maxsize=4)
def _of_transformers(name: str) -> nn.Module:
    from fedmmkt.client_app.models.pretrained import build_transformers_model  # Slow to import.

    model = build_transformers_model(name.removeprefix(TRANSFORMERS), ("0", "1"), 224)
    if model.image_encoder is None:
        raise ConfigError(f"run-config key 'client.vote-encoder' is {name!r}, which reads no images")
    return model.image_encoder.eval().requires_grad_(False)

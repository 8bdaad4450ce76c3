"""Choice of the devices, and of the number of threads, to compute on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedmmkt.common.config import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the named device; for ``auto``, a CUDA GPU if there is one, else the CPU.

    Raises
    ------
    ConfigError
        If the name is not a device, or the device is not available.
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
    """Return the named devices; for ``auto`` alone, all CUDA GPUs if there are any, else the CPU.

    Raises
    ------
    ConfigError
        As in `pick_device`.
    """
    count = torch.cuda.device_count()
    if list(names) == ["auto"] and count > 1:
        return [torch.device("cuda", index) for index in range(count)]
    return [pick_device(name) for name in names]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Have torch use this many threads of the CPU inside the block, in the thread that runs it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)

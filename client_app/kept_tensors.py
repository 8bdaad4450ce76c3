"""Tensors that a client makes once from its private data, and keeps on its own disk for later messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmmkt.common.files import private_folder, write_atomically

KEY = "of"

logger = getLogger("flwr")


def kept_or_made(file: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what a file keeps under a key; if it does not, make it and keep it.

    Parameters
    ----------
    file : Path
        Only its owner can read its folder. What it kept under another key is replaced.
    key : str
        Stands for all that the tensors depend on, such as `fingerprint`.
    make : callable
        Makes the tensors.
    """
    try:
        with safe_open(file, framework="pt") as kept:
            if (kept.metadata() or {}).get(KEY) == key:
                return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118  # It has no iterator.
    except (OSError, SafetensorError):  # There is none yet, or it is damaged.
        pass
    made = make()
    try:
        private_folder(file.parent)
        write_atomically(file, lambda temporary: save_file(made, temporary, {KEY: key}))
    except OSError as error:
        logger.warning("%s could not be kept, and is made again for each message: %s", file.name, error)
    return made


def fingerprint(settings: object, *tensors: Tensor) -> str:
    """Return a text that differs if settings or tensors do."""
    digest = hashlib.sha256(repr((settings, [(tensor.shape, tensor.dtype) for tensor in tensors])).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()

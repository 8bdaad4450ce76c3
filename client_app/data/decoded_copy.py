"""A decoded copy of a node's own data, so that the data is not read and decoded again for every message.

A deployed client is a new process for every message. With the copy, this process need not decode the data or import the
library that reads datasets. The copy is one file. It is written again if a data file or a setting has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from fedmmkt.client_app.data.private_data import PrivateData, load_private_data
from fedmmkt.client_app.memory import plain_name
from fedmmkt.common.config import NodeConfig, RunConfig
from fedmmkt.common.datasets import Examples
from fedmmkt.common.files import private_folder, remove_leftovers, write_atomically

logger = getLogger("flwr")


def load_own_data(
    state_folder: Path,
    client: str,
    config: RunConfig,
    node: NodeConfig,
    class_space: tuple[str, ...],
    images: bool,
    texts: bool,
) -> PrivateData:
    """Load the private data of a node with a ``data-path``, from the decoded copy if it is up to date.

    The result is the same as that of `load_private_data`.

    Parameters
    ----------
    state_folder : Path
        Folder of the node's state. The copy is ``data/CLIENT/examples.npz`` in it, readable only for its owner. The
        folder may lie inside the data folder.
    client : str
        The client's name.
    images, texts : bool
        Whether the node's model reads images, and whether it reads texts.

    Raises
    ------
    ConfigError
        If the data cannot be read or has classes outside the class space.
    """
    folder = state_folder / "data" / plain_name(client)
    path, key = folder / "examples.npz", _fingerprint(state_folder, config, node, class_space, images, texts)
    remove_leftovers(folder)
    if (copy := _read_copy(path, key)) is not None:
        return copy
    data = load_private_data(config, node, class_space, images, texts)
    try:
        private_folder(folder)
        _write_copy(path, key, data)
    except OSError as error:
        logger.warning("The data will be read again for the next message: %s", error)
    return data


def _fingerprint(
    state_folder: Path, config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> str:
    """Return a hash of all that determines the examples: settings, and name, size and time of each data file."""
    root = Path(node.data_path).expanduser().absolute()
    found = root.rglob("*") if root.is_dir() else [root]
    # The node's state changes every round and is not part of its data.
    files = sorted(path for path in found if path.is_file() and not path.is_relative_to(state_folder.absolute()))
    file_states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    data = node.own_data(config.data).model_dump()
    settings = [data, config.seed, class_space, images, texts]
    return hashlib.sha256(json.dumps([settings, file_states]).encode()).hexdigest()


def _write_copy(path: Path, key: str, data: PrivateData) -> None:
    arrays: dict[str, np.ndarray] = {"key": _to_array(key)}
    for name, part in (("train", data.train), ("test", data.test)):
        arrays[f"{name}.labels"] = part.labels_N
        if part.images_NHWC is not None:
            arrays[f"{name}.images"] = part.images_NHWC
        if part.texts is not None:
            arrays[f"{name}.texts"] = _to_array(part.texts)
        arrays[f"{name}.whites"] = _to_array(dict(part.whites))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _read_copy(path: Path, key: str) -> PrivateData | None:
    """Read the copy; return None if it is missing, damaged or out of date."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if _from_array(archive["key"]) != key:
                return None
            parts = [
                Examples(
                    archive[f"{name}.labels"],
                    archive.get(f"{name}.images"),
                    _from_array(archive[f"{name}.texts"]) if f"{name}.texts" in archive else None,
                    _from_array(archive[f"{name}.whites"]),
                )
                for name in ("train", "test")
            ]
    except Exception:  # numpy raises many kinds of errors on a damaged file; the data itself can be read instead.
        return None
    return PrivateData(*parts)


def _to_array(value: str | list[str] | dict[str, float]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_array(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())

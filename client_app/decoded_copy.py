"""A decoded copy of a node's own data, so that a message's process need not read and decode it again.

A deployed client is a new process for every message. The copy spares it the import of what reads datasets, and
decoding. It is one file, made anew when a file of the data or a setting has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from client_app.memory import plain_name
from client_app.private_data import PrivateData, load_private_data
from common.config import NodeConfig, RunConfig
from common.datasets import Examples
from common.files import write_atomically

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
    """Load what `load_private_data` does for a node with a ``data-path``, from the copy where there is one.

    Parameters
    ----------
    state_folder : Path
        Where the node keeps its state; the copy is ``data/CLIENT/examples.npz`` in it, for its owner only. It may
        lie within the data.
    client : str
        The client's name.
    images, texts : bool
        What the node's model reads.

    Raises
    ------
    ConfigError
        If the data cannot be read or has classes outside the class space.
    """
    folder = state_folder / "data" / plain_name(client)
    path, key = folder / "examples.npz", _state_of(state_folder, config, node, class_space, images, texts)
    if (copy := _read_copy(path, key)) is not None:
        return copy
    data = load_private_data(config, node, class_space, images, texts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_copy(path, key, data)
    except OSError as error:
        logger.warning("The data will be read again for the next message: %s", error)
    return data


def _state_of(
    state_folder: Path, config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> str:
    """Digest all that the examples depend on: the settings, and name, size and time of each file of the data."""
    root = Path(node.data_path).expanduser().absolute()
    found = root.rglob("*") if root.is_dir() else [root]
    # What a node keeps of a round changes with each, and is none of its data.
    files = sorted(path for path in found if path.is_file() and not path.is_relative_to(state_folder.absolute()))
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    data = node.own_data(config.data).model_dump(exclude={"own_fields"})
    settings = [data, config.seed, class_space, images, texts]
    return hashlib.sha256(json.dumps([settings, states]).encode()).hexdigest()


def _write_copy(path: Path, key: str, data: PrivateData) -> None:
    arrays: dict[str, np.ndarray] = {"key": _bytes(key)}
    for name, part in (("train", data.train), ("test", data.test)):
        arrays[f"{name}.labels"] = part.labels_N
        if part.images_NHWC is not None:
            arrays[f"{name}.images"] = part.images_NHWC
        if part.texts is not None:
            arrays[f"{name}.texts"] = _bytes(part.texts)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _read_copy(path: Path, key: str) -> PrivateData | None:
    """Read the copy; None if there is none, if it is of another state of the data, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if _object(archive["key"]) != key:
                return None
            parts = [
                Examples(
                    archive[f"{name}.labels"],
                    archive.get(f"{name}.images"),
                    _object(archive[f"{name}.texts"]) if f"{name}.texts" in archive else None,
                )
                for name in ("train", "test")
            ]
    except Exception:  # Whatever numpy says of a damaged file, the data itself is there.
        return None
    return PrivateData(*parts)


def _bytes(value: str | list[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _object(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())

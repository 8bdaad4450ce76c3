"""A node's private data: a partition of the run's dataset in simulation, its own dataset elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError, NodeConfig, RunConfig
from common.datasets import Examples, load_splits, partition_rows, relabel, to_examples
from common.files import write_atomically

logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class PrivateData:
    """Training examples, and those that the client's model is measured on."""

    train: Examples
    test: Examples


def load_private_data(
    config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> PrivateData:
    """Load what one node holds, labelled in the run's class space.

    In simulation all clients share the dataset's test split; a node with data of its own holds out a part.

    Parameters
    ----------
    images, texts : bool
        What the node's model reads; the rest is never decoded.

    Raises
    ------
    ConfigError
        If the data cannot be read or has classes outside the class space.
    """
    data = config.data
    if node.data_path:
        data = data.model_copy(update={"dataset": node.data_path})
    splits = load_splits(data, config.seed)
    train = splits.train
    if not node.data_path:
        if node.partition_id is None or node.num_partitions is None or node.partition_id >= node.num_partitions:
            raise ConfigError(
                f"node-config key 'partition-id' is {node.partition_id}; allowed: 0 up to 'num-partitions' "
                f"({node.num_partitions}) less one, or a 'data-path'"
            )
        train = train.select(partition_rows(data, node.num_partitions, config.seed)[node.partition_id])
    examples = [to_examples(part, data, images=images, texts=texts) for part in (train, splits.test)]
    return PrivateData(*(relabel(part, splits.classes, class_space) for part in examples))


def load_own_data(
    folder: Path, config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> PrivateData:
    """Load what `load_private_data` does for a node with a ``data-path``, from a decoded copy where there is one.

    A deployed client is a new process for every message. The copy spares it the import of what reads datasets,
    and decoding. It is one file, ``examples.npz``, made anew when a file of the data or a setting has changed.

    Parameters
    ----------
    folder : Path
        Where the copy is kept, for its owner only.
    images, texts : bool
        What the node's model reads.

    Raises
    ------
    ConfigError
        If the data cannot be read or has classes outside the class space.
    """
    path, key = folder / "examples.npz", _state_of(config, node, class_space, images, texts)
    if (copy := _read_copy(path, key)) is not None:
        return copy
    data = load_private_data(config, node, class_space, images, texts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_copy(path, key, data)
    except OSError as error:
        logger.warning("The data will be read again for the next message: %s", error)
    return data


def _state_of(config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool) -> str:
    """Digest all that the examples depend on: the settings, and name, size and time of each file."""
    root = Path(node.data_path).expanduser()
    files = sorted(path for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = [config.data.model_dump(), config.seed, node.data_path, class_space, images, texts]
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

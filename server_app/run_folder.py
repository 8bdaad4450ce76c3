"""The folder of one run: its configuration, a line of metrics and a picture per round, and where the rest goes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from common.config import ConfigError
from common.files import write_atomically, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = getLogger("flwr")


class RunFolder:
    """What a run leaves; each file is whole at any time, so that a crash costs the present round at most.

    `create` makes a folder for a new run; the constructor opens one as it is, and touches nothing.

    Parameters
    ----------
    path : Path
        The folder.
    tensorboard : bool
        Whether metrics are also written as TensorBoard events.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self.path = path
        self.tensorboard = tensorboard
        self._events: SummaryWriter | None = None

    @classmethod
    def create(cls, path: Path, tensorboard: bool) -> RunFolder:
        """Make the folder of a new run; one that holds an earlier run is moved aside, never overwritten.

        Parameters
        ----------
        path : Path
            An absolute path.
        tensorboard : bool
            Whether metrics are also written as TensorBoard events.

        Raises
        ------
        ConfigError
            If ``path`` is not absolute, or cannot be made or written.
        """
        if not path.is_absolute():
            raise _unusable(path, "is not absolute")
        try:
            path = path.resolve()  # moving a link aside would leave the new run on another disk
            path.mkdir(parents=True, exist_ok=True)
            _write_something(path)
            if (path / "metrics.jsonl").exists():
                _move_aside(path)
                path.mkdir()
        except OSError as error:
            raise _unusable(path, f"cannot be used ({error.strerror})") from error
        return cls(path, tensorboard)

    @property
    def config(self) -> Path:
        """The run's configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a round."""
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """Folder of pictures, one a round."""
        return self.path / "images"

    @property
    def lora(self) -> Path:
        """Folder of the adapter, as diffusers loads it."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """Folder of what is needed to go on with the run."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The run as one HTML page."""
        return self.path / "report.html"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``.

        Raises
        ------
        OSError
            If it could not be written; its old content is kept.
        """
        write_text(self.config, json.dumps(_strict(config), indent=2, sort_keys=True, allow_nan=False) + "\n")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a round to ``metrics.jsonl``, and to the TensorBoard events if they are wanted.

        The file is small, so it is rewritten whole: no crash can leave half a line.

        Parameters
        ----------
        line : mapping
            JSON-serialisable, with the key ``round``. Numbers that are not finite, which JSON does not
            know, are written as null.

        Raises
        ------
        OSError
            If it could not be written; the earlier lines are kept.
        """
        strict = _strict(line)
        earlier = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
        write_text(self.metrics, earlier + json.dumps(strict, allow_nan=False) + "\n")
        if self.tensorboard:
            self._write_events(strict)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``, oldest first; none if there is no such file."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def write_images(self, round: int, images: Sequence[Image.Image], columns: int) -> Path:
        """Write a round's pictures as one grid, ``images/round-NNN.png``.

        Parameters
        ----------
        round : int
            Its number, 0 for before any learning.
        images : sequence of PIL.Image.Image
            At least one, all of one size; placed row by row.
        columns : int
            Pictures in a row.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OSError
            If it could not be written; its old content is kept.
        """
        grid = _grid(images, columns)
        path = self.images / f"round-{round:03d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"))
        return path

    def close(self) -> None:
        """Close the TensorBoard events; a later `append_metrics` opens new ones."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write_events(self, line: Mapping[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and not always wanted

            self._events = SummaryWriter(str(self.path / "tensorboard"))
        for tag, value in _numbers(line):
            if tag != "round":
                self._events.add_scalar(tag, value, line["round"])
        self._events.flush()


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"run-config key 'output-dir': the run folder '{path}' {problem}; allowed: an absolute path of a folder "
        "that can be made and written, or empty for ~/.fedmmkt/runs/<run id>"
    )


def _write_something(folder: Path) -> None:
    """Raise OSError unless the folder takes a file: permissions alone do not tell of full or read-only disks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


def _move_aside(path: Path) -> None:
    """Rename an earlier run's folder by the time of its last metrics."""
    ended = datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime)
    name = f"{path.name}-{ended:%Y%m%d-%H%M%S}"
    target, number = path.with_name(name), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{name}-{number}")
    path.rename(target)
    logger.info("%s held an earlier run, which is now in %s", path, target)


def _strict(value: Any) -> Any:
    """Copy nested data with null for each number that strict JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _strict(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    """Give the numbers of nested objects with the keys that lead to them, joined by slashes."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            yield from _numbers(content, f"{tag}/{key}" if tag else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield tag, value


def _grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Place pictures row by row on white, with a narrow gap so that neighbours do not run together."""
    width, height = images[0].size
    gap = max(1, width // 16)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid

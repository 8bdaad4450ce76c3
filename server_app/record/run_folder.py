"""The folder of one run: its configuration, metrics and a picture per round, and the paths of all other files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_atomically, write_test_file, write_text

logger = getLogger("flwr")

# Of these, a run has at least one as soon as it has written anything.
STOPPED = "stopped"  # The cause, in the file of failures, of a run that somebody ended.
SIGNS_OF_A_RUN = {"config.json", "metrics.jsonl", "traceback.txt", "flower-tracebacks.txt", "clients"}


class Mark(NamedTuple):
    """How far a file was written: the number of bytes, and the SHA-256 of these."""

    bytes: int
    sha256: str


class RunFolder:
    """The folder of one run; files are written atomically, so a crash costs at most the current round.

    Use `create` for a new run, and `resume` to continue a run. The constructor opens a folder and changes nothing.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, self._digest = -1, hashlib.sha256()  # Of the metrics; not known yet.

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder of a new run; a folder with an earlier run is renamed, never overwritten.

        Parameters
        ----------
        path : Path
            An absolute path.

        Raises
        ------
        ConfigError
            If ``path`` is not absolute, cannot be created or written, holds something else than a run, or is in use by
            another run.
        """
        if not path.is_absolute():
            raise _unusable(path, "is not absolute")
        try:
            path = path.resolve()  # renaming a link would put the new run on another disk
            path.mkdir(parents=True, exist_ok=True)
            cls(path).check_is_free()
            with cls(path).in_use():  # Also of a run that has written nothing yet.
                write_test_file(path)
                if (path / "metrics.jsonl").exists():
                    _move_aside(path)
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise _unusable(path, f"cannot be used ({error.strerror})") from error
        return cls(path)

    @classmethod
    def resume(cls, path: Path, earlier: RunFolder, last: int, metrics_bytes: int) -> RunFolder:
        """Make the folder of a run that continues an earlier run, in the same folder or in a new one.

        In the same folder, results of later rounds are removed, because these rounds are repeated. With a new folder,
        the earlier folder is only read.

        Parameters
        ----------
        path : Path
            As in `create`.
        earlier : RunFolder
            The folder of the earlier run.
        last : int
            The round after which the run continues.
        metrics_bytes : int
            How much of the earlier metrics is kept.

        Raises
        ------
        ConfigError
            As in `create`.
        """
        if path.resolve() != earlier.path.resolve():
            folder = cls.create(path)
            for number, picture in earlier.pictures().items():
                if number <= last:
                    folder.images.mkdir(exist_ok=True)
                    shutil.copy2(picture, folder.images)
            for file in (earlier.captions, earlier.real_images):
                if file.exists():
                    shutil.copy2(file, folder.images)
            if metrics_bytes:
                write_atomically(folder.metrics, lambda part: _copy_start(earlier.metrics, part, metrics_bytes))
            return folder
        folder = cls(path.resolve())
        with folder.in_use():
            try:
                if folder.metrics.exists():
                    os.truncate(folder.metrics, metrics_bytes)
            except OSError as error:
                raise _unusable(path, f"cannot be used ({error.strerror})") from error
            for number, picture in folder.pictures().items():
                if number > last:
                    picture.unlink()
        return folder

    def check_is_free(self) -> None:
        """Check that the folder is missing, empty, or that of a run.

        Raises
        ------
        ConfigError
            If it holds something else, such as the user's data.
        """
        found = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if found and not found & SIGNS_OF_A_RUN:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise _unusable(
                self.path,
                f"holds something else ({min(found)!r}{more})",
            )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lock the folder for this run inside the block; the system releases the lock if the process dies.

        Raises
        ------
        ConfigError
            If another run is writing to the folder.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _unusable(self.path, "is being written by a run that is going on") from None
        except OSError as error:  # Some network file systems cannot lock folders.
            logger.warning("%s cannot be locked against other runs (%s)", self.path, error.strerror)
        try:
            yield
        finally:
            os.close(handle)

    @property
    def config(self) -> Path:
        """File of the run's configuration (JSON)."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """File of the metrics: one JSON object per line, one line per round."""
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """Folder of the pictures, one per round."""
        return self.path / "images"

    @property
    def captions(self) -> Path:
        """File of the prompts of the pictures (JSON), with the columns of a grid and the class of each row."""
        return self.images / "prompts.json"

    @property
    def real_images(self) -> Path:
        """Picture of real test images, one for each row of the grids."""
        return self.images / "real.png"

    @property
    def lora(self) -> Path:
        """Folder of the adapter, in the format that diffusers loads."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, to resume the run."""
        return self.path / "checkpoints"

    @property
    def failure(self) -> Path:
        """File with the cause, if the run failed (one line)."""
        return self.path / "failure.txt"

    @property
    def report(self) -> Path:
        """File of the run's report, one HTML page."""
        return self.path / "report.html"

    def pictures(self) -> dict[int, Path]:
        """Return the existing pictures by round, in order of the rounds."""
        named = ((re.fullmatch(r"round-(\d+)\.png", path.name), path) for path in self.images.glob("*.png"))
        found = {int(match[1]): path for match, path in named if match}
        return {number: found[number] for number in sorted(found)}

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json``; ``OSError`` if it is missing."""
        described: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
        return described

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``.

        Raises
        ------
        OSError
            If it could not be written. The old content is then kept.
        """
        write_text(self.config, json.dumps(_strict(config), indent=2, sort_keys=True, allow_nan=False) + "\n")

    def write_failure(self, cause: str) -> None:
        """Write why the run failed, or `STOPPED`; an empty cause removes the file, as a run begins.

        Raises
        ------
        OSError
            If it could not be written or removed.
        """
        if cause:
            write_text(self.failure, cause + "\n")
        else:
            self.failure.unlink(missing_ok=True)

    def read_failure(self) -> str:
        """Read why the run failed, or `STOPPED`; empty if it did not, or if it is going on."""
        try:
            return self.failure.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a round to ``metrics.jsonl``; nothing else in the file is read or written.

        A crash can leave half a line at the end, which readers leave out and the next line replaces.

        Parameters
        ----------
        line : mapping
            JSON-serialisable, with the key ``round``. Numbers that are not finite are written as null, because JSON has
            no such numbers.

        Raises
        ------
        OSError
            If it could not be written. The earlier lines are then kept.
        """
        written = self.metrics_mark()
        text = (json.dumps(_strict(line), allow_nan=False) + "\n").encode()
        try:
            with self.metrics.open("ab", buffering=0) as file:
                file.truncate(written.bytes)
                try:
                    rest = text
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(file.fileno(), written.bytes)
                    raise
        except OSError as error:
            raise OSError(
                error.errno, f"{self.metrics} could not be written ({error.strerror}); its old content is kept"
            ) from error
        self._digest.update(text)
        self._bytes += len(text)

    def metrics_mark(self) -> Mark:
        """Return how long the whole lines of ``metrics.jsonl`` are, with their checksum.

        The file is read once. Afterwards, what this object appends is added.
        """
        if self._bytes < 0:
            whole = self.metrics.read_bytes() if self.metrics.exists() else b""
            whole = whole[: whole.rfind(b"\n") + 1]
            self._bytes, self._digest = len(whole), hashlib.sha256(whole)
        return Mark(self._bytes, self._digest.hexdigest())

    def read_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines of ``metrics.jsonl``, oldest first; there are none if there is no such file."""
        if not self.metrics.exists():
            return
        with self.metrics.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``, oldest first; the list is empty if there is no such file."""
        return list(self.read_lines())

    def write_images(self, round: int, images: Sequence[Image.Image], columns: int) -> Path:
        """Write the pictures of a round as one grid, ``images/round-NNN.png``.

        Parameters
        ----------
        round : int
            Number of the round; 0 is before any learning.
        images : sequence of PIL.Image.Image
            At least one, all of one size. They are placed row by row.
        columns : int
            Pictures per row.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OSError
            If it could not be written. The old content is then kept.
        """
        path = self.picture(round)
        _write_grid(path, images, columns)
        return path

    def picture(self, round: int) -> Path:
        """Return the file of a round's picture, which may be missing."""
        return self.images / f"round-{round:03d}.png"

    def write_captions(
        self, prompts: Sequence[str], columns: int, rows: Sequence[str], real: Sequence[Image.Image] = ()
    ) -> None:
        """Write what the grids show.

        Parameters
        ----------
        prompts : sequence of str
            One per picture of a grid.
        columns : int
            Pictures per row.
        rows : sequence of str
            The class of each row; empty for a row of several.
        real : sequence of PIL.Image.Image
            Real images, one per row, of the size of the pictures; none if they are not known.

        Raises
        ------
        OSError
            If it could not be written. The old content is then kept.
        """
        described = {"columns": columns, "prompts": list(prompts), "rows": list(rows)}
        write_text(self.captions, json.dumps(described, indent=2) + "\n")
        if real:
            _write_grid(self.real_images, real, columns=1)
        else:  # A run that goes on may show none, where it did.
            self.real_images.unlink(missing_ok=True)

    def read_captions(self) -> dict[str, Any]:
        """Read what the grids show; empty for a run of an earlier version."""
        if not self.captions.exists():
            return {}
        described: dict[str, Any] = json.loads(self.captions.read_text(encoding="utf-8"))
        return described


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"run-config key 'output-dir': the run folder '{path}' {problem}; allowed: an absolute path of a folder "
        "that can be made and written, empty or that of an earlier run, or empty for ~/.fedmmkt/runs/<run id>"
    )


def _copy_start(source: Path, target: Path, size: int) -> None:
    """Copy the first bytes of a file."""
    with source.open("rb") as read, target.open("wb") as written:
        while part := read.read(min(size, 1 << 20)):
            written.write(part)
            size -= len(part)


def _move_aside(path: Path) -> None:
    """Rename the folder of an earlier run; the new name ends with the time of its last metrics."""
    ended = datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime)
    name = f"{path.name}-{ended:%Y%m%d-%H%M%S}"
    target, number = path.with_name(name), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{name}-{number}")
    path.rename(target)
    logger.info("%s held an earlier run, which is now in %s", path, target)


def _strict(value: Any) -> Any:
    """Copy nested data; numbers that strict JSON cannot represent become None."""
    if isinstance(value, Mapping):
        return {key: _strict(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_grid(path: Path, images: Sequence[Image.Image], columns: int) -> None:
    grid = _grid(images, columns)
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"))


def _grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Place pictures row by row on white, with a narrow gap between neighbours."""
    from diffusers.utils import make_image_grid  # takes seconds to import, and only writing needs it

    gap, columns = max(1, images[0].width // 16), min(columns, len(images))
    framed = [ImageOps.expand(image, (0, 0, gap, gap), "white") for image in images]
    framed += [Image.new("RGB", framed[0].size, "white")] * (-len(framed) % columns)
    grid = make_image_grid(framed, len(framed) // columns, columns)
    return grid.crop((0, 0, grid.width - gap, grid.height - gap))

"""Atomic writing: a file or folder is either complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it to ``path`` in one step.

    Parameters
    ----------
    path : Path
        The file; its folder is created if missing.
    write : callable
        Function that writes the content to the path it gets.

    Raises
    ------
    OSError
        If the disk is full or not writable. ``path`` is then unchanged, and the text names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: it makes files private, but other users should be able to read a report.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        _to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror}); its old content is kept"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def replaced_folder(path: Path, mode: int = 0o755) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces ``path`` if the block ends without an error.

    Parameters
    ----------
    path : Path
        The folder to replace or create.
    mode : int
        Permissions of the new folder.

    Raises
    ------
    OSError
        From the block, or from the replacement. ``path`` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
        temporary.chmod(mode)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _to_disk(file: Path) -> None:
    """Flush a file to disk, so that a power cut after the renaming cannot leave an empty file."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

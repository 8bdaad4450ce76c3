"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, then put it in place of ``path`` at once.

    Parameters
    ----------
    path : Path
        The file; its folder is made if missing.
    write : callable
        Writes the content to the path that it is given.

    Raises
    ------
    OSError
        If the disk is full or not writable; ``path`` is then what it was before. Its text names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files no other user may read: a report is for many.
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
    """Give an empty folder to fill, which takes the place of ``path`` when the block ends without error.

    ``mode`` is the permissions of the folder.

    Raises
    ------
    OSError
        From the block, or from the exchange; ``path`` is then what it was before.
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
    """Have the system write a file out, so that a power cut after its renaming leaves no empty one."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

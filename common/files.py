"""Atomic writing: a file or folder is either complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"
# What `write_atomically` and `replaced_folder` leave behind if the process is killed.
_LEFTOVER = re.compile(r"\..+\.([0-9a-f]{32}|[a-z0-9_]{8}(\.old)?)")
_LEFT_AFTER = 600  # seconds without a change until something temporary counts as left behind


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


def write_test_file(folder: Path) -> None:
    """Raise OSError if a file cannot be written; permissions alone do not show a full or read-only disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


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


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can read, and make every missing parent like it; return the folder."""
    for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    return path


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Wait until no other process has this folder locked, and lock it inside the block.

    Where there is no such folder, or its file system has no locks, nothing is waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield
        return
    try:
        with suppress(OSError):  # Some network file systems have none.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # Ends the lock.


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in a folder; what another process is still writing stays."""
    for path in folder.glob(".*"):
        with suppress(FileNotFoundError):  # Another process may have finished it just now.
            if _LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFT_AFTER:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def write_manifest(folder: Path) -> None:
    """Write the checksums of all files of a folder into its ``manifest.json``."""
    sums = {str(file.relative_to(folder)): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def damaged_files(folder: Path) -> set[str]:
    """Return the names of files that are missing or are not what was written; of a damaged manifest, its name."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return {name for name, written in sums.items() if _sha256(folder / name) != written}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {MANIFEST}


def _sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _to_disk(file: Path) -> None:
    """Flush a file to disk, so that a power cut after the renaming cannot leave an empty file."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

"""A failure in one line, with its traceback in a file."""

from __future__ import annotations

import traceback
from pathlib import Path

from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_text
from fedmmkt.common.payloads import PayloadError

LONGEST = 2000  # Characters of a failure's line; it may travel in a message.


class RunError(RuntimeError):
    """The run cannot continue; the text says why."""


def describe(error: BaseException) -> str:
    """Return the text of an error in one line; errors that are not the project's own begin with their kind."""
    text = " ".join(str(error).split()) if isinstance(error, ConfigError | PayloadError | RunError) else one_line(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def one_line(error: BaseException) -> str:
    """Return the kind and the text of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_traceback(file: Path, error: BaseException) -> bool:
    """Write the traceback of an error in place of an earlier one; return whether the disk took it."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(file, "".join(traceback.format_exception(error)))
    except OSError:
        return False
    return True

"""The common part of the commands that use what a run left, without Flower: quiet libraries and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from fedmmkt.common.config import ConfigError
from fedmmkt.common.registry import importable
from fedmmkt.deploy.processes import QUIET_LIBRARIES


def run_locally(act: Callable[[], int], app: Path | None) -> int:
    """Do what a command does; tell its errors in a line.

    Parameters
    ----------
    act : callable
        Does it, and returns the exit code.
    app : Path, optional
        Folder of the user's own app, whose modules it may import.

    Returns
    -------
    int
        The exit code; 2 for bad input.
    """
    os.environ.update({**QUIET_LIBRARIES, **os.environ})
    try:
        with importable(app) if app else nullcontext():
            return act()
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT

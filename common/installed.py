"""Access to files of the installed package that an app bundle cannot contain."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmmkt.common.config import ConfigError


def installed(path: str) -> Path:
    """Return the path of a package file or folder, such as ``starter/model``, in the app bundle or the installation.

    Raises
    ------
    ConfigError
        If it is in neither.
    """
    for folder in sys.modules["fedmmkt"].__path__:
        if (found := Path(folder) / path).exists():
            return found
    raise ConfigError(
        f"{path!r} of the package fedmmkt is not on this machine: it cannot travel in an app bundle; "
        "install fedmmkt here (pip install .)"
    )

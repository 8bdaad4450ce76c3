"""The ServerApp, under the name that an app's ``pyproject.toml`` gives it: ``fedmmkt.server:app``."""

import fedmmkt  # noqa: F401  Flower's simulation imports from two threads: this waits until the package is complete.
from fedmmkt.server_app.app import app

__all__ = ["app"]

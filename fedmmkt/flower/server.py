"""The ServerApp, under the name that an app's ``pyproject.toml`` gives it: ``fedmmkt.flower.server:app``."""

from fedmmkt.server import app

__all__ = ["app"]

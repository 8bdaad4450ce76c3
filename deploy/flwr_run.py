"""The run-config of Flower's own command ``flwr run``, checked before Flower submits the run.

Flower's SuperLink answers a key that the app does not have with "Invalid run configuration", and says no more. A wrong
value is found by the ServerApp, after its start. Both are told here instead. Files are not looked at: they are those of
the SuperLink's machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from fedmmkt.common.config import ConfigError, RunConfig, Setting
from fedmmkt.deploy.bundle import PROJECT, default_config, own_config, read_app, runs_fedmmkt
from fedmmkt.deploy.run_config_text import parse_run_config


def check_command(command: click.Context) -> None:
    """Check the run-config of ``flwr run``, if its app is one of ours.

    What Flower has read of its command line is used. Where it is not as Flower 1.39 has it, nothing is checked, and the
    SuperLink and the ServerApp check as ever.

    Raises
    ------
    click.ClickException
        If a key or a value is wrong. Flower shows the text, and exits with 1.
    """
    app, texts = command.params.get("app"), command.params.get("run_config_overrides")
    if not isinstance(app, str) or not isinstance(texts, list | tuple):
        return
    folder = Path(app).expanduser().resolve()
    try:
        project = read_app(folder)
    except ConfigError:
        return  # Flower says what is wrong with it.
    if not runs_fedmmkt(project):
        return
    try:
        changes = parse_run_config([str(text) for text in texts])
        RunConfig.from_flower({**default_config(project), **changes})
        _check_overridable(folder, own_config(project), changes)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _check_overridable(app: Path, own: Mapping[str, Setting], changes: Mapping[str, Setting]) -> None:
    """Check that the app has all keys: Flower changes only those, and not those that our defaults add."""
    if lacking := [key for key in changes if key not in own]:
        lines = ", ".join(f"{key} = {json.dumps(changes[key])}" for key in lacking)
        raise ConfigError(
            f"Flower changes only keys of [tool.flwr.app.config] in {app / PROJECT}, which lacks "
            f"{', '.join(map(repr, lacking))}; write {lines} there, or use fedmmkt demo --app {app}"
        )

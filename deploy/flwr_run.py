"""The run-config of Flower's own command ``flwr run``, checked before Flower submits the run.

Flower's SuperLink answers a key that the app does not have with "Invalid run configuration", and says no more. A wrong
value or name is found by the ServerApp, after its start. They are told here instead. Files are not looked at: they are
those of the SuperLink's machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from fedmmkt.common.config import ConfigError, RunConfig, Setting, to_flower
from fedmmkt.deploy.bundle import PROJECT, default_config, own_config, read_app, runs_fedmmkt
from fedmmkt.deploy.run_config_text import parse_run_config

NAMES = ("strategy", "t2i.aggregation", "t2i.scores", "t2i.update", "t2i.family", "client.models")


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
        config = RunConfig.from_flower({**default_config(project), **changes})
        _check_names(config)
        _check_overridable(folder, own_config(project), changes)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _check_names(config: RunConfig) -> None:
    """Check the names of rules, models, families and strategies, but for those of modules and of the hub.

    These are found on other machines. Where all names are the defaults, nothing is imported, which takes seconds.
    """
    settings, defaults = to_flower(config), to_flower(RunConfig())
    changed = {key: settings[key] for key in NAMES if settings[key] != defaults[key]}
    if not changed:
        return
    from fedmmkt.deploy.rules import registries

    problems = []
    for registry in registries():
        for name in map(str.strip, str(changed.get(registry.key, "")).split(",")):
            try:
                if name and ":" not in name and name != defaults[registry.key]:
                    registry.get(name, config.extra.as_dict())
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _check_overridable(app: Path, own: Mapping[str, Setting], changes: Mapping[str, Setting]) -> None:
    """Check that the app has all keys: Flower changes only those, and not those that our defaults add."""
    if lacking := [key for key in changes if key not in own]:
        lines = ", ".join(f"{key} = {json.dumps(changes[key])}" for key in lacking)
        raise ConfigError(
            f"Flower changes only keys of [tool.flwr.app.config] in {app / PROJECT}, which lacks "
            f"{', '.join(map(repr, lacking))}; write {lines} there, or use fedmmkt demo --app {app}"
        )

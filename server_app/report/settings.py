"""The settings of a run for the page: what differs from the defaults, and the command that repeats the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedmmkt.common.config import OWN_OF_A_RUN, RunConfig, Setting, to_flower
from fedmmkt.common.flower_settings import flatten, format_run_config
from fedmmkt.server_app.report.numbers import flat


class ShownSetting(NamedTuple):
    """A key of the run-config with its value; ``default`` is the default if it differs, else None."""

    key: str
    value: str
    default: str | None


def settings_of(config: Mapping[str, Any]) -> list[ShownSetting]:
    """Return all settings, those that differ from their default first."""
    defaults = dict(flat(RunConfig().model_dump(mode="json", by_alias=True)))
    found = [
        ShownSetting(key, value, None if defaults.get(key) == value else defaults.get(key, "none"))
        for key, value in flat(config)
    ]
    return sorted(found, key=lambda setting: setting.default is None)


def repeating_run_config(config: Mapping[str, Any]) -> str:
    """Return the option ``--run-config`` that repeats a run, quoted for a shell; empty if all settings are defaults."""
    defaults = to_flower(RunConfig())
    settings = {key: value for key, value in flatten(config).items() if defaults.get(key) != value}
    return run_config_option({key: value for key, value in settings.items() if key not in OWN_OF_A_RUN})


def run_config_option(settings: Mapping[str, Setting]) -> str:
    """Return the option ``--run-config`` for settings by dotted keys, quoted for a shell; empty if there are none."""
    return f" --run-config {shlex.quote(format_run_config(settings))}" if settings else ""

"""The settings of a run for the page: what differs from the defaults, and the command that repeats the run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.report.numbers import flat

# Where a run writes and for which nodes it waits is no property of its results.
PLACES = ("output-dir", "resume-from", "min-available-nodes")


class Setting(NamedTuple):
    """A key of the run-config with its value; ``default`` is the default if it differs, else None."""

    key: str
    value: str
    default: str | None


def settings_of(config: Mapping[str, Any]) -> list[Setting]:
    """Return all settings, those that differ from their default first."""
    defaults = dict(flat(RunConfig().model_dump(mode="json", by_alias=True)))
    found = [
        Setting(key, value, None if defaults.get(key) == value else defaults.get(key, "none"))
        for key, value in flat(config)
    ]
    return sorted(found, key=lambda setting: setting.default is None)


def repeating_run_config(config: Mapping[str, Any]) -> str:
    """Return the option ``--run-config`` that repeats a run, quoted for a shell; empty if all settings are defaults."""
    changed = {setting.key for setting in settings_of(config) if setting.default is not None} - {*PLACES}
    return run_config_option({key: value for key, value in _leaves(config) if key in changed})


def run_config_option(settings: Mapping[str, Any]) -> str:
    """Return the option ``--run-config`` for settings by dotted keys, quoted for a shell; empty if there are none."""
    pairs = [f"{key}={_written(value)}" for key, value in settings.items()]
    return f" --run-config {shlex.quote(' '.join(pairs))}" if pairs else ""


def _leaves(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    sections = [
        (f"{key}.", value) if isinstance(value, Mapping) else ("", {key: value}) for key, value in config.items()
    ]
    return [(f"{prefix}{key}", value) for prefix, section in sections for key, value in section.items()]


def _written(value: Any) -> str:
    """Write a value for Flower's parser of run-configs: TOML, but a text ends at the next quote, escaped or not."""
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str):
        return json.dumps(text)
    return json.dumps(text.replace('"', "\0")).replace("\\u0000", "\\u0022")

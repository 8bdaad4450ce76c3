"""Settings as Flower has them: flat, by dotted keys; and as the text of ``--run-config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return a configuration's settings by Flower's dotted keys; lists become comma-separated texts.

    Parameters
    ----------
    config : mapping
        The configuration as nested data, as in ``config.json``.
    """
    sections = (
        (f"{key}.", value) if isinstance(value, Mapping) else ("", {key: value}) for key, value in config.items()
    )
    return {
        prefix + name: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        for prefix, section in sections
        for name, value in section.items()
    }


def format_run_config(settings: Mapping[str, bool | int | float | str]) -> str:
    """Write settings in the format of ``flwr run --run-config``.

    Flower takes a quoted value up to the next quote and then parses it as TOML. So a quote inside a string must be a
    TOML escape.
    """
    return " ".join(f"{key}={_format_value(value)}" for key, value in settings.items())


def _format_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    return repr(value)


def _escape(character: str) -> str:
    special = character in '"\\\x7f' or ord(character) < 0x20
    return f"\\u{ord(character):04x}" if special else character

"""What is likely wrong with a run-config that cannot be read, setting by setting."""

from __future__ import annotations

import re
import tomllib

BACKSLASH = chr(92)
ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*(\\[btnfr])")  # TOML's short ones; whoever means them writes \\u000a.
TWICE = f"a backslash in a string is written twice, {BACKSLASH * 2}, or the string stands in single quotes"


def mistake_of(key: str, value: str) -> str:
    """Say what is likely wrong with the value of a setting as it is typed; empty if it can be read.

    Parameters
    ----------
    key : str
        The key.
    value : str
        The value, with its quotes.
    """
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return f"run-config key {key!r} is {value}, which cannot be read; {_hint(key, value)}"
    if isinstance(read, str) and value[0] == '"' and (escape := ESCAPE.search(value)):
        return f"run-config key {key!r} is {value}, in which {escape[1]} would be a control character; {TWICE}"
    return ""


def _hint(key: str, value: str) -> str:
    plain = value.strip("\"'").rstrip(",")
    if value[0] in "\"'" and (len(value) == 1 or value[-1] != value[0]) and not value.endswith(","):
        return f"the quote {value[0]} that begins it is not closed"
    if BACKSLASH in value:
        return TWICE
    if value.endswith(","):
        return f"no comma between settings, but a space: {key}={value.rstrip(',')}"
    if plain.lower() in ("true", "false"):
        return f"truth values are lower case: {key}={plain.lower()}"
    if re.fullmatch(r"[-+]?\d+,\d+", value):
        return f"a number has a decimal point: {key}={value.replace(',', '.')}"
    if re.search(r"\w+=", value):
        return "a space between two settings"
    return f'strings need quotes: {key}="{plain}"'

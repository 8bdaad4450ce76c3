"""The text of ``--run-config``: read as Flower reads it, and what is likely wrong with what cannot be read."""

from __future__ import annotations

import re
import tomllib

import click
from flwr.common.config import parse_config_args

from fedmmkt.common.config import ConfigError, Setting

BACKSLASH = chr(92)
ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*(\\[btnfr])")  # TOML's short ones; whoever means them writes \\u000a.
TWICE = f"a backslash in a string is written twice, {BACKSLASH * 2}, or the string stands in single quotes"
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own pattern; Flower drops text that does not match it


def parse_run_config(texts: list[str]) -> dict[str, Setting]:
    """Read run-config strings, or one TOML file, with Flower's parser.

    Raises
    ------
    ConfigError
        If they cannot be read, or if Flower would silently drop a part of them.
    """
    for text in texts:
        if text.endswith(".toml"):
            continue
        pairs = list(_PAIR.finditer(text))
        ends = [*(pair.start() for pair in pairs), len(text)][1:]
        between = [text[pair.end() : end].strip() for pair, end in zip(pairs, ends, strict=True)]
        mistakes = [_mistake_of(pair[1], pair[2], rest) for pair, rest in zip(pairs, between, strict=True)]
        problems = list(filter(None, mistakes))
        if problems:
            raise ConfigError("\n".join(problems))
        for pair in _PAIR.finditer(text):
            if (rest := text[pair.end() :]) and not rest[0].isspace():
                raise ConfigError(
                    f"run-config: {pair[0]} is followed by {rest!r:.40}; allowed: a space between two settings, and no "
                    "comma"
                )
        dropped = _PAIR.sub("", text).strip()
        if dropped:
            raise ConfigError(f"run-config: {dropped!r} is not of the form key=value (no spaces around '=')")
        keys = [key for key, _ in _PAIR.findall(text)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"run-config key {twice[0]!r} is given twice in {text!r}; allowed: each key once")
    try:
        return parse_config_args(texts)
    except click.ClickException as error:
        raise ConfigError(f"run-config {' '.join(texts)!r:.200} cannot be read: {error.message}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"run-config: {error}") from error


def _mistake_of(key: str, value: str, rest: str) -> str:
    """Say what is likely wrong with the value of a setting as it is typed, with its quotes; empty if it can be read.

    ``rest`` is the text between it and the next setting.
    """
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return f"run-config key {key!r} is {value}, which cannot be read; {_hint(key, value, rest)}"
    if isinstance(read, str) and value[0] == '"' and (escape := ESCAPE.search(value)):
        return f"run-config key {key!r} is {value}, in which {escape[1]} would be a control character; {TWICE}"
    return ""


def _hint(key: str, value: str, rest: str) -> str:
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
    if rest:
        return f'it ends at the space; a string with spaces needs quotes: {key}="{plain} {rest}"'
    return f'strings need quotes: {key}="{plain}"'

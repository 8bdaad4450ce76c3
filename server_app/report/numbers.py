"""Formatting of numbers for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def percent(value: float | None) -> str:
    """Format a fraction as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(difference: float) -> str:
    """Format a difference of fractions in percentage points."""
    return f"{100 * difference:+.1f} points".replace("-", "−")


def number(value: float | None) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def size(value: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def seconds(value: float) -> str:
    """Format a duration in seconds or minutes."""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def about(number: int, is_noisy: bool) -> str:
    """Format a number; one that was told with noise, for privacy, is not exact."""
    return f"about {number}" if is_noisy else str(number)


def counted(number: int, noun: str) -> str:
    """Format a number of things, such as ``2 clients``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Yield the leaves of nested mappings with dotted keys; lists become comma-separated texts."""
    if isinstance(value, Mapping):
        for name, content in value.items():
            yield from flat(content, f"{key}.{name}" if key else str(name))
    else:
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')

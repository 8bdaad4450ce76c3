"""The order in which people list names: ``cnn-2`` before ``cnn-10``."""

from __future__ import annotations

import re


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Make a sort key: digits by their number, the rest by its letters, and names that are alike so by themselves."""
    # Text and numbers alternate, so that like is compared with like.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name

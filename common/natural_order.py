"""Names: their natural sort order, ``cnn-2`` before ``cnn-10``, and the one form in which they are compared."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache


@lru_cache(maxsize=100_000)
def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares digits as numbers and the rest as text.

    The name itself decides between names that are otherwise equal, such as ``a1`` and ``a01``.
    """
    # Text and numbers alternate, so a number is always compared with a number.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def normal_form(name: str) -> str:
    """Return a name with composed letters (NFC); a Mac's file names come with decomposed ones."""
    return unicodedata.normalize("NFC", name)

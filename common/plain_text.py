"""Texts from outside: names that cannot forge a line of a log, and reasons that cannot fill a disk."""

from __future__ import annotations

import unicodedata

LONGEST_REASON = 500
# Control characters, halves of surrogate pairs, and separators of lines and paragraphs.
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
# Marks that reorder the letters around them: left-to-right and right-to-left embeddings, overrides and isolates.
_REORDERING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def is_plain(text: str) -> bool:
    """Return whether a text is one line as it will be shown: no control characters, and none that reorder letters."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_unprintable, text))


def printable(text: str, longest: int = LONGEST_REASON) -> str:
    """Return a text as one line that can be shown; what is longer than ``longest`` characters is cut."""
    shown = "".join(" " if _is_unprintable(letter) else letter for letter in text[:longest])
    line = " ".join(shown.split())
    return line if len(text) <= longest else f"{line} ... ({len(text)} characters)"


def _is_unprintable(letter: str) -> bool:
    return unicodedata.category(letter) in _UNPRINTABLE or letter in _REORDERING

"""How far a long stage is, in lines that read well in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import getLogger

FIRST_SECONDS = 5.0  # A stage that ends within them says nothing.
GROWTH = 0.2  # Part of its time so far that a stage is silent: an hour takes some thirty lines.
TRANSIENT = " ..."  # The end of a line that the next line may replace on a terminal.

logger = getLogger("flwr")


class Progress:
    """Tells how much of a stage is done and how long the rest takes; call it with the number of finished parts.

    Parameters
    ----------
    stage : str
        The word that the stage's lines begin with.
    total : int
        Number of parts.
    unit : str
        What the parts are, in the plural.
    tell : callable, optional
        Called with each line; by default it is logged.
    """

    def __init__(self, stage: str, total: int, unit: str, tell: Callable[[str], object] = logger.info) -> None:
        self._stage, self._total, self._unit, self._tell = stage, total, unit, tell
        self._began = time.monotonic()
        self._due = self._began + FIRST_SECONDS

    def __call__(self, done: int, detail: str = "") -> None:
        """Tell that so many parts are done, unless that was told a moment ago; ``detail`` stands behind it."""
        now = time.monotonic()
        if not 0 < done < self._total or now < self._due:
            return
        elapsed = now - self._began
        self._due = now + max(FIRST_SECONDS, GROWTH * elapsed)
        left = duration(elapsed / done * (self._total - done))
        parts = [f"{done}/{self._total} {self._unit}", *filter(None, [detail]), f"about {left} left"]
        self._tell(f"  {self._stage:<9} {', '.join(parts)}{TRANSIENT}")


def duration(seconds: float) -> str:
    """Write a time with one or two units, such as ``40 s``, ``12 min`` or ``2 h 5 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

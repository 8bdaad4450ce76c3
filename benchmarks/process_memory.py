"""The memory of a process in bytes, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

FORGET_PEAK = Path("/proc/self/clear_refs")


def held(pid: int | str = "self") -> int | None:
    """Return the resident memory of a process; None if the system does not tell it (not Linux)."""
    return _status(pid, "VmRSS")


def peak(pid: int | str = "self") -> int | None:
    """Return the largest resident memory that a process had, as `held` does."""
    return _status(pid, "VmHWM")


def forget_peak() -> None:
    """Let the peak of this process begin anew, at what it holds now; do nothing where there is none (not Linux)."""
    if FORGET_PEAK.exists():
        FORGET_PEAK.write_text("5")


def _status(pid: int | str, name: str) -> int | None:
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"^{name}:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None

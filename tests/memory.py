"""The largest memory that this process had, read from Linux."""

import re
from pathlib import Path

import pytest

PEAK = Path("/proc/self/clear_refs")
needs_peak = pytest.mark.skipif(not PEAK.exists(), reason="the peak memory is read from Linux")


def forget_peak() -> None:
    """Let the peak begin anew, at what is held now."""
    PEAK.write_text("5")


def peak() -> int:
    """Return the peak in bytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

"""Processes that were killed because the machine's memory was full: in one line, and what helps.

In simulation, Ray kills workers before the system would, and says so in some thousand characters of its own.
"""

from __future__ import annotations

import re

LACK_OF_MEMORY = (
    "a client's process was killed for lack of memory; close other programs, take fewer nodes or smaller models, or "
    "lower client.batch-size, client.synthetic-batch-size or data.image-size"
)
_KILLED = re.compile(r"killed due to (?:memory pressure|the node running low on memory)")
_ADVICE = "Refer to the documentation on how to address the out of memory issue"


def is_lack_of_memory(text: str) -> bool:
    """Tell whether Ray says in a text that it killed a worker for lack of memory."""
    return _KILLED.search(text) is not None


def is_advice(text: str) -> bool:
    """Tell whether a line is Ray's advice after such a text: how to configure Ray."""
    return _ADVICE in text or text.strip() == "(raylet)"

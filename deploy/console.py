"""What a command shows while it runs: plain lines with the time since its start, and no tracebacks.

The log of a run comes through Flower, which adds escape codes, levels, and lines about itself that mislead: it offers
commands for a SuperLink that nobody should change, and prints each traceback up to three times. The lines that stay are
those of the app, every warning and every error.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import TextIO

from fedmmkt.common.files import write_text
from fedmmkt.common.lack_of_memory import LACK_OF_MEMORY, is_advice, is_lack_of_memory
from fedmmkt.common.progress import TRANSIENT

ERASED = "\r\x1b[K"  # What a terminal needs to show the next line in place of the last.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOGGED = re.compile(r"(?:\(\w+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) (?:\d{4}-\S+ [\d:,]+)?:(.*)")
_TEXT_AT = 10  # The columns of a level and the blanks before the text, together.
_TRACEBACK = re.compile(r"(?:\(\w+ pid=\d+\) )?(?:Traceback \(most recent call last\):|ray::\w+)")
# Flower's lines about itself, by their beginning; none is a warning of something that is wrong.
_OF_FLOWER = (
    "Flower configuration not found. Created default configuration at",
    "Using SuperLink: ",
    "Successfully started run ",
    "Successfully installed ",
    "Starting logstream for run_id",
    "Starting Flower Simulation",
    "Start `flwr-serverapp` process",
    "Since flwr 1.32, default simulated SuperNodes changed",
    "Federation `@none/default` (",
    "To change federation size, use the following command:",
    "\tflwr federation simulation-config",
    "Manually terminating ClientAppActor",
)


class Console:
    """Shows the lines of a command and of the run that it follows.

    Parameters
    ----------
    output : TextIO
        Where the lines go. On a terminal, the next line replaces a line of progress; nowhere else is there an escape
        code or a carriage return.

    Attributes
    ----------
    last : str
        The text of the last line that was shown.
    tracebacks : list of str
        The lines that were held back: tracebacks in what Flower showed.
    """

    def __init__(self, output: TextIO) -> None:
        self.last = ""
        self.tracebacks: list[str] = []
        self._output = output
        self._on_terminal = output.isatty()
        self._began = time.monotonic()
        self._in_traceback = self._replaceable = self._is_due_blank = self._is_short_of_memory = False

    @classmethod
    def on(cls, output: TextIO | Console) -> Console:
        """Return the console of an output, or the console that is given."""
        return output if isinstance(output, Console) else cls(output)

    def say(self, text: str) -> None:
        """Show a line of the command's own."""
        for line in text.splitlines():
            self._show(line)

    def relay(self, line: str) -> None:
        """Show a line of the run's log, unless it belongs to a traceback or is one of Flower's lines about itself."""
        plain = _ESCAPES.sub("", line).rstrip()
        logged = _LOGGED.fullmatch(plain)
        level, text = (logged[1], logged[2][_TEXT_AT - len(logged[1]) :]) if logged else ("", plain)
        if logged or not self._in_traceback:
            self._in_traceback = bool(_TRACEBACK.match(text))
        if self._in_traceback:
            self.tracebacks.append(plain)
        elif is_lack_of_memory(text):
            self._tell_lack_of_memory()
        elif (text or logged) and not text.startswith(_OF_FLOWER) and not is_advice(text):
            text = text.replace("\t", "  ")
            self._show(f"{level} {text.strip()}" if level in ("WARNING", "ERROR", "CRITICAL") else text)

    def _tell_lack_of_memory(self) -> None:
        """Say it once in place of all that Ray says, which repeats it for each worker."""
        if not self._is_short_of_memory:
            self._show(f"WARNING {LACK_OF_MEMORY}")
        self._is_short_of_memory = True

    def write_tracebacks(self, file: Path) -> None:
        """Write the tracebacks that were held back into a file, and say where; nothing happens if there are none."""
        if not self.tracebacks:
            return
        try:
            write_text(file, "\n".join(self.tracebacks) + "\n")
            self.say(f"Tracebacks: {file}")
        except OSError:  # They must lie somewhere.
            self.say("\n".join(self.tracebacks))

    def _show(self, text: str) -> None:
        if not text.strip():
            self._is_due_blank = bool(self.last)
            return
        if self._is_due_blank:
            self._write("\n")
            self._is_due_blank = False
        self.last = text
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        line = f"{minutes:3}:{seconds:02}  {text}".rstrip()
        replaceable = self._on_terminal and text.endswith(TRANSIENT)
        if replaceable:
            line = line[: shutil.get_terminal_size().columns - 1]  # A line that wraps could not be replaced.
        self._write(line if replaceable else f"{line}\n")
        self._replaceable = replaceable

    def _write(self, text: str) -> None:
        self._output.write(f"{ERASED}{text}" if self._replaceable else text)
        self._output.flush()
        self._replaceable = False

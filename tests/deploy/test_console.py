import io
import re

import pytest

from fedmmkt.deploy.console import Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(lines, output=None):
    output = output or io.StringIO()
    console = Console(output)
    for line in lines:
        console.relay(line + "\n")
    return console, output.getvalue()


def test_lines_have_the_time_and_warnings_their_level():
    lines = [
        "\x1b[92mINFO \x1b[0m:      Run folder: /a",
        "INFO 2026-11-26 11:30:00,123:        clients   1/2  cnn-0",
        "\x1b[93mWARNING \x1b[0m:     adapt     the update diverged",
        "(ClientAppActor pid=12) \x1b[93mWARNING \x1b[0m:   cnn-0: texts are cut",
        "printed by the app",
    ]

    _, text = shown(lines)

    assert text.splitlines() == [
        "  0:00  Run folder: /a",
        "  0:00    clients   1/2  cnn-0",
        "  0:00  WARNING adapt     the update diverged",
        "  0:00  WARNING cnn-0: texts are cut",
        "  0:00  printed by the app",
    ]


def test_lines_of_flower_about_itself_are_left_out_and_its_warnings_stay():
    lines = [
        "",
        "Using SuperLink: local (127.0.0.1:58213)",
        "WARNING :   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.",
        "INFO :      To change federation size, use the following command:",
        "INFO :      \tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>",
        "WARNING :   Connection lost, retrying",
        "INFO :      ",
        "INFO :      ",
        "INFO :      [ROUND 1/2]",
        "INFO :      ",
    ]

    _, text = shown(lines)

    assert text.splitlines() == ["  0:00  WARNING Connection lost, retrying", "", "  0:00  [ROUND 1/2]"]


def test_tracebacks_lie_in_a_file(tmp_path):
    lines = [
        "ERROR :     Simulation raised an exception",
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in <module>',
        "",
        "ValueError: no",
        "INFO :      next",
        "ERROR :     ray::ClientAppActor.run() (pid=6370)",
        "RuntimeError: a worker died",
    ]

    console, text = shown(lines)
    console.write_tracebacks(tmp_path / "out" / "tracebacks.txt")

    assert text.splitlines() == ["  0:00  ERROR Simulation raised an exception", "  0:00  next"]
    assert console.last == f"Tracebacks: {tmp_path}/out/tracebacks.txt"
    written = (tmp_path / "out" / "tracebacks.txt").read_text().splitlines()
    assert written == [*lines[1:5], *lines[6:]]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (io.StringIO(), "  0:00  1/9 images ...\n  0:00  2/9 images ...\n  0:00  done\n"),
        (Terminal(), "  0:00  1/9 images ...\r\x1b[K  0:00  2/9 images ...\r\x1b[K  0:00  done\n"),
    ],
)
def test_progress_is_replaced_on_a_terminal_only(output, expected):
    _, text = shown(["INFO :      1/9 images ...", "INFO :      2/9 images ...", "INFO :      done"], output)

    assert text == expected


def test_a_long_line_of_progress_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")

    _, text = shown(["INFO :      a line that does not fit ..."], Terminal())

    assert re.sub(r"[\r\n]", "", text) == "  0:00  a line that"


def test_lack_of_memory_is_told_in_one_line():
    lines = [
        "(raylet) [2026-11-26 16:17:45,808 E 22508 22508] (raylet) node_manager.cc:3303: 1 Workers (tasks / actors) "
        "killed due to memory pressure (OOM), 0 Workers crashed due to other reasons at node (ID: 0a05)",
        "(raylet) ",
        "(raylet) Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest",
        "ERROR 2026-11-26 16:17:46,123:      1 worker(s) were killed due to the node running low on memory. Memory on "
        "the node (IP: 192.0.2.2, ID: 1a37) was 22.39GB / 23.54GB (0.951182); Object store memory usage: [- 0]",
        "INFO 2026-11-26 16:17:47,123:        clients   1/2  cnn-0",
    ]

    _, text = shown(lines)

    told, after = text.splitlines()
    assert told.startswith("  0:00  WARNING a client's process was killed for lack of memory; close other programs, ")
    assert after == "  0:00    clients   1/2  cnn-0"

"""The timeline of the last rounds: what the server did, what it did beside the clients, and when clients worked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.report.charts import CHART_STYLE, COLOURS, INK, STAGES, Chart, Legend, empty_axes, svg
from fedmmkt.server_app.report.measures import Line
from fedmmkt.server_app.report.numbers import seconds

MOST_ROWS = 12  # of more clients, one row shows how many of them were at work
BESIDE = {"measure": "yellow", "checkpoint": "grey", "report": "ink", "generate": STAGES["generate"]}
STEPS = 200  # points of the curve of how many clients were at work
Span = Sequence[Any]  # name, begin and end in seconds since the start of the run


def timeline_of(lines: Sequence[Line]) -> Chart | None:
    """Draw who did what when in the last rounds; None if the run did not record it."""
    shown = [line for line in lines if line["seconds"].get("timeline", {}).get("server")]
    if not shown:
        return None
    times = [line["seconds"]["timeline"] for line in shown]
    server = [span for time in times for span in time["server"] if span[0] not in ("total", "clients")]
    beside = [span for time in times for span in time.get("beside", ())]
    messages = [span for time in times for span in time["clients"]]
    begin = min(span[1] for time in times for span in time["server"])
    beside = [span for span in beside if span[2] > begin]
    names = sorted({name for name, *_ in messages}, key=natural_key)
    few = len(names) <= MOST_ROWS
    rows = ["server", "beside clients", *(names if few else ["clients"])]
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = empty_axes(left=1.05)
        axes.grid(visible=False)
        for span in server:
            _bar(axes, 0, span, begin, STAGES.get(span[0], "grey"))
        for span in beside:
            _bar(axes, 1, span, begin, BESIDE.get(span[0], "grey"))
        if few:
            for span in messages:
                _bar(axes, 2 + names.index(span[0]), span, begin, "orange")
        else:
            _at_work(axes, 2, messages, begin, len(names))
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"seconds since the start of round {shown[0]['round']}")
        stages = list(dict.fromkeys(name for name, *_ in server))
        others = [name for name in dict.fromkeys(name for name, *_ in beside) if name not in stages]
        legend = [Legend("■", STAGES.get(name, "grey"), name) for name in stages]
        legend += [Legend("■", BESIDE.get(name, "grey"), f"{name}, beside the clients") for name in others]
        legend.append(Legend("■", "orange", "clients at work" if few else f"how many of {len(names)} clients work"))
        label = f"Who did what when, rounds {shown[0]['round']} to {shown[-1]['round']}"
        return Chart(label, svg(figure, f"{label}: {_described(server, beside, messages)}"), legend)


def _bar(axes: Any, row: int, span: Span, begin: float, colour: str) -> None:
    axes.broken_barh(
        [(span[1] - begin, span[2] - span[1])], (row - 0.4, 0.8), color=COLOURS.get(colour, INK), linewidth=0
    )


def _at_work(axes: Any, row: int, messages: Sequence[Span], begin: float, count: int) -> None:
    """Draw the share of the clients that were at work, as height within a row."""
    starts_M, ends_M = (np.sort([span[side] - begin for span in messages]) for side in (1, 2))
    times_T = np.linspace(0, ends_M[-1], STEPS)
    working_T = np.searchsorted(starts_M, times_T, "right") - np.searchsorted(ends_M, times_T, "right")
    lower_T = np.full(STEPS, row + 0.4)
    axes.fill_between(times_T, lower_T, lower_T - 0.8 * working_T / count, color=COLOURS["orange"], linewidth=0)


def _described(server: Sequence[Span], beside: Sequence[Span], messages: Sequence[Span]) -> str:
    """Say how long each part took, and which message took longest."""
    parts = [f"{name} {_sum(server, name)}" for name in dict.fromkeys(span[0] for span in server)]
    parts += [f"beside the clients {name} {_sum(beside, name)}" for name in dict.fromkeys(span[0] for span in beside)]
    if messages:
        name, start, end = max(messages, key=lambda span: span[2] - span[1])
        parts.append(f"the longest answer {seconds(end - start)}, of {name}")
    return ", ".join(parts)


def _sum(spans: Sequence[Span], name: str) -> str:
    return seconds(sum(span[2] - span[1] for span in spans if span[0] == name))

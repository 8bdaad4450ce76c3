"""The charts of a run, drawn as SVG in the colours of the page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedmmkt.server_app.report.measures import (
    MOST_CURVES,
    ClientRow,
    Line,
    Measure,
    accuracy_of_client,
    client_rows,
    mean_accuracy,
    of_generator,
    points_of,
)
from fedmmkt.server_app.report.numbers import number, percent, seconds, size

# Okabe and Ito's colours, which colour-blind readers can distinguish. The page has its own shades for dark mode.
COLOURS = {"blue": "#0072b2", "orange": "#d55e00", "green": "#009e73", "pink": "#cc79a7", "yellow": "#e69f00"}
COLOURS |= {"sky": "#56b4e9", "grey": "#8a8f98"}
INK = "#010203"  # placeholder for the page's text colour
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟", "h": "⬢"}
DISTINCT_CLIENTS = len(MARKERS)  # more clients than this are coloured by modality
MODALITIES = {"image": "blue", "text": "orange", "image+text": "green"}
STAGES = {"generate": "blue", "clients": "orange", "aggregate": "pink", "adapt": "green", "measure": "yellow"}
STAGES |= {"evaluate": "sky"}
FEWEST_ROUNDS = 4  # a chart has room for at least this many
MOST_LABELLED_ROUNDS = 12
MOST_MARKED_ROUNDS = 40  # with more rounds, curves have no markers

CHART_SIZE = (4.6, 2.6)  # inches; small, so that the text stays readable on a phone
CHART_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmmkt",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Legend:
    """An entry of a chart's legend: marker, name of the colour, and text."""

    marker: str
    colour: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart: title, inline SVG with the values of each round to point at, and legend."""

    title: str
    svg: Markup
    legend: Sequence[Legend] = ()


def charts_of(lines: list[Line], chance: float | None = None) -> list[Chart]:
    """Draw one chart for each measure that the rounds have.

    Parameters
    ----------
    lines : list of dict
        The rounds.
    chance : float, optional
        The accuracy of guessing, drawn as a line.
    """
    rows = client_rows(lines)
    with matplotlib.rc_context(CHART_STYLE):
        charts = [
            _accuracy_chart(lines, rows, chance),
            _gains_chart(rows) if len(rows) > MOST_CURVES else None,
            _line_chart("T2I alignment", lines, of_generator("alignment"), "green", in_percent=True),
            _line_chart("T2I Fréchet distance", lines, of_generator("frechet"), "pink"),
            _line_chart("T2I recall", lines, of_generator("recall"), "sky", in_percent=True),
            _line_chart("LoRA loss", lines, of_generator("loss"), "orange"),
            _bytes_chart(lines),
            _seconds_chart(lines),
        ]
    return [chart for chart in charts if chart is not None]


def overlaid(title: str, curves: dict[str, list[tuple[int, float]]], in_percent: bool = False) -> Chart | None:
    """Draw the curves of several runs over each other; None if none has a value.

    Parameters
    ----------
    title : str
        Title of the chart.
    curves : dict of str to list of (int, float)
        Values by round, for each run; colours and markers follow the order of the runs.
    in_percent : bool
        Whether the values are fractions.
    """
    rounds = sorted({number for points in curves.values() for number, _ in points})
    if not rounds:
        return None
    written, legend = percent if in_percent else number, []
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _axes([{"round": round} for round in rounds], in_percent)
        for index, (name, points) in enumerate(curves.items()):
            colour, marker = list(COLOURS)[index % len(COLOURS)], list(MARKERS)[index % len(MARKERS)]
            if points:
                axes.plot(*zip(*points, strict=True), color=COLOURS[colour], marker=_marker(points, marker))
                legend.append(Legend(MARKERS[marker], colour, name))
        if not in_percent:
            _from_zero(axes, [value for points in curves.values() for _, value in points])
        values = {name: dict(points) for name, points in curves.items()}
        readings = {
            round: ", ".join(f"{name} {written(of[round])}" for name, of in values.items() if round in of)
            for round in rounds
        }
        ends = "; ".join(f"{name} {written(points[-1][1])}" for name, points in curves.items() if points)
        return Chart(title, svg(figure, f"{title}, last value: {ends}", readings), legend)


def _accuracy_chart(lines: list[Line], rows: Sequence[ClientRow], chance: float | None) -> Chart | None:
    if not rows:
        return None
    figure, axes = _axes(lines, percent=True)
    draw = _draw_curves if len(rows) <= MOST_CURVES else _draw_spread
    legend = draw(axes, lines, rows)
    mean = points_of(lines, mean_accuracy)
    if mean:
        axes.plot(*zip(*mean, strict=True), color=INK, linewidth=3, marker=_marker(mean), markersize=5)
        legend.append(Legend("●", "ink", "mean"))
    if chance is not None:
        axes.axhline(chance, color=COLOURS["grey"], linestyle=(0, (4, 3)), linewidth=1.2)
        legend.append(Legend("┄", "grey", f"chance, {percent(chance)}"))
    readings = {line["round"]: _accuracies(line, few=len(rows) <= DISTINCT_CLIENTS) for line in lines}
    label = "Accuracy of each client" if len(rows) <= MOST_CURVES else f"Accuracy of {len(rows)} clients"
    summary = _summary("mean accuracy", [(number, percent(value)) for number, value in mean])
    return Chart(label, svg(figure, f"{label}: {summary}", readings), list(dict.fromkeys(legend)))


def _draw_curves(axes: Any, lines: list[Line], rows: Sequence[ClientRow]) -> list[Legend]:
    """Draw a curve for each client; many clients are coloured by modality."""
    few = len(rows) <= DISTINCT_CLIENTS
    legend = []
    for index, client in enumerate(rows):
        colour = list(COLOURS)[index] if few else MODALITIES.get(client.modality, "grey")
        marker = list(MARKERS)[index] if few else "o"
        points = points_of(lines, accuracy_of_client(client.name))
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[colour],
            marker=_marker(points, marker),
            alpha=0.9 if few else 0.45,
        )
        legend.append(Legend(MARKERS[marker], colour, client.name if few else f"{client.modality} clients"))
    return legend


def _draw_spread(axes: Any, lines: list[Line], rows: Sequence[ClientRow]) -> list[Legend]:
    """Draw the range of all clients' accuracies in each round, and that of the middle four fifths."""
    measured = [(line["round"], line["clients"]["spread"]) for line in lines if line["clients"]["spread"]]
    rounds, spread = [number for number, _ in measured], np.array([spread for _, spread in measured])
    for low, high, alpha in ((0, 3, 0.18), (1, 2, 0.35)):
        axes.fill_between(rounds, spread[:, low], spread[:, high], color=COLOURS["blue"], alpha=alpha, linewidth=0)
    return [Legend("■", "blue", "all clients, and the middle four fifths")]


def _gains_chart(rows: Sequence[ClientRow]) -> Chart:
    """Draw how many clients gain how much."""
    figure, axes = empty_axes()
    gains = [100 * row.gain for row in rows]
    heights, edges = np.histogram(gains, bins=20)
    axes.stairs(heights, edges, fill=True, color=COLOURS["blue"])
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("gain in points")
    label = "Number of clients by their gain"
    summary = f"from {min(gains):+.1f} to {max(gains):+.1f} points, median {np.median(gains):+.1f}"
    return Chart(label, svg(figure, f"{label}: {summary}"))


def _line_chart(title: str, lines: list[Line], measure: Measure, colour: str, in_percent: bool = False) -> Chart | None:
    points = points_of(lines, measure)
    if not points:
        return None
    figure, axes = _axes([{"round": round} for round, _ in points], in_percent)
    axes.plot(*zip(*points, strict=True), color=COLOURS[colour], marker=_marker(points), linewidth=2)
    if not in_percent:
        _from_zero(axes, [value for _, value in points])
    texts = [(round, (percent if in_percent else number)(value)) for round, value in points]
    return Chart(title, svg(figure, f"{title}: {_summary('value', texts)}", dict(texts)))


def _bytes_chart(lines: list[Line]) -> Chart:
    largest = max(line["bytes"][way] for line in lines for way in ("down", "up"))
    unit, scale = ("MiB", 1024**2) if largest >= 1024**2 else ("KiB", 1024)
    figure, axes = _axes(lines)
    rounds = [line["round"] for line in lines]
    for way, colour, shift in (("down", "sky", -0.2), ("up", "orange", 0.2)):
        heights = [line["bytes"][way] / scale for line in lines]
        _bars(axes, [number + shift for number in rounds], 0.4, heights, [0.0] * len(rounds), COLOURS[colour])
    _from_zero(axes, [largest / scale])
    legend = [Legend("■", "sky", "to clients"), Legend("■", "orange", "from clients")]
    title = f"Traffic of a round, {unit}"
    readings = {
        line["round"]: f"{size(line['bytes']['down'])} to clients, {size(line['bytes']['up'])} from clients"
        for line in lines
    }
    return Chart(title, svg(figure, f"{title}: {_summary('traffic', list(readings.items()))}", readings), legend)


def _seconds_chart(lines: list[Line]) -> Chart:
    figure, axes = _axes(lines)
    rounds = [line["round"] for line in lines]
    stages = {stage: [line["seconds"].get(stage, 0) for line in lines] for stage in STAGES}
    stages = {stage: values for stage, values in stages.items() if any(values)}
    sums = [sum(heights) for heights in zip(*stages.values(), strict=True)] or [0] * len(lines)
    beside = [line["seconds"]["measure"] if line["is_measured_beside"] else 0 for line in lines]
    totals = [line["seconds"]["total"] + extra for line, extra in zip(lines, beside, strict=True)]
    stages["other"] = [max(0, total - named) for total, named in zip(totals, sums, strict=True)]
    bottom = [0.0] * len(lines)
    colours = {**STAGES, "other": "grey"}
    for stage, heights in stages.items():
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        _bars(axes, rounds, 0.7, top, bottom, COLOURS[colours[stage]])
        bottom = top
    _from_zero(axes, bottom)
    readings = {
        line["round"]: ", ".join(f"{stage} {seconds(values[index])}" for stage, values in stages.items())
        for index, line in enumerate(lines)
    }
    title = "Seconds of a round"
    summary = _summary("total", [(line["round"], seconds(line["seconds"]["total"])) for line in lines])
    legend = [Legend("■", colours[stage], stage) for stage in stages]
    return Chart(title, svg(figure, f"{title}: {summary}", readings), legend)


def _accuracies(line: Line, few: bool) -> str:
    """Say the accuracies of a round: of each client if they are few, else their range."""
    clients, mean, spread = (line["clients"][key] for key in ("per_client", "accuracy", "spread"))
    if not spread:
        return "not told" if clients else "no client"
    if few:
        named = [f"{name} {percent(client['accuracy'])}" for name, client in clients.items()]
    else:
        named = [f"lowest {percent(spread[0])}", f"highest {percent(spread[-1])}"]
    return ", ".join([f"mean {percent(mean)}", *named])


def _summary(what: str, texts: Sequence[tuple[int, str]]) -> str:
    """Say the first and the last value of a curve, for those who do not see it."""
    if not texts:
        return "no values"
    (first, before), (last, after) = texts[0], texts[-1]
    return f"{what} {before} in round {first}" + (f", {after} in round {last}" if first != last else "")


def _marker(points: Sequence[object], marker: str = "o") -> str | None:
    return marker if len(points) <= MOST_MARKED_ROUNDS else None


def _bars(
    axes: Any, centres: Sequence[float], width: float, tops: Sequence[float], bottoms: Sequence[float], colour: str
) -> None:
    """Draw all bars as one area; with many rounds, drawing each bar alone would take seconds."""
    edges = [centre + side * width / 2 for centre in centres for side in (-1, 1)]
    upper, lower = ([height for bar in heights for height in (bar, 0)] for heights in (tops, bottoms))
    axes.fill_between(edges, lower, upper, step="post", color=colour, linewidth=0)


def _from_zero(axes: Any, values: Sequence[float]) -> None:
    """Let the y axis show zero and all finite values, with some room above."""
    shown = [0.0, *(value for value in values if math.isfinite(value))]
    axes.set_ylim(min(shown), 1.06 * max(shown) or 1)


def _axes(lines: Sequence[Line], percent: bool = False) -> tuple[Any, Any]:
    """Make a figure with empty axes; the x axis shows the rounds that there are."""
    figure, axes = empty_axes()
    rounds = sorted({line["round"] for line in lines})
    axes.set_xlim(rounds[0] - 0.5, max(rounds[-1], rounds[0] + FEWEST_ROUNDS - 1) + 0.5)
    axes.set_xticks(rounds[:: -(-len(rounds) // MOST_LABELLED_ROUNDS)])
    axes.set_xlabel("round")
    if percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def empty_axes(left: float = 0.5) -> tuple[Any, Any]:
    """Make a figure with empty axes that begin ``left`` inches from its side."""
    width, height = CHART_SIZE
    figure = Figure(figsize=(width, height))
    left = left / width
    axes = figure.add_axes((left, 0.42 / height, 1 - left - 0.08 / width, 1 - 0.5 / height))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y")
    return figure, axes


def svg(figure: Any, label: str = "", readings: Mapping[int, str] | None = None) -> Markup:
    """Return the figure as inline SVG; its colours follow the page's light or dark mode.

    Parameters
    ----------
    figure : Figure
        A figure with one axes.
    label : str
        Text for those who do not see the chart.
    readings : mapping of int to str, optional
        The values of each round, shown where the reader points.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "var(--ink)")
    for name, value in COLOURS.items():
        drawn = drawn.replace(value, f"var(--{name})")
    if label:
        drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    before, end, after = drawn.rpartition("</svg>")
    # Safe: matplotlib wrote the figure, and texts from the run are escaped.
    return Markup(before + _hover_areas(figure, readings or {}) + end + after)


def _hover_areas(figure: Any, readings: Mapping[int, str]) -> str:
    """Return an invisible area for each round, with its values as a title, in the units of the SVG (points)."""
    axes, scale = figure.axes[0], 72 / figure.dpi
    _, height = figure.get_size_inches() * 72
    if not readings:
        return ""
    edges = np.array([(round + side, 0) for round in readings for side in (-0.5, 0.5)])
    pairs = (axes.transData.transform(edges)[:, 0] * scale).reshape(-1, 2).tolist()
    return "".join(
        f'<rect class="reading" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{height:.1f}">'
        f"<title>{escape(f'Round {round}: {text}')}</title></rect>"
        for (round, text), (left, right) in zip(readings.items(), pairs, strict=True)
    )

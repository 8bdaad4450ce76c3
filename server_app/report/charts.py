"""The charts of a run, drawn as SVG in the colours of the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedmmkt.server_app.report.measures import (
    Line,
    accuracy_of_client,
    client_rows,
    mean_accuracy,
    of_generator,
    points_of,
)

# Okabe and Ito's colours, which colour-blind readers can distinguish. The page has its own shades for dark mode.
COLOURS = {"blue": "#0072b2", "orange": "#d55e00", "green": "#009e73", "pink": "#cc79a7", "yellow": "#e69f00"}
COLOURS |= {"sky": "#56b4e9", "grey": "#8a8f98"}
INK = "#010203"  # placeholder for the page's text colour
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟", "h": "⬢"}
DISTINCT_CLIENTS = len(MARKERS)  # more clients than this are coloured by modality
MODALITIES = {"image": "blue", "text": "orange", "image+text": "green"}
STAGES = {"generate": "blue", "clients": "orange", "aggregate": "pink", "adapt": "green", "measure": "yellow"}
FEWEST_ROUNDS = 4  # a chart has room for at least this many
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
    """A chart: title, inline SVG without any text from the run, and legend."""

    title: str
    svg: Markup
    legend: Sequence[Legend] = ()


def charts_of(lines: list[Line]) -> list[Chart]:
    """Draw one chart for each measure that the rounds have."""
    alignment, frechet, loss = (points_of(lines, of_generator(key)) for key in ("alignment", "frechet", "loss"))
    with matplotlib.rc_context(CHART_STYLE):
        charts = [
            _accuracy_chart(lines),
            _line_chart("T2I alignment", alignment, "green", percent=True),
            _line_chart("T2I Fréchet distance", frechet, "pink"),
            _line_chart("LoRA loss", loss, "orange"),
            _bytes_chart(lines),
            _seconds_chart(lines),
        ]
    return [chart for chart in charts if chart is not None]


def _accuracy_chart(lines: list[Line]) -> Chart:
    clients = client_rows(lines)
    few = len(clients) <= DISTINCT_CLIENTS
    figure, axes = _axes(lines, percent=True)
    legend = []
    for index, client in enumerate(clients):
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
    mean = points_of(lines, mean_accuracy)
    if mean:
        axes.plot(*zip(*mean, strict=True), color=INK, linewidth=3, marker=_marker(mean), markersize=5)
        legend.append(Legend("●", "ink", "mean"))
    return Chart("Accuracy of each client", _svg(figure), list(dict.fromkeys(legend)))


def _line_chart(title: str, points: list[tuple[int, float]], colour: str, percent: bool = False) -> Chart | None:
    if not points:
        return None
    figure, axes = _axes([{"round": number} for number, _ in points], percent)
    axes.plot(*zip(*points, strict=True), color=COLOURS[colour], marker=_marker(points), linewidth=2)
    if not percent:
        axes.set_ylim(bottom=min(0, *(value for _, value in points)))
    return Chart(title, _svg(figure))


def _bytes_chart(lines: list[Line]) -> Chart:
    largest = max(line["bytes"][way] for line in lines for way in ("down", "up"))
    unit, scale = ("MiB", 1024**2) if largest >= 1024**2 else ("KiB", 1024)
    figure, axes = _axes(lines)
    rounds = [line["round"] for line in lines]
    for way, colour, shift in (("down", "sky", -0.2), ("up", "orange", 0.2)):
        heights = [line["bytes"][way] / scale for line in lines]
        _bars(axes, [number + shift for number in rounds], 0.4, heights, [0.0] * len(rounds), COLOURS[colour])
    legend = [Legend("■", "sky", "to clients"), Legend("■", "orange", "from clients")]
    return Chart(f"Traffic of a round, {unit}", _svg(figure), legend)


def _seconds_chart(lines: list[Line]) -> Chart:
    figure, axes = _axes(lines)
    rounds = [line["round"] for line in lines]
    stages = {stage: [line["seconds"].get(stage, 0) for line in lines] for stage in STAGES}
    sums = [sum(heights) for heights in zip(*stages.values(), strict=True)]
    stages["other"] = [max(0, line["seconds"]["total"] - named) for line, named in zip(lines, sums, strict=True)]
    bottom = [0.0] * len(lines)
    colours = {**STAGES, "other": "grey"}
    for stage, heights in stages.items():
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        _bars(axes, rounds, 0.7, top, bottom, COLOURS[colours[stage]])
        bottom = top
    return Chart("Seconds of a round", _svg(figure), [Legend("■", colour, stage) for stage, colour in colours.items()])


def _marker(points: Sequence[object], marker: str = "o") -> str | None:
    return marker if len(points) <= MOST_MARKED_ROUNDS else None


def _bars(
    axes: Any, centres: Sequence[float], width: float, tops: Sequence[float], bottoms: Sequence[float], colour: str
) -> None:
    """Draw all bars as one outline; with many rounds, drawing each bar alone would take seconds."""
    edges = [centre + side * width / 2 for centre in centres for side in (-1, 1)]
    upper, lower = ([height for bar in heights for height in (bar, 0)][:-1] for heights in (tops, bottoms))
    axes.stairs(upper, edges, baseline=lower, fill=True, color=colour)


def _axes(lines: Sequence[Line], percent: bool = False) -> tuple[Any, Any]:
    """Make a figure with empty axes; the x axis shows the rounds."""
    width, height = CHART_SIZE
    figure = Figure(figsize=(width, height))
    left = 0.5 / width
    axes = figure.add_axes((left, 0.42 / height, 1 - left - 0.08 / width, 1 - 0.5 / height))
    rounds = [line["round"] for line in lines]
    axes.set_xlim(min(rounds) - 0.5, max(*rounds, min(rounds) + FEWEST_ROUNDS - 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("round")
    axes.grid(axis="y")
    if percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def _svg(figure: Any) -> Markup:
    """Return the figure as inline SVG; its colours follow the page's light or dark mode."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "var(--ink)")
    for name, value in COLOURS.items():
        drawn = drawn.replace(value, f"var(--{name})")
    return Markup(drawn)  # safe: matplotlib wrote it, and it contains no text from the run

"""One self-contained HTML page of a run, rebuilt after each round: `python -m server_app.report FOLDER`."""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from common.files import write_text
from common.natural_order import natural_key
from server_app.run_folder import RunFolder

Line = dict[str, Any]
Measure = Callable[[Line], float | None]

# Okabe and Ito's colours, told apart by colour-blind readers; the page has its own shade of each for dark screens.
COLOURS = {"blue": "#0072b2", "orange": "#d55e00", "green": "#009e73", "pink": "#cc79a7", "yellow": "#e69f00"}
COLOURS |= {"sky": "#56b4e9", "grey": "#8a8f98"}
INK = "#010203"  # stands for the page's text colour
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟", "h": "⬢"}
DISTINCT_CLIENTS = len(MARKERS)  # more clients than this are coloured by modality
MODALITIES = {"image": "blue", "text": "orange", "image+text": "green"}
STAGES = {"generate": "blue", "clients": "orange", "aggregate": "pink", "adapt": "green", "measure": "yellow"}
FEWEST_ROUNDS = 4  # for which a chart leaves room
MOST_MARKED_ROUNDS = 40  # of more rounds, curves are lines only
MOST_PICTURES = 13  # a run of many rounds shows some of them, so that the page stays light
MOST_PICTURE_BYTES = 1_500_000
PICTURE_SIDE = 1600  # pixels to which larger pictures are reduced
PIXEL_ART_SIDE = 800  # a narrower grid is enlarged without blur

CHART_SIZE = (4.6, 2.6)  # inches; small, so that its text is readable when a phone shrinks it
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
class Headline:
    """A number as it was at first and as it is now.

    Attributes
    ----------
    title, before, after, change, note : str
        Ready to show; ``before`` and ``change`` are empty where there is one round only.
    better : bool or None
        Whether it went the way it should; None if it did not change.
    """

    title: str
    before: str
    after: str
    change: str
    better: bool | None
    note: str


@dataclass(frozen=True)
class Legend:
    """An entry under a chart: a marker, the colour's name and a text."""

    marker: str
    colour: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart: title, inline SVG without texts of the run's own, and legend."""

    title: str
    svg: Markup
    legend: Sequence[Legend] = ()


@dataclass(frozen=True)
class Picture:
    """A round's grid of pictures as a data URI, and whether its pixels should stay sharp when enlarged."""

    round: int
    uri: str
    pixelated: bool


@dataclass(frozen=True)
class ClientRow:
    """A client's accuracy when first and last seen, with the rounds of both."""

    name: str
    model: str
    modality: str
    examples: int
    before: float
    after: float
    first: int
    last: int


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run from what its folder holds; it needs no network and no other file.

    Parameters
    ----------
    folder : Path
        A run folder with ``config.json``; rounds and pictures are shown as far as they are there.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    OSError
        If ``config.json`` is missing or the page could not be written; an earlier page is then kept.
    """
    run = RunFolder(folder)
    write_text(run.report, _render(run.read_config(), run.read_metrics(), _pictures(run), _changed(run)))
    return run.report


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the report of a run folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m server_app.report", description="Rebuild a run's report.html.")
    parser.add_argument("folder", type=Path, help="the run folder")
    folder = parser.parse_args(arguments).folder
    try:
        print(write_report(folder))
    except OSError as error:
        parser.error(f"no report of {folder}: {error}")


def _render(described: Mapping[str, Any], lines: list[Line], pictures: list[Picture], changed: str) -> str:
    config = described["config"]
    planned = config["rounds"]
    done = lines[-1]["round"] if lines else None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "number": _number, "size": _size, "seconds": _seconds}
    return environment.from_string(TEMPLATE).render(
        run_id=described["run_id"],
        facts=_facts(config, described["classes"], lines),
        done=done,
        planned=planned,
        finished=done is not None and done >= planned,
        changed=changed,
        headlines=_headlines(lines),
        judged=any(line["generator"]["frechet"] is not None for line in lines),
        pictures=pictures,
        charts=_charts(lines) if lines else [],
        clients=_clients(lines),
        lines=lines,
        troubles=[(line["round"], *item) for line in lines for item in _troubles(line["replies"])],
        replies={kind: sum(line["replies"][kind] for line in lines) for kind in ("received", "rejected", "missing")},
        settings=list(_flat(config)),
        environment=list(_flat({key: value for key, value in described.items() if key != "config"})),
        colours=COLOURS,
    )


def _troubles(replies: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Name who did not take part in a round as asked, and why; runs of an earlier version know no late and gone."""
    yield from sorted(replies["reasons"].items())
    for name in replies.get("late", ()):
        yield name, "a reply to an earlier round came after that had closed, and is not counted"
    for name in replies.get("gone", ()):
        if name not in replies["reasons"]:
            yield name, "not connected"


def _facts(config: Mapping[str, Any], classes: Sequence[str], lines: list[Line]) -> list[str]:
    """Name the run in a few words: what it learns, with what, how."""
    clients = {name for line in lines for name in line["clients"]["per_client"]}
    data, t2i = config["data"], config["t2i"]
    facts = [f"{data['dataset']}, {len(classes)} classes", f"T2I {t2i['model']}", f"feedback {config['feedback']}"]
    return [*facts, _count(len(clients), "client")] if clients else facts


def _changed(run: RunFolder) -> str:
    source = run.metrics if run.metrics.exists() else run.config
    return f"{datetime.fromtimestamp(source.stat().st_mtime):%Y-%m-%d %H:%M:%S}"


# ---------------------------------------------------------------------- numbers


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Give the leaves of nested objects with dotted keys, lists as comma-separated texts."""
    if isinstance(value, Mapping):
        for name, content in value.items():
            yield from _flat(content, f"{key}.{name}" if key else str(name))
    else:
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def _points(lines: Iterable[Line], measure: Measure) -> list[tuple[int, float]]:
    """Give (round, value) where there is a value."""
    return [(line["round"], value) for line in lines if (value := measure(line)) is not None]


def _accuracy_of_modality(modality: str) -> Measure:
    def mean(line: Line) -> float | None:
        clients = line["clients"]["per_client"].values()
        values = [client["accuracy"] for client in clients if client["modality"] == modality]
        return sum(values) / len(values) if values else None

    return mean


def _accuracy_of_client(name: str) -> Measure:
    return lambda line: line["clients"]["per_client"].get(name, {}).get("accuracy")


def _of_clients(line: Line) -> float | None:
    mean: float | None = line["clients"]["accuracy"]
    return mean


def _of_generator(key: str) -> Measure:
    return lambda line: line["generator"][key]


def _headlines(lines: list[Line]) -> list[Headline]:
    modalities = sorted({client["modality"] for line in lines for client in line["clients"]["per_client"].values()})
    title = "{} clients, mean accuracy".format
    found = [_headline(title("All"), lines, _of_clients, _counts(lines))]
    if len(modalities) > 1:
        found += [
            _headline(title(name.capitalize()), lines, _accuracy_of_modality(name), _counts(lines, name))
            for name in modalities
        ]
    found += [
        _headline("T2I alignment", lines, _of_generator("alignment"), "recognised as prompted"),
        _headline("T2I Fréchet distance", lines, _of_generator("frechet"), "lower is better", sign=-1),
    ]
    return [headline for headline in found if headline is not None]


def _headline(title: str, lines: list[Line], measure: Measure, note: str, sign: int = 1) -> Headline | None:
    """Compare a measure's first value with its last; ``sign`` is -1 where less is better, and not a percentage."""
    points = _points(lines, measure)
    if not points:
        return None
    (first, before), (last, after) = points[0], points[-1]
    difference = after - before
    show, change = (_percent, f"{100 * difference:+.1f} points") if sign > 0 else (_number, _relative(before, after))
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    return Headline(
        title,
        show(before) if len(points) > 1 else "",
        show(after),
        change.replace("-", "−") if len(points) > 1 else "",
        None if difference == 0 else sign * difference > 0,
        f"{note}, {rounds}",
    )


def _relative(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before else f"{after - before:+.3g}"


def _counts(lines: list[Line], modality: str | None = None) -> str:
    """Say over how many clients the first and the last mean are, since some come late or miss a round."""
    rounds = [line["clients"]["per_client"].values() for line in lines]
    counts = [sum(modality in (None, client["modality"]) for client in clients) for clients in rounds]
    seen = [count for count in counts if count] or [0]
    return _count(seen[0], "client") if seen[0] == seen[-1] else f"{seen[0]} → {seen[-1]} clients"


def _clients(lines: list[Line]) -> list[ClientRow]:
    """Describe each client as it was last seen, in order of modality and name."""
    seen: dict[str, list[tuple[int, Line]]] = {}
    for line in lines:
        for name, client in line["clients"]["per_client"].items():
            seen.setdefault(name, []).append((line["round"], client))
    rows = []
    for name, reports in seen.items():
        (first, before), (last, after) = reports[0], reports[-1]
        described = {key: after[key] for key in ("model", "modality", "examples")}
        rows.append(
            ClientRow(name, **described, before=before["accuracy"], after=after["accuracy"], first=first, last=last)
        )
    return sorted(rows, key=lambda row: (row.modality, natural_key(row.name)))


# ---------------------------------------------------------------------- pictures


def _pictures(run: RunFolder) -> list[Picture]:
    """Read the rounds' grids in order; the first, the last and some between if they are many."""
    found = run.pictures()
    rounds = list(found)
    if len(rounds) > MOST_PICTURES:
        rounds = [rounds[index * (len(rounds) - 1) // (MOST_PICTURES - 1)] for index in range(MOST_PICTURES)]
    return [_picture(number, found[number]) for number in rounds]


def _picture(number: int, path: Path) -> Picture:
    with Image.open(path) as image:
        pixelated = image.width <= PIXEL_ART_SIDE
        if path.stat().st_size <= MOST_PICTURE_BYTES:
            return Picture(number, _data_uri("png", path.read_bytes()), pixelated)
        reduced = image.convert("RGB")
    reduced.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    reduced.save(buffer, format="JPEG", quality=85)
    return Picture(number, _data_uri("jpeg", buffer.getvalue()), pixelated=False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


# ---------------------------------------------------------------------- charts


def _charts(lines: list[Line]) -> list[Chart]:
    alignment, frechet, loss = (_points(lines, _of_generator(key)) for key in ("alignment", "frechet", "loss"))
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
    clients = _clients(lines)
    few = len(clients) <= DISTINCT_CLIENTS
    figure, axes = _axes(lines, percent=True)
    legend = []
    for index, client in enumerate(clients):
        colour = list(COLOURS)[index] if few else MODALITIES.get(client.modality, "grey")
        marker = list(MARKERS)[index] if few else "o"
        points = _points(lines, _accuracy_of_client(client.name))
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[colour],
            marker=_marker(points, marker),
            alpha=0.9 if few else 0.45,
        )
        legend.append(Legend(MARKERS[marker], colour, client.name if few else f"{client.modality} clients"))
    mean = _points(lines, _of_clients)
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
    named = [sum(heights) for heights in zip(*stages.values(), strict=True)]
    stages["other"] = [max(0, line["seconds"]["total"] - known) for line, known in zip(lines, named, strict=True)]
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
    """Draw bars as one outline that is flat between them: a run of many rounds would take seconds bar by bar."""
    edges = [centre + side * width / 2 for centre in centres for side in (-1, 1)]
    upper, lower = ([height for bar in heights for height in (bar, 0)][:-1] for heights in (tops, bottoms))
    axes.stairs(upper, edges, baseline=lower, fill=True, color=colour)


def _axes(lines: Sequence[Line], percent: bool = False) -> tuple[Any, Any]:
    """Make a figure with empty axes over the rounds."""
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
    """Draw as inline SVG whose colours follow the page's light or dark scheme."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "var(--ink)")
    for name, value in COLOURS.items():
        drawn = drawn.replace(value, f"var(--{name})")
    return Markup(drawn)  # safe: matplotlib wrote it, and no text of the run is in it


TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if not finished %}
<meta http-equiv="refresh" content="10">
{% endif %}
<title>FedMMKT run {{ run_id }}: {{ "finished" if finished else "running" }}</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1c2127; --soft: #626b77; --page: #f4f5f7; --card: #ffffff; --line: #e1e4e9; --good: #00714f; --bad: #b34700;
  {% for name, value in colours.items() %}--{{ name }}: {{ value }}; {% endfor +%}
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaed; --soft: #9aa4b1; --page: #111418; --card: #1a1e24; --line: #2d333c; --good: #3fcf9f; --bad: #ff9d57;
    --blue: #4aa3e0; --orange: #f07c2c; --green: #2bbd90; --sky: #8fd0f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; font-weight: 680; }
h2 { margin: 2.8rem 0 0.9rem; font-size: 1.2rem; letter-spacing: -0.01em; font-weight: 650; }
h3 { margin: 0 0 0.5rem; font-size: 0.9rem; font-weight: 600; }
p { margin: 0.4rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.86rem; }
.status { display: flex; flex-wrap: wrap; gap: 0.4rem 0.9rem; align-items: center; margin-top: 0.7rem; }
.badge {
  padding: 0.15rem 0.7rem; border-radius: 99px; font-size: 0.86rem; font-weight: 600; color: var(--good);
  background: color-mix(in srgb, currentColor 12%, transparent);
}
.badge.running { color: var(--blue); }
progress { width: 9rem; height: 0.5rem; accent-color: var(--blue); }
.grid { display: grid; gap: 0.9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; }
.grid > * { min-width: 0; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.headline b { font-size: 1.85rem; font-weight: 680; letter-spacing: -0.03em; line-height: 1.25; white-space: nowrap; }
.headline .was { color: var(--soft); font-size: 1.15rem; white-space: nowrap; }
.headline .numbers { display: flex; flex-wrap: wrap; gap: 0 0.5rem; align-items: baseline; }
.change { font-size: 0.86rem; font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.pair { display: grid; gap: 0.9rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: 6px; background: #fff; border: 4px solid #fff; }
.pixels { image-rendering: pixelated; }
figcaption { margin-bottom: 0.4rem; }
figcaption b { color: var(--ink); }
.slider { display: flex; gap: 0.8rem; align-items: center; margin: 0.9rem 0 0.5rem; }
.slider input { flex: 1; accent-color: var(--blue); }
.slider[hidden] { display: none; }
.strip { display: flex; gap: 0.7rem; overflow-x: auto; padding: 0.7rem 0 0.4rem; }
.strip figure { flex: 0 0 150px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; fill: var(--soft) !important; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin-top: 0.5rem; font-size: 0.82rem; }
.legend i { font-style: normal; margin-right: 0.3rem; }
.scroll { overflow: auto; max-height: 34rem; padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.9rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--soft); white-space: nowrap; }
th { font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.break { overflow-wrap: anywhere; min-width: 9rem; }
td.key { font: 0.82rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: nowrap; }
.meter { position: relative; height: 0.45rem; min-width: 7rem; margin-top: 0.5rem; background: var(--line); }
.meter, .meter i { border-radius: 99px; }
.meter i { position: absolute; inset: 0 auto 0 0; background: var(--blue); }
.meter s { position: absolute; top: -0.2rem; bottom: -0.2rem; width: 2px; background: var(--ink); }
details > summary { cursor: pointer; font-size: 0.9rem; font-weight: 600; }
details + details, .grid + .card { margin-top: 0.9rem; }
details > .scroll { margin-top: 0.6rem; }
@media (max-width: 560px) { body { padding-top: 1.5rem; } h1 { font-size: 1.5rem; } th, td { padding: 0.4rem 0.6rem; } }
@media print { body { max-width: none; } .scroll { max-height: none; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<header>
  <h1>FedMMKT run {{ run_id }}</h1>
  <div class="status">
    {% if finished %}
    <span class="badge">Finished: {{ done }} of {{ planned }} rounds</span>
    {% else %}
    <span class="badge running">
      {{- "Before the first round" if done is none else "Round %s of %s" % (done, planned) -}}
    </span>
    <progress max="{{ planned }}" value="{{ done or 0 }}" aria-label="rounds done"></progress>
    {% endif %}
    <span class="soft">{{ facts | join(" · ") }}</span>
    <span class="soft">{{ changed }}</span>
  </div>
</header>

{% if headlines %}
<h2>Before and after</h2>
<div class="grid">
  {% for headline in headlines %}
  <div class="card headline">
    <h3>{{ headline.title }}</h3>
    <div class="numbers">
      {% if headline.before %}
      <span class="was">{{ headline.before }} →</span>
      {% endif %}
      <b>{{ headline.after }}</b>
    </div>
    {% if headline.change %}
    <div class="change{{ "" if headline.better is none else " good" if headline.better else " bad" }}">
      {{- headline.change }}{{ "" if headline.better is none else ", better" if headline.better else ", worse" -}}
    </div>
    {% endif %}
    <div class="soft">{{ headline.note }}</div>
  </div>
  {% endfor %}
</div>
{% if not judged %}
<p class="soft">No judge measures the T2I model in this run, so its alignment and Fréchet distance are not known.</p>
{% endif %}
{% else %}
<p class="soft">Nothing is measured yet.</p>
{% endif %}

{% macro picture(item, label) %}
<figure>
  <figcaption>{{ label }}</figcaption>
  <img class="{{ "pixels" if item.pixelated }}" alt="Generated in round {{ item.round }}" src="{{ item.uri }}">
</figure>
{% endmacro %}
{% if pictures %}
<h2>What the T2I model draws</h2>
<div class="card">
  <p class="soft">The same prompts and the same seeds in each round: what changes is what it learned.</p>
  <div class="pair">
    {% set label %}Before, <b>round {{ pictures[0].round }}</b>{% endset %}
    {{ picture(pictures[0], label) }}
    {% if pictures | length > 1 %}
    <div id="shown">
      {% set label %}After, <b>round {{ pictures[-1].round }}</b>{% endset %}
      {{ picture(pictures[-1], label) }}
    </div>
    {% endif %}
  </div>
  {% if pictures | length > 1 %}
  <label class="slider soft" hidden>
    Round <input type="range" min="0" max="{{ pictures | length - 1 }}" value="{{ pictures | length - 1 }}">
  </label>
  <details>
    <summary>All rounds side by side</summary>
    <div class="strip">
      {% for item in pictures %}
      {% set label %}Round {{ item.round }}{% endset %}
      {{ picture(item, label) }}
      {% endfor %}
    </div>
  </details>
  {% endif %}
</div>
{% endif %}

{% if charts %}
<h2>Curves</h2>
<div class="grid charts">
  {% for chart in charts %}
  <div class="card">
    <h3>{{ chart.title }}</h3>
    {{ chart.svg }}
    {% if chart.legend %}
    <div class="legend">
      {% for entry in chart.legend %}
      <span><i style="color: var(--{{ entry.colour }})">{{ entry.marker }}</i>{{ entry.text }}</span>
      {% endfor %}
    </div>
    {% endif %}
  </div>
  {% endfor %}
</div>
{% endif %}

{% if clients %}
<h2>Clients</h2>
<div class="card scroll">
  <table>
    <thead><tr>
      <th>Name</th><th>Model</th><th>Modality</th><th class="n">Examples</th>
      <th class="n">Before</th><th class="n">After</th><th class="n">Points</th><th></th>
    </tr></thead>
    <tbody>
    {% for client in clients %}
    <tr>
      <td class="break"><b>{{ client.name }}</b></td>
      <td>{{ client.model }}</td>
      <td>{{ client.modality }}</td>
      <td class="n">{{ client.examples }}</td>
      <td class="n">{{ client.before | percent }}
        {%- if client.first != lines[0].round %}<br><span class="soft">round {{ client.first }}</span>{% endif %}</td>
      <td class="n">{{ client.after | percent }}
        {%- if client.last != done %}<br><span class="soft">round {{ client.last }}</span>{% endif %}</td>
      <td class="n {{ "good" if client.after > client.before else "bad" if client.after < client.before }}">
        {{- "%+.1f" | format(100 * (client.after - client.before)) }}</td>
      <td><div class="meter" title="the mark is before, the bar is after">
        <i style="width: {{ "%.1f" | format(100 * client.after) }}%"></i>
        <s style="left: {{ "%.1f" | format(99 * client.before) }}%"></s>
      </div></td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
</div>
<p class="soft">In the last column the mark is the accuracy before, the bar the accuracy after.</p>

<h2>Rounds</h2>
<div class="card scroll">
  <table>
    <thead><tr>
      <th class="n">Round</th><th class="n">Accuracy</th><th class="n">Alignment</th><th class="n">Fréchet</th>
      <th class="n">LoRA loss</th><th class="n">To clients</th><th class="n">From clients</th><th class="n">Time</th>
      <th class="n">Received</th><th class="n">Rejected</th><th class="n">Missing</th>
    </tr></thead>
    <tbody>
    {% for line in lines %}
    <tr>
      <td class="n"><b>{{ line.round }}</b></td>
      <td class="n">{{ line.clients.accuracy | percent }}</td>
      <td class="n">{{ line.generator.alignment | percent }}</td>
      <td class="n">{{ line.generator.frechet | number }}</td>
      <td class="n">{{ line.generator.loss | number }}</td>
      <td class="n">{{ line.bytes.down | size }}</td>
      <td class="n">{{ line.bytes.up | size }}</td>
      <td class="n">{{ line.seconds.total | seconds }}</td>
      <td class="n">{{ line.replies.received }}</td>
      <td class="n{{ " bad" if line.replies.rejected }}">{{ line.replies.rejected }}</td>
      <td class="n{{ " bad" if line.replies.missing }}">{{ line.replies.missing }}</td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
</div>
{% endif %}

{% if lines %}
<h2>Replies</h2>
<p>{{ replies.received }} received, {{ replies.rejected }} rejected, {{ replies.missing }} missing.
{% if not troubles %}<span class="soft">Every reply came and was used.</span>{% endif %}</p>
{% if troubles %}
<div class="card scroll">
  <table>
    <thead><tr><th>Round</th><th>Client or node</th><th>Reason</th></tr></thead>
    <tbody>
    {% for round, name, reason in troubles %}
    <tr><td>{{ round }}</td><td class="break">{{ name }}</td><td class="break">{{ reason }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
</div>
{% endif %}
{% endif %}

{% macro keys(title, items) %}
<details class="card">
  <summary>{{ title }}</summary>
  <div class="scroll">
    <table><tbody>
    {% for key, value in items %}
    <tr><td class="key">{{ key }}</td><td class="break">{{ value }}</td></tr>
    {% endfor %}
    </tbody></table>
  </div>
</details>
{% endmacro %}
<h2>Configuration</h2>
{{ keys("Run-config", settings) }}
{{ keys("Run, classes and versions", environment) }}

{% if pictures | length > 1 %}
<script>
const slider = document.querySelector(".slider"), frames = document.querySelectorAll(".strip img");
const image = document.querySelector("#shown img"), caption = document.querySelector("#shown figcaption b");
slider.hidden = false;
slider.querySelector("input").addEventListener("input", (event) => {
  const frame = frames[event.target.value];
  image.src = frame.src;
  image.alt = frame.alt;
  caption.textContent = frame.closest("figure").querySelector("figcaption").textContent.toLowerCase();
});
</script>
{% endif %}
</body>
</html>
"""


if __name__ == "__main__":
    main()

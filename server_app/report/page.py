"""The report of a run: one self-contained HTML page, rewritten after each round, or by ``fedmmkt report FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from fedmmkt.common.files import write_text
from fedmmkt.common.installed import installed
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.charts import COLOURS, charts_of
from fedmmkt.server_app.report.measures import Line, client_rows, headlines_of
from fedmmkt.server_app.report.numbers import counted, flat, number, percent, seconds, size
from fedmmkt.server_app.report.pictures import Picture, pictures_of


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the content of a run folder; the page needs no network and no other file.

    Parameters
    ----------
    folder : Path
        A run folder with ``config.json``. The page shows the rounds and pictures that exist.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    OSError
        If ``config.json`` is missing or the page could not be written. An earlier page is then kept.
    """
    run = RunFolder(folder)
    write_text(run.report, _render(run.read_config(), run.read_metrics(), pictures_of(run), _last_change(run)))
    return run.report


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the report of a run folder; return the exit code."""
    parser = argparse.ArgumentParser(prog="fedmmkt report", description="Rewrite the report.html of a run.")
    parser.add_argument("folder", type=Path, help="the run folder")
    folder = parser.parse_args(arguments).folder
    try:
        print(write_report(folder))
    except OSError as error:
        parser.error(f"no report of {folder}: {error}")
    return 0


def _render(described: Mapping[str, Any], lines: list[Line], pictures: list[Picture], changed: str) -> str:
    config = described["config"]
    planned = config["rounds"]
    done = lines[-1]["round"] if lines else None
    folder = installed("server_app/report/page.html").parent  # An app bundle contains no HTML.
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "number": number, "size": size, "seconds": seconds}
    return environment.get_template("page.html").render(
        run_id=described["run_id"],
        facts=_facts(config, described["classes"], lines),
        done=done,
        planned=planned,
        finished=done is not None and done >= planned,
        changed=changed,
        headlines=headlines_of(lines),
        judged=any(line["generator"]["frechet"] is not None for line in lines),
        pictures=pictures,
        charts=charts_of(lines) if lines else [],
        clients=client_rows(lines),
        lines=lines,
        troubles=[(line["round"], *item) for line in lines for item in _troubles(line["replies"])],
        replies={kind: sum(line["replies"][kind] for line in lines) for kind in ("received", "rejected", "missing")},
        settings=list(flat(config)),
        environment=list(flat({key: value for key, value in described.items() if key != "config"})),
        colours=COLOURS,
    )


def _troubles(replies: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the clients that did not take part in a round as expected, each with the reason.

    Runs of earlier versions have no ``late`` and ``gone``.
    """
    yield from sorted(replies["reasons"].items())
    for name in replies.get("late", ()):
        yield name, "a reply to an earlier round came too late and is not counted"
    for name in replies.get("gone", ()):
        if name not in replies["reasons"]:
            yield name, "not connected"


def _facts(config: Mapping[str, Any], classes: Sequence[str], lines: list[Line]) -> list[str]:
    """Return a few facts about the run: dataset, T2I model, feedback and number of clients."""
    clients = {name for line in lines for name in line["clients"]["per_client"]}
    data, t2i = config["data"], config["t2i"]
    facts = [f"{data['dataset']}, {len(classes)} classes", f"T2I {t2i['model']}", f"feedback {config['feedback']}"]
    return [*facts, counted(len(clients), "client")] if clients else facts


def _last_change(run: RunFolder) -> str:
    source = run.metrics if run.metrics.exists() else run.config
    return f"{datetime.fromtimestamp(source.stat().st_mtime):%Y-%m-%d %H:%M:%S}"

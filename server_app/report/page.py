"""The report of a run: one self-contained HTML page, written as rounds end, or by ``fedmmkt report FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmmkt.common.files import write_text
from fedmmkt.server_app.record.checkpoint import checkpoints
from fedmmkt.server_app.record.run_folder import STOPPED, RunFolder
from fedmmkt.server_app.report.charts import charts_of
from fedmmkt.server_app.report.control import few_steps_of, forgotten_of, personal_of, prompts_alone
from fedmmkt.server_app.report.heat import heat_maps_of
from fedmmkt.server_app.report.history import MOST_TROUBLES, History
from fedmmkt.server_app.report.images import measure_rows, verdict_rows
from fedmmkt.server_app.report.measures import (
    FROZEN,
    ClientRow,
    Line,
    alone_of,
    client_rows,
    evaluations_of,
    fading_of,
    headlines_of,
    summary_of,
)
from fedmmkt.server_app.report.numbers import counted, flat, seconds, size
from fedmmkt.server_app.report.pictures import Captions, Picture, captions_of, pictures_of
from fedmmkt.server_app.report.privacy import COVERED, client_names, feedback_of, privacy_rows
from fedmmkt.server_app.report.settings import ShownSetting, repeating_run_config, run_config_option, settings_of
from fedmmkt.server_app.report.template import render
from fedmmkt.server_app.report.timeline import timeline_of

MOST_CLIENT_ROWS = 40  # of more clients, those that gain least and those that gain most are listed
MOST_ROUND_ROWS = 100  # of more rounds, the first, the last and some between are listed


def write_report(folder: Path, history: History | None = None) -> Path:
    """Write ``report.html`` from the content of a run folder; the page needs no network and no other file.

    Parameters
    ----------
    folder : Path
        A run folder with ``config.json``. The page shows the rounds and pictures that exist.
    history : History, optional
        Its rounds; by default they are read from the folder.

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
    history = history or History.of(run.read_lines())
    parts = run.read_config(), history, pictures_of(run), captions_of(run), _last_change(run)
    page = _render(*parts, run.read_failure(), _way_on(run))
    write_text(run.report, page)
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


def _render(
    described: Mapping[str, Any],
    history: History,
    pictures: list[Picture],
    captions: Captions,
    changed: datetime,
    failure: str,
    way_on: str,
) -> str:
    lines = history.lines
    config, classes = described["config"], described["classes"]
    planned = config["rounds"]
    done = lines[-1]["round"] if lines else None
    clients = client_rows(lines)
    judge: Mapping[str, Any] = described.get("judge", {})
    images: Mapping[str, int] = judge.get("images", {})
    floors: Mapping[str, Any] = judge.get("floors", {})
    return render(
        "page.html",
        title=_title(described, changed),
        run_id=described["run_id"],
        facts=_facts(config, classes, lines),
        totals=_totals(lines),
        machine=_machine(described),
        command=repeating_run_config(config),
        nodes=len(client_names(lines)),
        privacy=privacy_rows(lines),
        covered=COVERED,
        done=done,
        planned=planned,
        finished=done is not None and done >= planned and not failure,
        failure=failure,
        stopped=failure == STOPPED,
        way_on=way_on,
        frozen=config["t2i"]["scores"] == FROZEN,
        changed=f"{changed:%Y-%m-%d %H:%M:%S}",
        headlines=headlines_of(lines, _judged_samples(config), floors.get("frechet")),
        summary=[
            *summary_of(clients),
            *personal_of(lines),
            *forgotten_of(lines, classes),
            *fading_of(lines, min(images.values(), default=None), floors.get("frechet")),
        ],
        few_steps=few_steps_of(clients, config),
        prompts_alone=prompts_alone(config, len(alone_of(lines).accuracies)).strip(),
        alone=alone_of(lines).source,
        warmup_epochs=config["client"]["warmup-epochs"],
        private_epochs=config["client"]["warmup-epochs"] + planned * config["client"]["local-epochs"],
        chance=1 / len(classes),
        tested=_tested(lines),
        judged=any(line["generator"]["frechet"] is not None for line in lines),
        judge_accuracy=judge.get("accuracy"),
        images=images,
        floor_images=floors.get("images"),
        measure_rows=measure_rows(lines, floors),
        verdict_rows=verdict_rows(lines),
        pictures=pictures,
        captions=captions,
        charts=[*charts_of(lines, 1 / len(classes)), *filter(None, [timeline_of(lines)])] if lines else [],
        heat_maps=heat_maps_of(lines, classes),
        clients=_shown_clients(clients),
        client_count=len(clients),
        class_count=len(classes),
        lines=lines,
        listed=_listed(lines),
        troubles=history.troubles,
        many_troubles=len(history.troubles) > MOST_TROUBLES,
        reasons=history.reasons,
        replies={kind: sum(line["replies"][kind] for line in lines) for kind in ("received", "rejected", "missing")},
        settings=settings_of(config),
        environment=[
            ShownSetting(key, value, None)
            for key, value in flat({key: value for key, value in described.items() if key != "config"})
        ],
    )


def _title(described: Mapping[str, Any], changed: datetime) -> str:
    """Name a run by its dataset, its T2I model and its date."""
    config = described["config"]
    started = described.get("started")
    date = datetime.fromisoformat(started) if started else changed
    dataset, model = (
        "/".join(text.rstrip("/").split("/")[-2:]) for text in (config["data"]["dataset"], config["t2i"]["model"])
    )
    return f"{dataset}, T2I {model}, {date:%Y-%m-%d}"


def _totals(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Return the time and the bytes of all rounds."""
    if not lines:
        return []
    down, up = (sum(line["bytes"][way] for line in lines) for way in ("down", "up"))
    time = seconds(sum(line["seconds"]["total"] for line in lines))
    return [("time of all rounds", time), ("to clients", size(down)), ("from clients", size(up))]


def _machine(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where the server ran, as far as the run recorded it."""
    hardware, versions = described.get("hardware", {}), described.get("versions", {})
    cores = [counted(hardware["cores"], "core")] if hardware else []
    parts = [hardware.get("processor"), *cores, hardware.get("memory"), *hardware.get("gpus", ())]
    named = {
        "hardware of the server": ", ".join(part for part in parts if part),
        "system": hardware.get("system", ""),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "commit": described.get("commit", ""),
    }
    return [(name, text) for name, text in named.items() if text]


def _judged_samples(config: Mapping[str, Any]) -> int | None:
    """Return of how many images the alignment is a share; a file of prompts may have some without a class."""
    t2i = config["t2i"]
    return t2i["evaluation-samples"] if t2i["prompts"] == "templates" else None


def _tested(lines: Sequence[Line]) -> str:
    """Return the number of test examples of a client, or their range."""
    counts = sorted({sum(evaluation["tested"]) for evaluation in evaluations_of(lines).values()})
    return " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else ""


def _shown_clients(rows: list[ClientRow]) -> list[ClientRow]:
    """Return the rows of the table; of many clients, those that gain least and those that gain most."""
    if len(rows) <= MOST_CLIENT_ROWS:
        return rows
    by_gain = sorted(rows, key=lambda row: row.gain)
    return [*by_gain[: MOST_CLIENT_ROWS // 2], *by_gain[-MOST_CLIENT_ROWS // 2 :]]


def _listed(lines: list[Line]) -> list[Line]:
    """Return the rounds of the table; of many, the first, the last and some between."""
    if len(lines) <= MOST_ROUND_ROWS:
        return lines
    return [lines[index * (len(lines) - 1) // (MOST_ROUND_ROWS - 1)] for index in range(MOST_ROUND_ROWS)]


def _facts(config: Mapping[str, Any], classes: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """Return a few facts about the run: dataset, T2I model, feedback and number of clients."""
    data, t2i, clients = config["data"], config["t2i"], len(client_names(lines))
    feedback = feedback_of(config["feedback"], privacy_rows(lines), clients)
    facts = [f"{data['dataset']}, {len(classes)} classes", f"T2I {t2i['model']}", feedback]
    return [*facts, counted(clients, "client")] if clients else facts


def _way_on(run: RunFolder) -> str:
    """Return the option with which a run goes on; empty if it has no checkpoint."""
    is_resumable = any(checkpoints(run.checkpoints))
    return run_config_option({"resume-from": str(run.path.resolve())}).strip() if is_resumable else ""


def _last_change(run: RunFolder) -> datetime:
    source = run.metrics if run.metrics.exists() else run.config
    return datetime.fromtimestamp(source.stat().st_mtime)

"""A comparison of several runs: one HTML page that needs no network, by ``fedmmkt compare RUN RUN ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_text
from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.record.run_folder import STOPPED, RunFolder
from fedmmkt.server_app.report.charts import STAGES, Chart, overlaid
from fedmmkt.server_app.report.history import History
from fedmmkt.server_app.report.measures import (
    ClientRow,
    Headline,
    Line,
    Measure,
    client_rows,
    headlines_of,
    mean_accuracy,
    of_generator,
    points_of,
)
from fedmmkt.server_app.report.numbers import flat
from fedmmkt.server_app.report.pictures import Captions, Picture, captions_of, pictures_of
from fedmmkt.server_app.report.privacy import client_names, feedback_of, privacy_rows
from fedmmkt.server_app.report.template import render

OWN_SETTINGS = ("output-dir", "resume-from")  # Each run has its own.
# What a judge depends on: the real images, their classes and its seed.
JUDGED_BY = ("data.dataset", "data.image-column", "data.label-column", "data.image-size", "classes", "seed")
CURVES: dict[str, tuple[Measure, bool]] = {
    "Clients' mean accuracy": (mean_accuracy, True),
    "T2I alignment": (of_generator("alignment"), True),
    "T2I Fréchet distance": (of_generator("frechet"), False),
    "T2I recall": (of_generator("recall"), True),
}


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs that are compared.

    Attributes
    ----------
    name : str
        Name of its folder; the whole path if another run has the same name.
    status : str
        How far it is.
    feedback : str
        What clients answer with.
    settings : dict of str to str
        Its settings, classes and versions, by dotted key.
    lines : list of dict
        Its metrics.
    clients : dict of str to ClientRow
        Its clients, by name.
    headlines : dict of str to Headline
        Its measures before and after, by title.
    pictures : list of Picture
        The first and the last of its pictures.
    captions : Captions
        What they show.
    seconds : dict of str to float
        Seconds of all rounds, by stage.
    down, up : int
        Bytes of all rounds.
    judged_by : tuple of str
        The settings that its judge depends on: runs of others have other Frechet distances.
    """

    name: str
    status: str
    feedback: str
    settings: dict[str, str]
    lines: list[Line]
    clients: dict[str, ClientRow]
    headlines: dict[str, Headline]
    pictures: list[Picture]
    captions: Captions
    seconds: dict[str, float]
    down: int
    up: int
    judged_by: tuple[str, ...]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one HTML page that compares runs, as they are now; the page needs no network and no other file.

    It shows the settings that differ, curves over each other, pictures side by side, the accuracy of each client with
    its gain, bytes and seconds. Runs may have other rounds and clients, lack pictures, and be going on. A folder that
    cannot be read is left out, and the page says so.

    Parameters
    ----------
    folders : sequence of Path
        Run folders.
    out : Path
        The page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        If fewer than two different folders can be read.
    OSError
        If the page could not be written.
    """
    return _write(*read_runs(folders), out)


def read_runs(folders: Sequence[Path]) -> tuple[list[ComparedRun], dict[Path, str]]:
    """Read runs; return those that can be read, and what is wrong with the others, by folder.

    Raises
    ------
    ConfigError
        If fewer than two different folders can be read.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in distinct]
    runs, problems = [], {}
    for folder, name in zip(distinct, names, strict=True):
        try:
            runs.append(_read(RunFolder(folder), name if names.count(name) == 1 else str(folder)))
        except OSError as error:
            problems[folder] = f"{error.strerror}: {error.filename}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems[folder] = f"its files are not those of a run ({error!r})"
    if len(runs) < 2:
        reasons = "".join(f"; {folder}: {problem}" for folder, problem in problems.items())
        raise ConfigError(f"{len(runs)} of {len(distinct)} folders can be read{reasons}; allowed: two runs or more")
    return runs, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="fedmmkt compare", description="Write one page that compares several runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs, problems = read_runs(options.runs)
        for folder, problem in problems.items():
            print(f"fedmmkt compare: {folder} is left out: {problem}", file=sys.stderr)
        print(_write(runs, problems, options.out))
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return 0


def _read(run: RunFolder, name: str) -> ComparedRun:
    described, lines = run.read_config(), History.of(run.read_lines()).lines
    config = described["config"]
    settings = {key: value for key, value in flat(config) if key not in OWN_SETTINGS}
    settings |= dict(flat({key: described.get(key) for key in ("classes", "versions", "threads")}))
    stages = {stage: sum(line["seconds"].get(stage, 0.0) for line in lines) for stage in (*STAGES, "total")}
    pictures = pictures_of(run)
    floor = described.get("judge", {}).get("floors", {}).get("frechet")
    return ComparedRun(
        name=name,
        status=_status(lines, config["rounds"], run.read_failure()),
        feedback=feedback_of(config["feedback"], privacy_rows(lines), len(client_names(lines))),
        settings=settings,
        lines=lines,
        clients={row.name: row for row in client_rows(lines)},
        headlines={headline.title: headline for headline in headlines_of(lines, None, floor)},
        pictures=[pictures[0], pictures[-1]] if len(pictures) > 1 else pictures,
        captions=captions_of(run),
        seconds=stages,
        down=sum(line["bytes"]["down"] for line in lines),
        up=sum(line["bytes"]["up"] for line in lines),
        judged_by=tuple(settings.get(key, "") for key in JUDGED_BY),
    )


def _status(lines: Sequence[Line], planned: int, failure: str) -> str:
    if failure:
        after = f"after round {lines[-1]['round']} of {planned}" if lines else "before the end of round 0"
        return f"stopped {after}" if failure == STOPPED else f"failed {after}: {failure}"
    if not lines:
        return "before the first round"
    done = lines[-1]["round"]
    return f"finished, {done} rounds" if done >= planned else f"round {done} of {planned}"


def _write(runs: Sequence[ComparedRun], problems: Mapping[Path, str], out: Path) -> Path:
    page = render(
        "compare.html",
        runs=runs,
        problems=problems,
        titles=_keys(runs, lambda run: run.headlines, key=None),
        settings=_differing_settings(runs),
        charts=_charts(runs),
        clients=_keys(runs, lambda run: run.clients, key=natural_key),
        is_comparable=len({run.judged_by for run in runs}) == 1,
        stages=[*STAGES, "total"],
        has_noise=any(row.is_noisy for run in runs for row in run.clients.values()),
    )
    write_text(out, page)
    return out


def _charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    charts = [
        overlaid(title, {run.name: points_of(run.lines, measure) for run in runs}, percent)
        for title, (measure, percent) in CURVES.items()
    ]
    return [chart for chart in charts if chart is not None]


def _differing_settings(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, each with its value in each run."""
    rows = [
        (key, [run.settings.get(key, "–") for run in runs]) for key in _keys(runs, lambda run: run.settings, key=None)
    ]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _keys(
    runs: Sequence[ComparedRun],
    part: Callable[[ComparedRun], Mapping[str, object]],
    key: Callable[[str], Any] | None,
) -> list[str]:
    """Return the keys of a part of any run, sorted by ``key``, or in the order of the runs."""
    found = list(dict.fromkeys(name for run in runs for name in part(run)))
    return sorted(found, key=key) if key else found

"""The common part of the commands that run an app: options, signals and exit codes."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flwr.supercore.logger import update_console_handler

from fedmmkt.common.config import ConfigError, Setting
from fedmmkt.deploy.bundle import app_folder
from fedmmkt.deploy.processes import StartError
from fedmmkt.deploy.run_checks import check_run
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.deploy.settings import earlier_nodes, effective_config
from fedmmkt.deploy.stopping import tell_stop
from fedmmkt.deploy.submission import COMPLETED

Runner = Callable[[Path, int, Path | None, Mapping[str, Setting]], str]


def run_command(
    name: str,
    description: str,
    nodes: int,
    out: Path,
    runner: Runner,
    arguments: list[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """Parse the command line, check the settings before anything starts, and run.

    Parameters
    ----------
    name, description : str
        Texts for ``--help``.
    nodes : int
        Default of ``--nodes``.
    out : Path
        Default of ``--out``.
    runner : callable
        ``(app, nodes, out, run_config) -> status``.
    arguments : list of str, optional
        The command line; that of the process by default.
    parents : sequence of argparse.ArgumentParser
        Parsers of further options, which the runner already knows.

    Returns
    -------
    int
        Exit code: 0 for a completed run, 1 for any other run, 2 for bad input.
    """
    options = _parse(name, description, nodes, out, arguments, parents)
    update_console_handler(colored=sys.stderr.isatty())  # Checks may warn.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    config: Mapping[str, Setting] = {}
    began = time.time()
    try:
        # `make` passes an empty string if no run-config was given.
        run_config = parse_run_config([text for text in options.run_config if text.strip()])
        resumed = Path(str(run_config["resume-from"])) if run_config.get("resume-from") else None
        if options.nodes is None:
            options.nodes = (earlier_nodes(resumed) if resumed else None) or nodes
        options.out = options.out or resumed or out
        with app_folder(options.app) as app:
            config = effective_config(app, options.nodes, options.out, run_config)
            check_run(app, options.nodes, config)
            Path(str(config["output-dir"])).mkdir(parents=True, exist_ok=True)  # Not before: a refused run leaves none.
            return 0 if runner(app, options.nodes, options.out, run_config) == COMPLETED else 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        if folder := str(config.get("output-dir", "")):
            tell_stop(Path(folder), began)
        if isinstance(stop, SystemExit):
            raise
        print(f"stopped{_way_on(name, options.app, str(config.get('output-dir', '')))}", file=sys.stderr)
        return 128 + signal.SIGINT


def _parse(
    name: str,
    description: str,
    nodes: int,
    out: Path,
    arguments: list[str] | None,
    parents: Sequence[argparse.ArgumentParser],
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"fedmmkt {name}", description=description, parents=parents)
    parser.add_argument(
        "--nodes", type=int, help=f"number of nodes (default: {nodes}, or those of the run that resume-from names)"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the run (default: {out}, or that of the run that resume-from names)"
    )
    parser.add_argument(
        "--app", type=Path, help="folder of the app (default: this folder; if it has no app, fedmmkt's own app)"
    )
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="PAIRS",
        help="changes to [tool.flwr.app.config], such as 'rounds=2 t2i.lora-rank=4', or a TOML file",
    )
    return parser.parse_args(arguments)


def _way_on(name: str, app: Path | None, folder: str) -> str:
    """Say how to go on in the folder of a run that was stopped; nothing if it has no checkpoint."""
    if not folder or not any((Path(folder) / "checkpoints").glob("round-*")):
        return ""
    from fedmmkt.server_app.report.settings import run_config_option

    own = f" --app {shlex.quote(str(app))}" if app else ""
    resumed = run_config_option({"resume-from": str(Path(folder).resolve())})
    return f"; to go on after its last whole round: fedmmkt {name}{own}{resumed}"


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)

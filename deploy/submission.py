"""Submit a run to a SuperLink as ``flwr run`` does, follow it, and learn how it ended."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
from flwr.common.config import flatten_dict, parse_config_args

from client_app.task_models import check_task_model
from common.config import ConfigError, RunConfig
from deploy.processes import script

Value = bool | int | float | str

COMPLETED = "finished:completed"
RETRY_SECONDS = 2.0
LOST_AFTER = 30  # unanswered questions after which a run counts as lost

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own pattern: what it does not match it drops
_STARTED = re.compile(r"Successfully started run (\d+)")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes
    ----------
    run_id : str
        Flower's id of the run, or an empty string if it was refused.
    status : str
        ``finished:completed``, ``finished:failed``, ``finished:stopped``, ``not-started`` or ``unknown``.
    details : str
        What Flower says about it, often an exception's text.
    """

    run_id: str
    status: str
    details: str

    def __str__(self) -> str:
        return " ".join(filter(None, ["run", self.run_id, self.status, self.details]))


def format_run_config(config: Mapping[str, Value]) -> str:
    """Write a run-config the way ``flwr run --run-config`` reads it.

    Flower finds a quoted value up to the next quote and then reads it as TOML, so a quote inside a string has to
    be a TOML escape.
    """
    return " ".join(f"{key}={_format_value(value)}" for key, value in config.items())


def parse_run_config(texts: list[str]) -> dict[str, Value]:
    """Read run-config strings, or one TOML file, with Flower's parser.

    Raises
    ------
    ConfigError
        If they cannot be read, or if Flower would silently drop a part.
    """
    for text in texts:
        dropped = _PAIR.sub("", text).strip()
        if dropped and not text.endswith(".toml"):
            raise ConfigError(f"run-config: {dropped!r} is not of the form key=value (no spaces around '=')")
    try:
        return parse_config_args(texts)
    except click.ClickException as error:
        strings = 'strings need quotes: key="value"'
        raise ConfigError(f"run-config {' '.join(texts)!r} cannot be read; {strings}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"run-config: {error}") from error


def app_config(app: Path) -> tuple[str, dict[str, Value]]:
    """Read an app's name and its default run-config.

    Raises
    ------
    ConfigError
        If the folder holds no Flower app.
    """
    path = app / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        flower = project["tool"]["flwr"]["app"]
    except OSError as error:
        raise ConfigError(f"no Flower app in {str(app)!r}: {path.name} cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except KeyError:
        raise ConfigError(f"no Flower app in {str(app)!r}: {path.name} has no [tool.flwr.app] table") from None
    return project.get("project", {}).get("name", ""), flatten_dict(flower.get("config", {}))


def effective_config(app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Value]) -> dict[str, Value]:
    """Put the folder and the number of nodes in front of a run-config, where the app knows these keys."""
    _, defaults = app_config(app)
    ours: dict[str, Value] = {"min-nodes": nodes}
    if out is not None:
        ours["output-dir"] = str(out.expanduser().absolute())
    return {key: value for key, value in ours.items() if key in defaults} | dict(run_config)


def check(app: Path, nodes: int, config: Mapping[str, Value]) -> None:
    """Find what is wrong with a run before anything is started.

    Raises
    ------
    ConfigError
        Names everything that is wrong with the configuration, or the folder that cannot be written.
    """
    name, defaults = app_config(app)
    if nodes < 1:
        raise ConfigError(f"--nodes is {nodes}; allowed: 1 or more")
    if name == "fedmmkt":
        for model in RunConfig.from_flower({**defaults, **config}).client.models:
            check_task_model(model)
    elif unknown := config.keys() - defaults.keys():
        raise ConfigError(f"run-config keys unknown to {name}: {', '.join(sorted(unknown))}")
    needed = config.get("min-nodes", 1)
    if isinstance(needed, int) and needed > nodes:
        raise ConfigError(f"min-nodes is {needed}, but only {nodes} nodes are simulated: the run would never start")
    if folder := config.get("output-dir"):
        _check_writable(Path(str(folder)).expanduser())


class Submitter:
    """Runs ``flwr`` with settings of its own.

    Parameters
    ----------
    working_directory : Path
        Where the command runs; Ray workers import from it before the app's copy, so it must hold no packages.
    environment : mapping
        Of `flower_environment`.
    """

    def __init__(self, working_directory: Path, environment: Mapping[str, str]) -> None:
        self.working_directory = working_directory
        self.environment = dict(environment)

    def run(
        self,
        app: Path,
        config: Mapping[str, Value],
        output: TextIO,
        connection: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> Outcome:
        """Run an app to its end and show its log.

        Parameters
        ----------
        app : Path
            Folder of the app.
        config : mapping
            Changes to the app's run-config.
        output : TextIO
            Where the log goes.
        connection : sequence of str
            Name of a connection in Flower's ``config.toml``; empty for the local one.
        options : sequence of str
            More options of ``flwr run``.
        """
        command = [script("flwr"), "run", str(app.resolve()), *connection, "--stream", *options]
        run_id = self._follow([*command, "--run-config", format_run_config(config)], output)
        if not run_id:
            return Outcome("", "not-started", "Flower refused the run; see above")
        outcome = self.outcome(run_id, connection)
        silent = 0
        while not outcome.status.startswith("finished") and silent < LOST_AFTER:
            # The log ended before the run: the SuperLink is down, or has just come back.
            silent = silent + 1 if outcome.status == "unknown" else 0
            time.sleep(RETRY_SECONDS)
            outcome = self.outcome(run_id, connection)
            if outcome.status == "running":
                self._follow([script("flwr"), "log", run_id, *connection, "--stream"], output)
        return outcome

    def _follow(self, command: list[str], output: TextIO) -> str:
        """Show what a command prints; return the id of the run that it says it started, or an empty string."""
        run_id = ""
        with self._flwr(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                output.flush()
                if not run_id and (match := _STARTED.search(line)):
                    run_id = match[1]
        return run_id

    def flwr(self, *arguments: str) -> str:
        """Run a ``flwr`` command and return what it printed."""
        with self._flwr([script("flwr"), *arguments]) as process:
            answer, _ = process.communicate()
        return answer

    def outcome(self, run_id: str, connection: Sequence[str] = ()) -> Outcome:
        """Ask how a run stands: the exit code of ``flwr run`` is 0 even if the ServerApp raised."""
        answer = self.flwr("ls", *connection, "--run-id", run_id, "--format", "json")
        try:
            run = json.loads(answer)["runs"][0]
        except (ValueError, KeyError):
            return Outcome(run_id, "unknown", answer)
        details = run.get("status-details", "")
        return Outcome(run_id, run["status"], "" if details == "N/A" else details)

    @contextlib.contextmanager
    def _flwr(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            command,
            cwd=self.working_directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    return repr(value)


def _escape(character: str) -> str:
    special = character in '"\\\x7f' or ord(character) < 0x20
    return f"\\u{ord(character):04x}" if special else character


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None

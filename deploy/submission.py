"""Submit a run to a SuperLink with ``flwr run``, follow it, and find out how it ended."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
from flwr.common.config import parse_config_args

from fedmmkt.client_app.models.building import check_task_model
from fedmmkt.common.config import ConfigError, RunConfig, Setting
from fedmmkt.common.registry import importable
from fedmmkt.deploy.bundle import PROJECT, bundled_files, default_config, folder_to_submit, read_app, runs_fedmmkt
from fedmmkt.deploy.processes import script
from fedmmkt.server_app.rules.checks import check_rules

COMPLETED = "finished:completed"
RETRY_SECONDS = 2.0
LOST_AFTER = 30  # status requests without an answer after which a run counts as lost

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own pattern; Flower drops text that does not match it
_STARTED = re.compile(r"Successfully started run (\d+)")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes
    ----------
    run_id : str
        Flower's id of the run; empty if Flower refused the run.
    status : str
        ``finished:completed``, ``finished:failed``, ``finished:stopped``, ``not-started`` or ``unknown``.
    details : str
        Flower's details, often the text of an exception.
    """

    run_id: str
    status: str
    details: str

    def __str__(self) -> str:
        return " ".join(filter(None, ["run", self.run_id, self.status, self.details]))


def format_run_config(config: Mapping[str, Setting]) -> str:
    """Write a run-config in the format of ``flwr run --run-config``.

    Flower takes a quoted value up to the next quote and then parses it as TOML. So a quote inside a string must be a
    TOML escape.
    """
    return " ".join(f"{key}={_format_value(value)}" for key, value in config.items())


def parse_run_config(texts: list[str]) -> dict[str, Setting]:
    """Read run-config strings, or one TOML file, with Flower's parser.

    Raises
    ------
    ConfigError
        If they cannot be read, or if Flower would silently drop a part of them.
    """
    for text in texts:
        dropped = _PAIR.sub("", text).strip()
        if dropped and not text.endswith(".toml"):
            raise ConfigError(f"run-config: {dropped!r} is not of the form key=value (no spaces around '=')")
        keys = [key for key, _ in _PAIR.findall(text)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"run-config key {twice[0]!r} is given twice in {text!r}; allowed: each key once")
    try:
        return parse_config_args(texts)
    except click.ClickException as error:
        written = " ".join(texts)
        hint = 'strings need quotes: key="value"'
        if "\\" in written:
            hint = f"a backslash in a string is written twice, {chr(92) * 2}"
        raise ConfigError(f"run-config {written} cannot be read; {hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"run-config: {error}") from error


def effective_config(app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Setting]) -> dict[str, Setting]:
    """Add the output folder and the number of nodes to a run-config, if the app has these keys.

    Values in ``run_config`` have priority.
    """
    defaults = default_config(read_app(app))
    ours: dict[str, Setting] = {"min-nodes": nodes}
    if out is not None:
        ours["output-dir"] = str(out.expanduser().absolute())
    return {key: value for key, value in ours.items() if key in defaults} | dict(run_config)


def check_run(app: Path, nodes: int, config: Mapping[str, Setting]) -> None:
    """Check the settings of a run before anything is started.

    Raises
    ------
    ConfigError
        If the configuration is wrong or the output folder cannot be written; the text names all wrong keys.
    """
    project = read_app(app)
    defaults = default_config(project)
    if nodes < 1:
        raise ConfigError(f"--nodes is {nodes}; allowed: 1 or more")
    if runs_fedmmkt(project):
        check_names(app, RunConfig.from_flower({**defaults, **config}))
    elif unknown := config.keys() - defaults.keys():
        name = project.get("project", {}).get("name", "the app")
        raise ConfigError(f"run-config keys unknown to {name}: {', '.join(sorted(unknown))}")
    needed = config.get("min-nodes", 1)
    if isinstance(needed, int) and needed > nodes:
        raise ConfigError(f"min-nodes is {needed}, but only {nodes} nodes are simulated: the run would never start")
    if folder := config.get("output-dir"):
        _check_writable(Path(str(folder)).expanduser())


def check_names(app: Path, config: RunConfig) -> None:
    """Check that every part that a configuration names exists; the user's modules are imported from the app's folder.

    Raises
    ------
    ConfigError
        If a part does not exist; the text names the first one.
    """
    extra = config.extra.as_dict()
    with importable(app):
        for model in config.client.models:
            check_task_model(model, extra)
        check_rules(config)
        # The imports of our own parts take seconds and cannot fail, so they are skipped.
        if config.strategy != RunConfig().strategy:
            from fedmmkt.server_app.strategy import strategies

            strategies.get(config.strategy, extra)
        if config.t2i.family != RunConfig().t2i.family:
            from fedmmkt.server_app.t2i.families import families

            families.get(config.t2i.family, extra)
    names = [*config.client.models, config.t2i.aggregation, config.t2i.scores, config.t2i.update]
    _check_bundled(app, [*names, config.strategy, config.t2i.family])


def _check_bundled(app: Path, names: Sequence[str]) -> None:
    """Check that modules which lie in the app's folder travel with it."""
    bundled = None
    for module in {name.partition(":")[0] for name in names if ":" in name and not name.startswith("transformers:")}:
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "/")
        if not file.is_relative_to(app.resolve()):
            continue
        bundled = bundled_files(app) if bundled is None else bundled
        if (own := file.relative_to(app.resolve()).as_posix()) not in bundled:
            raise ConfigError(
                f"{own} lies in the app {str(app.resolve())!r}, but is no part of its bundle (fab-include in its "
                f"{PROJECT}), so that the run would not find {module!r}; put it into an app of your own, and name "
                "that with --app"
            )


class Submitter:
    """Runs ``flwr`` commands in a given folder and environment.

    Parameters
    ----------
    working_directory : Path
        Working directory of the commands. It must contain no packages, because Ray workers would import them first.
    environment : mapping
        Variables from `flower_environment`.
    """

    def __init__(self, working_directory: Path, environment: Mapping[str, str]) -> None:
        self.working_directory = working_directory
        self.environment = dict(environment)

    def run(
        self,
        app: Path,
        config: Mapping[str, Setting],
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
            Name of a connection in Flower's ``config.toml``; empty for the local SuperLink.
        options : sequence of str
            Further options of ``flwr run``.
        """
        with folder_to_submit(app, config) as folder:
            command = [script("flwr"), "run", str(folder.resolve()), *connection, "--stream", *options]
            run_id = self._follow([*command, "--run-config", format_run_config(config)], output)
        if not run_id:
            return Outcome("", "not-started", "Flower refused the run; see above")
        outcome = self.outcome(run_id, connection)
        silent = 0
        while not outcome.status.startswith("finished") and silent < LOST_AFTER:
            # The log ended before the run did: the SuperLink is down, or has just restarted.
            silent = silent + 1 if outcome.status == "unknown" else 0
            time.sleep(RETRY_SECONDS)
            outcome = self.outcome(run_id, connection)
            if outcome.status == "running":
                self._follow([script("flwr"), "log", run_id, *connection, "--stream"], output)
        return outcome

    def _follow(self, command: list[str], output: TextIO) -> str:
        """Show the output of a command; return the id of the run that it started, or an empty string."""
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
        """Run a ``flwr`` command and return its output."""
        with self._flwr([script("flwr"), *arguments]) as process:
            answer, _ = process.communicate()
        return answer

    def outcome(self, run_id: str, connection: Sequence[str] = ()) -> Outcome:
        """Ask Flower for the status of a run, because ``flwr run`` exits with 0 even if the ServerApp failed."""
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


def _format_value(value: Setting) -> str:
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

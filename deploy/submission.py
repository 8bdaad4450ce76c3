"""Submit a run to a SuperLink with ``flwr run``, follow it, and find out how it ended."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from flwr.common.config import parse_config_args

from fedmmkt.common.config import ConfigError, Setting
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.deploy.bundle import default_config, folder_to_submit, read_app, runs_fedmmkt
from fedmmkt.deploy.console import Console
from fedmmkt.deploy.mistyped import mistake_of
from fedmmkt.deploy.processes import script
from fedmmkt.deploy.settings import with_earlier

COMPLETED = "finished:completed"
FOLDERS = ("output-dir", "resume-from", "client.state-dir")
PATHS = ("data.dataset", "data.classes", "t2i.model", "t2i.adapter", "t2i.prompts")  # Or something else than a path.
NO_PATHS = ("digits", "starter", "templates", "clients")
RETRY_SECONDS = 2.0
REFUSED = "Flower refused it, with the words above"
LOST_AFTER = 30  # status requests without an answer after which a run counts as lost

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own pattern; Flower drops text that does not match it
_EXCEPTION = re.compile(r"(?:Simulation|ServerApp) failed with exception: ")
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

    @property
    def cause(self) -> str:
        """Why the run failed, in the app's own words; the status if nobody said it."""
        return _EXCEPTION.sub("", self.details, count=1).strip() or self.status


def parse_run_config(texts: list[str]) -> dict[str, Setting]:
    """Read run-config strings, or one TOML file, with Flower's parser.

    Raises
    ------
    ConfigError
        If they cannot be read, or if Flower would silently drop a part of them.
    """
    for text in texts:
        if text.endswith(".toml"):
            continue
        problems = [mistake for key, value in _PAIR.findall(text) if (mistake := mistake_of(key, value))]
        if problems:
            raise ConfigError("\n".join(problems))
        for pair in _PAIR.finditer(text):
            if (rest := text[pair.end() :]) and not rest[0].isspace():
                raise ConfigError(
                    f"run-config: {pair[0]} is followed by {rest!r:.40}; allowed: a space between two settings, and no "
                    "comma"
                )
        dropped = _PAIR.sub("", text).strip()
        if dropped:
            raise ConfigError(f"run-config: {dropped!r} is not of the form key=value (no spaces around '=')")
        keys = [key for key, _ in _PAIR.findall(text)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"run-config key {twice[0]!r} is given twice in {text!r}; allowed: each key once")
    try:
        return parse_config_args(texts)
    except click.ClickException as error:
        raise ConfigError(f"run-config {' '.join(texts)!r:.200} cannot be read: {error.message}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"run-config: {error}") from error


def effective_config(app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Setting]) -> dict[str, Setting]:
    """Add the output folder and the number of nodes to a run-config, if the app has these keys.

    A run that goes on with an earlier one (``resume-from``) gets the settings of that too. Values in ``run_config``
    have priority.
    """
    project = read_app(app)
    defaults = default_config(project)
    ours: dict[str, Setting] = {"min-available-nodes": nodes}
    if out is not None:
        ours["output-dir"] = str(out.expanduser().absolute())
    changes = {key: _absolute(key, value) for key, value in run_config.items()}
    if runs_fedmmkt(project):
        changes = with_earlier(changes, defaults)
    return {key: value for key, value in ours.items() if key in defaults} | changes


def _absolute(key: str, value: Setting) -> Setting:
    """Make a path that is relative to this folder absolute, since Flower's processes work elsewhere."""
    if not isinstance(value, str) or not value:
        return value
    if key == "client.models":
        return ",".join(map(_absolute_model, value.split(",")))
    path = Path(value).expanduser()
    is_path = key in FOLDERS or (key in PATHS and value not in NO_PATHS and path.exists())
    return str(path.absolute()) if is_path else value


def _absolute_model(name: str) -> str:
    from fedmmkt.client_app.models.building import TRANSFORMERS  # It imports torch.

    source = name.strip().removeprefix(TRANSFORMERS)
    is_path = source != name.strip() and Path(source).expanduser().exists()
    return TRANSFORMERS + str(Path(source).expanduser().absolute()) if is_path else name


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
        console: Console,
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
        console : Console
            Shows the log, and at last how the run ended.
        connection : sequence of str
            Name of a connection in Flower's ``config.toml``; empty for the local SuperLink.
        options : sequence of str
            Further options of ``flwr run``.
        """
        with folder_to_submit(app, config) as folder:
            command = [script("flwr"), "run", str(folder.resolve()), *connection, "--stream", *options]
            run_id = self._follow([*command, "--run-config", format_run_config(config)], console)
        outcome = self._outcome_of(run_id, connection, console) if run_id else Outcome("", "not-started", REFUSED)
        if out := config.get("output-dir"):
            console.write_tracebacks(Path(str(out)) / "flower-tracebacks.txt")
        if outcome.status == COMPLETED:
            console.say(f"Completed: run {run_id}")
        elif not console.last.endswith(outcome.cause.splitlines()[-1]):
            console.say(f"The run failed: {outcome.cause}")
        return outcome

    def _outcome_of(self, run_id: str, connection: Sequence[str], console: Console) -> Outcome:
        """Follow a run to its end; return how it ended."""
        outcome = self.outcome(run_id, connection)
        silent = 0
        while not outcome.status.startswith("finished") and silent < LOST_AFTER:
            # The log ended before the run did: the SuperLink is down, or has just restarted.
            silent = silent + 1 if outcome.status == "unknown" else 0
            time.sleep(RETRY_SECONDS)
            outcome = self.outcome(run_id, connection)
            if outcome.status == "running":
                self._follow([script("flwr"), "log", run_id, *connection, "--stream"], console)
        return outcome

    def _follow(self, command: list[str], console: Console) -> str:
        """Show the output of a command; return the id of the run that it started, or an empty string."""
        run_id = ""
        with self._flwr(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                console.relay(line)
                if not run_id and (match := _STARTED.search(line)):
                    run_id = match[1]
                    console.say("Flower has taken the run; its app is loading")
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

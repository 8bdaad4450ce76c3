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

from fedmmkt.common.config import Setting
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.deploy.bundle import folder_to_submit
from fedmmkt.deploy.console import Console
from fedmmkt.deploy.processes import script

COMPLETED = "finished:completed"
RETRY_SECONDS = 2.0
REFUSED = "Flower refused it, with the words above"
LOST_AFTER = 30  # status requests without an answer after which a run counts as lost

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

"""Flower's processes: their commands, their environment, and a clean stop of all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

STOP_GRACE = 5.0  # seconds from SIGTERM to SIGKILL; an interrupted ServerApp may take long

_RAY_PATH_LIMIT = 38  # longest folder name for which Ray's socket paths stay within the system's limit

_FORCED = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # otherwise Flower installs a second torch for every run
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
QUIET_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
_DEFAULTS = {
    **QUIET_LIBRARIES,
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # 1 s would delay each start; 0.1 s costs 4% of a core
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about this variable
    "RAY_DEDUP_LOGS": "0",  # show equal messages of several clients
    "RAY_enable_metrics_collection": "0",  # nobody reads them, and their thread was seen to crash ending workers
}


class StartError(RuntimeError):
    """A part of Flower did not start; the text has its last log lines."""


def flower_environment(home: Path, port: int) -> dict[str, str]:
    """Return environment variables for Flower's commands: own ``FLWR_HOME``, quiet libraries, no installation in runs.

    Parameters
    ----------
    home : Path
        Becomes ``FLWR_HOME``.
    port : int
        Port of the SuperLink that the command `flwr` would start.
    """
    environment = {**_DEFAULTS, **uncoloured(os.environ), **_FORCED}
    environment.pop("RAY_ADDRESS", None)  # it may name a cluster of another user
    environment["FLWR_HOME"] = str(home)
    environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(port)
    # Flower starts its parts by command name, which must lead to the environment of this interpreter.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    if len(str(home)) <= _RAY_PATH_LIMIT:
        environment["RAY_TMPDIR"] = str(home)  # Ray's logs and sockets are removed with the folder
    return environment


def uncoloured(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without forced colours, which would go into Flower's JSON too; notebooks force them."""
    return {name: value for name, value in environment.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}


def script(name: str) -> str:
    """Return the path of a command of this interpreter's environment."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FlowerProcesses:
    """Flower's long-running commands of one folder; each has a log there, and all are stopped together.

    Parameters
    ----------
    home : Path
        Becomes ``FLWR_HOME``. It has the logs and an empty working directory: Flower would import modules from there.
    environment : mapping
        Variables from `flower_environment`.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        self.working_directory = home / "cwd"
        self.environment = dict(environment)
        self.prefix: list[str] = []  # a command that starts the others in another environment
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of this interpreter's environment; it logs to ``NAME.log``.

        Raises
        ------
        StartError
            If the environment has no such command.
        """
        if not Path(script(command)).exists():
            raise StartError(f"{script(command)} is not there: install flwr in the environment of {sys.executable}")
        self.working_directory.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*self.prefix, script(command), *arguments],
                cwd=self.working_directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach only this process, which stops the others
            )
        self.started.append(process)
        return process

    def log(self, name: str) -> Path:
        """Return the path of a command's log."""
        return self.home / f"{name}.log"

    def log_tail(self, name: str, lines: int = 20) -> str:
        """Return the last lines of a log."""
        return "\n".join(self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Stop every process and its descendants; processes that ignore SIGTERM are killed."""
        stop_together([self])

    def alive(self) -> set[psutil.Process]:
        """Return every process started here, with descendants, and orphans that still belong to the folder."""
        found: set[psutil.Process] = set()
        for process in self.started:
            if process.poll() is None:  # the id of an ended process may belong to another one
                with contextlib.suppress(psutil.Error):
                    root = psutil.Process(process.pid)
                    found |= {root, *root.children(recursive=True)}
        return found | {process for process in psutil.process_iter() if belongs_to(process, self.home)}


def stop_together(groups: Sequence[FlowerProcesses]) -> None:
    """Stop the processes of several folders and their descendants; processes that ignore SIGTERM are killed."""
    alive = set().union(*(group.alive() for group in groups))
    started = [process for group in groups for process in group.started]
    for process in started:
        process.terminate()
    # Flower's commands end their child processes. Ray's processes end with their parent.
    if wait_gone(alive, STOP_GRACE):
        alive = alive.union(*(group.alive() for group in groups))
        for left in alive:
            with contextlib.suppress(psutil.Error):
                left.kill()
        wait_gone(alive, STOP_GRACE)
    for process in started:
        process.wait()
    for group in groups:
        group.started.clear()


def belongs_to(process: psutil.Process, home: Path) -> bool:
    """Return whether a process belongs to a folder, by its environment or its working directory.

    Some of Ray's processes overwrite their environment with their title; for them, the working directory decides.
    """
    with contextlib.suppress(psutil.Error, OSError):
        if process.environ().get("FLWR_HOME") == str(home):
            return True
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.cwd()).startswith(f"{home}{os.sep}")
    return False


def wait_gone(processes: set[psutil.Process], seconds: float) -> bool:
    """Wait until the processes have ended; return whether one of them still runs."""
    deadline = time.monotonic() + seconds
    while any(_is_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and other stop signals inside the block, so that they do not interrupt cleanup.

    In other threads than the main thread, this has no effect.
    """
    previous: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

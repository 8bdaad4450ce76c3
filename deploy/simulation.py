"""Run a Flower app in simulation with one command, and leave no processes behind.

``fedmmkt demo`` starts its own SuperLink (with its own port, ``FLWR_HOME`` and empty working directory), submits the
app, shows the log during the run, asks Flower how the run ended, and stops everything that it started. Other code can
use :func:`simulate`, or :func:`local_flower` for several runs on one SuperLink.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from fedmmkt.common.config import Setting
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.deploy.command import run_command
from fedmmkt.deploy.console import Console
from fedmmkt.deploy.processes import FlowerProcesses, StartError, flower_environment, free_port, signals_ignored
from fedmmkt.deploy.settings import effective_config
from fedmmkt.deploy.submission import Outcome, Submitter

START_TIMEOUT = 60.0  # seconds until the SuperLink must answer; it takes 3 on two idle cores


def simulate(
    app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Setting], stream: TextIO | None = None
) -> str:
    """Run an app once on a new SuperLink.

    Parameters
    ----------
    app : Path
        Folder of the app.
    nodes : int
        Number of simulated SuperNodes.
    out : Path or None
        Becomes the run-config's ``output-dir``, as an absolute path.
    run_config : mapping
        Changes to the app's run-config. They have priority over the other arguments.
    stream : TextIO, optional
        Where the log goes; standard output by default.

    Returns
    -------
    str
        The run's status; ``finished:completed`` on success.
    """
    console = Console(stream or sys.stdout)
    console.say("Starting Flower")
    with local_flower() as flower:
        return flower.run(app, nodes, out, run_config, console).status


@contextlib.contextmanager
def local_flower() -> Iterator[LocalFlower]:
    """Start a local SuperLink for simulations; at the end, stop it and everything that it started.

    Raises
    ------
    StartError
        If the SuperLink does not start.
    """
    home = Path(tempfile.mkdtemp(prefix="fedmmkt-"))
    flower = LocalFlower(home)
    try:
        flower.start()
        yield flower
    finally:
        with signals_ignored():
            flower.stop()
            shutil.rmtree(home, ignore_errors=True)


class LocalFlower:
    """A SuperLink for simulations in its own folder; made by :func:`local_flower`."""

    def __init__(self, home: Path) -> None:
        self._port = free_port()
        self._processes = FlowerProcesses(home, flower_environment(home, self._port))
        self._submitter = Submitter(self._processes.working_directory, self._processes.environment)

    def start(self) -> None:
        """Start the SuperLink like ``flwr run`` does, but as a child process that can be stopped."""
        options = ["--insecure", "--simulation", "--isolation", "subprocess"]
        superlink = self._processes.start(
            "superlink", "flower-superlink", *options, "--host", "127.0.0.1", "--port", str(self._port)
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_healthy():
            if superlink.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"the local SuperLink did not start:\n{self._processes.log_tail('superlink')}")
            time.sleep(0.1)

    def run(
        self,
        app: Path,
        nodes: int,
        out: Path | None,
        run_config: Mapping[str, Setting],
        output: TextIO | Console | None = None,
    ) -> Outcome:
        """Run an app to its end and show its log; see :func:`simulate` for the parameters."""
        options = ["--federation-config", format_run_config(_federation(nodes))]
        config, console = effective_config(app, nodes, out, run_config), Console.on(output or sys.stdout)
        outcome = self._submitter.run(app, config, console, options=options)
        if outcome.status == "unknown":
            console.say(f"The local SuperLink's last lines:\n{self._processes.log_tail('superlink')}")
        return outcome

    def stop(self) -> None:
        """Stop the SuperLink and every process that it started."""
        self._processes.stop()

    def _is_healthy(self) -> bool:
        try:
            # Use no proxy for the connection to the child process.
            with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{self._port}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation that the command line asks for; return the exit code."""
    return run_command("demo", "Run the app in simulation.", 6, Path("runs/demo"), simulate, arguments)


def _federation(nodes: int) -> dict[str, Setting]:
    return {
        "num-supernodes": nodes,
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": _gpu_share(nodes),
        # Flower makes one actor per core, each with its own torch; limit them to the number of nodes.
        "init-args-num-cpus": min(nodes, os.cpu_count() or 1),
    }


def _gpu_share(nodes: int) -> float:
    """Return the fraction of a GPU for each client, so that all clients fit on the existing GPUs."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    else:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        count = sum(line.startswith("GPU ") for line in answer.stdout.splitlines())
    per_gpu = -(-nodes // count) if count else 0  # clients on the fullest GPU
    return int(1000 / per_gpu) / 1000 if per_gpu else 0.0


if __name__ == "__main__":
    sys.exit(main())

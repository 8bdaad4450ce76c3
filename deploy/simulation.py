"""Run a Flower app in simulation with one command, and leave nothing behind.

``python -m deploy.simulation`` starts a SuperLink of its own (own port, own ``FLWR_HOME``, own empty working
directory), submits the app, shows the run's log while it happens, asks Flower how the run ended, and stops
everything it started. Benchmarks use :func:`simulate`, or :func:`local_flower` for several runs on one SuperLink.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import click
import psutil  # type: ignore[import-untyped]
from flwr.common.config import flatten_dict, parse_config_args

from common.config import ConfigError, RunConfig

Value = bool | int | float | str

COMPLETED = "finished:completed"
START_TIMEOUT = 60.0  # seconds until the SuperLink must answer; 3 on two idle cores
STOP_GRACE = 5.0  # seconds from SIGTERM to SIGKILL; an interrupted ServerApp would take its time

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own pattern: what it does not match it drops
_STARTED = re.compile(r"Successfully started run (\d+)")
_RAY_PATH_LIMIT = 38  # longest folder in which Ray's socket paths stay under the system's limit

_FORCED = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else Flower installs a second torch for every run
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
_DEFAULTS = {
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # 1 s delays the start of every run; 0.1 s costs 4% of a core
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about it
    "RAY_DEDUP_LOGS": "0",  # clients may say the same thing; show it
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class SimulationError(RuntimeError):
    """The local SuperLink could not be started."""


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


def simulate(
    app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Value], stream: TextIO | None = None
) -> str:
    """Run an app once on a SuperLink of its own.

    Parameters
    ----------
    app : Path
        Folder of the app.
    nodes : int
        Number of simulated SuperNodes.
    out : Path or None
        Becomes the run-config's ``output-dir``, as an absolute path.
    run_config : mapping
        Changes to the app's run-config; they win over what the other arguments set.
    stream : TextIO, optional
        Where the log goes; standard output by default.

    Returns
    -------
    str
        The run's status, ``finished:completed`` if all is well.
    """
    with local_flower() as flower:
        return flower.run(app, nodes, out, run_config, stream).status


@contextlib.contextmanager
def local_flower() -> Iterator[LocalFlower]:
    """Start a local SuperLink for simulations; stop it and everything it started at the end.

    Raises
    ------
    SimulationError
        If it does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix="fedmmkt-"))
    flower = LocalFlower(home)
    try:
        flower.start()
        yield flower
    finally:
        with _signals_ignored():
            flower.stop()
            shutil.rmtree(home, ignore_errors=True)


class LocalFlower:
    """A SuperLink for simulations in a folder of its own; made by :func:`local_flower`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        # Ray workers import from the SuperLink's working directory before the app's copy: it must be empty.
        self._cwd = home / "cwd"
        self._log = home / "superlink.log"
        self._port = _free_port()
        self._environment = _environment(home, self._port)
        self._superlink: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the SuperLink as ``flwr run`` would, but as a child that can be stopped."""
        self._cwd.mkdir()
        options = ["--insecure", "--simulation", "--isolation", "subprocess"]
        with self._log.open("wb") as log:
            self._superlink = subprocess.Popen(
                [_script("flower-superlink"), *options, "--host", "127.0.0.1", "--port", str(self._port)],
                cwd=self._cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C must reach this process only, which then stops it
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_healthy():
            if self._superlink.poll() is not None or time.monotonic() > deadline:
                raise SimulationError(f"the local SuperLink did not start:\n{self._log_tail()}")
            time.sleep(0.1)

    def run(
        self,
        app: Path,
        nodes: int,
        out: Path | None,
        run_config: Mapping[str, Value],
        stream: TextIO | None = None,
    ) -> Outcome:
        """Run an app to its end and show its log; see :func:`simulate` for the parameters."""
        output = stream or sys.stdout
        run_id = self._submit_and_follow(app, nodes, effective_config(app, nodes, out, run_config), output)
        outcome = self._outcome(run_id) if run_id else Outcome("", "not-started", "Flower refused the run; see above")
        print(" ".join(filter(None, ["run", outcome.run_id, outcome.status, outcome.details])), file=output, flush=True)
        return outcome

    def stop(self) -> None:
        """Stop the SuperLink and every process that it started, gently at first."""
        if self._superlink is None:
            return
        started = self._processes()
        self._superlink.terminate()
        # The SuperLink ends its children, and Ray's processes end with the one that started them.
        if _wait_gone(started, STOP_GRACE):
            started |= self._processes()
            for process in started:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            _wait_gone(started, STOP_GRACE)
        self._superlink.wait()
        self._superlink = None

    def _submit_and_follow(self, app: Path, nodes: int, config: Mapping[str, Value], output: TextIO) -> str:
        """Return the run's id, or an empty string if there is none."""
        command = [_script("flwr"), "run", str(app.resolve()), "--stream"]
        command += ["--federation-config", format_run_config(_federation(nodes))]
        command += ["--run-config", format_run_config(config)]
        run_id = ""
        with self._flwr(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                output.flush()
                if not run_id and (match := _STARTED.search(line)):
                    run_id = match[1]
        return run_id

    def _outcome(self, run_id: str) -> Outcome:
        # The exit code of `flwr run` is 0 even if the ServerApp raised.
        with self._flwr([_script("flwr"), "ls", "--run-id", run_id, "--format", "json"]) as process:
            answer, _ = process.communicate()
        try:
            run = json.loads(answer)["runs"][0]
        except (ValueError, KeyError):
            return Outcome(run_id, "unknown", f"{answer}\nThe local SuperLink's last lines:\n{self._log_tail()}")
        details = run.get("status-details", "")
        return Outcome(run_id, run["status"], "" if details == "N/A" else details)

    @contextlib.contextmanager
    def _flwr(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            command,
            cwd=self._cwd,
            env=self._environment,
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

    def _is_healthy(self) -> bool:
        try:
            # No proxy of the environment stands between this process and its child.
            with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{self._port}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])

    def _processes(self) -> set[psutil.Process]:
        """Every process this SuperLink started: its descendants, and orphans that still carry its folder's name."""
        found: set[psutil.Process] = set()
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._superlink.pid if self._superlink else -1)
            found = {root, *root.children(recursive=True)}
        return found | {process for process in psutil.process_iter() if belongs_to(process, self._home)}


def belongs_to(process: psutil.Process, home: Path) -> bool:
    """Tell whether a process runs for the SuperLink of a folder, by its environment or its working directory.

    Some of Ray's processes overwrite their environment with their title; those have the working directory.
    """
    with contextlib.suppress(psutil.Error, OSError):
        if process.environ().get("FLWR_HOME") == str(home):
            return True
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.cwd()).startswith(f"{home}{os.sep}")
    return False


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
        RunConfig.from_flower({**defaults, **config})
    elif unknown := config.keys() - defaults.keys():
        raise ConfigError(f"run-config keys unknown to {name}: {', '.join(sorted(unknown))}")
    needed = config.get("min-nodes", 1)
    if isinstance(needed, int) and needed > nodes:
        raise ConfigError(f"min-nodes is {needed}, but only {nodes} nodes are simulated: the run would never start")
    if folder := config.get("output-dir"):
        _check_writable(Path(str(folder)).expanduser())


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation that the command line asks for; return the exit code."""
    options = _parse_arguments(arguments)
    try:
        # `make` passes an empty string where no run-config was given.
        run_config = parse_run_config([text for text in options.run_config if text.strip()])
        check(options.app, options.nodes, effective_config(options.app, options.nodes, options.out, run_config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        return 0 if simulate(options.app, options.nodes, options.out, run_config) == COMPLETED else 1
    except SimulationError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.simulation", description="Run the app in simulation.")
    parser.add_argument("--nodes", type=int, default=6, help="simulated nodes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--app", type=Path, default=Path(), help="folder of the app (default: this one)")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="PAIRS",
        help="changes to [tool.flwr.app.config], such as 'rounds=2 t2i.lora-rank=4', or a TOML file",
    )
    return parser.parse_args(arguments)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    return repr(value)


def _escape(character: str) -> str:
    special = character in '"\\\x7f' or ord(character) < 0x20
    return f"\\u{ord(character):04x}" if special else character


def _federation(nodes: int) -> dict[str, Value]:
    return {
        "num-supernodes": nodes,
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": _gpu_share(nodes),
        # Flower makes one actor a core, each with its own torch: no more than there are nodes.
        "init-args-num-cpus": min(nodes, os.cpu_count() or 1),
    }


def _gpu_share(nodes: int) -> float:
    """Return the part of a GPU for one client: all clients fit on the GPUs there are."""
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


def _environment(home: Path, port: int) -> dict[str, str]:
    environment = {**_DEFAULTS, **os.environ, **_FORCED}
    environment.pop("RAY_ADDRESS", None)  # a cluster of somebody else
    environment["FLWR_HOME"] = str(home)
    environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(port)
    # Flower starts its parts by name: they must be those of this interpreter.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    if len(str(home)) <= _RAY_PATH_LIMIT:
        environment["RAY_TMPDIR"] = str(home)  # Ray's logs and sockets go when the folder goes
    return environment


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


def _wait_gone(processes: set[psutil.Process], seconds: float) -> bool:
    """Wait until the processes have ended; return whether one is still there."""
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
def _signals_ignored() -> Iterator[None]:
    """Let no second Ctrl-C interrupt the cleaning up; other threads than the main one cannot ask for that."""
    previous: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())

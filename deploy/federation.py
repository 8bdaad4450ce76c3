"""Run the app on a real federation of processes: SuperLink, SuperExec and SuperNodes over gRPC with TLS.

``fedmmkt federation`` does on one machine, on loopback, what an operator does on several machines. It makes a CA,
certificates and keys, gives each node its own data, starts the SuperLink and the SuperNodes, registers the nodes'
keys, waits until all are healthy, submits the run, follows it to its end, and stops everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from fedmmkt.client_app.privacy.ledger import create_ledger
from fedmmkt.common.config import ConfigError, DataConfig, RunConfig, Setting
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.common.privacy import LARGEST_EPSILON, Budget
from fedmmkt.deploy.bundle import default_config, read_app
from fedmmkt.deploy.certificates import make_ca, make_node_key, make_server_certificate, make_superexec_secret
from fedmmkt.deploy.command import run_command
from fedmmkt.deploy.connection_checks import is_healthy
from fedmmkt.deploy.console import Console
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.deploy.processes import (
    FlowerProcesses,
    StartError,
    flower_environment,
    free_port,
    signals_ignored,
    stop_together,
)
from fedmmkt.deploy.settings import effective_config
from fedmmkt.deploy.submission import Outcome, Submitter

MODELS = ("cnn", "resnet", "text", "dual")
START_TIMEOUT = 90.0  # seconds until a process must be healthy; it takes 5 to 10 on two idle cores
CONNECTION = "federation"
_LOOPBACK = "127.0.0.1"


@dataclass
class Node:
    """A SuperNode: its process, and the settings of its start."""

    name: str
    processes: FlowerProcesses
    arguments: list[str]
    health: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start the node, or start it again after it ended."""
        self.process = self.processes.start(self.name, "flower-supernode", *self.arguments)

    def kill(self) -> None:
        """Kill the node's process, like a crash, but none of its child processes."""
        self.process.kill()
        self.process.wait()


class Federation:
    """A SuperLink with TLS and node authentication on loopback, and its nodes.

    A run continues if the SuperLink dies and comes back: a separate SuperExec runs the ServerApp, and the SuperLink
    keeps its state in a database.

    Parameters
    ----------
    home : Path
        A private folder for certificates, keys, logs and Flower's state.
    address : str
        IPv4 address of this host for the nodes to reach the SuperLink. Everything else stays on loopback.
    node_authentication : bool
        Whether only nodes with a registered key may connect.
    """

    def __init__(self, home: Path, address: str = _LOOPBACK, node_authentication: bool = True) -> None:
        self.home = home
        self.node_authentication = node_authentication
        self.pki = home / "pki"
        self.nodes: dict[str, Node] = {}
        self.runtime, self.health, self.superexec_health = (f"{_LOOPBACK}:{free_port()}" for _ in range(3))
        self.fleet = f"{address}:{free_port()}"
        self.server = self._processes("server")
        submitter = self._processes("submitter")
        submitter.working_directory.mkdir(parents=True)
        self.submitter = Submitter(submitter.working_directory, submitter.environment)
        make_ca(self.pki)
        make_server_certificate(self.pki, ["localhost"], [_LOOPBACK, address])
        self.secret = ("--superexec-auth-secret-file", str(make_superexec_secret(self.pki)))
        connect(submitter.home, CONNECTION, self.runtime, self.pki / "ca.crt")

    def start(self) -> None:
        """Start the SuperLink and the SuperExec, which runs ServerApps for it; wait until both are healthy.

        Raises
        ------
        StartError
            If one of them is not healthy in time.
        """
        self.start_superlink()
        self.superexec = self.server.start(
            "superexec",
            *("flower-superexec", "--runtime-api-address", self.runtime),
            *("--root-certificates", str(self.pki / "ca.crt"), *self.secret),
            *("--health-server-address", self.superexec_health),
        )
        _wait_healthy(self.superexec_health, self.superexec, self.server, "superexec")

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again with its old state; wait until it is healthy.

        Raises
        ------
        StartError
            If it is not healthy in time.
        """
        host, _, port = self.runtime.rpartition(":")
        self.superlink = self.server.start(
            "superlink",
            *("flower-superlink", "--host", host, "--port", port, "--fleet-api-address", self.fleet),
            *("--ssl-ca-certfile", str(self.pki / "ca.crt")),
            *("--ssl-certfile", str(self.pki / "server.pem"), "--ssl-keyfile", str(self.pki / "server.key")),
            *(("--enable-supernode-auth",) if self.node_authentication else ()),
            *("--database", str(self.server.home / "state.db")),
            *("--isolation", "process", "--disable-runtime-dependency-installation", *self.secret),
            *("--health-server-address", self.health),
        )
        _wait_healthy(self.health, self.superlink, self.server, "superlink")

    def kill_superlink(self) -> int:
        """Kill the SuperLink, like a crash; return its exit code."""
        self.superlink.kill()
        return self.superlink.wait()

    def add_node(
        self,
        name: str,
        node_config: Mapping[str, Setting],
        register: bool = True,
        authority: Path | None = None,
        environment: Mapping[str, str] | None = None,
        address: str | None = None,
        own_address: str = _LOOPBACK,
        prefix: Sequence[str] = (),
    ) -> Node:
        """Make a node's key, register it, and start the node.

        Parameters
        ----------
        name : str
            Name of the node and of its key.
        node_config : mapping
            See `common.config.NodeConfig`.
        register : bool
            Whether the key is registered at the SuperLink; otherwise it will refuse the node.
        authority : Path, optional
            Certificate of the CA that the node trusts; that of the federation by default.
        environment : mapping, optional
            Additional environment variables of the node.
        address : str, optional
            Address at which the node reaches the SuperLink's Fleet API, if it is not the API's own address.
        own_address : str
            IPv4 address of the node's health server.
        prefix : sequence of str
            A command that starts the node in another environment, such as ``ip netns exec NAME``.

        Raises
        ------
        StartError
            If the SuperLink does not accept the key.
        """
        key, public = make_node_key(self.pki, name)
        if register:
            self._register(name, public)
        health = f"{own_address}:{free_port()}"
        arguments = ["--root-certificates", str(authority or self.pki / "ca.crt"), "--superlink", address or self.fleet]
        arguments += ["--auth-supernode-private-key", str(key), "--port", str(free_port())]
        arguments += ["--health-server-address", health, "--node-config", format_run_config(node_config)]
        processes = self._processes(name)
        processes.environment |= environment or {}
        processes.prefix = list(prefix)
        self.nodes[name] = node = Node(name, processes, arguments, health)
        node.start()
        return node

    def wait_for_nodes(self) -> None:
        """Wait until every node is healthy.

        Raises
        ------
        StartError
            If a node is not healthy in time; the text names it and has its last log lines.
        """
        for node in self.nodes.values():
            _wait_healthy(node.health, node.process, node.processes, node.name)

    def run(self, app: Path, config: Mapping[str, Setting], output: TextIO | Console | None = None) -> Outcome:
        """Submit a run, follow it to its end, and return how it ended."""
        return self.submitter.run(app, config, Console.on(output or sys.stdout), connection=(CONNECTION,))

    def stop(self) -> None:
        """Stop every process, nodes first."""
        stop_together([node.processes for node in self.nodes.values()])  # while they can still sign off
        self.server.stop()

    def _register(self, name: str, public_key: Path) -> None:
        answer = self.submitter.flwr("supernode", "register", str(public_key), CONNECTION, "--format", "json")
        try:
            accepted = bool(json.loads(answer)["success"])
        except (ValueError, KeyError):
            accepted = False
        if not accepted:
            raise StartError(f"the key of {name} could not be registered:\n{answer}")

    def _processes(self, name: str) -> FlowerProcesses:
        home = self.home / name
        home.mkdir()
        return FlowerProcesses(home, flower_environment(home, free_port()))


@contextlib.contextmanager
def local_federation(
    home: Path | None = None, address: str = _LOOPBACK, node_authentication: bool = True
) -> Iterator[Federation]:
    """Start a federation on this host, and stop it at the end of the block.

    Parameters
    ----------
    home : Path, optional
        A new folder, which is kept. By default a temporary folder, which is removed with all keys.
    address, node_authentication
        See `Federation`.

    Raises
    ------
    ConfigError
        If the folder is not empty, or cannot be created.
    StartError
        If the SuperLink or the SuperExec does not start.
    """
    federation = Federation(_private_folder(home), address, node_authentication)
    try:
        federation.start()
        yield federation
    finally:
        with signals_ignored():
            federation.stop()
            if home is None:
                shutil.rmtree(federation.home, ignore_errors=True)


def connect(flower_home: Path, name: str, address: str, authority: Path) -> None:
    """Write Flower's ``config.toml`` with one connection, as the default connection."""
    # JSON strings are valid TOML strings.
    lines = ["[superlink]", f"default = {json.dumps(name)}", "", f"[superlink.{name}]"]
    lines += [f"address = {json.dumps(address)}", f"root-certificates = {json.dumps(str(authority.absolute()))}", ""]
    (flower_home / "config.toml").write_text("\n".join(lines), encoding="utf-8")


def federate(
    app: Path,
    nodes: int,
    out: Path | None,
    run_config: Mapping[str, Setting],
    stream: TextIO | None = None,
    home: Path | None = None,
    epsilon: float = 0.0,
) -> str:
    """Run an app once on a new federation.

    Parameters
    ----------
    app, out, run_config, stream
        As in `deploy.simulation.simulate`.
    nodes : int
        Number of SuperNodes. Each gets a part of ``data.dataset``. They get the models of ``client.models`` in turn, by
        default `MODELS`.
    home : Path, optional
        See `local_federation`.
    epsilon : float
        Privacy budget of each node; 0: none.

    Returns
    -------
    str
        The run's status; ``finished:completed`` on success.

    Raises
    ------
    ConfigError
        If the data cannot be divided this way, or ``home`` cannot be used.
    StartError
        If a part of the federation does not start.
    """
    console = Console(stream or sys.stdout)
    defaults = default_config(read_app(app))
    changes = {**({} if run_config.get("resume-from") else on_one_machine(defaults)), **run_config}
    effective = effective_config(app, nodes, out, changes)
    config = RunConfig.from_flower({**defaults, **effective})
    with local_federation(home) as federation:
        console.say("SuperLink is up, with TLS and node authentication")
        folders = write_partitions(config.data, nodes, config.seed, federation.home / "data")
        for index, folder in enumerate(folders):
            model = config.client.models[index % len(config.client.models)]
            name, state = f"{model}-{index}", federation.home / "state" / str(index)
            own = {"name": name, "model": model, "data-path": str(folder), "state-dir": str(state)}
            if epsilon:
                own["privacy-ledger"] = str(federation.home / "ledgers" / f"{index}.jsonl")
                create_ledger(Path(own["privacy-ledger"]), Budget(epsilon))
            federation.add_node(f"node-{index}", own | consent(config.data))
            console.say(f"SuperNode {name} is registered")
        federation.wait_for_nodes()
        console.say("All SuperNodes are healthy")
        return federation.run(app, effective, console).status


def on_one_machine(defaults: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return what differs from the app's defaults on one machine.

    Clients do not learn early: that would be one more process for each node and round on the same cores.
    """
    ours: dict[str, Setting] = {"client.models": ",".join(MODELS)}
    if "learn-early" in defaults:  # An app of one's own may lack it, and Flower refuses keys that an app does not have.
        ours["learn-early"] = False
    return ours


def consent(data: DataConfig) -> dict[str, Setting]:
    """Return what a node-config says so that a node with a part of this dataset answers as a simulated one would."""
    columns = {key: getattr(data, key) for key in ("image_column", "text_column", "label_column")}
    return {key.replace("_", "-"): name for key, name in columns.items()} | {"share-votes": True, "share-classes": True}


def main(arguments: list[str] | None = None) -> int:
    """Run the federation that the command line asks for; return the exit code."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--home", type=Path, help="new folder for certificates, keys, logs, and the nodes' data and state; it is kept"
    )
    own.add_argument("--epsilon", type=float, default=0.0, help="privacy budget of each node (default: none)")
    options = own.parse_known_args(arguments)[0]
    if not 0 <= options.epsilon <= LARGEST_EPSILON:
        own.error(f"--epsilon is {options.epsilon:g}; allowed: 0 to {LARGEST_EPSILON:g}")
    runner = partial(federate, home=options.home, epsilon=options.epsilon)
    out = Path("runs/federation")
    return run_command(
        "federation", "Run the app on real processes.", len(MODELS), out, runner, arguments, parents=[own]
    )


def _private_folder(home: Path | None) -> Path:
    if home is None:
        return Path(tempfile.mkdtemp(prefix="fedmmkt-"))  # readable only for its owner
    home = home.expanduser().absolute()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(home.iterdir()):
            raise ConfigError(f"--home is {str(home)!r}, which is not empty; allowed: a new folder")
        home.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"--home is {str(home)!r}, which cannot be made or used ({error.strerror})") from None
    return home


def _wait_healthy(address: str, process: subprocess.Popen[bytes], processes: FlowerProcesses, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_healthy(address):
        if process.poll() is not None or time.monotonic() > deadline:
            ended = "is not healthy" if process.poll() is None else f"ended with code {process.returncode}"
            raise StartError(f"{name} {ended}; its last lines:\n{processes.log_tail(name)}")
        time.sleep(0.2)

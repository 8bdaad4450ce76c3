"""Run the app on a real federation of processes: SuperLink, SuperExec and SuperNodes over gRPC with TLS.

``python -m deploy.federation`` does on one machine, on loopback, what an operator does on several: makes a CA,
certificates and keys, gives each node its own data, starts the SuperLink and the SuperNodes, registers the nodes'
keys, waits until all are healthy, submits the run, follows it to its end, and stops everything.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.config import RunConfig
from deploy.certificates import make_ca, make_node_key, make_server_certificate, make_superexec_secret
from deploy.command import run_command
from deploy.partition import write_partitions
from deploy.processes import FlowerProcesses, StartError, flower_environment, free_port, signals_ignored, stop_together
from deploy.submission import Outcome, Submitter, Value, app_config, effective_config, format_run_config

MODELS = ("cnn", "resnet", "text", "dual")
START_TIMEOUT = 90.0  # seconds until a process must be healthy; 5 to 10 on two idle cores
CONNECTION = "federation"
_LOOPBACK = "127.0.0.1"


@dataclass
class Node:
    """A SuperNode: its process, and with what it was started."""

    name: str
    processes: FlowerProcesses
    arguments: list[str]
    health: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it, or start it again after it ended."""
        self.process = self.processes.start(self.name, "flower-supernode", *self.arguments)

    def kill(self) -> None:
        """Kill it at once, as a crash would, and nothing else."""
        self.process.kill()
        self.process.wait()


class Federation:
    """A SuperLink with TLS and node authentication on loopback, and the nodes that were added to it.

    Runs go on when the SuperLink dies and comes back: a SuperExec of its own runs the ServerApp, and the SuperLink
    keeps its state in a database.

    Parameters
    ----------
    home : Path
        A private folder for certificates, keys, logs and Flower's state.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pki = home / "pki"
        self.nodes: dict[str, Node] = {}
        self.runtime, self.fleet, self.health = (f"{_LOOPBACK}:{free_port()}" for _ in range(3))
        self.server = self._processes("server")
        submitter = self._processes("submitter")
        submitter.working_directory.mkdir(parents=True)
        self.submitter = Submitter(submitter.working_directory, submitter.environment)
        make_ca(self.pki)
        make_server_certificate(self.pki, ["localhost"], [_LOOPBACK])
        self.secret = ("--superexec-auth-secret-file", str(make_superexec_secret(self.pki)))
        connect(submitter.home, CONNECTION, self.runtime, self.pki / "ca.crt")

    def start(self) -> None:
        """Start the SuperLink, and the SuperExec that runs ServerApps for it."""
        self.start_superlink()
        self.superexec = self.server.start(
            "superexec",
            *("flower-superexec", "--runtime-api-address", self.runtime),
            *("--root-certificates", str(self.pki / "ca.crt"), *self.secret),
        )

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again with the state that it had, and wait until it is healthy.

        Raises
        ------
        StartError
            If it is not, in time.
        """
        host, _, port = self.runtime.rpartition(":")
        self.superlink = self.server.start(
            "superlink",
            *("flower-superlink", "--host", host, "--port", port, "--fleet-api-address", self.fleet),
            *("--ssl-ca-certfile", str(self.pki / "ca.crt")),
            *("--ssl-certfile", str(self.pki / "server.pem"), "--ssl-keyfile", str(self.pki / "server.key")),
            *("--enable-supernode-auth", "--database", str(self.server.home / "state.db")),
            *("--isolation", "process", "--disable-runtime-dependency-installation", *self.secret),
            *("--health-server-address", self.health),
        )
        _wait_healthy(self.health, self.superlink, self.server, "superlink")

    def kill_superlink(self) -> int:
        """Kill the SuperLink at once, as a crash would; return its exit code."""
        self.superlink.kill()
        return self.superlink.wait()

    def add_node(
        self,
        name: str,
        node_config: Mapping[str, Value],
        register: bool = True,
        authority: Path | None = None,
        environment: Mapping[str, str] | None = None,
        address: str | None = None,
    ) -> Node:
        """Make a node's key, register it, and start the node.

        Parameters
        ----------
        name : str
            Also the name of its key.
        node_config : mapping
            See `common.config.NodeConfig`.
        register : bool
            Whether the SuperLink is told of the key; else it will refuse the node.
        authority : Path, optional
            Certificate of the CA that the node trusts; the federation's by default.
        environment : mapping, optional
            Variables that the node has beside the usual ones.
        address : str, optional
            Where the node finds the SuperLink's Fleet API, if not at its own port.

        Raises
        ------
        StartError
            If the SuperLink does not take the key.
        """
        key, public = make_node_key(self.pki, name)
        if register:
            self._register(name, public)
        health = f"{_LOOPBACK}:{free_port()}"
        arguments = ["--root-certificates", str(authority or self.pki / "ca.crt"), "--superlink", address or self.fleet]
        arguments += ["--auth-supernode-private-key", str(key), "--port", str(free_port())]
        arguments += ["--health-server-address", health, "--node-config", format_run_config(node_config)]
        processes = self._processes(name)
        processes.environment |= environment or {}
        self.nodes[name] = node = Node(name, processes, arguments, health)
        node.start()
        return node

    def wait_for_nodes(self) -> None:
        """Wait until every node is healthy.

        Raises
        ------
        StartError
            Names the first that is not, with its last log lines.
        """
        for node in self.nodes.values():
            _wait_healthy(node.health, node.process, node.processes, node.name)

    def run(self, app: Path, config: Mapping[str, Value], stream: TextIO | None = None) -> Outcome:
        """Submit a run and follow it to its end."""
        outcome = self.submitter.run(app, config, stream or sys.stdout, connection=(CONNECTION,))
        print(outcome, file=stream or sys.stdout, flush=True)
        return outcome

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
def local_federation() -> Iterator[Federation]:
    """Start a federation in a temporary folder; at the end stop it and remove the folder, keys and all.

    Raises
    ------
    StartError
        If the SuperLink does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix="fedmmkt-"))  # for its owner only
    federation = Federation(home)
    try:
        federation.start()
        yield federation
    finally:
        with signals_ignored():
            federation.stop()
            shutil.rmtree(home, ignore_errors=True)


def connect(flower_home: Path, name: str, address: str, authority: Path) -> None:
    """Write Flower's ``config.toml`` with one connection, which is the default."""
    # A JSON string is a TOML string.
    lines = ["[superlink]", f"default = {json.dumps(name)}", "", f"[superlink.{name}]"]
    lines += [f"address = {json.dumps(address)}", f"root-certificates = {json.dumps(str(authority.absolute()))}", ""]
    (flower_home / "config.toml").write_text("\n".join(lines), encoding="utf-8")


def is_healthy(address: str) -> bool:
    """Ask a process over gRPC whether it serves (grpc.health.v1)."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def federate(
    app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Value], stream: TextIO | None = None
) -> str:
    """Run an app once on a federation of its own.

    Parameters
    ----------
    app, out, run_config, stream
        As of `deploy.simulation.simulate`.
    nodes : int
        Number of SuperNodes. They get the parts of ``data.dataset``, and in turn the models that the run-config
        names in ``client.models``, or `MODELS`.

    Returns
    -------
    str
        The run's status, ``finished:completed`` if all is well.

    Raises
    ------
    ConfigError
        If the data cannot be divided so.
    StartError
        If a part of the federation does not come up.
    """
    output = stream or sys.stdout
    changes = {"client.models": ",".join(MODELS), **run_config}
    effective = effective_config(app, nodes, out, changes)
    config = RunConfig.from_flower({**app_config(app)[1], **effective})
    with local_federation() as federation:
        print("SuperLink is up, with TLS and node authentication", file=output, flush=True)
        folders = write_partitions(config.data, nodes, config.seed, federation.home / "data")
        for index, folder in enumerate(folders):
            model = config.client.models[index % len(config.client.models)]
            name, state = f"{model}-{index}", federation.home / "state" / str(index)
            settings = {"name": name, "model": model, "data-path": str(folder), "state-dir": str(state)}
            federation.add_node(f"node-{index}", settings)
            print(f"SuperNode {name} is registered", file=output, flush=True)
        federation.wait_for_nodes()
        print("All SuperNodes are healthy", file=output, flush=True)
        return federation.run(app, effective, output).status


def main(arguments: list[str] | None = None) -> int:
    """Run the federation that the command line asks for; return the exit code."""
    out = Path("runs/federation")
    return run_command("deploy.federation", "Run the app on real processes.", len(MODELS), out, federate, arguments)


def _wait_healthy(address: str, process: subprocess.Popen[bytes], processes: FlowerProcesses, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_healthy(address):
        if process.poll() is not None or time.monotonic() > deadline:
            ended = "is not healthy" if process.poll() is None else f"ended with code {process.returncode}"
            raise StartError(f"{name} {ended}; its last lines:\n{processes.log_tail(name)}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())

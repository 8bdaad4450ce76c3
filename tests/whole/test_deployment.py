"""The operator's page, `docs/deployment.md`: its commands run on loopback, host by host, in its order."""

import json
import os
import re
import shlex
import stat
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from fedmmkt.common.config import NodeConfig
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.deploy.connection_checks import is_healthy
from fedmmkt.deploy.processes import FlowerProcesses, flower_environment, free_port, stop_together
from fedmmkt.deploy.run_config_text import parse_run_config
from tests import ROOT
from tests.conftest import TINY
from tests.services import command, environment, read_environment_file, read_unit

PAGE = (ROOT / "docs" / "deployment.md").read_text()
SCRIPTS = sysconfig.get_path("scripts")
HOSTS = ("yours", "superlink", "clinic-a", "clinic-b")
SHARED_PORTS = ("9091", "9092")


def blocks():
    """Return the page's commands, each with the hosts on which they are given."""
    return [(hosts.split(), text) for hosts, text in re.findall(r"^```sh (.+)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)]


class Host:
    """A folder in place of a host: its `/etc` and `/var/lib`, its home, its services, its ports."""

    def __init__(self, folder, ports):
        self.folder = folder
        self.ports = ports | {port: str(free_port()) for port in ("9094", "9101", "9102", "9103")}
        self.home = folder / "root"
        self.home.mkdir(parents=True)
        self.environment = flower_environment(self.home / ".flwr", free_port()) | {"HOME": str(self.home)}
        self.services = {}
        self.said = ""

    def adapt(self, text):
        """Put this host's folders and ports into commands, and take out what needs other hosts or users."""
        text = re.sub(r"^ssh -fN .*$", "true", text, flags=re.MULTILINE)
        text = re.sub(r"sudo (-u fedmmkt )?", "", text).replace("-o fedmmkt -g fedmmkt ", "")
        text = text.replace("fedmmkt:fedmmkt", str(os.getuid())).replace("scp ", "cp ")
        text = re.sub(r"/opt/fedmmkt/bin|\.venv/bin", SCRIPTS, text)  # at once: SCRIPTS may hold the second
        text = text.replace("flwr run . ", f"flwr run {ROOT} ")
        text = text.replace('output-dir="', 'output-dir="root@superlink.example:')  # whose path it is
        text = re.sub(r"(?:root@([\w-]+)\.example:)?(/etc/fedmmkt|/var/lib/fedmmkt)", self._place, text)
        text = text.replace("superlink.example", "localhost")
        return re.sub(r"\b9\d\d\d\b", lambda match: self.ports[match[0]], text)

    def _place(self, match):
        return f"{self.folder.parent / (match[1] or self.folder.name)}{match[2]}"

    def give(self, text):
        """Run commands; each must succeed."""
        for part in re.split(r"^(sudo systemctl .*)\n", text, flags=re.MULTILINE):
            if part.startswith("sudo systemctl "):
                self._systemctl(*part.split()[2:])
            elif part.strip():
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", self.adapt(part)],
                    cwd=self.home, env=self.environment | {"PYTHONPATH": str(ROOT)},
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{self.said[-5000:]}\n{part}\n{done.stdout}\n{done.stderr}"
                self.said += done.stdout

    def _systemctl(self, action, *names):
        for name in names:
            if action in {"stop", "restart"}:
                self.services[name].stop()
            if action in {"enable", "start", "restart"} and name != "--now":
                self._start(name)

    def _start(self, name):
        unit = read_unit(name)
        variables = {}
        for file in unit.get("EnvironmentFile", ()):
            variables |= read_environment_file(Path(self.adapt(file)).read_text())
        unit["ExecStart"] = [
            self.adapt(line) for line in unit["ExecStart"]
        ]  # before variables that are adapted come in
        program, *arguments = command(unit, variables)
        own = {key: self.adapt(value) for key, value in environment(unit).items()}
        service = FlowerProcesses(Path(own["FLWR_HOME"]), self.environment | own)
        self.services[name] = service
        service.process = service.start(name, Path(program).name, *arguments)
        health = arguments[arguments.index("--health-server-address") + 1]
        deadline = time.monotonic() + 90
        while not is_healthy(health):
            assert service.process.poll() is None, service.log_tail(name)
            assert time.monotonic() < deadline, service.log_tail(name)
            time.sleep(0.2)


@pytest.fixture
def hosts(tmp_path):
    shared = {port: str(free_port()) for port in SHARED_PORTS}
    hosts = {name: Host(tmp_path / name, shared) for name in HOSTS}
    yield hosts
    stop_together([service for host in hosts.values() for service in host.services.values()])


def nodes(host):
    """Return how many nodes are in each state, as the server sees them."""
    answer = subprocess.run(
        [f"{SCRIPTS}/flwr", "supernode", "list", "clinics", "--format", "json"],
        cwd=host.home, env=host.environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [node["status"] for node in json.loads(answer)["nodes"]]


@pytest.mark.slow
def test_the_commands_of_the_page_do_what_it_says(hosts):
    yours, _, first, second = (hosts[name] for name in HOSTS)
    tiny = {key: value for key, value in TINY.items() if key != "judge"}
    given = 0
    for names, text in blocks():
        if "RUN_ID" in text:
            (run,) = runs(yours)
            assert run["status"] == "finished:completed"
            text = text.replace("RUN_ID", run["run-id"])
        if "NODE_ID" in text:
            assert nodes(yours).count("online") == 2
            text = text.replace("NODE_ID", re.findall(r"SuperNode (\d+) registered", yours.said)[0])
        text = text.replace("min-available-nodes=2 ", f"min-available-nodes=2 {format_run_config(tiny)} ")
        for name in names:
            hosts[name].give(text)
            given += 1

    assert given >= 25
    assert (yours.home / "first" / "report.html").exists()
    revoked = first.services["fedmmkt-supernode"].process
    assert revoked.wait(timeout=30) == 0
    deadline = time.monotonic() + 60
    while nodes(yours) != ["online"]:
        assert time.monotonic() < deadline, second.services["fedmmkt-supernode"].log_tail("fedmmkt-supernode")
        time.sleep(1)
    for host in hosts.values():
        for private in (host.folder / "etc" / "fedmmkt", host.folder / "var" / "lib" / "fedmmkt"):
            assert not private.exists() or stat.S_IMODE(private.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in host.folder.rglob("*.key"))


def runs(host):
    answer = subprocess.run(
        [f"{SCRIPTS}/flwr", "list", "clinics", "--format", "json"],
        cwd=host.home, env=host.environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return json.loads(answer)["runs"]


def test_the_node_configs_shown_are_accepted():
    shown = re.findall(r"^NODE_CONFIG='(.*)'$", PAGE, re.MULTILINE) + re.findall(
        r"^`(data-path=[^`]*)`", PAGE, re.MULTILINE
    )

    assert len(shown) == 3
    for text in shown:
        NodeConfig.from_flower(parse_run_config([text]))


def test_every_block_names_its_hosts_but_those_that_install_or_need_an_engine():
    untagged = re.findall(r"^```sh\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)

    assert {host for hosts, _ in blocks() for host in hosts} == set(HOSTS)
    assert all("pip install" in text or "docker compose" in text for text in untagged)
    assert all(shlex.split(text) for text in untagged)

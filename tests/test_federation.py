"""The app on a real federation: SuperLink, SuperExec and SuperNodes over gRPC with TLS and node authentication."""

import io
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from common.config import DataConfig, RunConfig, to_flower
from deploy.certificates import make_ca
from deploy.federation import CONNECTION, connect, is_healthy, local_federation
from deploy.partition import write_partitions
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent


class Watcher(io.StringIO):
    """A log that does something once, when a line says that it is time."""

    def __init__(self, when, do):
        super().__init__()
        self.when, self.do, self.done = when, do, False

    def write(self, line):
        if not self.done and self.when in line:
            self.done = True
            self.do()
        return super().write(line)


def settings(out, **changes):
    config = to_flower(RunConfig()) | TINY | {"output-dir": str(out)}
    return config | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with local_federation() as federation:
        yield federation


@pytest.fixture(scope="module")
def nodes(federation, tmp_path_factory):
    """Three nodes of three modalities, each with a folder of its own data."""
    folders = write_partitions(DataConfig(), 3, 0, tmp_path_factory.mktemp("data"))
    for model, folder in zip(("cnn", "text", "dual"), folders, strict=True):
        config = {"name": model, "model": model, "data-path": str(folder), "state-dir": str(folder / "state")}
        federation.add_node(model, config)
    federation.wait_for_nodes()
    return federation.nodes


def test_keys_and_state_are_for_their_owner_only(federation):
    assert stat.S_IMODE(federation.home.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in federation.pki.rglob("*.key"))


def test_a_node_whose_key_is_not_registered_is_refused(federation):
    node = federation.add_node("stranger", {"data-path": "/nowhere"}, register=False)

    code = node.process.wait(timeout=60)

    assert code == 1
    assert "2004" in node.processes.log_tail("stranger")
    del federation.nodes["stranger"]


def test_a_node_with_another_ca_is_refused(federation, tmp_path):
    other = make_ca(tmp_path / "pki")[0]
    node = federation.add_node("misled", {"data-path": "/nowhere"})
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()
    node.arguments[node.arguments.index("--root-certificates") + 1] = str(other)

    node.start()

    assert node.process.wait(timeout=60) == 1
    assert "CERTIFICATE_VERIFY_FAILED" in node.processes.log("misled").read_text()
    del federation.nodes["misled"]


def test_a_submitter_with_another_ca_is_refused(federation, tmp_path):
    other = make_ca(tmp_path / "pki")[0]
    home = Path(federation.submitter.environment["FLWR_HOME"])
    try:
        connect(home, CONNECTION, federation.runtime, other)

        answer = federation.submitter.flwr("ls", CONNECTION)
    finally:
        connect(home, CONNECTION, federation.runtime, federation.pki / "ca.crt")

    assert "Error" in answer
    assert "connection configuration" in " ".join(answer.split())  # Flower names no certificate here


def test_a_run_outlives_a_kill_of_the_superlink(federation, nodes, tmp_path):
    """Three modalities over TLS; the SuperLink is killed in mid-round and comes back."""
    killed = []

    def kill_and_restart():
        killed.append(federation.kill_superlink())
        federation.start_superlink()

    log = Watcher("[ROUND 2/2]", kill_and_restart)

    outcome = federation.run(ROOT, settings(tmp_path / "run", min_nodes=3), log)

    assert outcome.status == "finished:completed", log.getvalue()
    assert killed
    assert is_healthy(federation.health)
    lines = metrics(tmp_path / "run")
    assert [line["replies"]["received"] for line in lines] == [3, 3, 3]
    assert sorted(lines[-1]["clients"]["per_client"]) == ["cnn", "dual", "text"]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_killed_node_costs_its_voice_and_comes_back_with_its_model(federation, nodes, tmp_path):
    """The round closes by quorum and deadline; restarted, the node goes on from its disk."""
    victim = nodes["cnn"]

    def kill():
        for process in victim.processes.alive():
            process.kill()
        victim.process.wait()

    log = Watcher("[ROUND 2/8]", kill)
    restart = Watcher("[ROUND 6/8]", lambda: _restart_when_let_in(victim))
    both = _Both(log, restart)
    config = settings(tmp_path / "run", min_nodes=3, rounds=8, round_deadline=25.0, quorum=0.6)

    outcome = federation.run(ROOT, config, both)

    assert outcome.status == "finished:completed", log.getvalue()
    lines = metrics(tmp_path / "run")
    asked = [sorted(line["clients"]["per_client"]) for line in lines]
    assert asked[1] == ["cnn", "dual", "text"]
    assert asked[2] == ["dual", "text"]
    assert lines[2]["replies"]["reasons"].keys() == {"cnn"}
    assert asked[-1] == ["cnn", "dual", "text"]


class _Both(io.StringIO):
    def __init__(self, *watchers):
        super().__init__()
        self.watchers = watchers

    def write(self, line):
        for watcher in self.watchers:
            watcher.write(line)
        return len(line)


def _restart_when_let_in(node):
    """A node of the same key is refused (2004) until the SuperLink has marked the dead one offline."""
    for _ in range(20):
        node.start()
        try:
            node.process.wait(timeout=15)
        except Exception:
            return
    raise AssertionError(node.processes.log_tail(node.name))

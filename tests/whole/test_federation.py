"""The app on a real federation: SuperLink, SuperExec and SuperNodes over gRPC with TLS and node authentication."""

import io
import json
import math
import stat
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedmmkt.common.config import DataConfig, RunConfig, to_flower
from fedmmkt.deploy.certificates import make_ca
from fedmmkt.deploy.connection_checks import is_healthy
from fedmmkt.deploy.doctor import main
from fedmmkt.deploy.federation import CONNECTION, connect, consent, local_federation, on_one_machine
from fedmmkt.deploy.federation import main as federation_command
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.server_app.t2i.families import WEIGHT_NAME
from tests import ROOT
from tests.conftest import TINY


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
        federation.add_node(model, config | consent(DataConfig()))
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
    other, _ = make_ca(tmp_path / "pki")
    node = federation.add_node("misled", {"data-path": "/nowhere"}, authority=other)

    code = node.process.wait(timeout=60)

    assert code == 1
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


def test_the_doctor_tells_a_wrong_ca_from_the_right_one_on_both_sides(federation, tmp_path, monkeypatch, capsys):
    other = make_ca(tmp_path / "pki")[0]
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))

    for authority, code, said in ((federation.pki / "ca.crt", 0, "ok    "), (other, 1, "WRONG ")):
        connect(tmp_path, "clinic", federation.runtime, authority)
        assert main(["--ca", str(authority), "--superlink", federation.fleet, "--health", federation.health]) == code
        as_node = capsys.readouterr().out.splitlines()
        assert main(["--connection", "clinic"]) == code
        as_submitter = capsys.readouterr().out.splitlines()

        assert as_node[-2].startswith(f"{said}TLS: ")
        assert as_node[-1] == f"ok    health: {federation.health} serves"
        assert as_submitter[-1].startswith(f"{said}connection: ")
        assert ("wrong CA" in as_submitter[-1]) == ("wrong CA" in as_node[-2]) == bool(code)


def test_a_run_outlives_a_kill_of_the_superlink(federation, nodes, tmp_path):
    """Three modalities over TLS; the SuperLink is killed in mid-round and comes back."""
    killed = []

    def kill_and_restart():
        killed.append(federation.kill_superlink())
        federation.start_superlink()

    log = Watcher("[ROUND 2/2]", kill_and_restart)

    outcome = federation.run(ROOT, settings(tmp_path / "run", min_available_nodes=3), log)

    assert outcome.status == "finished:completed", log.getvalue()
    assert killed
    assert is_healthy(federation.health)
    lines = metrics(tmp_path / "run")
    assert [line["replies"]["received"] for line in lines] == [3, 3, 3]
    assert sorted(lines[-1]["clients"]["per_client"]) == ["cnn", "dual", "text"]
    assert (tmp_path / "run" / "report.html").exists()


def test_clients_learn_early_on_nodes_of_their_own(federation, nodes, tmp_path):
    log = io.StringIO()

    outcome = federation.run(ROOT, settings(tmp_path / "run", min_available_nodes=3, rounds=2, learn_early=True), log)

    assert outcome.status == "finished:completed", log.getvalue()
    lines = metrics(tmp_path / "run")
    assert [line["replies"]["received"] for line in lines] == [3, 3, 3]
    assert [line["replies"]["rejected"] for line in lines] == [0, 0, 0]
    timeline = lines[-1]["seconds"]["timeline"]
    (_, begin, _), *_ = (span for span in timeline["server"] if span[0] == "generate")
    early = [name for name, began, _ in timeline["clients"] if began < begin]
    assert sorted(early) == ["cnn", "dual", "text"]  # Sent before the batch was made.


def test_on_one_machine_no_node_starts_a_process_more_to_learn_early():
    models = {"client.models": "cnn,resnet,text,dual"}
    assert on_one_machine({"learn-early": True}) == {**models, "learn-early": False}
    assert on_one_machine({}) == models  # Flower refuses a key that an app does not have.


def test_a_home_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    mode = tmp_path.stat().st_mode

    assert federation_command(["--home", str(tmp_path), "--out", str(tmp_path / "run")]) == 2

    assert "which is not empty; allowed: a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"
    assert tmp_path.stat().st_mode == mode


def test_an_upload_that_cannot_be_put_together_costs_its_node_alone(federation, nodes, tmp_path):
    """Of Flower, an array that names a chunk that is not there ends the run, or takes the host's memory."""
    folder = write_partitions(DataConfig(), 4, 1, tmp_path / "data")[0]
    config = {"name": "liar", "model": "hostile_node:forger", "data-path": str(folder), "state-dir": str(tmp_path)}
    liar = federation.add_node("liar", config, environment={"PYTHONPATH": str(ROOT / "tests")})
    try:
        federation.wait_for_nodes()
        log = io.StringIO()

        outcome = federation.run(ROOT, settings(tmp_path / "run", min_available_nodes=4, rounds=2), log)
    finally:
        liar.processes.stop()
        del federation.nodes["liar"]

    assert outcome.status == "finished:completed", log.getvalue()
    lines = metrics(tmp_path / "run")
    assert [line["replies"]["received"] for line in lines] == [4, 3, 4]  # In the last round, for the last message.
    assert "the reply cannot be put together: IndexError" in lines[1]["replies"]["reasons"]["liar"]
    assert "more than 256 MB" in lines[2]["replies"]["reasons"]["liar"]


@pytest.mark.slow
def test_a_run_whose_server_app_was_killed_goes_on_and_equals_the_uninterrupted_one(federation, nodes, tmp_path):
    changes = {"min_available_nodes": 3, "rounds": 3}
    whole = federation.run(ROOT, settings(tmp_path / "whole", **changes), io.StringIO())
    killed = []

    def kill():
        for process in psutil.Process(federation.superexec.pid).children(recursive=True):
            if process.status() != psutil.STATUS_ZOMBIE and "serverapp" in " ".join(process.cmdline()):
                killed.append(process.pid)
                process.kill()

    log = Watcher("[ROUND 2/3]", lambda: (time.sleep(5), kill()))
    cut = federation.run(ROOT, settings(tmp_path / "cut", **changes), log)
    resumed = federation.run(
        ROOT, settings(tmp_path / "resumed", resume_from=str(tmp_path / "cut"), **changes), io.StringIO()
    )

    assert killed
    assert whole.status == resumed.status == "finished:completed"
    assert cut.status != "finished:completed"
    assert len(metrics(tmp_path / "cut")) < 4
    lines = [
        [
            {key: value for key, value in line.items() if key not in ("seconds", "bytes")}
            for line in metrics(tmp_path / name)
        ]
        for name in ("whole", "resumed")
    ]  # With `learn-early`, the clock decides which batches are sent again.
    assert lines[0] == lines[1]
    adapters = [load_file(tmp_path / name / "lora" / WEIGHT_NAME) for name in ("whole", "resumed")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.slow
def test_a_node_that_dies_and_one_that_lies_cost_their_voices_only(tmp_path):
    """One is killed in mid-round and comes back with its model from disk; one sends garbage in every round."""
    models = {"cnn": "cnn", "text": "text", "dual": "dual", "liar": "hostile_node:model"}
    folders = write_partitions(DataConfig(), len(models), 0, tmp_path / "data")
    with local_federation() as federation:
        for (name, model), folder in zip(models.items(), folders, strict=True):
            config = {"name": name, "model": model, "data-path": str(folder), "state-dir": str(folder / "state")}
            federation.add_node(name, config, environment={"PYTHONPATH": str(ROOT / "tests")})
        federation.wait_for_nodes()
        over = threading.Event()
        supervisor = threading.Thread(target=kill_and_keep_up, args=(federation.nodes["cnn"], over))
        log = Watcher("[ROUND 3/8]", supervisor.start)

        changes = {"min_available_nodes": 4, "rounds": 8, "round_deadline": 40.0}
        outcome = federation.run(ROOT, settings(tmp_path / "run", **changes), log)

        over.set()
        supervisor.join()
    assert outcome.status == "finished:completed", log.getvalue()
    lines = metrics(tmp_path / "run")
    reasons = [line["replies"]["reasons"] for line in lines]
    assert "liar" not in reasons[0]
    assert "cannot be read" in reasons[1]["liar"]
    assert "cannot be read" in reasons[2]["liar"]
    assert lines[2]["bytes"]["up"] > 100_000_000
    assert "answers batch 'another'" in reasons[3]["liar"]
    assert all("values are not finite" in reason["liar"] for reason in reasons[4:])

    answered = [sorted(name for name in line["clients"]["per_client"] if name != "liar") for line in lines]
    assert answered[:3] == [["cnn", "dual", "text"]] * 3
    assert answered[3] == ["dual", "text"]
    assert reasons[3]["cnn"]
    assert answered[-1] == ["cnn", "dual", "text"]
    # AdamW counts its steps: a model that had started anew would have missed those of the rounds before the kill.
    state = sorted((folders[0] / "state").rglob("optimizer.pt"))[-1]
    steps = int(torch.load(state)["state"][0]["step"])
    epoch = math.ceil(lines[1]["clients"]["per_client"]["cnn"]["examples"] / 16)
    learned = sum("cnn" in names for names in answered[1:]) + 1  # once more after the last round
    assert steps >= learned * epoch


@pytest.mark.slow
def test_a_node_that_lies_changes_nothing_for_the_others(federation, nodes, tmp_path):
    changes = {"min_available_nodes": 3, "rounds": 4, "judge": True}
    folder = write_partitions(DataConfig(), 4, 1, tmp_path / "data")[0]
    honest = federation.run(ROOT, settings(tmp_path / "honest", **changes), io.StringIO())
    config = {"name": "liar", "model": "hostile_node:model", "data-path": str(folder), "state-dir": str(tmp_path)}
    liar = federation.add_node("liar", config, environment={"PYTHONPATH": str(ROOT / "tests")})
    try:
        federation.wait_for_nodes()
        log = io.StringIO()

        lied_to = federation.run(ROOT, settings(tmp_path / "lied-to", **changes | {"min_available_nodes": 4}), log)
    finally:
        liar.processes.stop()
        del federation.nodes["liar"]

    assert honest.status == lied_to.status == "finished:completed", log.getvalue()
    lines = [metrics(tmp_path / name) for name in ("honest", "lied-to")]
    assert all(line["replies"]["reasons"].keys() == {"liar"} for line in lines[1][1:])
    assert [line["generator"] for line in lines[0]] == [line["generator"] for line in lines[1]]
    for alone, together in zip(*lines, strict=True):
        others = {name: values for name, values in together["clients"]["per_client"].items() if name != "liar"}
        assert others == alone["clients"]["per_client"]


def kill_and_keep_up(node, over):
    """Kill a node in mid-round, then start it again whenever it ends, as a service manager does."""
    time.sleep(3)
    node.kill()
    # It is refused until the SuperLink has marked the dead one offline.
    while not over.wait(1):
        if node.process.poll() is not None:
            node.start()

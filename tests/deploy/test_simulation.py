"""The one-command simulation: what it refuses at once, and that nothing is left behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.cli.build import build_fab_from_disk

from fedmmkt.deploy import simulation, submission
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.deploy.settings import effective_config
from tests import ROOT

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "toyfed"
version = "0.1.0"
description = "A query to every node"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "toy"

[tool.flwr.app.components]
serverapp = "toyfed.apps:server"
clientapp = "toyfed.apps:client"

[tool.flwr.app.config]
output-dir = ""
min-available-nodes = 1
mode = "answer"
"""

APPS = """
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query("partition")
def partition(message, context):
    record = ConfigRecord({"partition": context.node_config["partition-id"]})
    return Message(RecordDict({"answer": record}), reply_to=message)


@server.main()
def main(grid, context):
    config = context.run_config
    print("server app is here", flush=True)
    if config["mode"] == "raise":
        raise ValueError("planned failure")
    while len(nodes := list(grid.get_node_ids())) < config["min-available-nodes"]:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query.partition") for node in nodes])
    answers = sorted(reply.content["answer"]["partition"] for reply in replies)
    Path(config["output-dir"], "answers.txt").write_text(f"{answers} {config['mode']}")
    while config["mode"] == "hang":
        time.sleep(0.1)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    package = tmp_path / "toy" / "toyfed"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "apps.py").write_text(APPS)
    return package.parent


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a name short enough for Ray's sockets, which pytest's is not."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def start(toy, tmp_path, short_tmp):
    """A function that starts the command on the toy app; what a failed test leaves running is stopped."""
    started = []

    def start(run_config):
        command = [sys.executable, "-m", "fedmmkt", "demo", "--nodes", "2", "--app", str(toy)]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "x" / ".." / "out"), "--run-config", run_config],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(short_tmp)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background job, which these tests may be, ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def left_behind(tmp: Path) -> list[object]:
    """Files below the folder, and living processes that run for a SuperLink in it."""

    def runs_below(process: psutil.Process) -> bool:
        try:
            home, cwd = process.environ().get("FLWR_HOME", ""), process.cwd()
            return process.status() != psutil.STATUS_ZOMBIE and (home.startswith(str(tmp)) or cwd.startswith(str(tmp)))
        except (psutil.Error, OSError):
            return False

    return [*tmp.iterdir(), *filter(runs_below, psutil.process_iter())]


def test_a_run_answers_and_leaves_nothing(start, tmp_path, short_tmp, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook
    process = start("mode=\"two words 'quoted'\"")
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert (tmp_path / "out" / "answers.txt").read_text() == "[0, 1] two words 'quoted'"
    assert "server app is here" in log
    assert "  Completed: run " in log.splitlines()[-1]
    assert not {"\x1b", "\r"} & set(log)
    assert all(re.match(r" {1,2}\d+:\d\d  ", line) for line in log.splitlines() if line)
    assert left_behind(short_tmp) == []


def test_an_exception_of_the_server_app_fails_the_command(start, tmp_path, short_tmp):
    process = start('mode="raise"')
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 1, log
    assert log.splitlines()[-1].endswith("  The run failed: planned failure")
    assert "Traceback (most recent call last)" not in log
    assert "planned failure" in (tmp_path / "out" / "flower-tracebacks.txt").read_text()
    assert left_behind(short_tmp) == []


def test_ctrl_c_stops_the_run_and_leaves_nothing(start, toy, tmp_path, short_tmp):
    (tmp_path / "x").mkdir()
    (tmp_path / "out" / "checkpoints" / "round-00001").mkdir(parents=True)
    process = start('mode="hang"')
    assert process.stdout is not None
    for line in process.stdout:
        if "server app is here" in line:
            break
    process.send_signal(signal.SIGINT)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, log
    assert "Traceback" not in log
    resumed = f"fedmmkt demo --app {toy} --run-config 'resume-from=\"{tmp_path / 'out'}\"'"
    assert log.splitlines()[-1] == f"stopped; to go on after its last whole round: {resumed}"
    assert left_behind(short_tmp) == []


def test_the_app_can_be_bundled():
    assert len(build_fab_from_disk(ROOT)) > 0


def test_the_users_settings_win(toy):
    ours = effective_config(toy, 3, Path("runs/x"), {})
    assert ours == {"min-available-nodes": 3, "output-dir": str(Path("runs/x").absolute())}
    users = {"min-available-nodes": 1, "output-dir": "/elsewhere", "mode": "x"}
    assert effective_config(toy, 3, Path("runs/x"), users) == users


def test_keys_that_an_app_lacks_are_not_set(toy):
    project = toy / "pyproject.toml"
    project.write_text(project.read_text().replace("min-available-nodes = 1\n", ""))
    assert effective_config(toy, 3, None, {"mode": "x"}) == {"mode": "x"}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--app", "/nowhere"], ["no Flower app in '/nowhere'"]),
        (["--nodes", "0"], ["--nodes is 0"]),
        (["--run-config", "rouns=2 t2i.lora-rank=0"], ["'rouns' is unknown", "'t2i.lora-rank' is 0"]),
        (["--run-config", "rounds : 2"], ["'rounds : 2' is not of the form"]),
        (["--nodes", "2", "--run-config", "min-available-nodes=3"], ["min-available-nodes is 3, but only 2 nodes"]),
        (
            ["--run-config", 't2i.scores="vots"'],
            ["'t2i.scores' is 'vots', but no score rule", "(did you mean 'votes'?)"],
        ),
        (
            ["--run-config", 'strategy="nowhere:Mine"'],
            ["is 'nowhere:Mine', but there is no module 'nowhere'"],
        ),
        (["--run-config", 't2i.family="sdd"'], ["'t2i.family' is 'sdd', but no T2I family is registered"]),
        (
            ["--run-config", 'client.models="cnn,rnn"'],
            ["'client.models' is 'rnn', but no", "allowed: cnn, dual, mlp"],
        ),
    ],
)
def test_bad_input_is_refused_before_anything_starts(arguments, messages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulation, "simulate", lambda *_: pytest.fail("started"))
    defaults = ["--app", str(ROOT), "--out", str(tmp_path / "out")]
    assert simulation.main([*defaults, *arguments]) == 2
    errors = capsys.readouterr().err
    assert all(message in errors for message in messages)
    assert "Traceback" not in errors


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert simulation.main(["--app", str(ROOT), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_key_unknown_to_another_app_is_refused(toy, tmp_path, capsys):
    assert simulation.main(["--app", str(toy), "--out", str(tmp_path / "out"), "--run-config", "mood=1"]) == 2
    assert "unknown to toyfed: mood" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "nodes", "share"), [("0", 6, 0.166), ("0,1", 6, 0.333), ("0,1", 1, 1.0), ("", 6, 0.0), ("-1", 6, 0.0)]
)
def test_gpus_are_shared(visible, nodes, share, toy, tmp_path, monkeypatch):
    options = []
    monkeypatch.setattr(simulation.shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(
        submission.Submitter,
        "run",
        lambda *_, **given: options.extend(given["options"]) or submission.Outcome("1", submission.COMPLETED, ""),
    )

    simulation.LocalFlower(tmp_path / "home").run(toy, nodes, None, {}, io.StringIO())

    assert options[0] == "--federation-config"
    assert parse_run_config([options[1]])["client-resources-num-gpus"] == share

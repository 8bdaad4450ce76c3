"""The app in Flower's own simulation: SuperLink, Ray, and the bundle that travels."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from flwr.cli.build import build_fab_from_disk

from fedmmkt.common.config import RunConfig
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.deploy.simulation import simulate
from fedmmkt.server_app.app import build_strategy
from tests import ROOT


def test_a_real_run_ends_well_and_as_it_does_in_one_process(tiny_run, tmp_path):
    """Two tiny rounds; clients that run side by side under Ray must not change a digit."""
    settings = tiny_run("flower", client__models="cnn,dual", min_available_nodes=2)
    settings["output-dir"] = str(tmp_path / "flower")

    status = simulate(ROOT, 2, tmp_path / "flower", settings)

    assert status == "finished:completed"
    assert (tmp_path / "flower" / "report.html").exists()
    lines = [json.loads(line) for line in (tmp_path / "flower" / "metrics.jsonl").read_text().splitlines()]
    # The T2I's last digits depend on the threads that it computes with, which tests before this one have changed.
    torch.set_num_threads(json.loads((tmp_path / "flower" / "config.json").read_text())["threads"])
    own = tiny_run("own", client__models="cnn,dual")
    grid = InProcessGrid(
        "fedmmkt.client_app.app:app", own, [{"partition-id": i, "num-partitions": 2} for i in range(2)], workers=2
    )
    strategy = build_strategy(RunConfig.from_flower(own), 1)
    strategy.start(grid)
    grid.close()
    for flower, direct in zip(lines, strategy.recorder.run_folder.read_metrics(), strict=True):
        assert flower["clients"] == direct["clients"]
        assert flower["generator"] == direct["generator"]
        assert flower["replies"] == direct["replies"]


LOAD = """
import importlib, sys, threading, time
from importlib.util import find_spec

sys.path.insert(0, sys.argv[1])
server = threading.Thread(target=importlib.import_module, args=("fedmmkt.flower.server",))
server.start()
time.sleep(float(sys.argv[2]))
print(find_spec("fedmmkt.client") is not None)
print(importlib.import_module("fedmmkt.client").app is not None)
server.join()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("later", [0.0, 0.002])
def test_two_threads_may_load_the_bundle_at_once(later, bundle, tmp_path):
    """As Flower's simulation does: a thread loads the ServerApp while the main one looks for the ClientApp."""
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(bundle), str(later)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert loaded.stdout == "True\nTrue\n", loaded.stderr

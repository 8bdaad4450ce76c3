"""The app in Flower's own simulation: SuperLink, Ray, and the bundle that travels."""

import json
from pathlib import Path

import torch

from common.config import RunConfig
from deploy.in_process import InProcessGrid
from deploy.simulation import simulate
from server_app.app import build_strategy

ROOT = Path(__file__).parent.parent


def test_a_real_run_ends_well_and_as_it_does_in_one_process(tiny_run, tmp_path):
    """Two tiny rounds; clients that run side by side under Ray must not change a digit."""
    settings = tiny_run("flower", client__models="cnn,dual", min_nodes=2)
    settings["output-dir"] = str(tmp_path / "flower")

    status = simulate(ROOT, 2, tmp_path / "flower", settings)

    assert status == "finished:completed"
    assert (tmp_path / "flower" / "report.html").exists()
    lines = [json.loads(line) for line in (tmp_path / "flower" / "metrics.jsonl").read_text().splitlines()]
    # The T2I's last digits depend on the threads that it computes with, which tests before this one have changed.
    torch.set_num_threads(json.loads((tmp_path / "flower" / "config.json").read_text())["threads"])
    own = tiny_run("own", client__models="cnn,dual")
    grid = InProcessGrid(
        "client_app.app:app", own, [{"partition-id": i, "num-partitions": 2} for i in range(2)], workers=2
    )
    strategy = build_strategy(RunConfig.from_flower(own), 1)
    strategy.start(grid)
    grid.close()
    for flower, direct in zip(lines, strategy.run_folder.read_metrics(), strict=True):
        assert flower["clients"] == direct["clients"]
        assert flower["generator"] == direct["generator"]
        assert flower["replies"] == direct["replies"]

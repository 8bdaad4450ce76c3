"""The overhead of a round without training, on real processes over TLS: ``python -m benchmarks.overhead``.

The same nodes, model and data run FedMMKT and then Flower's own FedAvg, on one SuperLink. Nothing is trained. So the
seconds of a round are those of starting clients, reading data, moving messages and waiting. Bytes are counted on the
wire between each node and the SuperLink; they include TLS, gRPC, polling and heartbeats.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.relay import Relay, relay
from fedmmkt.common.config import RunConfig, Setting
from fedmmkt.deploy.federation import Federation, consent, local_federation
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.deploy.submission import COMPLETED

ROOT = Path(__file__).parent.parent
NOTHING_TRAINED: dict[str, Setting] = {
    "client.warmup-epochs": 0,
    "client.local-epochs": 0,
    "client.distillation-steps": 0,
    "learn-early": False,  # There is nothing to learn.
    "t2i.scores": "none",
    "t2i.evaluation-samples": 10,
    "t2i.inference-steps": 2,  # same number of images and bytes, in less time
    "judge": False,
    "tracker": "",
}

FEDAVG_PROJECT = """
[project]
name = "plainfedavg"
version = "1.0.0"

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "plainfedavg.apps:server"
clientapp = "plainfedavg.apps:client"

[tool.flwr.app.config]
rounds = 4
evaluate = 1.0
min-available-nodes = 4
model = "cnn"
out = ""
"""
FEDAVG_APPS = '''
"""Flower's FedAvg of a task model without training, written as in Flower's quick start."""

from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def build(name):
    """Build a task model, or a list of weights of the size of the T2I's adapter."""
    from torch import nn, zeros
    from fedmmkt.client_app.models.building import build_task_model

    if name.startswith("adapter:"):
        return nn.ParameterList([zeros(int(name.removeprefix("adapter:")))])
    return build_task_model(name, 10, 32)


def load(message, context):
    from fedmmkt.client_app.data.private_data import load_private_data
    from fedmmkt.common.config import NodeConfig, RunConfig
    from fedmmkt.common.dataset_files import DIGIT_NAMES
    import torch

    torch.set_num_threads(1)
    model = build(context.run_config["model"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node = NodeConfig.from_flower(context.node_config)
    data = load_private_data(RunConfig(), node, DIGIT_NAMES, images=True, texts=False)
    return model, data


@client.train()
def train(message, context):
    import torch

    model, data = load(message, context)
    torch.manual_seed(context.node_id)
    with torch.no_grad():
        for weight in model.parameters():  # As training would: Flower sends equal content only once.
            weight += 1e-3 * torch.randn_like(weight)
    metrics = MetricRecord({"num-examples": len(data.train)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message, context):
    import torch
    from fedmmkt.client_app.learning.training import evaluate
    from fedmmkt.client_app.models.task_model import Inputs

    model, data = load(message, context)
    images = torch.from_numpy(data.test.images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    accuracy, loss = evaluate(model, Inputs(images), torch.from_numpy(data.test.labels_N))
    metrics = MetricRecord({"num-examples": len(data.test), "accuracy": accuracy, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    config, nodes = context.run_config, context.run_config["min-available-nodes"]
    arrays = ArrayRecord(build(config["model"]).state_dict())
    strategy = FedAvg(
        fraction_evaluate=config["evaluate"],
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes if config["evaluate"] else 0,
        min_available_nodes=nodes,
    )

    def note_round(server_round, arrays):  # Called before the first round and after each.
        with Path(config["out"]).open("a") as lines:
            lines.write(f"{server_round}\\n")

    strategy.start(grid, arrays, num_rounds=config["rounds"], evaluate_fn=note_round)
'''


@dataclass(frozen=True)
class Mark:
    """The time at the end of a round, and the bytes that all nodes had received and sent by then."""

    seconds: float
    down: int
    up: int


@dataclass(frozen=True)
class Costs:
    """The cost of a run's rounds, except the first and the last: seconds by round, and mean bytes per node."""

    seconds: list[float]
    down: float
    up: float


def fedmmkt_costs(federation: Federation, relays: Sequence[Relay], rounds: int, folder: Path) -> Costs:
    """Run FedMMKT; the seconds are those of the exchange with clients."""
    config = NOTHING_TRAINED | {"output-dir": str(folder), "min-available-nodes": len(relays), "rounds": rounds}
    file = folder / "metrics.jsonl"
    with marked(file, relays) as marks:
        _run(federation, ROOT, config)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return _costs(marks, len(relays), [line["seconds"]["clients"] for line in lines[2:-1]])


def fedavg_costs(
    federation: Federation, relays: Sequence[Relay], rounds: int, folder: Path, model: str, evaluate: float
) -> Costs:
    """Run Flower's FedAvg; the seconds are those of whole rounds, in which the server does almost nothing."""
    package = folder / "plainfedavg"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(FEDAVG_PROJECT, encoding="utf-8")
    (package / "__init__.py").touch()
    (package / "apps.py").write_text(FEDAVG_APPS, encoding="utf-8")
    file = folder / "rounds.txt"
    config: dict[str, Setting] = {"min-available-nodes": len(relays), "rounds": rounds}
    config |= {"model": model, "evaluate": evaluate}
    with marked(file, relays) as marks:
        _run(federation, folder, config | {"out": str(file)})
    return _costs(marks, len(relays), [after.seconds - before.seconds for before, after in pairwise(marks)][1:-1])


@contextlib.contextmanager
def marked(file: Path, relays: Sequence[Relay]) -> Iterator[list[Mark]]:
    """Record time and bytes whenever ``file`` gets a new line; the run adds one line per round."""
    marks: list[Mark] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            lines = file.read_bytes().count(b"\n") if file.exists() else 0
            if lines > len(marks):
                down, up = (sum(getattr(relay, way) for relay in relays) for way in ("down", "up"))
                marks.append(Mark(time.perf_counter(), down, up))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield marks
    finally:
        over.set()
        watcher.join()


def _costs(marks: Sequence[Mark], nodes: int, seconds: list[float]) -> Costs:
    first, last = marks[1], marks[-2]
    messages = nodes * (len(marks) - 3)
    return Costs(seconds, (last.down - first.down) / messages, (last.up - first.up) / messages)


def _run(federation: Federation, app: Path, config: dict[str, Setting]) -> None:
    log = io.StringIO()
    if federation.run(app, config, log).status != COMPLETED:
        raise RuntimeError(log.getvalue())


def adapter_size() -> int:
    """Count the weights of the T2I's adapter with the default settings."""
    from fedmmkt.server_app.t2i.generator import Generator

    return sum(tensor.numel() for tensor in Generator(RunConfig().t2i, 0).adapter.state().values())


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run; first and last are not counted")
    parser.add_argument("--model", default="cnn", help="task model of every node")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        federation = stack.enter_context(local_federation())
        relays = [stack.enter_context(relay(federation.fleet)) for _ in range(options.nodes)]
        parts = write_partitions(RunConfig().data, options.nodes, 0, folder / "data")
        for index, (part, relayed) in enumerate(zip(parts, relays, strict=True)):
            name = f"{options.model}-{index}"
            state = folder / "state" / name
            config = {"name": name, "model": options.model, "data-path": str(part), "state-dir": str(state)}
            config = consent(RunConfig().data) | config
            federation.add_node(name, config, environment={"PYTHONPATH": str(ROOT)}, address=relayed.address)
        federation.wait_for_nodes()
        common, adapter = (federation, relays, options.rounds), f"adapter:{adapter_size()}"
        rows = {
            "FedMMKT (one message)": fedmmkt_costs(*common, folder / "fedmmkt"),
            "FedAvg (train, evaluate)": fedavg_costs(*common, folder / "both", options.model, 1.0),
            "FedAvg (train alone)": fedavg_costs(*common, folder / "train", options.model, 0.0),
            "FedAvg of the T2I's adapter (train alone)": fedavg_costs(*common, folder / "adapter", adapter, 0.0),
        }
    print(f"\na round without training, {options.nodes} {options.model} nodes on this machine\n")
    print("| | seconds (least to most) | KB down per node | KB up per node |\n|---|---|---|---|")
    for name, costs in rows.items():
        seconds = f"{statistics.mean(costs.seconds):.1f} ({min(costs.seconds):.1f} to {max(costs.seconds):.1f})"
        print(f"| {name} | {seconds} | {costs.down / 1e3:.1f} | {costs.up / 1e3:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

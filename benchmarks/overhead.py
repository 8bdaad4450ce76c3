"""What a round costs over its computing: ``python -m benchmarks.overhead``, on real processes over TLS.

The same nodes, model and data run FedMMKT and then Flower's own FedAvg, on one SuperLink. Nothing is trained, so
that a round's seconds are those of starting clients, reading data, moving messages and waiting.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common.config import RunConfig
from deploy.federation import Federation, local_federation
from deploy.partition import write_partitions
from deploy.submission import COMPLETED, Value

ROOT = Path(__file__).parent.parent
NOTHING_TRAINED: dict[str, Value] = {
    "client.warmup-epochs": 0,
    "client.local-epochs": 0,
    "client.distillation-steps": 0,
    "t2i.scores": "none",
    "t2i.evaluation-samples": 10,
    "t2i.inference-steps": 2,  # as many images and bytes as ever, made sooner
    "judge": False,
    "tensorboard": False,
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
min-nodes = 4
model = "cnn"
out = ""
"""
FEDAVG_APPS = '''
"""Flower's FedAvg of a task model that is not trained, as its quick start writes it."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


def load(message, context):
    from client_app.private_data import load_private_data
    from client_app.task_models import Inputs, build_task_model
    from common.config import NodeConfig, RunConfig
    from common.dataset_files import DIGIT_NAMES
    import torch

    torch.set_num_threads(1)
    model = build_task_model(context.run_config["model"], 10, 32)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node = NodeConfig.from_flower(context.node_config)
    data = load_private_data(RunConfig(), node, DIGIT_NAMES, images=True, texts=False)
    return model, data


@client.train()
def train(message, context):
    model, data = load(message, context)
    metrics = MetricRecord({"num-examples": len(data.train)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message, context):
    import torch
    from client_app.learning import evaluate
    from client_app.task_models import Inputs

    model, data = load(message, context)
    images = torch.from_numpy(data.test.images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    accuracy, loss = evaluate(model, Inputs(images), torch.from_numpy(data.test.labels_N))
    metrics = MetricRecord({"num-examples": len(data.test), "accuracy": accuracy, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    from client_app.task_models import build_task_model

    config, times = context.run_config, []
    nodes = config["min-nodes"]
    arrays = ArrayRecord(build_task_model(config["model"], 10, 32).state_dict())
    strategy = FedAvg(
        fraction_evaluate=config["evaluate"],
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes if config["evaluate"] else 0,
        min_available_nodes=nodes,
    )
    # Called before the first round and after each.
    strategy.start(
        grid, arrays, num_rounds=config["rounds"], evaluate_fn=lambda *_: times.append(time.perf_counter())
    )
    Path(config["out"]).write_text(json.dumps(times))
'''


def fedmmkt_seconds(federation: Federation, nodes: int, rounds: int, folder: Path) -> list[float]:
    """Return each round's seconds with clients; the first and the last are no plain rounds and left out."""
    config = NOTHING_TRAINED | {"output-dir": str(folder), "min-nodes": nodes, "rounds": rounds}
    _run(federation, ROOT, config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["seconds"]["clients"] for line in lines[2:-1]]


def fedavg_seconds(
    federation: Federation, nodes: int, rounds: int, model: str, evaluate: float, folder: Path
) -> list[float]:
    """Return each round's seconds, but those of the first and the last."""
    package = folder / "plainfedavg"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(FEDAVG_PROJECT, encoding="utf-8")
    (package / "__init__.py").touch()
    (package / "apps.py").write_text(FEDAVG_APPS, encoding="utf-8")
    out = folder / "times.json"
    _run(
        federation,
        folder,
        {"min-nodes": nodes, "rounds": rounds, "model": model, "evaluate": evaluate, "out": str(out)},
    )
    times = json.loads(out.read_text(encoding="utf-8"))
    return [after - before for before, after in pairwise(times)][1:-1]


def _run(federation: Federation, app: Path, config: dict[str, Value]) -> None:
    log = io.StringIO()
    if federation.run(app, config, log).status != COMPLETED:
        raise RuntimeError(log.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run; the first and the last do not count")
    parser.add_argument("--model", default="cnn", help="task model of every node")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary, local_federation() as federation:
        folder = Path(temporary)
        parts = write_partitions(RunConfig().data, options.nodes, 0, folder / "data")
        for index, part in enumerate(parts):
            name = f"{options.model}-{index}"
            state = folder / "state" / name
            config = {"name": name, "model": options.model, "data-path": str(part), "state-dir": str(state)}
            federation.add_node(name, config, environment={"PYTHONPATH": str(ROOT)})
        federation.wait_for_nodes()
        common = (federation, options.nodes, options.rounds)
        rows = {
            "FedMMKT (one message)": fedmmkt_seconds(*common, folder / "fedmmkt"),
            "FedAvg (train, evaluate)": fedavg_seconds(*common, options.model, 1.0, folder / "both"),
            "FedAvg (train alone)": fedavg_seconds(*common, options.model, 0.0, folder / "train"),
        }
    print(f"\nseconds of a round without training, {options.nodes} {options.model} nodes on this machine")
    for name, seconds in rows.items():
        print(f"{name:26} {statistics.mean(seconds):6.1f}  ({min(seconds):.1f} to {max(seconds):.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

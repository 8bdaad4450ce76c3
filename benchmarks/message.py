"""The time that a deployed client spends on a message, by stage: ``python -m benchmarks.message``.

A deployed client is a new process for every message. Here such processes are started without a SuperNode. Each one
imports the app, loads model and data, answers a batch of 400 images without training, saves its model, and ends. The
first message decodes the node's data and makes a new model. Later messages use the decoded copy and the saved model;
the table shows their medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES, SIDE = 400, 32
STAGES = ("Python and Flower", "torch", "the app", "model and memory", "data", "answer", "all")


def answer(folder: Path, started: float) -> dict[str, float]:
    """Answer the message in ``folder`` as a client process does; return the seconds of each stage."""
    marks = [started]

    def stage() -> float:
        marks.append(time.time())
        return marks[-1] - marks[-2]

    from flwr.app import Context, RecordDict
    from flwr.clientapp import ClientApp  # noqa: F401

    content, run_config, node_config = pickle.loads((folder / "message.pickle").read_bytes())
    seconds = {"Python and Flower": stage()}
    import torch  # noqa: F401

    seconds["torch"] = stage()
    app: Any = importlib.import_module("fedmmkt.client_app.app")
    seconds["the app"] = stage()
    client_module: Any = importlib.import_module("fedmmkt.client_app.client")
    load, reading = client_module.load_own_data, [0.0]

    def timed(*arguments: Any) -> Any:
        start = time.time()
        data = load(*arguments)
        reading[0] = time.time() - start
        return data

    client_module.load_own_data = timed
    context = Context(1, 1, node_config, RecordDict(), run_config)
    request = app.Request.from_content(content)
    client = client_module.Client(context, request.instructions)
    seconds["model and memory"] = stage() - reading[0]
    seconds["data"] = reading[0]
    client.receive(request)
    client.learn()
    payload = client.answer(request.batches[-1])
    RecordDict({**client.report().to_records("report"), **payload.to_records("payload")})
    seconds["answer"] = stage()
    return seconds | {"all": marks[-1] - started}


def measure(repeats: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Answer messages in new processes; return seconds by stage of the first, and medians of the later ones."""
    command = [sys.executable, "-m", "benchmarks.message", "--answer", str(folder), "--started"]
    seconds: list[dict[str, float]] = []
    for _ in range(1 + repeats):
        done = subprocess.run([*command, repr(time.time())], capture_output=True, text=True, check=True)
        seconds.append(json.loads(done.stdout.splitlines()[-1]))
    later = {stage: statistics.median(one[stage] for one in seconds[1:]) for stage in STAGES}
    return seconds[0], later


def write_message(model: str, data: Path, folder: Path) -> None:
    """Write the message of a round and the client's configurations, for `answer` to read."""
    import numpy as np

    from fedmmkt.common.config import RunConfig, to_flower
    from fedmmkt.common.datasets import load_splits
    from fedmmkt.common.images import encode_images
    from fedmmkt.common.payloads import Instructions, Request, SyntheticBatch

    classes = load_splits(RunConfig().data, 0).classes
    rng = np.random.default_rng(0)
    images, offsets = encode_images(rng.integers(0, 256, (SAMPLES, SIDE, SIDE, 3), dtype=np.uint8))
    batch = SyntheticBatch(
        batch_id="a-1",
        round=1,
        prompts=tuple(f"the digit {classes[index % len(classes)]}" for index in range(SAMPLES)),
        prompted_N=np.arange(SAMPLES) % len(classes),
        images=images,
        offsets=offsets,
    )
    instructions = Instructions(run_key="a", round=1, classes=classes, votes=True, anchor_size=0)
    nothing_trained = {"client.warmup-epochs": 0, "client.local-epochs": 0, "client.distillation-steps": 0}
    run_config = to_flower(RunConfig()) | nothing_trained
    state = str(folder / "state")
    node_config = {"name": model, "model": model, "data-path": str(data), "state-dir": state, "share-votes": True}
    sent = batch.without_images() if model.startswith("text") else batch
    content = Request(instructions, (sent,)).to_content()
    folder.mkdir()
    (folder / "message.pickle").write_bytes(pickle.dumps((content, run_config, node_config)))


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.message", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["cnn", "text", "dual"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        print(json.dumps(answer(arguments.answer, arguments.started)))
        return
    from fedmmkt.common.config import DataConfig
    from fedmmkt.deploy.partition import write_partitions

    print(f"| seconds | {' | '.join(STAGES)} |\n{'|---' * (len(STAGES) + 1)}|")
    with tempfile.TemporaryDirectory() as home:
        data = write_partitions(DataConfig(), 4, 0, Path(home) / "data")[0]
        for model in arguments.models:
            write_message(model, data, Path(home) / model)
            for name, seconds in zip(("first", "later"), measure(arguments.repeats, Path(home) / model), strict=True):
                cells = " | ".join(f"{seconds[stage]:.2f}" for stage in STAGES)
                print(f"| {model}, {name} message | {cells} |", flush=True)


if __name__ == "__main__":
    main()

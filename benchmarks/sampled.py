"""The server's memory with many connected clients of which a round asks a part: ``python -m benchmarks.sampled``.

Each case is a run in a process of its own, with the starter T2I, the demo's 400 images a round, and clients that answer
with random logits at once. So what differs is what the server keeps for its clients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks import process_memory
from fedmmkt.common.config import RunConfig, Setting, to_flower
from fedmmkt.common.payloads import ClientReport, DistillationPayload, FinalEvaluation, Request
from fedmmkt.deploy.in_process import InProcessGrid

CASES = ((100, 1.0), (1000, 0.1))  # Connected clients, and the fraction that a round asks: 100 in both.
ROUNDS = 3

app = ClientApp()


def _report(context: Context, kept: tuple[str, ...] = ()) -> ClientReport:
    name = f"client-{context.node_id}"
    settings = {"client": name, "model": "mlp", "modality": "image", "examples": 10, "accuracy": 0.5, "loss": 1.0}
    return ClientReport.model_validate(settings | {"kept": kept, "awaiting": kept[-1:]})


@app.evaluate()
@app.train("distill")
def _measure(message: Message, context: Context) -> Message:
    return Message(RecordDict(dict(_report(context).to_records("report"))), reply_to=message)


@app.train()
def _train(message: Message, context: Context) -> Message:
    request = Request.from_content(message.content)
    batch, classes = request.batches[-1], len(request.instructions.classes)
    logits_NC = np.random.default_rng(context.node_id).normal(size=(len(batch), classes)).astype(np.float16)
    counts_C = np.bincount(np.arange(10) % classes, minlength=classes)
    payload = DistillationPayload(batch_id=batch.batch_id, logits_NC=logits_NC, class_counts_C=counts_C)
    report = _report(context, tuple(one.batch_id for one in request.batches))
    return Message(RecordDict({**report.to_records("report"), **payload.to_records("payload")}), reply_to=message)


@app.evaluate("final")
def _evaluate_finally(message: Message, context: Context) -> Message:
    counts_C = np.ones(len(Request.from_content(message.content).instructions.classes), np.int64)
    evaluation = FinalEvaluation(examples_C=counts_C, tested_C=counts_C, correct_C=counts_C)
    records = {**_report(context).to_records("report"), **evaluation.to_records("evaluation")}
    return Message(RecordDict(records), reply_to=message)


def run(clients: int, fraction: float) -> dict[str, float]:
    """Run in this process; return its largest memory in MB, and the seconds of a round."""
    from fedmmkt.server_app.app import build_strategy

    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Setting] = {
            **{"output-dir": folder, "rounds": ROUNDS, "tracker": "", "judge": False},
            **{"fraction-train": fraction, "fraction-evaluate": fraction, "feedback": "logits"},
            "learn-early": False,
            **{"t2i.inference-steps": 2, "t2i.adaptation-steps": 2},
        }
        config = to_flower(RunConfig()) | changes
        grid = InProcessGrid("benchmarks.sampled:app", config, [{}] * clients)
        strategy = build_strategy(RunConfig.from_flower(config), 1)
        began = time.monotonic()
        strategy.start(grid)
        seconds = (time.monotonic() - began) / ROUNDS
        asked = strategy.recorder.run_folder.read_metrics()[-2]["replies"]["asked"]
    return {
        "asked": len(asked),
        "seconds": seconds,
        "peak": (process_memory.peak() or 0) / 1e6,
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampled", description=__doc__)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(run(int(options.case[0]), float(options.case[1]))))
        return 0
    print(
        "| clients | fraction-train | asked in a round | largest memory (MB) | seconds a round |\n|---|---|---|---|---|"
    )
    for clients, fraction in CASES:
        command = [sys.executable, "-m", "benchmarks.sampled", "--case", str(clients), str(fraction)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        told = json.loads(answer.stdout.splitlines()[-1])
        print(f"| {clients} | {fraction} | {told['asked']} | {told['peak']:.0f} | {told['seconds']:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

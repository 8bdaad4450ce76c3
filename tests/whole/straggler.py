"""The clients of a test: the last partition is twice as slow as the rounds, whatever these take."""

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmmkt.client_app import app as honest

SLOW = 2  # Partition.
app = ClientApp()


def recorded_rounds(context: Context) -> int:
    metrics = Path(context.run_config["output-dir"]) / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return honest.evaluate_model(message, context)


@app.train("distill")
def _distill(message: Message, context: Context) -> Message:
    return honest.distill(message, context)


@app.train()
def _train(message: Message, context: Context) -> Message:
    reply = honest.train_round(message, context)
    if context.node_config["partition-id"] == SLOW:
        over = message.content["instructions"]["round"] + 2  # Lines, of rounds from 0 to the next one.
        while recorded_rounds(context) < min(over, context.run_config["rounds"]):
            time.sleep(0.02)
    return reply

"""The clients of a test: the last partition is twice as slow as the rounds, whatever these take."""

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmmkt.client_app import app as honest

SLOW = 2  # Partition.
app = ClientApp()


def last_round(context: Context) -> int:
    """Return the last round that has a checkpoint; metrics are written later, beside the next round."""
    checkpoints = Path(context.run_config["output-dir"], "checkpoints").glob("round-*")
    return max((int(folder.name.removeprefix("round-")) for folder in checkpoints), default=-1)


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
        over = message.content["instructions"]["round"] + 1
        while last_round(context) < min(over, context.run_config["rounds"] - 1):
            time.sleep(0.02)
    return reply

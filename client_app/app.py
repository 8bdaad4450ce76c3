"""The ClientApp: it gets two messages per round, and answers the second with logits.

``train.early`` learns, before the new batch is there; ``train`` answers that batch, and learns first if no early
message came (as with ``learn-early=false``). ``train.distill`` learns a last time. ``evaluate`` changes nothing.
``evaluate.final`` measures by class, at the end of a run. ``query.classes`` returns the client's classes, if a node
with data of its own shares them.
"""

from __future__ import annotations

from contextlib import suppress
from logging import DEBUG, ERROR, getLogger
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from flwr.supercore.logger import update_console_handler

from fedmmkt.client_app.client import Client, state_folders
from fedmmkt.client_app.data.private_data import held_classes
from fedmmkt.client_app.memory import DEFAULT_FOLDER, plain_name
from fedmmkt.client_app.privacy.mode import has_budget
from fedmmkt.client_app.refusals import RefusedError, discreet, refused_as
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.common.failures import describe, write_traceback
from fedmmkt.common.payloads import ClassReport, PayloadError, Request

logger = getLogger("flwr")


def answer_failures(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer an exception with its text in one line; the node's state folder gets the traceback.

    An exception that leaves the app makes Flower log its traceback several times.
    """
    update_console_handler(timestamps=True, colored=False)  # Its output may be a log file.
    try:
        return call_next(message, context)
    except Exception as error:
        reason, file = describe(error), _traceback_file(context)
        kept = write_traceback(file, error)
        # In simulation, the server's log is the same, and it says the reason.
        level = DEBUG if "partition-id" in context.node_config else ERROR
        logger.log(level, "%s (%s)", reason, f"traceback: {file}" if kept else "no traceback could be kept")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _traceback_file(context: Context) -> Path:
    """Return the file of a node's last traceback, below its state folder as far as the settings can be read."""
    folder, name = DEFAULT_FOLDER, f"node-{context.node_config.get('partition-id', context.node_id)}"
    with suppress(ConfigError):
        node = NodeConfig.from_flower(context.node_config)
        name = plain_name(node.name) or name
        folder = state_folders(RunConfig.from_flower(context.run_config), node)[0]
    return folder.expanduser() / "errors" / f"{name}.txt"


app = ClientApp(mods=[answer_failures])


@app.train()
@discreet
def train_round(message: Message, context: Context) -> Message:
    """Train on the last soft targets and on private data, then answer the new batch."""
    request = Request.from_content(message.content)
    if not request.batches:
        raise PayloadError("a round needs a synthetic batch, and the message holds none")
    client = Client(context, request.instructions)
    with client.alone():
        client.receive(request)
        batch = request.batches[-1]
        # In private mode no answer depends on the model; so a spent budget refuses before anything is learned and kept.
        private = client.answer(batch) if client.private else None
        client.learn()
        payload = private or client.answer(batch)
        report = client.report()
    return Message(RecordDict({**report.to_records("report"), **payload.to_records("payload")}), reply_to=message)


@app.train("early")
@discreet
def learn_early(message: Message, context: Context) -> Message:
    """Train on the last soft targets and on private data, before the new batch is there.

    A client with a privacy budget waits for the batch, since a spent budget refuses a round before anything is learned.
    """
    request = Request.from_content(message.content)
    client = Client(context, request.instructions)
    if client.private:
        return Message(RecordDict(), reply_to=message)
    with client.alone():
        client.receive(request)
        client.learn()
        report = client.report(measured=False)
    return Message(RecordDict(report.to_records("report")), reply_to=message)


@app.train("distill")
@discreet
def distill(message: Message, context: Context) -> Message:
    """Train on the last soft targets and on private data, write the model card, and report; there is no new batch."""
    request = Request.from_content(message.content)
    client = Client(context, request.instructions)
    with client.alone():
        client.receive(request)
        client.learn()
        report = client.report()
        client.write_card(report)
    return Message(RecordDict(report.to_records("report")), reply_to=message)


@app.evaluate()
@discreet
def evaluate_model(message: Message, context: Context) -> Message:
    """Report on the current model, without training."""
    client = Client(context, Request.from_content(message.content).instructions)
    return Message(RecordDict(client.report().to_records("report")), reply_to=message)


@app.evaluate("final")
@discreet
def evaluate_finally(message: Message, context: Context) -> Message:
    """Report on the final model, with its measures by class and those of a model that learned alone."""
    client = Client(context, Request.from_content(message.content).instructions)
    report, evaluation = client.report(), client.final_evaluation()
    return Message(RecordDict({**report.to_records("report"), **evaluation.to_records("evaluation")}), reply_to=message)


@app.query("classes")
@discreet
def report_classes(message: Message, context: Context) -> Message:
    """Return the classes of which this client holds examples."""
    config, node = RunConfig.from_flower(context.run_config), NodeConfig.from_flower(context.node_config)
    if node.has_own_data and not node.share_classes:
        raise RefusedError("the node refused: its node-config has no share-classes=true")
    if has_budget(config, node):
        raise RefusedError(
            "the node refused: names of classes have no noise, and it has a privacy budget; name them in 'data.classes'"
        )
    with refused_as("data", context.node_config):
        report = ClassReport(classes=held_classes(config, node))
    return Message(RecordDict(dict(report.to_records("classes"))), reply_to=message)

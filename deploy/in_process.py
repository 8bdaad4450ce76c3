"""A Flower grid without Flower's processes: the same messages and apps, with direct calls.

Tests and benchmarks use it when the start of SuperLink and Ray would take longer than the run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

RunConfigValues = Mapping[str, bool | int | float | str]


class InProcessGrid(Grid):
    """Answers messages by direct calls of a ClientApp, one after the other or in worker processes.

    Parameters
    ----------
    app : str
        The ClientApp of all nodes, as ``module:name``.
    run_config : mapping
        Flower's flat run-config.
    node_configs : list of mapping
        One node-config per node.
    workers : int
        Number of worker processes. With 0, the app is called in this process.
    """

    def __init__(
        self,
        app: str,
        run_config: RunConfigValues,
        node_configs: list[Mapping[str, bool | int | float | str]],
        workers: int = 0,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # Flower's Message needs it.
        self.app = app
        self.contexts = {
            node_id: Context(1, node_id, dict(node_config), RecordDict(), dict(run_config))
            for node_id, node_config in enumerate(node_configs, start=1)
        }
        self.pending: dict[str, Future[Message] | Message] = {}
        self.ids = count(1)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context) if workers else None

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Not available: there is no Flower run."""
        raise RuntimeError("an in-process grid belongs to no Flower run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not available: Flower replaced this method by ``Message(...)``."""
        raise RuntimeError("use Message(...)")

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes."""
        return list(self.contexts)

    def get_nodes(self) -> Iterable[Any]:
        """Not available: only the ids of the nodes are known."""
        raise RuntimeError("an in-process grid knows its nodes by id only")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages to the app; return the ids of the messages."""
        pushed = []
        for message in messages:
            message_id = f"message-{next(self.ids)}"
            arguments = (self.app, _identified(message, message_id), self.contexts[message.metadata.dst_node_id])
            self.pending[message_id] = self.pool.submit(_answer, *arguments) if self.pool else _answer(*arguments)
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived."""
        replies = []
        for message_id in message_ids:
            reply = self.pending.get(message_id)
            if isinstance(reply, Future):
                if not reply.done():
                    continue
                reply = reply.result()
            if reply is not None:
                del self.pending[message_id]
                replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for all replies."""
        pending = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(pending):
            replies += self.pull_messages(pending)
            time.sleep(0.01)
        return replies

    def close(self) -> None:
        """Stop the worker processes."""
        if self.pool:
            self.pool.shutdown()


def _identified(message: Message, message_id: str) -> Message:
    sent = message.metadata
    metadata = Metadata(
        run_id=1,
        message_id=message_id,
        src_node_id=0,
        dst_node_id=sent.dst_node_id,
        reply_to_message_id="",
        group_id=sent.group_id,
        created_at=sent.created_at,
        ttl=sent.ttl,
        message_type=sent.message_type,
    )
    return Message(metadata=metadata, content=message.content)  # type: ignore[call-overload]


def _answer(app: str, message: Message, context: Context) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, context.node_id
    module, _, name = app.partition(":")
    try:
        reply: Message = getattr(importlib.import_module(module), name)(message, context)
    except Exception as error:  # As in Flower, an exception of a client becomes an error reply.
        return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
    return reply

"""One exchange with clients: send requests, receive replies as they arrive, and classify each reply.

An invalid reply excludes its sender from this round, but never stops the run. The sender of a reply is known from the
message that it answers, because Flower's own error replies carry the SuperLink's id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmmkt.common.payloads import ClientReport, DistillationPayload, PayloadError, record_bytes

POLL_SECONDS = 0.1
NOT_TAKEN = "Flower did not take the message to the node"
NO_ANSWER = "no answer before the round closed"
WENT_OFFLINE = "the node went offline during the round"


@dataclass(frozen=True)
class Answer:
    """A valid reply after parsing: the client's report, and its payload if one was requested."""

    report: ClientReport
    payload: DistillationPayload | None = None

    @property
    def required_payload(self) -> DistillationPayload:
        """The payload; raises ``ValueError`` if there is none."""
        if self.payload is None:
            raise ValueError(f"the reply of {self.report.client} holds no payload")
        return self.payload


@dataclass(frozen=True)
class Reply:
    """The result of one message.

    Attributes
    ----------
    kind : str
        ``answered``: the reply is valid. ``rejected``: the reply is an error or invalid, or Flower did not accept the
        message. ``offline``: the node went offline. ``unanswered``: there was no reply before the exchange closed.
        ``late``: the reply answers a message of an earlier exchange.
    node_id : int
        The node that got the message.
    message_id : str
        Id of the message to the node; empty if Flower did not accept it.
    message : Message, optional
        The reply of the node.
    answer : Answer, optional
        The parsed reply, if it is valid.
    reason : str
        Why there is no valid answer.
    """

    kind: Literal["answered", "rejected", "offline", "unanswered", "late"]
    node_id: int
    message_id: str
    message: Message | None = None
    answer: Answer | None = None
    reason: str = ""

    @property
    def bytes(self) -> int:
        """Size of the reply's content in bytes; 0 if there is none."""
        return record_bytes(self.message.content) if self.message is not None and self.message.has_content() else 0


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    read: Callable[[Message], Answer],
    deadline: float,
    quorum: float,
    overdue: Mapping[str, int],
) -> Iterator[Reply]:
    """Send messages and yield replies as they arrive, until all are there or the deadline passes with a quorum.

    There is exactly one `Reply` per message. Replies to messages of earlier exchanges are yielded as well.

    Parameters
    ----------
    grid : Grid
        Flower's connection to the nodes.
    messages : iterable of Message
        One message per node.
    read : callable
        Parses a reply into an `Answer`, or raises `PayloadError`.
    deadline : float
        Seconds after which the exchange closes if the quorum is met.
    quorum : float
        Fraction of the messages that must be answered before the exchange can close at the deadline. Any answer counts,
        but at least one must be valid.
    overdue : mapping of str to int
        Unanswered messages of earlier exchanges, with their nodes.
    """
    outgoing = list(messages)
    pending = _push(grid, outgoing)
    for message in outgoing:
        if (node_id := message.metadata.dst_node_id) not in pending.values():
            yield Reply("rejected", node_id, "", reason=NOT_TAKEN)
    awaited = dict(overdue)
    closing = time.monotonic() + deadline
    names: dict[str, int] = {}
    while pending:
        arrived = list(grid.pull_messages([*pending, *awaited]))
        for message in arrived:
            message_id = message.metadata.reply_to_message_id
            if message_id in awaited:
                yield Reply("late", awaited.pop(message_id), message_id, message)
            else:
                yield _read(message, read, pending.pop(message_id), names)
        answered = len(outgoing) - len(pending)
        if names and time.monotonic() > closing and answered >= quorum * len(outgoing):
            break
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
    for message_id, node_id in pending.items():
        yield Reply("unanswered", node_id, message_id, reason=NO_ANSWER)


def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send messages; return the node of each message that Flower accepted.

    For other messages, Flower returns an empty id or no id.
    """
    pushed = zip(grid.push_messages(messages), messages, strict=False)
    return {message_id: message.metadata.dst_node_id for message_id, message in pushed if message_id}


def _read(message: Message, read: Callable[[Message], Answer], node_id: int, names: dict[str, int]) -> Reply:
    """Parse and classify a reply; ``names`` maps each client name in this exchange to its node."""
    message_id = message.metadata.reply_to_message_id
    if message.has_error():
        if message.error.code == ErrorCode.NODE_UNAVAILABLE:
            return Reply("offline", node_id, message_id, reason=WENT_OFFLINE)
        reason = f"error {message.error.code}: {(message.error.reason or '').strip()}"
        return Reply("rejected", node_id, message_id, message, reason=reason)
    try:
        answer = read(message)
        if names.setdefault(answer.report.client, node_id) != node_id:
            raise PayloadError(f"client name {answer.report.client!r} is taken by another node")
    except PayloadError as error:
        return Reply("rejected", node_id, message_id, message, reason=str(error))
    return Reply("answered", node_id, message_id, message, answer)

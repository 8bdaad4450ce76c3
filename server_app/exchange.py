"""One exchange with clients: push requests, pull replies as they come, keep what is valid.

A reply that does not fit costs its sender's voice in this round and never the run. Which node a reply is from,
the message that it answers tells: Flower's own error replies carry the SuperLink's id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.payloads import ClientReport, DistillationPayload, PayloadError, record_bytes

POLL_SECONDS = 0.1
NO_ANSWER = "no answer before the round closed"
WENT_OFFLINE = "the node went offline during the round"


@dataclass(frozen=True)
class Answer:
    """A valid reply: who sent it, and its payload where one was asked for."""

    node_id: int
    report: ClientReport
    payload: DistillationPayload | None = None


@dataclass
class Replies:
    """What came of an exchange.

    Attributes
    ----------
    answers : list of Answer
        Valid replies, ordered by client name, so that sums do not depend on who was first.
    rejected : dict of str to str
        Reason by node, for errors and invalid replies.
    missing : dict of str to str
        Reason by node, for those that had not answered when the exchange closed, or went offline.
    gone : set of str
        Those of them that went offline.
    overdue : dict of str to int
        Node by message, for messages that may still be answered.
    late : list of Message
        Replies to messages of earlier exchanges.
    bytes_down, bytes_up : int
        Content sent and received, over all nodes.
    """

    answers: list[Answer] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    overdue: dict[str, int] = field(default_factory=dict)
    late: list[Message] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    parse: Callable[[Message], Answer],
    node_name: Callable[[int], str],
    deadline: float,
    quorum: float,
    overdue: Collection[str],
    on_answer: Callable[[Answer, int], object],
    on_rejected: Callable[[str, str], object],
) -> Replies:
    """Send messages and gather replies until all are in, or the deadline has passed with a quorum.

    Parameters
    ----------
    grid : Grid
        Flower's.
    messages : iterable of Message
        One a node.
    parse : callable
        Turns a reply into an `Answer`, or raises `PayloadError`.
    node_name : callable
        Names a node in logs.
    deadline : float
        Seconds after which the exchange closes if the quorum is met.
    quorum : float
        Part of the messages that must have been answered, in whatever way but one of them validly, to close at the
        deadline.
    overdue : collection of str
        Messages of earlier exchanges that may still be answered.
    on_answer, on_rejected : callable
        Are told of each valid reply with the number of those so far, and of each rejected one.
    """
    outgoing = list(messages)
    replies = Replies(bytes_down=sum(record_bytes(message.content) for message in outgoing))
    pending = _push(grid, outgoing)
    for message in outgoing:
        if message.metadata.dst_node_id not in pending.values():
            replies.rejected[node_name(message.metadata.dst_node_id)] = "Flower did not take the message to the node"
    awaited = set(overdue)
    closing = time.monotonic() + deadline
    clients: dict[str, int] = {}
    while pending:
        arrived = list(grid.pull_messages([*pending, *awaited]))
        for reply in arrived:
            message_id = reply.metadata.reply_to_message_id
            if message_id in awaited:
                awaited.remove(message_id)
                replies.late.append(reply)
                replies.bytes_up += record_bytes(reply.content) if reply.has_content() else 0
                continue
            node_id = pending.pop(message_id)
            name = node_name(node_id)
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                replies.missing[name] = WENT_OFFLINE
                replies.gone.add(name)
                continue
            try:
                answer = _checked(reply, parse, node_id, clients, replies)
            except PayloadError as error:
                replies.rejected[name] = str(error)
                on_rejected(name, str(error))
            else:
                replies.answers.append(answer)
                on_answer(answer, len(replies.answers))
        answered = len(outgoing) - len(pending)
        if replies.answers and time.monotonic() > closing and answered >= quorum * len(outgoing):
            break
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
    replies.overdue = pending
    replies.missing |= {node_name(node_id): NO_ANSWER for node_id in pending.values()}
    replies.answers.sort(key=lambda answer: answer.report.client)
    return replies


def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Return the node of each message that Flower took; for another it gives no id, or none at all."""
    pushed = zip(grid.push_messages(messages), messages, strict=False)
    return {message_id: message.metadata.dst_node_id for message_id, message in pushed if message_id}


def _checked(
    reply: Message, parse: Callable[[Message], Answer], node_id: int, clients: dict[str, int], replies: Replies
) -> Answer:
    if reply.has_error():
        raise PayloadError(f"error {reply.error.code}: {(reply.error.reason or '').strip()}")
    replies.bytes_up += record_bytes(reply.content)
    answer = parse(reply)
    if clients.setdefault(answer.report.client, node_id) != node_id:
        raise PayloadError(f"client name {answer.report.client!r} is taken by another node")
    return Answer(node_id, answer.report, answer.payload)

"""One exchange with clients: push requests, pull replies as they come, keep what is valid.

A reply that does not fit costs its sender's voice in this round and never the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from common.payloads import ClientReport, DistillationPayload, PayloadError, record_bytes

POLL_SECONDS = 0.1


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
    missing : list of str
        Nodes that had not answered when the exchange closed.
    bytes_down, bytes_up : int
        Content sent and received, over all nodes.
    """

    answers: list[Answer] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    parse: Callable[[Message], Answer],
    node_name: Callable[[int], str],
    deadline: float,
    quorum: float,
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
        Part of the messages that must have been answered, in whatever way, to close at the deadline.
    on_answer, on_rejected : callable
        Are told of each valid reply with the number of those so far, and of each rejected one.
    """
    outgoing = list(messages)
    replies = Replies(bytes_down=sum(record_bytes(message.content) for message in outgoing))
    pending = dict(zip(grid.push_messages(outgoing), (m.metadata.dst_node_id for m in outgoing), strict=True))
    closing = time.monotonic() + deadline
    clients: dict[str, int] = {}
    while pending:
        arrived = list(grid.pull_messages(list(pending)))
        for reply in arrived:
            node_id = pending.pop(reply.metadata.reply_to_message_id)
            try:
                answer = _checked(reply, parse, node_id, clients, replies)
            except PayloadError as error:
                replies.rejected[node_name(node_id)] = str(error)
                on_rejected(node_name(node_id), str(error))
            else:
                replies.answers.append(answer)
                on_answer(answer, len(replies.answers))
        answered = len(outgoing) - len(pending)
        if pending and time.monotonic() > closing and answered >= quorum * len(outgoing):
            break
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
    replies.missing = sorted(node_name(node_id) for node_id in pending.values())
    replies.answers.sort(key=lambda answer: answer.report.client)
    return replies


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

"""One exchange with clients: send requests, receive replies as they arrive, and classify each reply.

An invalid reply excludes its sender from this round, but never stops the run. The sender of a reply is known from the
message that it was asked for, and never from what the reply says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import WARNING
from typing import Literal

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedmmkt.common.lack_of_memory import LACK_OF_MEMORY, is_lack_of_memory
from fedmmkt.common.payloads import ClientReport, DistillationPayload, FinalEvaluation, PayloadError, record_bytes
from fedmmkt.common.plain_text import printable
from fedmmkt.server_app.inbox import pull_reply

POLL_SECONDS = 0.1
NAMED = 6  # Most clients that a line names.
MOST_POLL_SECONDS = 3.0  # As Flower's own strategies.
PATIENCE = 0.05  # A pause is at most this fraction of the time waited so far, so that polling costs no round more.
IDLE = 3  # Each message is asked for by a call of its own (13 ms), so the SuperLink is left alone this much longer.
NOT_TAKEN = "Flower did not take the message to the node"
NO_ANSWER = "no answer before the round closed"
WENT_OFFLINE = "the node went offline during the round"
BUSY = "still busy with an earlier round, and not asked"

Admit = Callable[[int, ClientReport], None]


@dataclass(frozen=True)
class Answer:
    """A valid reply after parsing: the client's report, and its payload or final evaluation if one was requested."""

    report: ClientReport
    payload: DistillationPayload | None = None
    evaluation: FinalEvaluation | None = None

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
        ``late``: the reply answers a message of an earlier exchange. ``busy``: the message was not sent, because the
        node has not answered an earlier one.
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

    kind: Literal["answered", "rejected", "offline", "unanswered", "late", "busy"]
    node_id: int
    message_id: str
    message: Message | None = None
    answer: Answer | None = None
    reason: str = ""

    @property
    def counts_late(self) -> bool:
        """Whether it is late, and answers a batch that is still taught."""
        return self.kind == "late" and self.answer is not None and self.answer.payload is not None

    @property
    def bytes(self) -> int:
        """Size of the reply's content in bytes; 0 if there is none."""
        return record_bytes(self.message.content) if self.message is not None and self.message.has_content() else 0


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    read: Callable[[Message], Answer],
    admit: Admit,
    deadline: float,
    quorum: float,
    overdue: Mapping[str, int],
    most_bytes: int,
    least_valid: int = 1,
    waiting: Callable[[Collection[int]], object] = lambda node_ids: None,
    read_late: Callable[[str, Message], Answer] | None = None,
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
    admit : callable
        Called with a node and its report; raises `PayloadError` if the node may not answer under this name.
    deadline : float
        Seconds after which the exchange closes if the quorum is met.
    quorum : float
        Fraction of the messages that must be answered before the exchange can close at the deadline. Any answer counts,
        but ``least_valid`` must be valid.
    overdue : mapping of str to int
        Unanswered messages of earlier exchanges, with their nodes.
    most_bytes : int
        Largest size of a reply.
    least_valid : int
        Valid replies without which the exchange does not close.
    waiting : callable
        Called again and again with the nodes that have not answered yet.
    read_late : callable, optional
        Parses the reply to an overdue message, given its id. If it is there, nodes with an overdue message are sent
        their new one when they have answered the old one, and not at all if the exchange closes before.
    """
    outgoing = list(messages)
    busy = set(overdue.values()) if read_late else set()
    held = {message.metadata.dst_node_id: message for message in outgoing if message.metadata.dst_node_id in busy}
    pending, refused = push(grid, [message for message in outgoing if message.metadata.dst_node_id not in held])
    yield from refused
    awaited = dict(overdue)
    began = time.monotonic()
    asked, valid = len(outgoing) - len(held), 0
    while pending or (held and valid < least_valid):
        swept, any_arrived = time.monotonic(), False
        for message_id, node_id in [*pending.items(), *awaited.items()]:
            reply = pull(grid, message_id, node_id, most_bytes)
            if reply is None:
                continue
            any_arrived = True
            if awaited.pop(message_id, None) is not None:
                yield _late(reply, read_late, admit)
                if node_id in held and node_id not in awaited.values():
                    sent, refused = push(grid, [held.pop(node_id)])
                    pending, asked = pending | sent, asked + 1
                    yield from refused
                continue
            del pending[message_id]
            reply = _read(reply, read, admit)
            valid += reply.kind == "answered"
            yield reply
        now, answered = time.monotonic(), asked - len(pending)
        if valid >= least_valid and now - began > deadline and answered >= quorum * asked:
            break
        if not any_arrived and (pending or held):
            waiting([*pending.values(), *held])
            time.sleep(pause(now - began, now - swept))
    for message_id, node_id in pending.items():
        yield Reply("unanswered", node_id, message_id, reason=NO_ANSWER)
    for node_id in held:
        yield Reply("busy", node_id, "", reason=BUSY)


def pause(waited: float, swept: float) -> float:
    """Return the seconds until the next poll.

    Parameters
    ----------
    waited : float
        Seconds since the exchange began: polls become rarer, down to one in `MOST_POLL_SECONDS`.
    swept : float
        Seconds that the last poll of all messages took.
    """
    return max(POLL_SECONDS, min(PATIENCE * waited, MOST_POLL_SECONDS), IDLE * swept)


def causes_of(problems: Mapping[str, str], total: int) -> list[str]:
    """Return a line for each distinct problem: how many of ``total`` clients have it, which, and what it is."""
    clients = {reason: [name for name in problems if problems[name] == reason] for reason in problems.values()}
    listed = {reason: f" ({names})" if (names := listed_names(found)) else "" for reason, found in clients.items()}
    return [f"{len(found)} of {total} clients{listed[reason]}: {reason}" for reason, found in clients.items()]


def listed_names(clients: Sequence[str]) -> str:
    """List the first clients by name, without nodes that never told theirs: their long numbers say nothing."""
    names = [name for name in clients if not name.startswith("node ")]
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])


def push(grid: Grid, messages: list[Message]) -> tuple[dict[str, int], list[Reply]]:
    """Send messages; return the node of each message that Flower accepted, and what became of the others.

    For other messages, Flower returns an empty id or no id.
    """
    if not messages:
        return {}, []
    pushed = zip(_push_messages(grid, messages), messages, strict=False)
    accepted = {message_id: message.metadata.dst_node_id for message_id, message in pushed if message_id}
    nodes = [message.metadata.dst_node_id for message in messages]
    taken = set(accepted.values())
    return accepted, [Reply("rejected", node_id, "", reason=NOT_TAKEN) for node_id in nodes if node_id not in taken]


def _push_messages(grid: Grid, messages: list[Message]) -> Iterable[str]:
    """Push messages; if the connection breaks in the middle, push them once more, as new ones."""
    try:
        return grid.push_messages(messages)
    except ObjectPushError:
        # Flower tries an object again whose confirmation was lost, and then takes it as refused, since it is there.
        log(WARNING, "The connection to the SuperLink broke while messages were sent; they are sent again")
        return grid.push_messages([_copy(message) for message in messages])


def _copy(message: Message) -> Message:
    sent = message.metadata
    return Message(message.content, sent.dst_node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)


def pull(grid: Grid, message_id: str, node_id: int, most_bytes: int) -> Reply | None:
    """Pull the reply to a message; None if there is none yet. A valid one is not parsed yet."""
    try:
        message = pull_reply(grid, message_id, most_bytes)
    except PayloadError as error:
        return Reply("rejected", node_id, message_id, reason=printable(str(error)))
    return None if message is None else Reply("answered", node_id, message_id, message)


def _late(reply: Reply, read_late: Callable[[str, Message], Answer] | None, admit: Admit) -> Reply:
    """Parse the reply to an overdue message, if anybody wants it."""
    if read_late is None:
        return replace(reply, kind="late", reason="")
    return replace(_read(reply, partial(read_late, reply.message_id), admit), kind="late")


def _read(reply: Reply, read: Callable[[Message], Answer], admit: Admit) -> Reply:
    """Parse a reply, and admit its sender."""
    if reply.message is None:
        return reply
    if reply.message.has_error():
        error = reply.message.error
        if error.code == ErrorCode.NODE_UNAVAILABLE:
            return replace(reply, kind="offline", message=None, reason=WENT_OFFLINE)
        reason = (error.reason or "").strip()
        if is_lack_of_memory(reason):
            return replace(reply, kind="rejected", reason=LACK_OF_MEMORY)
        if error.code != ErrorCode.CLIENT_APP_RAISED_EXCEPTION or not reason:  # Else it is the client's own.
            reason = f"error {error.code}: {reason}"
        return replace(reply, kind="rejected", reason=printable(reason))
    try:
        answer = read(reply.message)
        admit(reply.node_id, answer.report)
    except PayloadError as error:
        return replace(reply, kind="rejected", reason=printable(str(error)))
    return replace(reply, answer=answer)

"""Pulling of replies one by one, so that what one node sent cannot cost another node's reply.

Flower forgets all replies that it hands out in one call, and then puts each together from the objects that its node
uploaded. If that fails for one, all are lost. Here each reply is pulled by itself. Its size is bounded before it is put
together: an array may name the same chunk any number of times, so a small upload may claim any size.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from flwr.app import Array, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.superlink.grid import http_grid

from fedmmkt.common.payloads import PayloadError

MAX_OBJECTS = 10_000  # An honest reply has about ten, and one more for each 5 MB.
MAX_RECORD_BYTES = 8_000_000  # Of an object that is no part of an array.
ASK_SECONDS = 0.5
UPLOAD_SECONDS = 120  # A reply is announced before its objects are uploaded; meanwhile others wait.


def pull_reply(grid: Grid, message_id: str, most_bytes: int) -> Message | None:
    """Return the reply to a message; None if there is none yet.

    Parameters
    ----------
    grid : Grid
        Flower's connection to the nodes.
    message_id : str
        The message that was sent.
    most_bytes : int
        Largest size of a reply, both as it was uploaded and as it is put together.

    Raises
    ------
    PayloadError
        If there is a reply that cannot be read, is too large, or says that it answers another message.
    """
    with _bounded(most_bytes):
        arrived = list(grid.pull_messages([message_id]))
    if not arrived:
        return None
    if arrived[0].metadata.reply_to_message_id != message_id:  # The node wrote it.
        raise PayloadError("the reply says that it answers another message")
    return arrived[0]


def ask(
    grid: Grid, messages: Iterable[Message], seconds: float, most_bytes: int
) -> Iterator[tuple[int, Message | PayloadError]]:
    """Send messages, and yield each reply with its node as it arrives, until all are there or the time is over.

    In place of a reply that `pull_reply` refuses there is the error.
    """
    outgoing = list(messages)
    pushed = zip(grid.push_messages(outgoing), outgoing, strict=False)
    pending = {message_id: message.metadata.dst_node_id for message_id, message in pushed if message_id}
    closing = time.monotonic() + seconds
    while pending and time.monotonic() < closing:
        for message_id, node_id in list(pending.items()):
            try:
                reply: Message | PayloadError | None = pull_reply(grid, message_id, most_bytes)
            except PayloadError as error:
                reply = error
            if reply is not None:
                del pending[message_id]
                yield node_id, reply
        if pending:
            time.sleep(ASK_SECONDS)


@contextmanager
def _bounded(most_bytes: int) -> Iterator[None]:
    """Let Flower's grid pull objects and put them together with bounds inside the block."""
    bounded = {
        "pull_objects": partial(_pull_objects, most_bytes),
        "inflate_object_from_contents": partial(inflate, most_bytes),
    }
    original = {name: getattr(http_grid, name) for name in bounded}
    try:
        vars(http_grid).update(bounded)
        yield
    finally:
        vars(http_grid).update(original)


def _pull_objects(
    most_bytes: int, object_ids: list[str], pull_object_fn: Callable[[str], bytes]
) -> Mapping[str, bytes]:
    """Pull each object once, as long as they are not too many and not too large."""
    if len(object_ids) > MAX_OBJECTS:
        raise PayloadError(f"the reply has {len(object_ids)} objects; allowed: up to {MAX_OBJECTS}")
    pulled, lock = 0, threading.Lock()

    def pull(object_id: str) -> bytes:
        nonlocal pulled
        content = pull_object_fn(object_id)
        with lock:
            pulled += len(content)
        _check_size(pulled, most_bytes)
        return content

    return pull_objects(list(dict.fromkeys(object_ids)), pull, max_time=UPLOAD_SECONDS)


def inflate(most_bytes: int, message_id: str, contents: dict[str, bytes]) -> InflatableObject:
    """Put a message together, after a check of the size that its arrays claim."""
    try:
        _check_size(sum(_claimed_bytes(content, contents) for content in contents.values()), most_bytes)
        inflated = inflate_object_from_contents(message_id, contents)
    except PayloadError:
        raise
    except Exception as error:  # The bytes are not trusted: Flower's parsers may raise anything.
        raise PayloadError(f"the reply cannot be put together: {error!r}") from None
    if not isinstance(inflated, Message):
        raise PayloadError(f"the reply is a {type(inflated).__name__}, and no message")
    return inflated


def _claimed_bytes(content: bytes, contents: Mapping[str, bytes]) -> int:
    """Return how many bytes an object will take: of an array, those of all chunks that it names."""
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind != ArrayChunk.__qualname__ and len(content) > MAX_RECORD_BYTES:
        raise PayloadError(f"the reply has a {kind} of {len(content)} bytes; allowed: up to {MAX_RECORD_BYTES}")
    if kind != Array.__qualname__:
        return 0
    chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
    return sum(len(contents[children[index]]) for index in chunks)


def _check_size(size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise PayloadError(
            f"the reply has more than {most_bytes / 1e6:g} MB, which is the run-config key 'reply-limit'"
        )

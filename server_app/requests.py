"""Requests: one message per node, with the batches and soft targets that the node lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict

from fedmmkt.common.payloads import Instructions, Request, SyntheticBatch
from fedmmkt.server_app.ledger import Ledger


def make_requests(
    node_ids: Iterable[int],
    ledger: Ledger,
    instructions: Callable[[bool], Instructions],
    message_type: str,
    batch: SyntheticBatch | None = None,
) -> Iterator[Message]:
    """Yield one request per node: the batches and soft targets that it lacks, and the new batch if there is one.

    Equal requests share one content, because Flower stores it as one object. Clients that read only texts get no
    images.

    Parameters
    ----------
    node_ids : iterable of int
        The nodes to ask.
    ledger : Ledger
        Knows what each node lacks.
    instructions : callable
        Called with whether the node has answered before; returns the instructions.
    message_type : str
        Flower's message type.
    batch : SyntheticBatch, optional
        The new batch, which the nodes will answer.
    """
    contents: dict[tuple[Any, ...], RecordDict] = {}
    for node_id in sorted(node_ids):
        batches, targets = ledger.missing_for(node_id)
        sent = (*batches, batch) if batch else batches
        sees_images, is_known = ledger.sees_images(node_id), node_id in ledger.reports
        key = (sees_images, is_known, tuple(one.batch_id for one in sent), tuple(map(id, targets)))
        if key not in contents:
            shown = sent if sees_images else tuple(one.without_images() for one in sent)
            contents[key] = Request(instructions(is_known), shown, targets).to_content()
        yield Message(contents[key], dst_node_id=node_id, message_type=message_type)

"""The class space of a run, collected from clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from logging import INFO, WARNING

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.natural_order import natural_key
from fedmmkt.common.payloads import CLASS_RECORDS, ClassReport, PayloadError, check_keys
from fedmmkt.common.plain_text import printable
from fedmmkt.common.progress import FIRST_SECONDS, TRANSIENT, duration
from fedmmkt.server_app.inbox import ask


def wait_for_nodes(grid: Grid, needed: int, timeout: float) -> None:
    """Wait until enough nodes are connected.

    Raises
    ------
    ConfigError
        If too few nodes are connected after ``timeout`` seconds.
    """
    began = told = time.monotonic()
    closing = began + timeout
    while (connected := len(list(grid.get_node_ids()))) < needed:
        if time.monotonic() > closing:
            raise ConfigError(
                f"run-config key 'min-available-nodes' is {needed}, but {connected} node(s) connected within "
                f"{timeout:g} s ('node-timeout'); start more (in simulation: num-supernodes), or lower "
                "min-available-nodes"
            )
        if time.monotonic() - told > FIRST_SECONDS:
            told = time.monotonic()
            waited = duration(told - began)
            log(INFO, "Waiting for nodes: %s of %s connected, %s%s", connected, needed, waited, TRANSIENT)
        time.sleep(0.5)
    log(INFO, "%s nodes connected", connected)


def classes_of_clients(grid: Grid, config: RunConfig) -> tuple[str, ...]:
    """Ask every client for its classes; return them in natural order, as far as the run's limits allow.

    Raises
    ------
    ConfigError
        If too few nodes connect, or all clients together hold fewer than two classes.
    """
    wait_for_nodes(grid, config.min_available_nodes, config.node_timeout)
    asked = [
        Message(RecordDict(), dst_node_id=node_id, message_type=f"{MessageType.QUERY}.classes")
        for node_id in sorted(grid.get_node_ids())
    ]
    held: dict[int, tuple[str, ...]] = {}
    for node_id, reply in ask(grid, asked, config.round_deadline, round(config.reply_limit * 1e6)):
        try:
            held[node_id] = _read_classes(reply, config.data.node_classes)
        except PayloadError as error:
            log(WARNING, "Node %s named no classes: %s", node_id, printable(str(error)))
    classes = limited([held[node_id] for node_id in sorted(held)], config.data.class_holders, config.data.max_classes)
    if left_out := sorted(set().union(*held.values()).difference(classes), key=natural_key):
        log(
            WARNING,
            "%s classes that clients named are left out ('data.max-classes', 'data.class-holders'): %s",
            len(left_out),
            printable(", ".join(left_out)),
        )
    if len(classes) < 2:
        raise ConfigError(
            f"run-config key 'data.classes' is 'clients', and the {len(asked)} clients hold {len(classes)} class(es); "
            "allowed: two or more; a node with data of its own names them with the node-config key "
            "'share-classes=true'"
        )
    return tuple(sorted(classes, key=natural_key))


def limited(held: Sequence[tuple[str, ...]], holders: int, most: int) -> set[str]:
    """Choose from the classes of all clients.

    If there are too many, those of more clients go first, and then each client's first ones, so that a client that
    names many cannot crowd out those of the others.

    Parameters
    ----------
    held : sequence of tuple of str
        The classes of each client.
    holders : int
        How many clients must hold a class.
    most : int
        How many classes are taken.
    """
    count = Counter(name for names in held for name in set(names))
    place: dict[str, int] = {}
    for names in held:
        for position, name in enumerate(sorted(set(names), key=natural_key)):
            place[name] = min(position, place.get(name, position))
    order = sorted(count, key=lambda name: (-count[name], place[name], natural_key(name)))
    return set([name for name in order if count[name] >= holders][:most])


def _read_classes(reply: Message | PayloadError, most: int) -> tuple[str, ...]:
    """Parse a client's classes; raise `PayloadError` if there are none or too many."""
    if isinstance(reply, PayloadError):
        raise reply
    if reply.has_error():
        raise PayloadError((reply.error.reason or f"error {reply.error.code}").strip())
    check_keys(reply.content, CLASS_RECORDS)
    classes = ClassReport.from_records(reply.content, "classes").classes
    if len(classes) > most:
        raise PayloadError(f"it named {len(classes)} classes; 'data.node-classes' allows {most}")
    return classes

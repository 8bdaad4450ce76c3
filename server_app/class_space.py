"""The class space of a run, collected from clients."""

from __future__ import annotations

import time
from logging import INFO, WARNING

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.natural_order import natural_key
from fedmmkt.common.payloads import ClassReport, PayloadError

FROM_CLIENTS = ("clients",)


def wait_for_nodes(grid: Grid, needed: int, timeout: float) -> None:
    """Wait until enough nodes are connected.

    Raises
    ------
    ConfigError
        If too few nodes are connected after ``timeout`` seconds.
    """
    closing = time.monotonic() + timeout
    while (connected := len(list(grid.get_node_ids()))) < needed:
        if time.monotonic() > closing:
            raise ConfigError(
                f"run-config key 'min-nodes' is {needed}, but {connected} node(s) connected within "
                f"{timeout:g} s ('node-timeout'); start more (in simulation: num-supernodes), or lower min-nodes"
            )
        time.sleep(0.5)
    log(INFO, "%s nodes connected", connected)


def classes_of_clients(grid: Grid, config: RunConfig) -> tuple[str, ...]:
    """Ask every client for its classes; return all of them in natural order.

    Raises
    ------
    ConfigError
        If too few nodes connect, or all clients together hold fewer than two classes.
    """
    wait_for_nodes(grid, config.min_nodes, config.node_timeout)
    asked = [
        Message(RecordDict(), dst_node_id=node_id, message_type=f"{MessageType.QUERY}.classes")
        for node_id in sorted(grid.get_node_ids())
    ]
    held: set[str] = set()
    for reply in grid.send_and_receive(asked, timeout=config.round_deadline):
        try:
            if reply.has_error():
                raise PayloadError((reply.error.reason or f"error {reply.error.code}").strip())
            held |= set(ClassReport.from_records(reply.content, "classes").classes)
        except PayloadError as error:
            log(WARNING, "A client named no classes: %s", error)
    if len(held) < 2:
        raise ConfigError(
            f"run-config key 'data.classes' is 'clients', and the {len(asked)} clients hold {len(held)} class(es); "
            "allowed: two or more"
        )
    return tuple(sorted(held, key=natural_key))

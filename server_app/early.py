"""Learning early: clients learn from a round's soft targets while the T2I learns and makes the next batch."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from fedmmkt.common.payloads import REPORT_RECORDS, ClientReport, PayloadError, check_keys
from fedmmkt.server_app.exchange import pull, push
from fedmmkt.server_app.ledger import Ledger
from fedmmkt.server_app.recorder import Recorder


class Sent(NamedTuple):
    """A message that lets a node learn early: the round in which it learns, and when it was sent."""

    node_id: int
    round: int
    sent: float


class Early:
    """Sends the messages that let clients learn early, and hears who did.

    Nothing depends on whether a client did: one that did not learns when the request of the round comes.

    Parameters
    ----------
    grid : Grid
        Flower's connection to the nodes.
    ledger : Ledger
        Learns from the replies which batches a client holds.
    recorder : Recorder
        Counts bytes, and notes when a client learned.
    """

    def __init__(self, grid: Grid, ledger: Ledger, recorder: Recorder) -> None:
        self.grid, self.ledger, self.recorder = grid, ledger, recorder
        self._sent: dict[str, Sent] = {}  # By the messages' ids; those without a reply yet.

    def send(self, messages: list[Message], server_round: int) -> None:
        """Send messages, and wait for no reply.

        Parameters
        ----------
        messages : list of Message
            At most one for each node.
        server_round : int
            The round in which clients learn.
        """
        sent, refused = push(self.grid, messages)
        unsent = {reply.node_id for reply in refused}
        self.recorder.record_early([message for message in messages if message.metadata.dst_node_id not in unsent])
        now = time.perf_counter()
        self._sent |= {message_id: Sent(node_id, server_round, now) for message_id, node_id in sent.items()}

    def hear(self, server_round: int, connected: Collection[int]) -> None:
        """Note which batches those hold who have learned early; the request of the round need not bring them.

        Parameters
        ----------
        server_round : int
            The round that begins.
        connected : collection of int
            Ids of the connected nodes: a client's name may come from another node only if its own is gone.
        """
        for message_id, (node_id, learned_in, sent) in list(self._sent.items()):
            reply = pull(self.grid, message_id, node_id, round(self.recorder.config.reply_limit * 1e6))
            if reply is None:
                continue
            del self._sent[message_id]
            if reply.message is None or reply.message.has_error() or not reply.message.content:
                continue  # The request of the round asks for the same, and what is wrong is told then.
            with suppress(PayloadError):
                check_keys(reply.message.content, REPORT_RECORDS)
                report = ClientReport.from_records(reply.message.content, "report")
                self.ledger.admit(node_id, report, connected)
                self.recorder.record_early_reply(reply, report.client, sent)
                if learned_in == server_round:  # Else the node has answered a batch since, and so told more.
                    self.ledger.record_early(node_id, report, server_round)

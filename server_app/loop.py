"""The loop of a run: it calls a strategy round by round, and uses a ledger and a recorder.

The whole exchange between server and clients goes through this loop. So it is enough to override a public method of a
strategy to change a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.supercore import log

from fedmmkt.common.failures import RunError
from fedmmkt.common.payloads import EVALUATION_RECORDS, PAYLOAD_RECORDS, REPORT_RECORDS, check_keys
from fedmmkt.server_app.class_space import wait_for_nodes
from fedmmkt.server_app.early import Early
from fedmmkt.server_app.exchange import Answer, Reply, causes_of, exchange
from fedmmkt.server_app.ledger import Ledger
from fedmmkt.server_app.recorder import Recorder

LEAST_TTL = 600.0  # Seconds that a node has to answer, however short the rounds are.
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Read = Callable[[Message], Answer]
Late = dict[int, dict[str, Message]]  # Replies that count, by the round that asked for them and by client.


class RoundSteps(Protocol):
    """The methods that the loop calls on a strategy; `FedMMKT` documents each of them."""

    extra_records: frozenset[str]

    def summary(self) -> None:
        """Log the main settings."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests for reports."""

    def read_evaluate_reply(self, reply: Message) -> Answer:
        """Parse the reply to such a request."""

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregate the reports."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a round."""

    def configure_early(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return the requests to learn in a round whose batch is not there yet."""

    def read_train_reply(self, reply: Message) -> Answer:
        """Parse the reply to such a request."""

    def read_late_reply(self, sent_in: int, reply: Message) -> Answer:
        """Parse the reply to such a request of an earlier round."""

    def aggregate_late(self, server_round: int, sent_in: int, replies: Iterable[Message]) -> None:
        """Learn from the late replies to an earlier round."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from a round's replies."""

    def configure_distill(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return the requests after the last round."""

    def configure_final_evaluation(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return the requests for measures by class, after the last distillation."""

    def read_final_evaluation(self, reply: Message) -> Answer:
        """Parse the reply to such a request."""

    def arrays(self) -> ArrayRecord:
        """Return the T2I's adapter."""

    def load_arrays(self, arrays: ArrayRecord) -> None:
        """Load an adapter."""


@dataclass
class Loop:
    """A run: its parts, its length and its deadline.

    Attributes
    ----------
    strategy : RoundSteps
        Defines the steps of a round.
    grid : Grid
        Flower's connection to the nodes.
    ledger : Ledger
        The server's record of clients and batches.
    recorder : Recorder
        Measures and records each round.
    rounds : int
        Number of rounds of the whole run.
    round_deadline : float
        Seconds after which a round closes, if the quorum is met.
    train_config, evaluate_config : ConfigRecord
        Passed to `configure_train` and `configure_evaluate`.
    evaluate_fn : callable, optional
        Called with the round and the adapter's arrays, before the first round and after each round.
    """

    strategy: RoundSteps
    grid: Grid
    ledger: Ledger
    recorder: Recorder
    rounds: int
    round_deadline: float
    train_config: ConfigRecord = field(default_factory=ConfigRecord)
    evaluate_config: ConfigRecord = field(default_factory=ConfigRecord)
    evaluate_fn: EvaluateFn | None = None
    _connected: set[int] = field(default_factory=set, init=False)  # When the last exchange began.
    _early: Early = field(init=False)

    def __post_init__(self) -> None:
        """Make the part that lets clients learn early."""
        self._early = Early(self.grid, self.ledger, self.recorder)

    def run(self) -> Result:
        """Run the remaining rounds.

        Raises
        ------
        ConfigError
            If too few nodes connect.
        RunError
            If no client gives a valid reply.
        """
        result, last_round = Result(), self.recorder.last_round
        log(INFO, "Starting %s:", type(self.strategy).__name__)
        self.strategy.summary()
        if last_round is not None and last_round >= self.rounds:
            log(INFO, "All %s rounds are done; to continue, raise 'rounds'", self.rounds)
            self.recorder.report()
        else:
            wait_for_nodes(self.grid, self.recorder.config.min_available_nodes, self.recorder.config.node_timeout)
            log(INFO, "")
            if last_round is None:
                self._begin(result)
            else:
                self._resume(last_round, result)
            for server_round in range((last_round or 0) + 1, self.rounds + 1):
                self._round(server_round, result)
        result.arrays = self.strategy.arrays()
        self.recorder.end()
        return result

    def _begin(self, result: Result) -> None:
        """Run round 0: measure clients and T2I before they learn anything."""
        log(INFO, "[BEFORE] measuring clients before any training")
        with self.recorder.round(0, self.ledger):
            self.recorder.measure()
            self._evaluate(0, result)
            self.ledger.add_participants(self.recorder.answered_clients())
        self._evaluate_on_server(0, result)

    def _resume(self, last_round: int, result: Result) -> None:
        """Ask clients which batches they hold.

        This exchange counts for no round, because the interrupted run did not have it.
        """
        log(INFO, "[RESUME] after round %s: asking clients which batches they hold", last_round)
        with self.recorder.unrecorded(last_round):
            self._evaluate(last_round, result)
        for report in self.ledger.known_clients():
            if self.ledger.history and report.client in self.ledger.clients and not report.kept:
                log(WARNING, "  clients   %s holds nothing of the earlier run, and begins anew", report.client)

    def _round(self, server_round: int, result: Result) -> None:
        log(INFO, "")
        log(INFO, "[ROUND %s/%s]%s", server_round, self.rounds, self.recorder.time_left(server_round, self.rounds))
        strategy = self.strategy
        with self.recorder.round(server_round, self.ledger):
            messages = strategy.configure_train(server_round, strategy.arrays(), self.train_config, self.grid)
            self._early.hear(server_round, self._connected)  # Before the requests are made, one by one.
            records, late = REPORT_RECORDS | PAYLOAD_RECORDS, Late()
            replies = self._ask(server_round, messages, strategy.read_train_reply, records, late)
            for sent_in, by_client in sorted(late.items()):
                strategy.aggregate_late(server_round, sent_in, [by_client[client] for client in sorted(by_client)])
            arrays, metrics = strategy.aggregate_train(server_round, replies)
            if arrays is not None:
                strategy.load_arrays(arrays)
            self.recorder.measure()
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            if server_round == self.rounds:
                messages = strategy.configure_distill(server_round, self.grid)
                self._early.hear(server_round + 1, self._connected)
                self._collect(server_round, messages, result)
                self._evaluate_finally(server_round)
            self.ledger.add_participants(self.recorder.answered_clients())
        self._evaluate_on_server(server_round, result)

    def let_learn(self, server_round: int) -> None:
        """Let clients learn in the next round, or after the last one, from the soft targets of this one."""
        if self.recorder.config.learn_early:
            messages = list(self.strategy.configure_early(server_round + 1, self.grid))
            for message in messages:
                message.metadata.ttl = self._ttl
            self._early.send(messages, server_round + 1)

    def _evaluate(self, server_round: int, result: Result) -> None:
        arrays = self.strategy.arrays()
        messages = self.strategy.configure_evaluate(server_round, arrays, self.evaluate_config, self.grid)
        self._collect(server_round, messages, result)

    def _collect(self, server_round: int, messages: Iterable[Message], result: Result) -> None:
        """Send requests for reports and aggregate the replies."""
        replies = self._ask(server_round, messages, self.strategy.read_evaluate_reply, REPORT_RECORDS)
        if (metrics := self.strategy.aggregate_evaluate(server_round, replies)) is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _ask(
        self,
        server_round: int,
        messages: Iterable[Message],
        read: Read,
        records: frozenset[str],
        late: Late | None = None,
    ) -> list[Message]:
        """Exchange messages; return the valid replies sorted by client name, so that sums are reproducible.

        With ``late``, nodes that still owe an answer are not asked before they gave it; those that count are put there.
        """
        outgoing = {message.metadata.dst_node_id: message for message in messages}
        overdue, read_late = self.ledger.overdue, None if late is None else self._read_late
        valid: dict[str, Message] = {}
        problems: dict[str, str] = {}
        with self.recorder.exchange(list(outgoing.values())):
            exchanged = self._exchange(
                outgoing.values(), read, records, self.recorder.config.quorum, overdue, 1, read_late
            )
            for reply in exchanged:
                sent_in = self.ledger.record_reply(reply, server_round)
                name = self.ledger.name(reply.node_id)
                self.recorder.record_reply(reply, name, sent_in)
                if reply.kind == "busy":
                    self.recorder.record_unsent(outgoing.pop(reply.node_id))
                elif reply.kind == "late":
                    if late is not None and reply.counts_late and reply.message is not None:
                        late.setdefault(sent_in, {})[name] = reply.message
                elif reply.answer is not None and reply.message is not None:
                    valid[reply.answer.report.client] = reply.message
                else:
                    problems[name] = reply.reason
            if not valid:  # Before what is done beside the clients is waited for.
                causes = "\n".join(causes_of(problems, len(outgoing))) or "none was asked"
                raise RunError(f"round {server_round}: none of {len(outgoing)} nodes gave a valid reply\n{causes}")
        self.recorder.record_asked({self.ledger.name(node_id) for node_id in outgoing})
        self.recorder.record_connected({self.ledger.name(node_id) for node_id in self._connected})
        return [valid[client] for client in sorted(valid)]

    def _evaluate_finally(self, server_round: int) -> None:
        """Ask for measures by class. They count for no other measure, and a client without them is no failure."""
        outgoing = list(self.strategy.configure_final_evaluation(server_round, self.grid))
        read = self.strategy.read_final_evaluation
        with self.recorder.timed("evaluate"):
            for reply in self._exchange(outgoing, read, EVALUATION_RECORDS, quorum=0, overdue={}, least_valid=0):
                self.recorder.record_evaluation(reply, self.ledger.name(reply.node_id))

    def _exchange(
        self,
        outgoing: Collection[Message],
        read: Read,
        records: frozenset[str],
        quorum: float,
        overdue: Mapping[str, int],
        least_valid: int = 1,
        read_late: Callable[[str, Message], Answer] | None = None,
    ) -> Iterator[Reply]:
        """Exchange messages, with the bounds of the run on what replies may hold and who may answer."""
        self._connected = {*self.grid.get_node_ids(), *(message.metadata.dst_node_id for message in outgoing)}
        for message in outgoing:
            message.metadata.ttl = self._ttl

        def read_asked(message: Message) -> Answer:
            check_keys(message.content, records | self.strategy.extra_records)
            return read(message)

        return exchange(
            self.grid,
            outgoing,
            read_asked,
            admit=lambda node_id, report: self.ledger.admit(node_id, report, self._connected),
            deadline=self.round_deadline,
            quorum=quorum,
            overdue=overdue,
            most_bytes=round(self.recorder.config.reply_limit * 1e6),
            least_valid=least_valid,
            waiting=self._tell_waiting,
            read_late=read_late,
        )

    @property
    def _ttl(self) -> float:
        """Seconds after which a message need not be answered any more: its batch is then no longer taught."""
        return max(self.round_deadline * (self.ledger.batches_kept + 1), LEAST_TTL)

    def _read_late(self, message_id: str, reply: Message) -> Answer:
        """Parse the reply to an overdue message: its report alone, if there is nothing else or nobody wants it."""
        check_keys(reply.content, REPORT_RECORDS | PAYLOAD_RECORDS | self.strategy.extra_records)
        sent_in = self.ledger.round_of(message_id)
        if self.ledger.taught(sent_in) is None or "payload" not in reply.content:
            return self.strategy.read_evaluate_reply(reply)
        return self.strategy.read_late_reply(sent_in, reply)

    def _tell_waiting(self, node_ids: Collection[int]) -> None:
        self.recorder.log_waiting([self.ledger.name(node_id) for node_id in node_ids])

    def _evaluate_on_server(self, server_round: int, result: Result) -> None:
        metrics = self.evaluate_fn(server_round, self.strategy.arrays()) if self.evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

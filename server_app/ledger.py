"""The ledger of a run: the server's record of clients and batches.

It records which client runs on which node, which batches were sent, their soft targets and scores, and what each client
still lacks. The strategy writes to it. The ledger itself does not depend on the strategy or on the T2I model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from fedmmkt.common.payloads import ClientReport, Modality, PayloadError, SoftTargets, SyntheticBatch
from fedmmkt.server_app.exchange import Answer, Reply
from fedmmkt.server_app.guard import NO_TRIAL, Arms, GuardState
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.t2i.samples import Samples

# An earlier run that this run continues: its key, and the round after which it was continued.
Ancestor = tuple[str, int]


class Identity(NamedTuple):
    """What a node said of itself when it first answered."""

    client: str
    model: str
    modality: Modality


@dataclass(frozen=True)
class TargetsByClient:
    """The soft targets of one batch for each client; clients with the same teachers share them.

    Attributes
    ----------
    distinct : tuple of SoftTargets
        The different soft targets.
    of_client : mapping of str to int or None
        For each client name, an index into ``distinct``; None if the client gets no soft targets.
    of_modality : mapping of str to int or None
        The same for each modality, for clients that were not known when the soft targets were made.
    """

    distinct: tuple[SoftTargets, ...]
    of_client: Mapping[str, int | None]
    of_modality: Mapping[Modality, int | None]

    def for_client(self, report: ClientReport | None) -> SoftTargets | None:
        """Return the soft targets of a client; None if it gets none.

        A client without a report gets soft targets only if they are the same for all modalities.
        """
        if report is None:
            chosen = set(self.of_modality.values())
            index = chosen.pop() if len(chosen) == 1 else None
        else:
            index = self.of_client.get(report.client, self.of_modality.get(report.modality))
        return None if index is None else self.distinct[index]


@dataclass(frozen=True)
class Source:
    """What a batch that is made ahead is made from: the state after the last round but one.

    Attributes
    ----------
    round : int
        The round of the batch.
    adapter : dict of str to torch.Tensor
        The T2I's adapter.
    pool : tuple of Samples
        The scored samples, oldest first.
    guard : GuardState
        The trial of the T2I's update at that time.
    """

    round: int
    adapter: dict[str, Tensor]
    pool: tuple[Samples, ...]
    guard: GuardState


class Ledger:
    """The server's record of its clients and of the batches that it sent them.

    Parameters
    ----------
    run_key : str
        Key under which clients keep their memory of the run.
    batches_kept : int
        Number of last rounds whose batches and soft targets are kept, for clients that lack them.
    samples_kept : int
        Number of last rounds whose scored samples are kept, for the update of the T2I model.

    Attributes
    ----------
    reports : dict of int to ClientReport
        The newest report of each node, by node id; the last one to answer comes last.
    identities : dict of int to Identity
        The client's name, model and modality of each node that ever answered, by node id, oldest first.
    clients : set of str
        Names of all clients that took part in a round.
    history : list of (SyntheticBatch, TargetsByClient)
        The batches that have soft targets, oldest first.
    pool : list of Samples
        The scored samples for the update of the T2I model, oldest first.
    ancestors : tuple of (str, int)
        Keys of the runs that this run continues, oldest first, and the round after which each was continued.
    drawn : frozenset of str
        Names of the nodes that had their turn, if a round asks a part of the nodes only.
    guard : GuardState
        The trial of the T2I's last update.
    arms : Arms or None
        Who made the samples of the last batch that was served; None if no challenger did.
    made_from : Source or None
        What the next round's batch is made from, if batches are made ahead.
    """

    def __init__(self, run_key: str, batches_kept: int, samples_kept: int) -> None:
        self.run_key = run_key
        self.batches_kept, self.samples_kept = batches_kept, samples_kept
        self.reports: dict[int, ClientReport] = {}
        self.identities: dict[int, Identity] = {}
        self.clients: set[str] = set()
        self.history: list[tuple[SyntheticBatch, TargetsByClient]] = []
        self.pool: list[Samples] = []
        self.standings: dict[str, Standing] = {}
        self.ancestors: tuple[Ancestor, ...] = ()
        self.drawn: frozenset[str] = frozenset()
        self.guard = NO_TRIAL
        self.arms: Arms | None = None
        self.made_from: Source | None = None
        self._served: dict[int, tuple[SyntheticBatch, Samples]] = {}
        self._overdue: dict[str, tuple[int, int]] = {}
        self._answers: dict[int, list[Answer]] = {}
        self._heard: dict[int, int] = {}
        self._changed: dict[str, int] = {}

    def restore(
        self,
        ancestors: tuple[Ancestor, ...],
        clients: Iterable[str],
        history: list[tuple[SyntheticBatch, TargetsByClient]],
        pool: list[Samples],
        identities: Mapping[int, Identity],
        standings: Mapping[str, Standing] | None = None,
        drawn: Iterable[str] = (),
        guard: GuardState = NO_TRIAL,
        made_from: Source | None = None,
    ) -> None:
        """Continue from the ledger of an earlier run.

        This run keeps its own key. Clients copy their memory of the earlier run, as it was after the last round of that
        run's checkpoint. So a round that is repeated does not count twice, and the runs do not mix.
        """
        self.ancestors, self.clients, self.history, self.pool = ancestors, set(clients), history, pool
        self.identities, self.standings = dict(identities), dict(standings or {})
        self.drawn = frozenset(drawn)
        self.guard, self.made_from = guard, made_from

    # ------------------------------------------------------------------ batches

    def serve(self, batch: SyntheticBatch, samples: Samples, arms: Arms | None = None) -> None:
        """Store the batch of a round, its samples and who made them, until `teach` is called."""
        self._served, self.arms = {batch.round: (batch, samples)}, arms

    def served(self, server_round: int) -> tuple[SyntheticBatch, Samples]:
        """Return the stored batch of a round and its samples; raises ``KeyError`` if there is none."""
        return self._served[server_round]

    def open_batch(self) -> SyntheticBatch | None:
        """Return the batch that clients are currently asked about; None if there is none."""
        return next((batch for batch, _ in self._served.values()), None)

    def teach(self, server_round: int, targets: TargetsByClient, scored: Samples) -> None:
        """Store the results of a round's batch: soft targets for clients, and scored samples for the T2I model."""
        batch, _ = self._served.pop(server_round)
        self.history = [*self.history, (batch, targets)][-self.batches_kept :]
        self.pool = [*self.pool, scored][-self.samples_kept :]

    def taught(self, server_round: int) -> SyntheticBatch | None:
        """Return the batch of an earlier round, if its soft targets are kept and a late answer to it still counts."""
        batches = (batch for batch, _ in self.history if batch.round == server_round)
        return next(batches, None) if server_round in self._answers else None

    def keep_answers(self, server_round: int, answers: list[Answer]) -> None:
        """Keep the answers to a round's batch, as long as a node still owes one and the batch is kept.

        So answers take memory beyond their round only where a node is late.
        """
        self._answers[server_round] = answers
        owed = {sent_in for _, sent_in in self._overdue.values()} & {batch.round for batch, _ in self.history}
        self._answers = {sent_in: kept for sent_in, kept in self._answers.items() if sent_in in owed}

    def answers(self, server_round: int) -> list[Answer]:
        """Return the answers that are kept of a round."""
        return self._answers[server_round]

    def teach_again(self, server_round: int, taught_in: int, targets: TargetsByClient, scores_N: Tensor) -> None:
        """Replace the results of an earlier round's batch, for all that have not heard of them.

        Parameters
        ----------
        server_round : int
            The present round.
        taught_in : int
            The round of the batch.
        targets : TargetsByClient
            Its new soft targets.
        scores_N : torch.Tensor
            Its new scores.
        """
        for index, (batch, _) in enumerate(self.history):
            if batch.round != taught_in:
                continue
            self.history[index] = (batch, targets)
            self._changed[batch.batch_id] = server_round
            age = len(self.history) - index
            # The pool may keep fewer rounds, or only some of a round's samples, if a refused update made the others.
            if age <= len(self.pool) and len(self.pool[-age]) == len(scores_N):
                self.pool[-age] = replace(self.pool[-age], scores_N=scores_N)

    def missing_for(self, node_id: int) -> tuple[tuple[SyntheticBatch, ...], tuple[SoftTargets, ...]]:
        """Return the batches with soft targets that a node does not hold, and the soft targets that it lacks."""
        report = self.reports.get(node_id)
        kept, awaiting = (set(report.kept), set(report.awaiting)) if report else (set(), set())
        absent = tuple(batch for batch, _ in self.history if batch.batch_id not in kept)
        heard = self._heard.get(node_id, -1)
        # Soft targets that were made again after the request that the node last answered.
        changed = {batch_id for batch_id in kept & self._changed.keys() if self._changed[batch_id] >= heard}
        wanted = awaiting | changed | {batch.batch_id for batch in absent}
        lacking = (targets.for_client(report) for batch, targets in self.history if batch.batch_id in wanted)
        return absent, tuple(targets for targets in lacking if targets is not None)

    # ------------------------------------------------------------------ clients

    def admit(self, node_id: int, report: ClientReport, connected: Collection[int]) -> None:
        """Bind a node to the name, model and modality with which it first answers, for the whole run.

        A name belongs to the first node that answered with it. Another node may have it while that one is not
        connected, as after a new installation with a new key; the first one gets it back when it returns.

        Parameters
        ----------
        node_id : int
            The node that answered.
        report : ClientReport
            What it says of itself.
        connected : collection of int
            The nodes that are connected.

        Raises
        ------
        PayloadError
            If the node was bound to something else, or the name belongs to another node that is connected.
        """
        said = Identity(report.client, report.model, report.modality)
        for other, identity in self.identities.items():
            if other == node_id:
                break
            if identity.client == said.client and other in connected:
                raise PayloadError(f"client name {said.client!r} belongs to another node")
        if (bound := self.identities.setdefault(node_id, said)) != said:
            raise PayloadError(f"says that it is {', '.join(said)}, and was {', '.join(bound)} before in this run")

    def name(self, node_id: int) -> str:
        """Return the name of a node for logs: the name of its client if it has answered, else its id."""
        return self.reports[node_id].client if node_id in self.reports else f"node {node_id}"

    def known_clients(self) -> list[ClientReport]:
        """Return the newest report of each client, sorted by name."""
        # A client that came back under another node id is still one client.
        newest = {report.client: report for report in self.reports.values()}
        return [newest[client] for client in sorted(newest)]

    def sees_images(self, node_id: int) -> bool:
        """Return whether a node gets images: every node does, unless its report says that it reads only texts."""
        return node_id not in self.reports or self.reports[node_id].modality != "text"

    def add_participants(self, clients: Iterable[str]) -> None:
        """Record the clients that took part in a round."""
        self.clients |= set(clients)

    # ------------------------------------------------------------------ requests

    @property
    def overdue(self) -> dict[str, int]:
        """The unanswered messages of closed exchanges, with their nodes."""
        return {message_id: node_id for message_id, (node_id, _) in self._overdue.items()}

    def record_reply(self, reply: Reply, server_round: int) -> int:
        """Record a reply; return the round in which its message was sent."""
        sent_in = self._overdue.pop(reply.message_id)[1] if reply.kind == "late" else server_round
        if reply.answer is not None:
            before = self.name(reply.node_id)
            self.reports.pop(reply.node_id, None)
            self.reports[reply.node_id] = reply.answer.report
            self._heard[reply.node_id] = sent_in
            if before in self.drawn:  # It was drawn before it told its name.
                self.drawn = self.drawn - {before} | {reply.answer.report.client}
        if reply.kind == "unanswered":
            self._overdue[reply.message_id] = (reply.node_id, server_round)
        return sent_in

    def record_early(self, node_id: int, report: ClientReport, server_round: int) -> None:
        """Record which batches a node holds after it learned in a round whose batch it has not got yet."""
        held = {"kept": report.kept, "awaiting": report.awaiting}
        self.reports[node_id] = self.reports[node_id].model_copy(update=held)
        self._heard[node_id] = server_round

    def round_of(self, message_id: str) -> int:
        """Return the round in which an overdue message was sent."""
        return self._overdue[message_id][1]

"""The measures of one round: clients, T2I model, traffic, time and participation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmmkt.common.payloads import ClientReport, FinalEvaluation
from fedmmkt.server_app.exchange import Reply
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.standings import standings_to_json


@dataclass
class RoundRecord:
    """The measures of one round, which become one line of ``metrics.jsonl``.

    Attributes
    ----------
    reports : list of ClientReport
        The newest report of each client that gave a valid reply.
    asked : set of str
        Clients that got a message; a node that has never answered is named by its id.
    rejected, missing : dict of str to str
        The reason why there is no valid reply, by client.
    late : set of str
        Clients whose reply to an earlier round came in this round.
    late_counted : set of str
        Those of them whose reply counts, because the batch that it answers is still taught.
    busy : set of str
        Clients that were not asked, because they had not answered an earlier round.
    connected : set of str
        Clients that are connected; a node that has never answered is named by its id.
    gone : set of str
        Clients that took part before and are no longer connected, or that went offline in this round.
    evaluations : dict of str to FinalEvaluation
        The measures by class, by client; only in the last round.
    standings : dict of str to Standing, optional
        What each client's answer counts for; None if that was not judged.
    stages : list of (str, float, float)
        Each stage of the server with its begin and end, by `time.perf_counter`.
    messages : list of (str, float, float)
        Each client's valid replies: its name, when it was asked and when the reply came.
    noises : dict of str to dict
        Standard deviations of the noise in the answers of clients with a privacy budget, by client.
    guard : dict or None
        What the clients decided about the T2I's last update; None without one on trial.
    """

    round: int
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("generate", "clients", "aggregate", "adapt", "evaluate", "measure", "total"), 0.0
        )
    )
    bytes_down: int = 0
    bytes_up: int = 0
    reports: list[ClientReport] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    late_counted: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    connected: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    evaluations: dict[str, FinalEvaluation] = field(default_factory=dict)
    standings: dict[str, Standing] | None = None
    noises: dict[str, dict[str, float | None]] = field(default_factory=dict)
    generator_loss: float | None = None
    stages: list[tuple[str, float, float]] = field(default_factory=list)
    messages: list[tuple[str, float, float]] = field(default_factory=list)
    guard: dict[str, Any] | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[stage] += end - start
            self.stages.append((stage, start, end))

    def record_reply(self, reply: Reply, name: str) -> None:
        """Add the result of a message; a newer report of a client replaces the older one."""
        self.bytes_up += reply.bytes
        if reply.kind == "answered" and reply.answer is not None:
            newest = {report.client: report for report in self.reports} | {name: reply.answer.report}
            self.reports = [newest[client] for client in sorted(newest)]
            if (payload := reply.answer.payload) is not None and payload.counts_noise is not None:
                self.noises[name] = {"counts_noise": payload.counts_noise, "votes_noise": payload.votes_noise}
        elif reply.kind == "rejected":
            self.rejected[name] = reply.reason
        elif reply.kind in ("offline", "unanswered"):
            self.missing[name] = reply.reason
            if reply.kind == "offline":
                self.gone.add(name)
        elif reply.kind == "busy":
            self.busy.add(name)
        elif reply.bytes:  # Late error replies have no content and do not count.
            self.late.add(name)
            if reply.counts_late:
                self.late_counted.add(name)

    def accuracy(self, modality: str | None = None) -> float | None:
        """Return the mean accuracy of all clients, or of one modality; None if there are none."""
        reports = [report for report in self.reports if modality in (None, report.modality)]
        values = [report.accuracy for report in reports if report.accuracy is not None]
        return float(np.mean(values)) if values else None

    def _privacy_to_json(self, report: ClientReport) -> dict[str, Any]:
        """Return what a client has spent of its privacy budget, and the noise of its answer; empty without a budget."""
        if not report.is_private:
            return {}
        spent = {"epsilon": report.epsilon, "budget": report.budget, "delta": report.delta}
        return {"privacy": spent | self.noises.get(report.client, {})}

    def participation(self) -> str:
        """Return a line with the numbers of asked and answered clients, and the names of the others."""
        others = {
            "rejected": self.rejected,
            "missing": self.missing,
            "late": self.late,
            "busy": self.busy,
            "gone": self.gone,
        }
        named = [f"{kind}: {', '.join(sorted(names))}" for kind, names in others.items() if names]
        return "; ".join([f"{len(self.asked)} asked, {len(self.reports)} answered", *named])

    def to_json(self, zero: float = 0.0) -> dict[str, Any]:
        """Return the line of ``metrics.jsonl``; the times of its timeline are in seconds since ``zero``."""
        per_client = {
            report.client: report.model_dump(include={"accuracy", "loss", "modality", "model", "examples"})
            | self._privacy_to_json(report)
            for report in self.reports
        }
        modalities = sorted({report.modality for report in self.reports})
        judged = {} if self.standings is None else {"reliability": standings_to_json(self.standings)}
        final = judged | ({"evaluation": _evaluation_to_json(self.evaluations)} if self.evaluations else {})
        guard = {"guard": self.guard} if self.guard else {}
        return {
            "round": self.round,
            "clients": {
                "accuracy": self.accuracy(),
                "by_modality": {modality: self.accuracy(modality) for modality in modalities},
                "per_client": per_client,
            },
            "generator": {"alignment": None, "frechet": None, "loss": self.generator_loss},  # Measured later.
            "bytes": {"down": self.bytes_down, "up": self.bytes_up},
            "seconds": {
                **{stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
                "timeline": {"server": spans(self.stages, zero), "clients": spans(self.messages, zero)},
            },
            "replies": {
                "received": len(self.reports),
                "rejected": len(self.rejected),
                "missing": len(self.missing),
                "asked": sorted(self.asked),
                "answered": [report.client for report in self.reports],
                "late": sorted(self.late),
                "late_counted": sorted(self.late_counted),
                "busy": sorted(self.busy),
                "gone": sorted(self.gone),
                "reasons": self.rejected | self.missing,
            },
        } | (guard | final)


def spans(timed: Sequence[tuple[str, float, float]], zero: float) -> list[list[Any]]:
    """Return names with their begin and end in seconds since ``zero``, as JSON."""
    return [[name, round(start - zero, 3), round(end - zero, 3)] for name, start, end in timed]


def _evaluation_to_json(evaluations: Mapping[str, FinalEvaluation]) -> dict[str, Any]:
    """Return each client's measures by class, its accuracies that follow from them, and the means over the clients."""
    per_client = {name: _client_to_json(evaluations[name]) for name in sorted(evaluations)}
    keys = ("accuracy", "personal", "alone", "alone_personal")
    values = {key: [client[key] for client in per_client.values() if client.get(key) is not None] for key in keys}
    return {key: float(np.mean(found)) for key, found in values.items() if found} | {"per_client": per_client}


def _client_to_json(evaluation: FinalEvaluation) -> dict[str, Any]:
    examples_C, tested_C = evaluation.examples_C, evaluation.tested_C
    measures: dict[str, Any] = {"examples": examples_C.tolist(), "tested": tested_C.tolist()}
    for prefix, correct_C in (("", evaluation.correct_C), ("alone_", evaluation.alone_correct_C)):
        if correct_C is not None:
            measures |= {
                f"{prefix}correct": correct_C.tolist(),
                prefix.rstrip("_") or "accuracy": float(correct_C.sum() / tested_C.sum()),
                f"{prefix}personal": personal_accuracy(correct_C, tested_C, examples_C),
            }
    return measures


def personal_accuracy(correct_C: np.ndarray, tested_C: np.ndarray, examples_C: np.ndarray) -> float | None:
    """Return the accuracy by class, weighted by a client's own class distribution.

    Classes without test examples are left out; None if the client holds no other class.
    """
    weights_C = np.where(tested_C > 0, examples_C, 0)
    if not weights_C.any():
        return None
    return float((weights_C * correct_C / np.maximum(tested_C, 1)).sum() / weights_C.sum())

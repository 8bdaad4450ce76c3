"""What is measured in one round: both sides, the exchange, and who took part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.payloads import ClientReport
from server_app.exchange import Replies


@dataclass
class RoundRecord:
    """What is measured in one round, on its way to ``metrics.jsonl``.

    Attributes
    ----------
    reports : list of ClientReport
        The newest of each client that gave a valid reply.
    asked : set of str
        Clients that were sent a message; a node that has never answered goes by its id.
    rejected, missing : dict of str to str
        Why there was no valid reply, by client.
    late : set of str
        Clients whose reply to an earlier round came in this one, after that had closed; it is not counted.
    gone : set of str
        Clients that took part before and are not connected any more, or went offline in this round.
    """

    round: int
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("generate", "clients", "aggregate", "adapt", "measure", "total"), 0.0)
    )
    bytes_down: int = 0
    bytes_up: int = 0
    reports: list[ClientReport] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    generator_loss: float | None = None
    alignment: float | None = None
    frechet: float | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def add(self, replies: Replies) -> None:
        """Add an exchange; the newest report of a client stands."""
        self.bytes_down += replies.bytes_down
        self.bytes_up += replies.bytes_up
        self.rejected |= replies.rejected
        self.missing |= replies.missing
        self.gone |= replies.gone
        newest = {report.client: report for report in self.reports}
        newest |= {answer.report.client: answer.report for answer in replies.answers}
        self.reports = [newest[name] for name in sorted(newest)]

    def accuracy(self, modality: str | None = None) -> float | None:
        """Mean accuracy of the clients, or of those of one modality; None if there is none."""
        values = [report.accuracy for report in self.reports if modality in (None, report.modality)]
        return float(np.mean(values)) if values else None

    def participation(self) -> str:
        """Say in a line how many were asked and answered, and name the others."""
        others = {"rejected": self.rejected, "missing": self.missing, "late": self.late, "gone": self.gone}
        named = [f"{kind}: {', '.join(sorted(names))}" for kind, names in others.items() if names]
        return "; ".join([f"{len(self.asked)} asked, {len(self.reports)} answered", *named])

    def to_json(self) -> dict[str, Any]:
        """Make a line of ``metrics.jsonl``."""
        per_client = {
            report.client: report.model_dump(include={"accuracy", "loss", "modality", "model", "examples"})
            for report in self.reports
        }
        modalities = sorted({report.modality for report in self.reports})
        return {
            "round": self.round,
            "clients": {
                "accuracy": self.accuracy(),
                "by_modality": {modality: self.accuracy(modality) for modality in modalities},
                "per_client": per_client,
            },
            "generator": {"alignment": self.alignment, "frechet": self.frechet, "loss": self.generator_loss},
            "bytes": {"down": self.bytes_down, "up": self.bytes_up},
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "replies": {
                "received": len(self.reports),
                "rejected": len(self.rejected),
                "missing": len(self.missing),
                "asked": sorted(self.asked),
                "answered": [report.client for report in self.reports],
                "late": sorted(self.late),
                "gone": sorted(self.gone),
                "reasons": self.rejected | self.missing,
            },
        }

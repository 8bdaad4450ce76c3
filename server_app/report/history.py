"""The rounds of a run as its pages need them: what is kept in memory does not grow with clients times rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmmkt.server_app.exchange import causes_of
from fedmmkt.server_app.report.measures import MOST_CURVES, Line

SPREAD = (0, 10, 90, 100)  # percentiles of the clients' accuracies that are kept of each round
ROUNDS_IN_TIMELINE = 3
MOST_TROUBLES = 200  # more than this are counted by their reason
NAMED = 5  # clients that a reason names


@dataclass
class Reason:
    """A reason why replies were not used: how often, of whom, and in which rounds."""

    count: int
    names: list[str]
    first: int
    last: int


@dataclass
class History:
    """The rounds of a run, without what no page shows.

    Of more than `MOST_CURVES` clients, a round keeps the reports that are a client's first or newest, or of round 1.

    Attributes
    ----------
    lines : list of dict
        The lines of ``metrics.jsonl``, shortened. ``clients`` also has the ``spread`` of the accuracies and the
        ``counts`` of clients by modality.
    asked : set of str
        All clients that were asked.
    refused : dict of str to str
        The last reason why a reply was refused or missing, by client.
    troubles : list of (int, str, str)
        Round, client and reason of the first replies that were not used.
    reasons : dict of str to Reason
        All reasons.
    """

    lines: list[Line] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    troubles: list[tuple[int, str, str]] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    _seen: dict[str, list[int]] = field(default_factory=dict)  # For each client, the lines that have a report of it.

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> History:
        """Return the history of some lines; they are read one at a time."""
        history = cls()
        for line in lines:
            history.add(line)
        return history

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a round; the line itself is not changed."""
        replies, reports = line["replies"], dict(line["clients"]["per_client"])
        self.asked |= set(replies.get("asked", ()))
        self.refused |= replies["reasons"]
        for name, reason in _troubles(replies):
            self._add_trouble(line["round"], name, reason)
        accuracies = [report["accuracy"] for report in reports.values() if report["accuracy"] is not None]
        clients = line["clients"] | {
            "per_client": reports,
            "spread": np.percentile(accuracies, SPREAD).tolist() if accuracies else None,
            "counts": dict(Counter(report["modality"] for report in reports.values())),
        }
        counts = {key: value for key, value in replies.items() if isinstance(value, int)}
        beside = "timeline" in line["seconds"]  # Else measuring is a part of the round's total.
        self.lines.append({**line, "clients": clients, "replies": counts, "is_measured_beside": beside})
        if len(self.lines) > ROUNDS_IN_TIMELINE:
            seconds = self.lines[-1 - ROUNDS_IN_TIMELINE]["seconds"]
            self.lines[-1 - ROUNDS_IN_TIMELINE]["seconds"] = {k: v for k, v in seconds.items() if k != "timeline"}
            self.lines[-2].pop("evaluation", None)  # Of a run that went on after its last round.
        for name in reports:
            self._seen.setdefault(name, []).append(len(self.lines) - 1)
        if len(self._seen) > MOST_CURVES:
            self._shorten()

    def causes(self) -> list[str]:
        """Return a line for each reason for which a reply was refused or missing: how many clients, which, and why."""
        return causes_of(self.refused, len(self.asked))

    def _shorten(self) -> None:
        """Drop the reports between a client's first and newest one; that of round 1 stays."""
        for name, seen in self._seen.items():
            if len(seen) > 2:
                dropped = [index for index in seen[1:-1] if self.lines[index]["round"] != 1]
                for index in dropped:
                    del self.lines[index]["clients"]["per_client"][name]
                self._seen[name] = [index for index in seen if index not in dropped]

    def _add_trouble(self, round: int, name: str, reason: str) -> None:
        if len(self.troubles) <= MOST_TROUBLES:
            self.troubles.append((round, name, reason))
        known = self.reasons.setdefault(reason, Reason(0, [], round, round))
        known.count, known.last = known.count + 1, round
        if name not in known.names and len(known.names) < NAMED:
            known.names.append(name)


def _troubles(replies: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the clients that did not take part in a round as expected, each with the reason.

    Runs of earlier versions lack some of the keys.
    """
    yield from sorted(replies["reasons"].items())
    for name in replies.get("late", ()):
        counts = "late, and counts" if name in replies.get("late_counted", ()) else "too late, and is not counted"
        yield name, f"a reply to an earlier round came {counts}"
    for name in replies.get("busy", ()):
        yield name, "still busy with an earlier round, and not asked"
    for name in replies.get("gone", ()):
        if name not in replies["reasons"]:
            yield name, "not connected"

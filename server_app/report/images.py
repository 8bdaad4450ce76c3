"""What the report says of the T2I's images (each measure before, after and for real images) and of its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmmkt.server_app.report.numbers import number, percent

MEASURES = {
    "alignment": "Alignment",
    "frechet": "Fréchet distance",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
}
IN_PUBLIC = {"kernel_distance": "Kernel distance"} | {
    key: MEASURES[key] for key in ("precision", "recall", "density", "coverage")
}
PERCENT = {"alignment", "precision", "recall", "coverage"}
VERDICTS = {
    "accepted": "accepted: clients prefer its images",
    "undecided": "waits: not clear yet",
    "taken back": "taken back: clients do not prefer its images",
}


@dataclass(frozen=True)
class MeasureRow:
    """One measure of the T2I's images: its name, and its values before, after, and for real images."""

    name: str
    before: str
    after: str
    floor: str


@dataclass(frozen=True)
class VerdictRow:
    """What clients decided in a round about the last update of the T2I."""

    round: int
    verdict: str
    preference: str
    step: str
    base_share: str


def measure_rows(lines: Sequence[Mapping[str, Any]], floors: Mapping[str, Any]) -> list[MeasureRow]:
    """Return a row for each measure that the first and the last round have; none without a variety of measures.

    Those in a public network's features follow, if the run has one, under its name.
    """
    if not lines or "recall" not in lines[-1]["generator"]:
        return []
    stages = lines[0]["generator"], lines[-1]["generator"], floors
    rows = [MeasureRow(name, *(_figure(key, values.get(key)) for values in stages)) for key, name in MEASURES.items()]
    public = [values.get("public") or {} for values in stages]
    if not public[1]:
        return rows
    encoder = public[1]["encoder"]
    return rows + [
        MeasureRow(f"{name}, by {encoder}", *(_figure(key, values.get(key)) for values in public))
        for key, name in IN_PUBLIC.items()
    ]


def verdict_rows(lines: Sequence[Mapping[str, Any]]) -> list[VerdictRow]:
    """Return a row for each round in which an update was on trial."""
    return [
        VerdictRow(
            line["round"],
            VERDICTS[line["guard"]["verdict"]],
            ", ".join(f"{name} {z:+.1f}".replace("-", "−") for name, z in line["guard"]["preference"].items()) or "–",
            percent(line["guard"]["step"]),
            percent(line["guard"].get("base_share")),
        )
        for line in lines
        if "guard" in line
    ]


def _figure(key: str, value: float | None) -> str:
    return percent(value) if key in PERCENT else number(value)

"""Values from the lines of ``metrics.jsonl``: by round, before and after, and per client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.report.numbers import counted, number, percent

Line = dict[str, Any]
Measure = Callable[[Line], float | None]


@dataclass(frozen=True)
class Headline:
    """A measure at its first and at its last value.

    Attributes
    ----------
    title, before, after, change, note : str
        Texts to show. ``before`` and ``change`` are empty if there is only one round.
    better : bool or None
        Whether the change is an improvement; None if there is no change.
    """

    title: str
    before: str
    after: str
    change: str
    better: bool | None
    note: str


@dataclass(frozen=True)
class ClientRow:
    """A client's first and last accuracy, with their rounds, and its description."""

    name: str
    model: str
    modality: str
    examples: int
    before: float
    after: float
    first: int
    last: int


def points_of(lines: Iterable[Line], measure: Measure) -> list[tuple[int, float]]:
    """Return (round, value) for each line that has a value."""
    return [(line["round"], value) for line in lines if (value := measure(line)) is not None]


def accuracy_of_modality(modality: str) -> Measure:
    """Return a measure: the mean accuracy of the clients of one modality."""

    def mean(line: Line) -> float | None:
        clients = line["clients"]["per_client"].values()
        values = [client["accuracy"] for client in clients if client["modality"] == modality]
        return sum(values) / len(values) if values else None

    return mean


def accuracy_of_client(name: str) -> Measure:
    """Return a measure: the accuracy of one client."""
    return lambda line: line["clients"]["per_client"].get(name, {}).get("accuracy")


def mean_accuracy(line: Line) -> float | None:
    """Return the mean accuracy of all clients in a round."""
    mean: float | None = line["clients"]["accuracy"]
    return mean


def of_generator(key: str) -> Measure:
    """Return a measure: the value of the T2I model under a key."""
    return lambda line: line["generator"][key]


def headlines_of(lines: list[Line]) -> list[Headline]:
    """Compare each measure's first value with its last."""
    modalities = sorted({client["modality"] for line in lines for client in line["clients"]["per_client"].values()})
    title = "{} clients, mean accuracy".format
    found = [_headline(title("All"), lines, mean_accuracy, _counts(lines))]
    if len(modalities) > 1:
        found += [
            _headline(title(name.capitalize()), lines, accuracy_of_modality(name), _counts(lines, name))
            for name in modalities
        ]
    found += [
        _headline("T2I alignment", lines, of_generator("alignment"), "recognised as prompted"),
        _headline("T2I Fréchet distance", lines, of_generator("frechet"), "lower is better", sign=-1),
    ]
    return [headline for headline in found if headline is not None]


def _headline(title: str, lines: list[Line], measure: Measure, note: str, sign: int = 1) -> Headline | None:
    """Compare a measure's first value with its last.

    ``sign`` is -1 if lower is better. The values are then shown as numbers, not as percentages.
    """
    points = points_of(lines, measure)
    if not points:
        return None
    (first, before), (last, after) = points[0], points[-1]
    difference = after - before
    show, change = (percent, f"{100 * difference:+.1f} points") if sign > 0 else (number, _relative(before, after))
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    return Headline(
        title,
        show(before) if len(points) > 1 else "",
        show(after),
        change.replace("-", "−") if len(points) > 1 else "",
        None if difference == 0 else sign * difference > 0,
        f"{note}, {rounds}",
    )


def _relative(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before else f"{after - before:+.3g}"


def _counts(lines: list[Line], modality: str | None = None) -> str:
    """Return the numbers of clients in the first and last mean; clients may join late or miss a round."""
    rounds = [line["clients"]["per_client"].values() for line in lines]
    counts = [sum(modality in (None, client["modality"]) for client in clients) for clients in rounds]
    seen = [count for count in counts if count] or [0]
    return counted(seen[0], "client") if seen[0] == seen[-1] else f"{seen[0]} → {seen[-1]} clients"


def client_rows(lines: list[Line]) -> list[ClientRow]:
    """Return one row per client, described by its last report, sorted by modality and name."""
    seen: dict[str, list[tuple[int, Line]]] = {}
    for line in lines:
        for name, client in line["clients"]["per_client"].items():
            seen.setdefault(name, []).append((line["round"], client))
    rows = []
    for name, reports in seen.items():
        (first, before), (last, after) = reports[0], reports[-1]
        described = {key: after[key] for key in ("model", "modality", "examples")}
        rows.append(
            ClientRow(name, **described, before=before["accuracy"], after=after["accuracy"], first=first, last=last)
        )
    return sorted(rows, key=lambda row: (row.modality, natural_key(row.name)))

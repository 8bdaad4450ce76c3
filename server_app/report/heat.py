"""The accuracy by class and client, as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.report.measures import Line, evaluations_of
from fedmmkt.server_app.report.numbers import about
from fedmmkt.server_app.report.privacy import privacy_rows

MOST_CLIENTS, MOST_CLASSES = 24, 20  # of more, those of the lowest accuracy are shown


@dataclass(frozen=True)
class Cell:
    """A class at a client.

    Attributes
    ----------
    share : float or None
        Accuracy on this class; None without test examples of it.
    is_held : bool
        Whether a client has private examples of the class; false in the row of all clients, and where their number was
        told with noise.
    title : str
        The numbers of examples.
    """

    share: float | None
    is_held: bool
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Accuracy by class: rows of clients after a row of the test examples of all of them together."""

    title: str
    classes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def heat_maps_of(lines: Sequence[Line], classes: Sequence[str]) -> list[HeatMap]:
    """Return the heat maps of the local-only control, if the run has it, and of the clients; none before the end."""
    evaluations = evaluations_of(lines)
    if not evaluations:
        return []
    noisy = {row.name for row in privacy_rows(lines)}
    shown = _chosen_classes(evaluations, len(classes))
    clients = sorted(
        sorted(evaluations, key=lambda name: evaluations[name]["accuracy"])[:MOST_CLIENTS], key=natural_key
    )
    kinds: list[tuple[str, Literal["alone_correct", "correct"]]] = [
        ("Alone", "alone_correct"),
        ("Federated", "correct"),
    ]
    return [
        HeatMap(
            title,
            tuple(classes[index] for index in shown),
            (
                ("all tests", tuple(_pooled_cell(evaluations, index, key, bool(noisy)) for index in shown)),
                *(
                    (name, tuple(_cell(evaluations[name], index, key, name in noisy) for index in shown))
                    for name in clients
                ),
            ),
        )
        for title, key in kinds
        if all(key in evaluation for evaluation in evaluations.values())
    ]


def _chosen_classes(evaluations: Mapping[str, Any], count: int) -> list[int]:
    def accuracy(index: int) -> float:
        share = _pooled_cell(evaluations, index, "correct").share
        return 1.0 if share is None else share

    return sorted(sorted(range(count), key=accuracy)[:MOST_CLASSES])


def _cell(evaluation: Mapping[str, Any], index: int, key: str, is_noisy: bool) -> Cell:
    correct, tested, examples = (evaluation[name][index] for name in (key, "tested", "examples"))
    title = f"{correct} of {tested} test examples, {about(examples, is_noisy)} private examples"
    return Cell(correct / tested if tested else None, examples > 0 and not is_noisy, title)


def _pooled_cell(evaluations: Mapping[str, Any], index: int, key: str, is_noisy: bool = False) -> Cell:
    """Return a cell of the clients' test examples together."""
    correct, tested, examples = (
        sum(evaluation[name][index] for evaluation in evaluations.values()) for name in (key, "tested", "examples")
    )
    title = f"{correct} of {tested} tests at all clients, {about(examples, is_noisy)} private examples"
    return Cell(correct / tested if tested else None, False, title)

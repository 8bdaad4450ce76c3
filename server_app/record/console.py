"""What the console shows of a round, and of the whole run at its end."""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO
from typing import Any

from flwr.supercore import log

MODALITIES = ("image", "text", "image+text")
T2I_ROWS = (("T2I alignment", "alignment", 3), ("T2I Frechet distance", "frechet", 1), ("T2I recall", "recall", 3))


def log_round(line: Mapping[str, Any], rounds: int, participation: str) -> None:
    """Show a line of ``metrics.jsonl``, of a run of so many rounds."""
    clients, generator = line["clients"], line["generator"]
    if line["round"] == 0:
        log(INFO, "")
    log(
        INFO,
        "round %s/%s | clients %s | image %s text %s both %s | alignment %s | Frechet %s | "
        "%.2f MB down %.2f MB up | %.0f s",
        line["round"],
        rounds,
        figure(clients["accuracy"]),
        *(figure(clients["by_modality"].get(modality)) for modality in MODALITIES),
        figure(generator["alignment"]),
        figure(generator["frechet"], 1),
        line["bytes"]["down"] / 1e6,
        line["bytes"]["up"] / 1e6,
        line["seconds"]["total"],
    )
    if participation:
        log(INFO, "  clients   %s", participation)


def log_before_and_after(first: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """Show the measures of clients and T2I in the first and the last line, and what clients reach alone."""
    evaluation = last.get("evaluation", {})
    alone = {name: values.get("alone") for name, values in evaluation.get("per_client", {}).items()}
    _log_row("", "before", "alone", "after")
    means = first["clients"]["accuracy"], evaluation.get("alone"), last["clients"]["accuracy"]
    _log_row("clients' mean accuracy", *map(figure, means))
    for name, key, digits in T2I_ROWS:
        if key in last["generator"]:
            before, after = (figure(line["generator"].get(key), digits) for line in (first, last))
            _log_row(name, before, "-", after)
    for client, values in last["clients"]["per_client"].items():
        before = first["clients"]["per_client"].get(client, {}).get("accuracy")
        accuracies = before, alone.get(client), values["accuracy"]
        _log_row(f"  {client} ({values['modality']})", *map(figure, accuracies))


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _log_row(name: str, *figures: str) -> None:
    log(INFO, "%-28s %8s %8s %8s", name, *figures)

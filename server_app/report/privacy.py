"""The privacy budgets of a run's clients: what they spent, on what, and what is not covered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.report.measures import Line
from fedmmkt.server_app.report.numbers import counted


@dataclass(frozen=True)
class PrivacyRow:
    """What a client said of its privacy budget.

    Attributes
    ----------
    name : str
        The client.
    epsilon, budget, delta : float
        What all its answers have spent, over all runs; the whole budget; and the delta of both.
    counts_noise, votes_noise : float or None
        Standard deviation of the noise in its class counts and votes; None if it sent none.
    """

    name: str
    epsilon: float
    budget: float
    delta: float
    counts_noise: float | None = None
    votes_noise: float | None = None


# For each kind of record of a client with a privacy budget, whether its epsilon covers it.
COVERED = (
    ("votes", "covered: discrete Gaussian noise on the votes for each batch"),
    ("class counts, number of examples", "covered: discrete Gaussian noise, once a run"),
    ("logits", "none are sent"),
    (
        "accuracy, loss, measures by class",
        "none are sent by a node with data of its own; simulated clients send those on the common test part, for the "
        "experiment, and these are not covered",
    ),
    ("names of classes", "none are sent"),
    ("name, model, modality, batches held", "no noise: they do not depend on examples"),
    ("errors, and when an answer comes", "not covered: an error is one word and a number"),
)


def privacy_rows(lines: Sequence[Line]) -> list[PrivacyRow]:
    """Return one row for each client that has a privacy budget, by name, with what it said last."""
    said: dict[str, Line] = {}
    for line in lines:
        for name, client in line["clients"]["per_client"].items():
            if "privacy" in client:
                said[name] = said.get(name, {}) | client["privacy"]
    return [PrivacyRow(name, **said[name]) for name in sorted(said, key=natural_key)]


def feedback_of(rule: str, rows: Sequence[PrivacyRow], clients: int) -> str:
    """Say what clients answer with.

    Parameters
    ----------
    rule : str
        The run-config's ``feedback``.
    rows : sequence of PrivacyRow
        The clients with a privacy budget.
    clients : int
        How many clients there are.
    """
    if not rows:
        return f"feedback {rule}"
    budgets = sorted({row.budget for row in rows})
    epsilon = "epsilon " + " to ".join(f"{budget:g}" for budget in dict.fromkeys([budgets[0], budgets[-1]]))
    said = f"{epsilon}, no logits"
    return said if len(rows) == clients else f"feedback {rule}, {len(rows)} of {counted(clients, 'client')}: {said}"


def client_names(lines: Sequence[Line]) -> list[str]:
    """Return the names of all clients that answered, sorted."""
    return sorted({name for line in lines for name in line["clients"]["per_client"]}, key=natural_key)

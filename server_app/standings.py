"""What each client's answer counts for in a round, and who is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING

import numpy as np
from flwr.supercore import log

from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.rules.reliability import Standing, judge_answers, weighed


def weigh_answers(
    answers: Sequence[Answer], prompted_N: np.ndarray, known: Mapping[str, Standing], classes: Sequence[str]
) -> tuple[list[Answer], list[float], dict[str, Standing]]:
    """Weigh the answers to a batch by how far they can be relied on.

    Parameters
    ----------
    answers : sequence of Answer
        Sorted by client name.
    prompted_N : numpy.ndarray
        int64; the class that each prompt names, -1 if it names none.
    known : mapping of str to Standing
        The standing of each client that has answered and learned before; see `judge_answers`.
    classes : sequence of str
        Names of the classes.

    Returns
    -------
    tuple
        The answers that count, as far as they count; for each of them, how far its client may count for more than the
        median client, between 0 and 1; and the standing of each client that answered.
    """
    judged = judge_answers({one.report.client: one.required_payload for one in answers}, prompted_N, known, classes)
    counted, excess = [], []
    for answer in answers:
        judgement = judged[answer.report.client]
        payload = weighed(answer.required_payload, judgement)
        if payload is not None:
            counted.append(answer if payload is answer.payload else replace(answer, payload=payload))
            excess.append(judgement.excess)
    return counted, excess, {name: judgement.standing for name, judgement in judged.items()}


def log_changes(before: Mapping[str, Standing], after: Mapping[str, Standing]) -> None:
    """Show whose weight falls or comes back in a round, and why."""
    for name, standing in after.items():
        earlier = before.get(name, Standing())
        if standing.weight < earlier.weight:
            log(WARNING, "  clients   %s counts for %.2f: %s", name, standing.weight, standing.reason)
        elif standing.weight == 1 and standing.reason and not earlier.reason:
            log(WARNING, "  clients   %s counts in part: %s", name, standing.reason)
        elif standing == replace(standing, weight=1.0, votes=True, reason="") and earlier.reason:
            log(INFO, "  clients   %s counts whole again", name)


def standings_to_json(standings: Mapping[str, Standing]) -> dict[str, dict[str, object]]:
    """Return the clients that do not count whole, for ``metrics.jsonl``."""
    return {
        name: {"weight": standing.weight, "votes": standing.votes, "reason": standing.reason}
        for name, standing in standings.items()
        if standing.reason
    }

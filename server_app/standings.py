"""What each client's answer counts for in a round, and who is told of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING

import numpy as np
from flwr.supercore import log

from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.rules.bounds import bounded
from fedmmkt.server_app.rules.reliability import NOT_SHOWN, Standing, judge_answers, weighed


def weigh_answers(
    answers: Sequence[Answer],
    prompted_N: np.ndarray,
    known: Mapping[str, Standing],
    classes: Sequence[str],
    cap: float,
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
    cap : float
        How many times the examples of the median client a client may count for at most.

    Returns
    -------
    tuple
        The answers that count, as far as they count; for each of them, how many times the examples of the median client
        its client may count for, between 1 and ``cap``; and the standing of each client that answered.
    """
    judged = judge_answers({one.report.client: one.required_payload for one in answers}, prompted_N, known, classes)
    counted, most = [], []
    for answer in answers:
        judgement = judged[answer.report.client]
        payload = weighed(answer.required_payload, judgement)
        if payload is not None:
            counted.append(answer if payload is answer.payload else replace(answer, payload=payload))
            most.append(1 + judgement.excess * (cap - 1))
    return counted, most, {name: judgement.standing for name, judgement in judged.items()}


def bound_answers(answers: Sequence[Answer], most: Sequence[float], new: Collection[str], cap: float) -> list[Answer]:
    """Bound what each client can contribute, and show whose new answer is bounded, and why.

    Parameters
    ----------
    answers : sequence of Answer
        The answers that count; at least one.
    most : sequence of float
        For each of them, how many times the examples of the median client its client may count for.
    new : collection of str
        The clients whose answers were not bounded before.
    cap : float
        How many times the examples of the median client any client may count for at most.
    """
    payloads = bounded([answer.required_payload for answer in answers], most)
    for answer, payload, times in zip(answers, payloads, most, strict=True):
        if payload is not answer.payload and answer.report.client in new:
            about = "about " if answer.required_payload.counts_noise is not None else ""
            said, counted = answer.report.examples, int(payload.class_counts_C.sum())
            level, why = _why_bounded(answer, times, cap)
            client = answer.report.client
            log(level, "  clients   %s says %s%s examples, and counts as %s: %s", client, about, said, counted, why)
    return [replace(answer, payload=payload) for answer, payload in zip(answers, payloads, strict=True)]


def _why_bounded(answer: Answer, times: float, cap: float) -> tuple[int, str]:
    """Return why a client counts for at most ``times`` the median client's examples, and how grave this is."""
    if times >= cap:
        return WARNING, f"nobody counts for more than {cap:g} times the median client (client-cap)"
    most = "the median client" if times == 1 else f"{times:.3g} times the median client"
    if answer.required_payload.logits_NC is None:
        shown = "with a privacy budget it sends no logits, and its votes are not clearly like the others'"
    else:
        shown = "its answers do not show clearly enough that it knows more"
    return INFO, f"{shown}, so it counts for at most {most} (robust); this is no reproach"


def log_changes(before: Mapping[str, Standing], after: Mapping[str, Standing]) -> None:
    """Show whose weight falls or comes back in a round, and why."""
    for name, standing in after.items():
        earlier = before.get(name, Standing())
        if standing.reason.startswith(NOT_SHOWN):
            log(INFO, "  clients   %s counts for %.2f: %s; this is no reproach", name, standing.weight, standing.reason)
        elif standing.weight < earlier.weight:
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

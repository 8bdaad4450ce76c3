"""What the local-only control says of single clients: where the federation made one worse, and how far it compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedmmkt.server_app.report.measures import FROZEN, ClientRow, Line, evaluations_of
from fedmmkt.server_app.report.noise import Share, share, verdict
from fedmmkt.server_app.report.numbers import counted, percent, points
from fedmmkt.server_app.report.settings import run_config_option

LEAST_TESTED = 3  # test examples of a class below which no fall is told
MOST_NAMED = 4  # of more falls, the largest are named
MANY_STEPS = 4  # times the control's steps, from which on the report says that it has few
Key = Literal["correct", "alone_correct"]


def personal_share(evaluation: Mapping[str, Any], key: Key) -> Share | None:
    """Return a client's personal accuracy with its standard error; None without what it needs.

    It is a mean over the classes, weighted by the client's own examples, so its variance is that of the classes' times
    the squared weights.
    """
    if key not in evaluation:
        return None
    known = [
        (examples, share(correct / tested, tested))
        for examples, tested, correct in zip(evaluation["examples"], evaluation["tested"], evaluation[key], strict=True)
        if tested and examples > 0
    ]
    total = sum(examples for examples, _ in known)
    if not total:
        return None
    value = sum(examples * one.value for examples, one in known) / total
    return Share(value, math.sqrt(sum((examples * (one.error or 0)) ** 2 for examples, one in known)) / total)


def personal_of(lines: Sequence[Line]) -> list[str]:
    """Say in a sentence how many clients gain in personal accuracy, and which falls most; none without the control."""
    shares = {
        name: (personal_share(evaluation, "alone_correct"), personal_share(evaluation, "correct"))
        for name, evaluation in evaluations_of(lines).items()
    }
    both = {name: (alone, federated) for name, (alone, federated) in shares.items() if alone and federated}
    if not both:
        return []
    verdicts = {name: verdict(alone, federated) for name, (alone, federated) in both.items()}
    found = list(verdicts.values())
    better = found.count("better")
    are = "is" if better == 1 else "are"
    text = (
        f"By personal accuracy (each client's own mixture of classes), {better} {are} better, "
        f"{found.count('worse')} worse, {found.count('within noise')} within noise"
    )
    name, (alone, federated) = min(both.items(), key=lambda item: item[1][1].value - item[1][0].value)
    if (change := federated.value - alone.value) < 0:
        judged = ", within noise" if verdicts[name] == "within noise" else ""
        change_text = f"from {percent(alone.value)} to {percent(federated.value)}"
        text += f"; {name} falls most: {points(change)} ({change_text}{judged})"
    return [f"{text}."]


def forgotten_of(lines: Sequence[Line], classes: Sequence[str]) -> list[str]:
    """Say in a sentence which classes that a client holds it knows worse than alone, beyond noise.

    Parameters
    ----------
    lines : sequence of dict
        The lines of ``metrics.jsonl``.
    classes : sequence of str
        The names of the classes.
    """
    noises = {
        name: client["privacy"].get("counts_noise") or 0.0
        for line in lines
        for name, client in line["clients"]["per_client"].items()
        if "privacy" in client
    }
    falls = []
    for name, evaluation in evaluations_of(lines).items():
        if "alone_correct" not in evaluation:
            continue
        least = 2 * noises.get(name, 0.0)  # A number that noise alone rarely makes.
        for index, (examples, tested) in enumerate(zip(evaluation["examples"], evaluation["tested"], strict=True)):
            if examples <= least or tested < LEAST_TESTED:
                continue
            alone, federated = (share(evaluation[key][index] / tested, tested) for key in ("alone_correct", "correct"))
            if verdict(alone, federated) == "worse":
                said = f"{name} {classes[index]}, {percent(alone.value)} to {percent(federated.value)}"
                falls.append((federated.value - alone.value, f"{said} (of {counted(tested, 'test example')})"))
    if not falls:
        return []
    falls.sort(key=lambda fall: fall[0])
    more = f"; and {len(falls) - MOST_NAMED} more" if len(falls) > MOST_NAMED else ""
    named = "; ".join(text for _, text in falls[:MOST_NAMED])
    return [f"Known worse than alone, of classes that a client holds: {named}{more}."]


def prompts_alone(config: Mapping[str, Any], named: int) -> str:
    """Return the run-config of the control without any client's word; empty where clients' word is all there is.

    Generated images and the classes of their prompts are then all that clients get, so that what remains of the gain is
    the T2I's own knowledge.

    Parameters
    ----------
    config : mapping
        The run's configuration.
    named : int
        How many clients the run compares with themselves alone.
    """
    client, t2i = config["client"], config["t2i"]
    taught = client["distillation-weight"] or t2i["scores"] != FROZEN
    if not named or not taught or not client["prompt-weight"]:
        return ""
    return run_config_option({"client.distillation-weight": 0.0, "client.alignment-weight": 0.0, "t2i.scores": FROZEN})


def few_steps_of(rows: Sequence[ClientRow], config: Mapping[str, Any]) -> str:
    """Say in a sentence that the control has few optimiser steps beside the federated models; empty if it has not.

    Parameters
    ----------
    rows : sequence of ClientRow
        The clients.
    config : mapping
        The run's configuration, by dotted keys' parts.
    """
    client, rounds = config["client"], config["rounds"]
    learns = any(client[key] for key in ("distillation-weight", "prompt-weight", "alignment-weight"))
    drawn = client["distillation-steps"] if learns else 0
    found = []
    for row in rows:
        epoch = math.ceil(row.examples / client["batch-size"])
        private = client["local-epochs"] * epoch  # The shorter part of a round is spread over the longer one.
        first = client["warmup-epochs"] * epoch
        alone, federated = first + rounds * private, first + rounds * max(private, drawn)
        if federated > MANY_STEPS * alone:
            found.append((alone, federated, row.name))
    if not found:
        return ""
    alone, federated, name = min(found)
    return (
        f"For {len(found)} of {counted(len(rows), 'client')} it may have learned too little: of few private examples, "
        f"equally many epochs are few optimiser steps ({name} about {alone}, against {federated} with synthetic "
        "samples). A part of the gain may be that of more steps."
    )

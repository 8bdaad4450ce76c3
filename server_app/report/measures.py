"""Values from the lines of ``metrics.jsonl``: by round, by client, and untrained, alone and federated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmmkt.common.natural_order import natural_key
from fedmmkt.server_app.report.noise import Share, Verdict, mean_share, share, verdict
from fedmmkt.server_app.report.numbers import about, counted, number, percent, points

FROZEN = "none"  # The score rule that leaves the T2I model as it is.

Line = dict[str, Any]
Measure = Callable[[Line], float | None]

MOST_CURVES = 30  # of more clients than this, the spread is drawn instead of curves


@dataclass(frozen=True)
class Headline:
    """A measure before and after learning.

    Attributes
    ----------
    title : str
        What is measured.
    values : tuple of (str, str)
        Names and texts of the values, the final one last.
    change : str
        The change to the final value; empty if there is none to compare with.
    verdict : str
        Whether the change is an improvement beyond noise; empty if the noise is not known.
    note : str
        How many clients and which rounds.
    """

    title: str
    values: tuple[tuple[str, str], ...]
    change: str
    verdict: Verdict
    note: str


@dataclass(frozen=True)
class ClientRow:
    """A client's description and its accuracies, which are None where they are not known.

    Attributes
    ----------
    name, model, modality, examples
        Its last description.
    before, alone, after : Share or None
        Its accuracy in its first round, alone, and in its last round.
    first, last : int
        These rounds.
    personal, alone_personal : float or None
        The accuracy weighted by the client's own class distribution, federated and alone.
    doubt : str
        In how many rounds the client did not count whole, and why at last; empty if it always did.
    is_noisy : bool
        Whether it told its number of examples with noise, for its privacy budget.
    """

    name: str
    model: str
    modality: str
    examples: int
    before: Share
    alone: Share | None
    after: Share
    first: int
    last: int
    personal: float | None
    alone_personal: float | None
    doubt: str = ""
    is_noisy: bool = False

    @property
    def shown_examples(self) -> str:
        """Its number of examples, as far as it is known."""
        return about(self.examples, self.is_noisy)

    @property
    def base(self) -> Share:
        """What the client is compared with: itself alone, or in its first round if that is not known."""
        return self.alone or self.before

    @property
    def gain(self) -> float:
        """Difference of its last accuracy to its base."""
        return self.after.value - self.base.value

    @property
    def verdict(self) -> Verdict:
        """Whether the client gains beyond noise."""
        return verdict(self.base, self.after)


@dataclass(frozen=True)
class Alone:
    """The accuracy of clients without the federation, by name.

    Attributes
    ----------
    accuracies : dict of str to float
        By client.
    source : str
        ``control``: a model that learned from private data alone, in as many private epochs. ``warm-up``: the client's
        own model in round 1, before its first distillation. Empty if it is not known.
    """

    accuracies: dict[str, float]
    source: Literal["control", "warm-up", ""]


def alone_of(lines: Sequence[Line]) -> Alone:
    """Return what clients reach alone: the local-only control if the run has one, else the accuracy after warm-up."""
    control = {name: client["alone"] for name, client in evaluations_of(lines).items() if "alone" in client}
    if control:
        return Alone(control, "control")
    if len(lines) > 2 and lines[1]["round"] == 1:  # With one round only, its report follows the distillation.
        per_client = lines[1]["clients"]["per_client"]
        return Alone({name: client["accuracy"] for name, client in _measured(per_client).items()}, "warm-up")
    return Alone({}, "")


def evaluations_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the clients' final evaluations by name; empty before the end, and for runs of earlier versions."""
    evaluations: dict[str, Any] = lines[-1].get("evaluation", {}).get("per_client", {}) if lines else {}
    return evaluations


def points_of(lines: Iterable[Line], measure: Measure) -> list[tuple[int, float]]:
    """Return (round, value) for each line that has a value."""
    return [(line["round"], value) for line in lines if (value := measure(line)) is not None]


def accuracy_of_modality(modality: str) -> Measure:
    """Return a measure: the mean accuracy of the clients of one modality."""

    def mean(line: Line) -> float | None:
        if (known := line["clients"].get("by_modality")) is not None:
            of_modality: float | None = known.get(modality)
            return of_modality
        clients = _measured(line["clients"]["per_client"]).values()
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
    """Return a measure: the value of the T2I model under a key; runs of earlier versions lack some."""
    return lambda line: line["generator"].get(key)


def headlines_of(
    lines: list[Line], alignment_samples: int | None = None, frechet_floor: float | None = None
) -> list[Headline]:
    """Compare untrained, alone and federated clients, and the T2I model before and after.

    Parameters
    ----------
    lines : list of dict
        The rounds.
    alignment_samples : int, optional
        Number of images of which the alignment is a share.
    frechet_floor : float, optional
        The Frechet distance of real images to real ones. A change to a distance up to this is not judged, nor is one
        from there by no more than this.
    """
    modalities = sorted({client["modality"] for line in lines for client in line["clients"]["per_client"].values()})
    title = "{} clients, mean accuracy".format
    found = [_clients_headline(title("All"), lines, mean_accuracy)]
    if len(modalities) > 1:
        found += [
            _clients_headline(title(name.capitalize()), lines, accuracy_of_modality(name), name) for name in modalities
        ]

    def alignment_change(before: float, after: float) -> tuple[str, Verdict]:
        judged = verdict(share(before, alignment_samples), share(after, alignment_samples))
        return points(after - before), judged

    def frechet_change(before: float, after: float) -> tuple[str, Verdict]:
        return _frechet_change(before, after, frechet_floor)

    found += [
        _t2i_headline("alignment", "alignment", lines, percent, "recognised as prompted", alignment_change),
        _t2i_headline("Fréchet distance", "frechet", lines, number, "lower is better", frechet_change),
        _t2i_headline("recall", "recall", lines, percent, "real images that generated ones cover", _recall_change),
    ]
    return [headline for headline in found if headline is not None]


def _clients_headline(title: str, lines: list[Line], measure: Measure, modality: str | None = None) -> Headline | None:
    measured = points_of(lines, measure)
    if not measured:
        return None
    (first, before), (last, after) = measured[0], measured[-1]
    note = f"{_counts(lines, modality)}, {_rounds(first, last)}"
    values = [("untrained" if first == 0 else f"round {first}", percent(before))]
    if first == last:
        return Headline(title, tuple(values), "", "", note)
    rows = [row for row in client_rows(lines) if modality in (None, row.modality) and row.last == last]
    alone = [row.alone for row in rows if row.alone is not None]
    base, federated = (
        mean_share(alone) or mean_share([row.before for row in rows]),
        mean_share([row.after for row in rows]),
    )
    change = points(after - before)
    if base and alone:
        values.append(("alone", percent(base.value)))
        change = f"{points(after - base.value)} compared with alone"
        note += f", {len(alone)} of them alone" if len(alone) < len(rows) else ""
    return Headline(title, (*values, ("federated", percent(after))), change, verdict(base, federated), note)


def _t2i_headline(
    name: str,
    key: str,
    lines: list[Line],
    written: Callable[[float], str],
    note: str,
    changed: Callable[[float, float], tuple[str, Verdict]],
) -> Headline | None:
    """Compare a measure of the T2I before and after; ``changed`` says the change, and whether it is beyond noise."""
    title, measured = f"T2I {name}", points_of(lines, of_generator(key))
    if not measured:
        return None
    (first, before), (last, after) = measured[0], measured[-1]
    note = f"{note}, {_rounds(first, last)}"
    if first == last:
        return Headline(title, (("before", written(before)),), "", "", note)
    values = (("before", written(before)), ("after", written(after)))
    return Headline(title, values, *changed(before, after), note)


def _frechet_change(before: float, after: float, floor: float | None) -> tuple[str, Verdict]:
    change = f"{100 * (after / before - 1):+.0f} %" if before else f"{after - before:+.3g}"
    if floor is not None and (after <= floor or (before <= floor and after - before <= floor)):
        where = f"real images among themselves have {number(floor)}"
    else:
        where = "nearer to real images" if after < before else "further from real images" if after > before else ""
    return ", ".join(filter(None, [change.replace("-", "−"), where])), ""


def _recall_change(before: float, after: float) -> tuple[str, Verdict]:
    where = "images more alike" if after < before else "images more various" if after > before else ""
    return ", ".join(filter(None, [points(after - before), where])), ""


def fading_of(lines: Sequence[Line], images: int | None = None, frechet_floor: float | None = None) -> list[str]:
    """Say in a sentence that images have become more alike, if they have, and whether they look more real.

    Parameters
    ----------
    lines : sequence of dict
        The lines of ``metrics.jsonl``.
    images : int, optional
        Of how many images recall is a share. A fall that would be within the noise of so many independent ones is none;
        if it is not known, any fall is one.
    frechet_floor : float, optional
        As in `headlines_of`.
    """
    recalls, distances = (points_of(lines, of_generator(key)) for key in ("recall", "frechet"))
    if not recalls:
        return []
    first, last = recalls[0][1], recalls[-1][1]
    if last >= first or verdict(share(first, images), share(last, images)) == "within noise":
        return []
    before, after = percent(first), percent(last)
    falls = bool(distances) and (frechet_floor or 0) < distances[-1][1] < distances[0][1]
    nearer = "nearer to real ones on the whole, but " if falls else ""
    return [
        f"Images of the T2I are {nearer}more alike than before: {after} of the real images have their like among them, "
        f"before {before} (recall)."
    ]


def _rounds(first: int, last: int) -> str:
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _counts(lines: list[Line], modality: str | None = None) -> str:
    """Return the numbers of clients in the first and last mean; clients may join late or miss a round."""
    rounds = [line["clients"]["counts"] for line in lines]
    counts = [sum(count for kind, count in kinds.items() if modality in (None, kind)) for kinds in rounds]
    seen = [count for count in counts if count] or [0]
    return counted(seen[0], "client") if seen[0] == seen[-1] else f"{seen[0]} → {seen[-1]} clients"


def _measured(per_client: Line) -> Line:
    """Return the clients that told their accuracy; others withhold it."""
    return {name: client for name, client in per_client.items() if client["accuracy"] is not None}


def client_rows(lines: list[Line]) -> list[ClientRow]:
    """Return one row per client that told its accuracy, described by its last report, sorted by modality and name."""
    seen: dict[str, list[tuple[int, Line]]] = {}
    for line in lines:
        for name, client in _measured(line["clients"]["per_client"]).items():
            seen.setdefault(name, []).append((line["round"], client))
    alone, evaluations, doubts = alone_of(lines).accuracies, evaluations_of(lines), _doubts(lines)
    rows = []
    for name, reports in seen.items():
        (first, before), (last, after) = reports[0], reports[-1]
        evaluation = evaluations.get(name, {})
        tested = sum(evaluation.get("tested", ())) or None
        rows.append(
            ClientRow(
                name,
                **{key: after[key] for key in ("model", "modality", "examples")},
                before=share(before["accuracy"], tested),
                alone=share(alone[name], tested) if name in alone else None,
                after=share(after["accuracy"], tested),
                first=first,
                last=last,
                personal=evaluation.get("personal"),
                alone_personal=evaluation.get("alone_personal"),
                doubt=doubts.get(name, ""),
                is_noisy="privacy" in after,
            )
        )
    return sorted(rows, key=lambda row: (row.modality, natural_key(row.name)))


def _doubts(lines: Sequence[Line]) -> dict[str, str]:
    judged = [line["reliability"] for line in lines if "reliability" in line]
    doubts: dict[str, list[Line]] = {}
    for found in judged:
        for name, doubt in found.items():
            doubts.setdefault(name, []).append(doubt)
    return {
        name: f"{'counted in part only' if any(doubt['weight'] for doubt in found) else 'not counted'} "
        f"in {len(found)} of {len(judged)} rounds: {found[-1]['reason']}"
        for name, found in doubts.items()
    }


def summary_of(rows: Sequence[ClientRow]) -> list[str]:
    """Say in sentences how many clients gain, which gains least, and which has the lowest accuracy."""
    compared = [row for row in rows if row.alone is not None or row.first != row.last]
    if not compared:
        return []
    least, lowest = min(compared, key=lambda row: row.gain), min(compared, key=lambda row: row.after.value)
    base = "alone" if least.alone else "before"
    sentences = []
    if all(row.verdict for row in compared):
        counts = {said: sum(row.verdict == said for row in compared) for said in ("better", "worse", "within noise")}
        sentences.append(
            f"Of {counted(len(compared), 'client')}, {counts['better']} are better federated than {base} beyond noise, "
            f"{counts['worse']} worse, {counts['within noise']} within noise."
        )
    judged = f", {least.verdict}" if least.verdict == "within noise" else ""
    if len(compared) < 2 or least.after.value == lowest.after.value == max(row.after.value for row in compared):
        return sentences  # There is no least, where all are alike.
    sentences += [
        f"{least.name} gains least: {points(least.gain)} "
        f"(from {percent(least.base.value)} to {percent(least.after.value)}{judged}).",
        f"{lowest.name} has the lowest accuracy: {percent(lowest.after.value)}, with "
        f"{'about ' if lowest.is_noisy else ''}{counted(lowest.examples, 'private example')} "
        f"({base} {percent(lowest.base.value)}).",
    ]
    return sentences

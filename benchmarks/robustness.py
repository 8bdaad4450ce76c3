"""Clients that lie: what they cost the honest ones and the T2I, with and without ``robust``, on digits.

Run ``python -m benchmarks.robustness``. Twenty clients of six architectures, some of which learn like the others and
then lie in their answers (`benchmarks/attacks.py`); a hidden liar is honest for three rounds. Each attack has a row
with ``robust``, one without, and the run without liars is measured on the same honest clients. ``--replay`` lies in the
recorded answers of a run without liars instead, and compares the soft targets: seconds for all attacks and rules.
``--quick`` has ten clients, small models, three attacks and fewer steps. Finished runs are kept in the output folder.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.attacks import ATTACKS, Honest, own_sight_NC
from benchmarks.rows import DIGITS, Lines, Overrides, row_folder, run_once, spread
from fedmmkt.client_app import app as honest_app
from fedmmkt.common.images import resize_images
from fedmmkt.common.payloads import ClientReport, DistillationPayload, Request, SyntheticBatch
from fedmmkt.server_app.consensus import aggregate_payloads
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.standings import bound_answers, weigh_answers
from fedmmkt.server_app.strategy import FedMMKT

HIDDEN_ROUNDS = 3
ABSENT = "absent"  # The control: the clients that elsewhere lie give no answer at all.
CLIENT_CAP = 10.0
RULES = ("mask", "mean", "energy", "entropy", "era", "median", "min-ce")

# ---------------------------------------------------------------------- clients that lie

app = ClientApp()


@app.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return honest_app.evaluate_model(message, context)


@app.evaluate("final")
def _evaluate_finally(message: Message, context: Context) -> Message:
    return honest_app.evaluate_finally(message, context)


@app.train("distill")
def _distill(message: Message, context: Context) -> Message:
    return honest_app.distill(message, context)


@app.train("early")
def _learn_early(message: Message, context: Context) -> Message:
    return honest_app.learn_early(message, context)


@app.train()
def _train(message: Message, context: Context) -> Message:
    """Learn and answer like the others; then a liar changes the answer."""
    reply = honest_app.train_round(message, context)
    partition = int(context.node_config["partition-id"])
    request = Request.from_content(message.content)
    server_round, settings = request.instructions.round, context.run_config
    liars = [int(liar) for liar in str(settings["extra.liars"]).split(",") if liar]
    if partition not in liars or server_round <= int(settings["extra.honest-rounds"]):
        return reply
    if settings["extra.attack"] == ABSENT:
        raise RuntimeError("absent")
    payload = DistillationPayload.from_records(reply.content, "payload")
    report = ClientReport.from_records(reply.content, "report")
    lie = _lie(str(settings["extra.attack"]), payload, request.batches[-1].prompted_N, server_round, partition)
    changed = report.model_copy(update={"examples": int(lie.class_counts_C.sum())})
    return Message(RecordDict({**changed.to_records("report"), **lie.to_records("payload")}), reply_to=message)


def _lie(
    attack: str,
    payload: DistillationPayload,
    prompted_N: np.ndarray,
    server_round: int,
    client: int,
    seen_NC: np.ndarray | None = None,
) -> DistillationPayload:
    """Apply an attack; without ``seen_NC`` the client goes by what it sees itself."""
    logits_NC = _logits_NC(payload)
    seen_NC = own_sight_NC(logits_NC, prompted_N) if seen_NC is None else seen_NC
    seeds = (1000 * server_round + client, server_round)
    lie = ATTACKS[attack](Honest(logits_NC, payload.class_counts_C, payload.votes_N, prompted_N, seen_NC, *seeds))
    changes = {"logits_NC": lie.logits_NC.astype(np.float16), "class_counts_C": lie.counts_C, "votes_N": lie.votes_N}
    return payload.model_copy(update=changes)


def liars_of(fraction: float, nodes: int, seed: int) -> list[int]:
    """Draw which partitions lie."""
    return sorted(np.random.default_rng(seed).permutation(nodes)[: round(fraction * nodes)].tolist())


# ---------------------------------------------------------------------- whole runs


@dataclass(frozen=True)
class Profile:
    """How many clients, and how much they do."""

    nodes: int
    attacks: tuple[str, ...]
    fractions: tuple[float, ...]
    settings: Overrides


HIDDEN = ", hidden"
ALL_ATTACKS = (*(name + kind for kind in ("", HIDDEN) for name in ATTACKS), ABSENT)
FULL = Profile(20, ALL_ATTACKS, (0.1, 0.3, 0.45), {"rounds": 6})
QUICK = Profile(
    10,
    ("inflated", "least likely", "least likely" + HIDDEN),
    (0.3,),
    {
        "rounds": 5,
        "client.models": "cnn,mlp",
        "client.distillation-steps": 60,
        "t2i.samples-per-round": 200,
        "t2i.adaptation-steps": 40,
    },
)


@dataclass(frozen=True)
class Outcome:
    """Mean accuracy of the honest clients, federated and alone, and the T2I's measures."""

    accuracy: float
    alone: float
    alignment: float
    frechet: float


def outcome_of(lines: Lines, liars: Sequence[int]) -> Outcome:
    """Measure a run on the clients that are not among ``liars``."""
    clients = {
        name: client
        for name, client in lines[-1]["evaluation"]["per_client"].items()
        if int(name.rpartition("-")[2]) not in liars
    }
    accuracy, alone = (statistics.mean(client[key] for client in clients.values()) for key in ("accuracy", "alone"))
    return Outcome(accuracy, alone, lines[-1]["generator"]["alignment"], lines[-1]["generator"]["frechet"])


def compare(
    profile: Profile, common: Overrides, seeds: Sequence[int], out: Path, ways: Sequence[bool] = (True, False)
) -> str:
    """Do the missing runs, with ``robust`` in these ways; return the table."""
    rows = ["| liars | | honest clients | than without liars | alone | alignment | Frechet | than without |"]
    rows.append("|---|---|---|---|---|---|---|---|")

    def run(name: str, seed: int, changes: Overrides) -> Lines:
        settings = profile.settings | common | {"local-only-control": True, "seed": seed} | changes
        lines = run_once(row_folder(out, name, seed), settings, profile.nodes, "benchmarks.robustness:app")
        print(f"{name}, seed {seed}: {lines[-1]['clients']['accuracy']:.3f}", file=sys.stderr, flush=True)
        return lines

    plain = {True: {seed: run("none", seed, _lies("", ())) for seed in seeds}}
    if False in ways:
        plain[False] = {seed: run("none, robust off", seed, _lies("", ()) | {"robust": False}) for seed in seeds}
    for robust, runs in plain.items():
        rows.append(_row("none", robust, *_pairs(runs, plain[True], dict.fromkeys(seeds, ()))))
    for fraction in profile.fractions:
        liars = {seed: liars_of(fraction, profile.nodes, seed) for seed in seeds}
        for attack in profile.attacks:
            title = f"{fraction:.0%} {attack}"
            for robust in ways:
                name = title.replace("%", " percent") + ("" if robust else ", robust off")
                runs = {seed: run(name, seed, _lies(attack, liars[seed]) | {"robust": robust}) for seed in seeds}
                rows.append(_row(title, robust, *_pairs(runs, plain[True], liars)))
    return "\n".join(rows)


def _lies(attack: str, liars: Sequence[int]) -> Overrides:
    """Return the settings that `app` reads."""
    return {
        "extra.attack": attack.removesuffix(HIDDEN),
        "extra.liars": ",".join(map(str, liars)),
        "extra.honest-rounds": HIDDEN_ROUNDS if attack.endswith(HIDDEN) else 0,
    }


def _pairs(
    runs: Mapping[int, Lines], plain: Mapping[int, Lines], liars: Mapping[int, Sequence[int]]
) -> tuple[list[Outcome], list[Outcome]]:
    """Return the outcomes of runs, and of the runs without liars on the same clients."""
    return [outcome_of(runs[seed], liars[seed]) for seed in runs], [outcome_of(plain[s], liars[s]) for s in runs]


def _row(title: str, robust: bool, found: Sequence[Outcome], plain: Sequence[Outcome]) -> str:
    pairs = list(zip(found, plain, strict=True))
    cells = [
        title,
        "robust" if robust else "off",
        spread([one.accuracy for one in found]),
        spread([100 * (one.accuracy - other.accuracy) for one, other in pairs], 1),
        spread([one.alone for one in found]),
        spread([one.alignment for one in found]),
        spread([one.frechet for one in found], 0),
        spread([100 * (one.frechet / other.frechet - 1) for one, other in pairs], 0) + " %",
    ]
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------- replay of recorded answers


class Recording(FedMMKT):
    """The strategy, which also keeps the clients' answers and what the judge sees in each sample."""

    def aggregate_train(self, server_round: int, replies: object) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep what is aggregated."""
        messages = list(replies)  # type: ignore[call-overload]
        answers = sorted(map(self.read_train_reply, messages), key=lambda answer: answer.report.client)
        batch, samples = self.ledger.served(server_round)
        judge = self.recorder.images.judge
        if judge is None:
            raise ValueError("a recording needs the judge")
        images_NHWC = resize_images(samples.images_NHWC, self.config.data.image_size)
        seen_NC = judge.head(judge.embed(images_NHWC)).softmax(1).detach()
        kept = {"answers": answers, "batch": batch.without_images(), "seen_NC": seen_NC.numpy()}
        torch.save(kept, self.recorder.run_folder.path / f"answers-{server_round}.pt")
        return super().aggregate_train(server_round, messages)


@dataclass(frozen=True)
class Recorded:
    """The answers to one batch, and what the judge sees in it."""

    answers: list[Answer]
    batch: SyntheticBatch
    seen_NC: np.ndarray


def recorded_rounds(folder: Path) -> list[Recorded]:
    """Read what `Recording` kept."""
    files = sorted(folder.glob("answers-*.pt"), key=lambda file: int(file.stem.rpartition("-")[2]))
    return [Recorded(**torch.load(file, weights_only=False)) for file in files]


def replayed(
    rounds: Sequence[Recorded], attack: str, liars: Sequence[int], rule: str, robust: bool
) -> list[tuple[float, float]]:
    """Lie in recorded answers and aggregate them.

    Returns for each round in which liars lie how many soft targets name what the judge sees, and the probability that
    they give to it.
    """
    known: dict[str, Standing] = {}
    outcomes = []
    hidden = attack.endswith(HIDDEN)
    for number, recorded in enumerate(rounds, start=1):
        answers, prompted_N = recorded.answers, recorded.batch.prompted_N
        lies = bool(attack) and not (hidden and number <= HIDDEN_ROUNDS)
        if lies:
            answers = _with_lies(answers, attack.removesuffix(HIDDEN), liars, prompted_N, number)
        most = [CLIENT_CAP] * len(answers)
        if robust:
            names = [str(index) for index in range(recorded.seen_NC.shape[1])]
            answers, most, known = weigh_answers(answers, prompted_N, known, names, CLIENT_CAP)
        payloads = [answer.required_payload for answer in bound_answers(answers, most, (), CLIENT_CAP)]
        found_NC = aggregate_payloads(aggregations.get(rule), rule, payloads, torch.from_numpy(prompted_N), robust)
        targets_NC = found_NC.numpy()
        if lies or not attack:
            right = (targets_NC.argmax(1) == recorded.seen_NC.argmax(1)).mean()
            outcomes.append((float(right), float((targets_NC * recorded.seen_NC).sum(1).mean())))
    return outcomes


def _logits_NC(payload: DistillationPayload) -> np.ndarray:
    assert payload.logits_NC is not None  # Nobody has a privacy budget here.
    return payload.logits_NC.astype(np.float32)


def _with_lies(
    answers: Sequence[Answer], attack: str, liars: Sequence[int], prompted_N: np.ndarray, number: int
) -> list[Answer]:
    """Let the liars lie; they know the mean of what the honest clients say."""
    partitions = [int(answer.report.client.rpartition("-")[2]) for answer in answers]
    logits = [_logits_NC(answer.required_payload) for answer in answers]
    honest_KNC = torch.from_numpy(np.stack([one for one, p in zip(logits, partitions, strict=True) if p not in liars]))
    seen_NC = honest_KNC.softmax(-1).mean(0).numpy()
    return [
        Answer(answer.report, _lie(attack, answer.required_payload, prompted_N, number, partition, seen_NC))
        if partition in liars
        else answer
        for answer, partition in zip(answers, partitions, strict=True)
    ]


def replay(profile: Profile, common: Overrides, seeds: Sequence[int], rules: Sequence[str], out: Path) -> str:
    """Record the missing runs; return a table of soft targets' accuracies for all attacks, fractions and rules."""
    settings: Overrides = {"rounds": HIDDEN_ROUNDS + 1, "strategy": "benchmarks.robustness:Recording"}
    folders = []
    for seed in seeds:
        folder = row_folder(out, "recorded", seed)
        run_once(folder, profile.settings | common | settings | {"seed": seed}, profile.nodes)
        folders.append((seed, recorded_rounds(folder / "run")))
    fractions = profile.fractions
    titles = [f"{fraction:.0%}{' off' if not robust else ''}" for fraction in fractions for robust in (True, False)]
    rows = [f"| rule | liars | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for rule in rules:
        for attack in ("", *(name for name in ALL_ATTACKS if name != ABSENT)):
            cells = []
            for fraction in fractions:
                for robust in (True, False):
                    means = [
                        np.mean(replayed(rounds, attack, liars_of(fraction, profile.nodes, seed), rule, robust), axis=0)
                        for seed, rounds in folders
                    ]
                    right, given = np.mean(means, axis=0)
                    cells.append(f"{right:.3f} ({given:.2f})")
            rows.append(f"| {rule} | {attack or 'none'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, do the missing runs, print the table and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="ten clients, small models, three attacks, fewer steps")
    parser.add_argument("--replay", action="store_true", help="lie in recorded answers, and compare the soft targets")
    parser.add_argument("--attacks", nargs="+", choices=ALL_ATTACKS, help="by default all; with --quick three")
    parser.add_argument("--fractions", type=float, nargs="+", help="of the clients that lie; by default 0.1 0.3 0.45")
    parser.add_argument("--robust", action="store_true", help="no run without `robust`: half of the time")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="with --replay")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, help="by default 6, with --quick 5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/robustness"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    base = QUICK if arguments.quick else FULL
    profile = Profile(
        base.nodes,
        tuple(arguments.attacks or base.attacks),
        tuple(arguments.fractions or base.fractions),
        base.settings | ({"rounds": arguments.rounds} if arguments.rounds else {}),
    )
    common = DIGITS | {"data.alpha": arguments.alpha, "checkpoints-kept": 0}
    name = "quick" if arguments.quick else f"rounds-{profile.settings['rounds']}"
    out = (arguments.out / name / f"alpha-{arguments.alpha:g}").resolve()
    if arguments.replay:
        table = replay(profile, common, arguments.seeds, arguments.rules, out)
    else:
        table = compare(profile, common, arguments.seeds, out, (True,) if arguments.robust else (True, False))
    out.mkdir(parents=True, exist_ok=True)
    (out / ("replay.md" if arguments.replay else "table.md")).write_text(f"{table}\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()

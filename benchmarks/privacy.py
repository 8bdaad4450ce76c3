"""What privacy costs, and what attacks find: ``python -m benchmarks.privacy --seeds 3 --epsilon inf 8 4 1 --attacks``.

Accuracy and T2I by epsilon, on digits with the six clients of the demo; with ``--data DIR`` also on CIFAR-10 with
twenty clients (`benchmarks.cifar10`). ``--attacks`` attacks the votes and the logits of a node, on digits. ``--quick``
has two rounds and few suspects, to see that it runs. Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import cifar10
from benchmarks.digits import NODES
from benchmarks.privacy_attacks import (
    ALIKE,
    GRADED,
    Rates,
    Votes,
    as_pixels,
    calibrated,
    confidence,
    evolved,
    most_tpr,
    nearest_correlations,
    rates,
    votes_on_copies,
)
from benchmarks.rows import ACCURACY, COSTS_AND_T2I, DIGITS, Column, Overrides, modality, run_rows, table
from fedmmkt.client_app.answers import nearest_neighbour_votes, private_votes, vote_features
from fedmmkt.client_app.learning.optimizer import AdamW
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, parameter_groups, predict, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs
from fedmmkt.common.config import DataConfig, RunConfig
from fedmmkt.common.datasets import load_splits, to_examples
from fedmmkt.common.payloads import VOTES_PER_IMAGE
from fedmmkt.common.privacy import DEFAULT_DELTA, most_precision, plan_of

ROUNDS = RunConfig().rounds
BATCHES = 200  # Of the evolution.
REPETITIONS = 10  # Of the noise, for each suspect.
CORE = 3  # Of graded copies, the first three get a member's votes.
EPSILON = Column(
    "epsilon spent (most of the clients)",
    lambda lines: max(
        (
            client["privacy"]["epsilon"]
            for client in lines[-1]["clients"]["per_client"].values()
            if client.get("privacy")
        ),
        default=None,
    ),
    2,
)
COLUMNS = (EPSILON, ACCURACY, modality("image", "image clients"), *COSTS_AND_T2I)


def row(epsilon: float) -> tuple[str, Overrides]:
    """Return name and run-config overrides of a row."""
    return f"epsilon {epsilon:g}", {} if math.isinf(epsilon) else {"client.epsilon": epsilon}


def noise_of(epsilon: float, answers: int) -> float:
    """Return the noise multiplier of each batch's votes, as a node plans it for a run of so many rounds."""
    return plan_of(most_precision(epsilon, DEFAULT_DELTA), answers).votes


def drawn(shape: tuple[int, ...], noise: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the noise of votes, seeded and rounded; a node draws it from secure randomness, which takes much longer."""
    return rng.normal(size=shape, scale=noise * VOTES_PER_IMAGE**0.5).round()


@dataclass(frozen=True)
class Holdings:
    """Digits that are divided among equal clients at random, and each client's model, which learned from them alone.

    Attributes
    ----------
    images_NCHW, labels_N : torch.Tensor
        The training part of the digits.
    rows : list of torch.Tensor
        Row numbers of each client.
    models : list of AlignedModel
        A CNN of each client, with the epochs of a run.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    rows: list[Tensor]
    models: list[AlignedModel]

    def votes(self, client: int) -> Votes:
        """Return the function that a node without a privacy budget answers votes with."""
        private = self.images_NCHW[self.rows[client]]
        encoder = self.models[client].task_model.image_encoder
        assert encoder is not None

        def answer(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            features = vote_features(encoder, private, images_NCHW)
            return nearest_neighbour_votes(features[0], self.labels_N[self.rows[client]], features[1], labels_N)

        return answer

    def bounded_votes(self, client: int, noise: float = 0) -> Votes:
        """Return the function that a node with a privacy budget answers votes with; noise zero: before the noise."""
        rows, rng = self.rows[client], np.random.default_rng(client)

        def answer(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            votes_N = private_votes(self.images_NCHW[rows], self.labels_N[rows], images_NCHW, labels_N)
            return torch.from_numpy(votes_N + drawn(votes_N.shape, noise, rng)).float()

        return answer

    def others(self, client: int, count: int) -> Tensor:
        """Return rows that the client does not hold."""
        elsewhere = torch.cat([rows for other, rows in enumerate(self.rows) if other != client])
        return elsewhere[torch.randperm(len(elsewhere), generator=torch.Generator().manual_seed(client))[:count]]


def divide(clients: int = NODES, epochs: int | None = None) -> Holdings:
    """Divide the digits among clients at random, so that members and others are alike, and train their models."""
    config = RunConfig(seed=0, data=DataConfig(dataset="digits"))
    settings = config.client
    epochs = settings.warmup_epochs + settings.local_epochs * (ROUNDS - 1) if epochs is None else epochs
    splits = load_splits(config.data, 0)
    examples = to_examples(splits.train, config.data, images=True, texts=False)
    images_NCHW = torch.from_numpy(np.array(examples.images_NHWC)).permute(0, 3, 1, 2).contiguous()
    labels_N = torch.from_numpy(examples.labels_N)
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    rows, models = list(order.chunk(clients)), []
    for client, part in enumerate(rows):
        torch.manual_seed(client)
        model = AlignedModel(build_task_model("cnn", len(splits.classes), config.data.image_size), anchor_size=0)
        optimizer = AdamW(parameter_groups(model, settings), weight_decay=1e-3)
        private = PrivateSet(Inputs(images_NCHW[part]), labels_N[part])
        train(model, optimizer, private, None, settings, epochs, torch.Generator().manual_seed(client))
        models.append(model)
    return Holdings(images_NCHW, labels_N, rows, models)


# ---------------------------------------------------------------------- membership


def membership_rows(held: Holdings, epsilons: Sequence[float], suspects: int, clients: int) -> list[str]:
    """Attack the votes on near-copies of suspects, 120 in a batch, half of them members; return the table's rows."""
    lines = []
    for name, changes, counted in (("alike", ALIKE, len(ALIKE)), ("graded", GRADED, CORE)):
        for protected in (False, True):
            asked = held.bounded_votes if protected else held.votes
            found = [_copies_of(asked(client), held, client, suspects, changes) for client in range(clients)]
            members, others = (torch.cat(part)[:, :counted] for part in zip(*found, strict=True))
            if not protected:
                scores = [part.sum(1).double().numpy()[None] for part in (members, others)]
                lines.append(
                    _line(f"20 copies, {name}", "votes without a budget", 1, rates(scores[0], scores[1]), None)
                )
                continue
            for epsilon in epsilons:
                noise = noise_of(epsilon, ROUNDS)
                for batches in (1, ROUNDS):
                    scores = [
                        _noisy_sums(part.numpy(), noise, batches, seed) for seed, part in enumerate((members, others))
                    ]
                    best = most_tpr(noise, batches, 0.01)
                    title = f"epsilon {epsilon:g}"
                    lines.append(_line(f"20 copies, {name}", title, batches, rates(scores[0], scores[1]), best))
    return lines


def _copies_of(
    votes: Votes, held: Holdings, client: int, suspects: int, changes: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the votes on copies of a client's members and of as many others."""
    generator = torch.Generator().manual_seed(client)
    members, others = held.rows[client][:suspects], held.others(client, suspects)
    found = []
    for some, more in zip(members.split(60), others.split(60), strict=True):
        rows = torch.cat([some, more])
        found.append(votes_on_copies(votes, held.images_NCHW[rows], held.labels_N[rows], changes, generator))
    halves = [part.tensor_split([len(part) // 2]) for part in found]
    return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])


def _noisy_sums(votes_NK: NDArray[np.float32], noise: float, batches: int, seed: int) -> NDArray[np.float64]:
    """Return sums of votes over copies and batches, each vote with noise of its own.

    It is drawn anew in each repetition (repetitions x N).
    """
    noisy = votes_NK + drawn((REPETITIONS, batches, *votes_NK.shape), noise, np.random.default_rng(seed))
    sums: NDArray[np.float64] = noisy.sum((1, 3))
    return sums


def logits_rows(held: Holdings) -> list[str]:
    """Attack the logits of each client's model by the confidence in the right class; return the table's rows."""
    scores_KN = [
        confidence(predict(model.task_model, Inputs(held.images_NCHW)), held.labels_N) for model in held.models
    ]
    compared: dict[str, list[tuple[Tensor, Tensor]]] = {"confidence": [], "compared with models of others (LiRA)": []}
    holder_N = torch.empty(len(held.labels_N), dtype=torch.int64)
    for client, rows in enumerate(held.rows):
        holder_N[rows] = client
    for client, own_N in enumerate(scores_KN):
        is_member_N = holder_N == client
        compared["confidence"].append((own_N[is_member_N], own_N[~is_member_N]))
        above_N = torch.empty_like(own_N)
        for holder in range(len(held.rows)):
            part = holder_N == holder
            others = [scores[part] for other, scores in enumerate(scores_KN) if other not in (client, holder)]
            above_N[part] = calibrated(own_N[part], others)
        compared["compared with models of others (LiRA)"].append((above_N[is_member_N], above_N[~is_member_N]))
    lines = []
    for name, parts in compared.items():
        own, other = (torch.cat(part).double().numpy()[None] for part in zip(*parts, strict=True))
        lines.append(_line(f"logits: {name}", "logits without a budget", 1, rates(own, other), None))
    return [*lines, "| logits | any epsilon | | none are sent | | | |"]


def _line(attack: str, answer: str, batches: int, found: Rates, best: float | None) -> str:
    cells = " | ".join(f"{low_high[0]:.3f} ({low_high[1]:.3f} to {low_high[2]:.3f})" for low_high in
                       (found.tpr_01, found.tpr_001, found.auc))  # fmt: skip
    return _told(f"| {attack} | {answer} | {batches} | {cells} | {'-' if best is None else f'{best:.3f}'} |")


def _told(line: str) -> str:
    print(line, file=sys.stderr, flush=True)
    return line


# ---------------------------------------------------------------------- reconstruction


def evolution_rows(held: Holdings, epsilons: Sequence[float], labels: Sequence[int], batches: int) -> list[str]:
    """Rebuild private images of single classes from votes; return the table's rows.

    The control are as many images of the same class that the client does not hold. What a class has in common, its mean
    over images that the client does not hold, is also taken from all images before they are compared.
    """
    blind = torch.Generator().manual_seed(0)
    answers: list[tuple[str, int, Callable[[], Votes]]] = [
        ("no information (random votes)", batches, lambda: lambda images, _: torch.rand(len(images), generator=blind)),
        ("votes without a budget", batches, lambda: held.votes(0)),
        ("votes without a budget", ROUNDS, lambda: held.votes(0)),
        ("votes of pixels, no noise", batches, lambda: held.bounded_votes(0)),
    ]
    for epsilon in epsilons:
        for count in (batches, ROUNDS):
            answers.append((f"epsilon {epsilon:g}", count, partial(held.bounded_votes, 0, noise_of(epsilon, count))))
    return [_evolution_line(held, name, count, make(), labels) for name, count, make in answers]


def _evolution_line(held: Holdings, name: str, batches: int, votes: Votes, labels: Sequence[int]) -> str:
    raw: list[tuple[Tensor, Tensor]] = []
    beyond: list[tuple[Tensor, Tensor]] = []
    for label in labels:
        made = evolved(votes, label, batches, torch.Generator().manual_seed(label))
        private, public = (
            as_pixels(held.images_NCHW[rows[held.labels_N[rows] == label]])
            for rows in (held.rows[0], torch.cat(held.rows[1:]))
        )
        control, common = public[: len(private)], public[len(private) :].mean(0)
        raw.append((nearest_correlations(private, made), nearest_correlations(control, made)))
        made = made * 255 - common
        beyond.append((nearest_correlations(private - common, made), nearest_correlations(control - common, made)))
    cells = []
    for parts in (raw, beyond):
        for values in zip(*parts, strict=True):
            together = torch.cat(values)
            cells.append(f"{together.max():.2f} / {together.median():.2f}")
    return _told(f"| {name} | {batches} | {' | '.join(cells)} |")


def attack(epsilons: Sequence[float], quick: bool) -> str:
    """Run all attacks; return their tables."""
    finite = [epsilon for epsilon in epsilons if not math.isinf(epsilon)]
    held = divide(epochs=2) if quick else divide()
    suspects, clients, labels, batches = (60, 1, (0,), 20) if quick else (240, 2, (0, 8), BATCHES)
    title = "| attack | answers | batches | TPR at FPR .01 | TPR at FPR .001 | AUC | no attack has more, at FPR .01 |"
    lines = [title, "|---" * 7 + "|", *membership_rows(held, finite, suspects, clients), *logits_rows(held)]
    membership = "\n".join(lines)
    columns = ("private", "others", "private, beyond the class", "others, beyond the class")
    title = "| answers | batches | " + " | ".join(f"{name}: best / median" for name in columns) + " |"
    lines = [title, "|---" * 6 + "|", *evolution_rows(held, finite, labels, batches)]
    reconstruction = "\n".join(lines)
    return (
        f"### Membership ({clients} client(s), {suspects} members and {suspects} others each; for logits, all)\n\n"
        f"{membership}\n\n"
        f"### Reconstruction (correlation with the nearest image that was made; classes {labels})\n\n{reconstruction}"
    )


# ---------------------------------------------------------------------- accuracy


def cifar10_rows(arguments: argparse.Namespace, rows: dict[str, Overrides], out: Path) -> str:
    """Run CIFAR-10 with twenty clients; return the table, or why there is none."""
    if not (arguments.data / "train.parquet").exists():
        return f"CIFAR-10 is left out: {arguments.data} has no train.parquet."
    made = cifar10.make_start(cifar10.QUICK, arguments.data, out / "start") | {"data.alpha": 0.1}
    common = cifar10.SETTINGS | cifar10.QUICK.settings | made
    runs = run_rows(rows, common, arguments.cifar_seeds, cifar10.NODES, out / "alpha-0.1")
    return f"### CIFAR-10 (--quick of benchmarks.cifar10), alpha 0.1\n\n{table(runs, COLUMNS)}"


def main() -> None:
    """Parse the command line, do the missing runs, write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.privacy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds, few suspects: to see that it runs")
    parser.add_argument("--attacks", action="store_true", help="attack votes and logits")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 8, 4, 1], help="inf: no budget")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of the runs on digits; 0: no runs")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--cifar-seeds", type=int, default=1, help="seeds of the runs on CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/privacy"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    out = arguments.out.resolve() / ("quick" if arguments.quick else "full")
    rows = dict(row(epsilon) for epsilon in arguments.epsilon)
    tables = []
    if arguments.seeds:
        common = DIGITS | {"rounds": 2 if arguments.quick else ROUNDS, "data.alpha": 0.1}
        runs = run_rows(rows, common, arguments.seeds, NODES, out / "digits")
        title = f"### Digits, alpha 0.1, {arguments.seeds} seed(s), {common['rounds']} rounds"
        tables.append(f"{title}, delta {DEFAULT_DELTA:g}\n\n{table(runs, COLUMNS)}")
    if arguments.data:
        tables.append(cifar10_rows(arguments, rows, out / "cifar10"))
    if arguments.attacks:
        tables.append(attack(arguments.epsilon, arguments.quick))
    text = "\n\n".join(tables)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

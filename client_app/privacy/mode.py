"""A node in private mode: all that it answers from its private data has noise, and is in its ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmmkt.client_app.answers import private_votes
from fedmmkt.client_app.memory import plain_name
from fedmmkt.client_app.privacy.ledger import Answer, LedgerError, PrivacyLedger, copy_ledger, create_ledger
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.common.datasets import Examples
from fedmmkt.common.payloads import VOTES_PER_IMAGE, DistillationPayload, Instructions, SyntheticBatch
from fedmmkt.common.privacy import Budget

HEADS, SIMULATED = "privacy", "privacy-ledger.jsonl"


class PrivateMode:
    """The answers of a node in private mode.

    Parameters
    ----------
    ledger : PrivacyLedger
        The node's ledger.
    instructions : Instructions
        The server's instructions; the noise is planned for all rounds of the run.
    examples : Examples
        The private training examples.

    Attributes
    ----------
    counts : Answer
        The number of examples of each class with noise, at least zero and not all zero; the same throughout a run.
        They are answered at once: so no run has a plan without a charge, however many runs a server makes up.

    Raises
    ------
    LedgerError
        If the ledger cannot be used.
    SpentError
        If its budget is spent.
    """

    def __init__(self, ledger: PrivacyLedger, instructions: Instructions, examples: Examples) -> None:
        self.ledger = ledger
        self._classes, self._examples = instructions.classes, examples
        self._origin, self._plan = ledger.plan(instructions.run_key, instructions.ancestors, instructions.rounds)
        self.counts = self._counts()

    def _counts(self) -> Answer:
        question = _question("counts", self._origin, self._classes)
        counts_C = np.bincount(self._examples.labels_N, minlength=len(self._classes))
        answer = self.ledger.answer(question, counts_C, 1.0, self._plan.counts, self._origin)
        clipped_C = answer.values_N.clip(min=0)
        if not clipped_C.any():
            clipped_C[answer.values_N.argmax()] = 1
        return Answer(clipped_C, answer.noise)

    def votes(self, batch: SyntheticBatch, synthetic_NHWC: NDArray[np.uint8]) -> Answer:
        """Return the votes of private images for a batch, with noise; they may be negative.

        Raises
        ------
        ConfigError
            If images have more than eight bits: what is white in one of them depends on all of them.
        """
        examples = self._examples
        if examples.whites:
            raise ConfigError("with a privacy ledger, images of more than eight bits cannot vote; allowed: 8 bits")
        if examples.images_NHWC is None:
            raise ConfigError("votes need private images, and the data hold none")
        votes_N = private_votes(
            _channels_first(examples.images_NHWC),
            torch.from_numpy(examples.labels_N),
            _channels_first(synthetic_NHWC),
            torch.from_numpy(batch.prompted_N),
        )
        question = _question("votes", self._classes, synthetic_NHWC, batch.prompted_N)
        return self.ledger.answer(question, votes_N, VOTES_PER_IMAGE**0.5, self._plan.votes, self._origin)

    def answer(self, batch: SyntheticBatch, synthetic_NHWC: NDArray[np.uint8] | None) -> DistillationPayload:
        """Answer a batch with class counts and votes, and without logits.

        Parameters
        ----------
        batch : SyntheticBatch
            The batch.
        synthetic_NHWC : numpy.ndarray, optional
            The decoded images of the batch; None if the client casts no votes.
        """
        votes = None if synthetic_NHWC is None else self.votes(batch, synthetic_NHWC)
        return DistillationPayload(
            batch_id=batch.batch_id,
            class_counts_C=self.counts.values_N,
            counts_noise=self.counts.noise,
            votes_N=votes.values_N.astype(np.float32) if votes else None,
            votes_noise=votes.noise * VOTES_PER_IMAGE**0.5 if votes else None,
        )

    def spent(self) -> dict[str, float]:
        """Return what a report says of the budget: the epsilon that is spent, the whole one, and its delta."""
        told = self.ledger.statement()
        return {"epsilon": told.epsilon, "budget": told.budget.epsilon, "delta": told.budget.delta}


def has_budget(config: RunConfig, node: NodeConfig) -> bool:
    """Return whether a node is in private mode.

    A node with data of its own is if its node-config names a ledger, a simulated client if the run says so.
    """
    return bool(node.privacy_ledger if node.has_own_data else config.client.epsilon)


def ledger_of(
    config: RunConfig, node: NodeConfig, state_folders: Sequence[Path], client: str, instructions: Instructions
) -> PrivacyLedger:
    """Return the ledger of a node in private mode; a simulated client has one for each run, in its state folder."""
    if node.has_own_data:
        return PrivacyLedger(Path(node.privacy_ledger), state_folders[0] / HEADS)
    budget = Budget(config.client.epsilon, config.client.delta)
    return _simulated_ledger(state_folders, client, instructions, budget)


def _simulated_ledger(
    folders: Sequence[Path], client: str, instructions: Instructions, budget: Budget
) -> PrivacyLedger:
    """Return the ledger of a simulated client for a run; a run that goes on takes a copy of the earlier one."""

    def of_run(run_key: str, folder: Path) -> Path:
        return folder.expanduser() / run_key / plain_name(client) / SIMULATED

    path = of_run(instructions.run_key, folders[0])
    earlier: Iterable[Path] = (of_run(key, folder) for key in reversed(instructions.ancestors) for folder in folders)
    if not path.exists():
        found = next(filter(Path.exists, earlier), None)
        with suppress(LedgerError):  # Another process made it just now.
            copy_ledger(found, path) if found else create_ledger(path, budget)
    return PrivacyLedger(path)


def _channels_first(images_NHWC: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)


def _question(kind: str, *parts: str | tuple[str, ...] | np.ndarray) -> str:
    """Return a name of a question: a hash of all that it depends on."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(json.dumps([str(part.dtype), part.shape]).encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part).encode())
    return f"{kind}-{digest.hexdigest()}"

"""A node in private mode: all that it answers from its private data has noise, and is in its ledger."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmmkt.client_app.answers import private_votes
from fedmmkt.client_app.memory import plain_name
from fedmmkt.client_app.privacy.ledger import Answer, LedgerError, PrivacyLedger, create_ledger
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

    Raises
    ------
    LedgerError
        If the ledger cannot be used.
    SpentError
        If its budget is spent.
    """

    def __init__(self, ledger: PrivacyLedger, instructions: Instructions) -> None:
        self.ledger = ledger
        self._classes = instructions.classes
        self._origin, self._plan = ledger.plan(instructions.run_key, instructions.ancestors, instructions.rounds)

    def class_counts(self, examples: Examples) -> Answer:
        """Return the number of examples of each class with noise; the same values throughout a run.

        They are at least zero, and not all zero.
        """
        question = _question("counts", self._origin, self._classes)
        counts_C = np.bincount(examples.labels_N, minlength=len(self._classes))
        answer = self.ledger.answer(question, counts_C, 1.0, self._plan.counts, self._origin)
        clipped_C = answer.values_N.clip(min=0)
        if not clipped_C.any():
            clipped_C[answer.values_N.argmax()] = 1
        return Answer(clipped_C, answer.noise)

    def votes(self, batch: SyntheticBatch, examples: Examples, synthetic_NHWC: NDArray[np.uint8]) -> Answer:
        """Return the votes of private images for a batch, with noise; they may be negative.

        Raises
        ------
        ConfigError
            If images have more than eight bits: what is white in one of them depends on all of them.
        """
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

    def answer(
        self, batch: SyntheticBatch, examples: Examples, synthetic_NHWC: NDArray[np.uint8] | None
    ) -> DistillationPayload:
        """Answer a batch with class counts and votes, and without logits.

        Parameters
        ----------
        batch : SyntheticBatch
            The batch.
        examples : Examples
            The private training examples.
        synthetic_NHWC : numpy.ndarray, optional
            The decoded images of the batch; None if the client casts no votes.
        """
        counts = self.class_counts(examples)
        votes = None if synthetic_NHWC is None else self.votes(batch, examples, synthetic_NHWC)
        return DistillationPayload(
            batch_id=batch.batch_id,
            class_counts_C=counts.values_N,
            counts_noise=counts.noise,
            votes_N=votes.values_N.astype(np.float32) if votes else None,
            votes_noise=votes.noise * VOTES_PER_IMAGE**0.5 if votes else None,
        )

    def spent(self) -> dict[str, float]:
        """Return what a report says of the budget: the epsilon that is spent, the whole one, and its delta."""
        budget = self.ledger.budget
        return {"epsilon": self.ledger.epsilon(), "budget": budget.epsilon, "delta": budget.delta}


def private_mode(
    config: RunConfig, node: NodeConfig, state_folders: Sequence[Path], client: str, instructions: Instructions
) -> PrivateMode | None:
    """Return the private mode of a node; None if it has none.

    A node with data of its own is in private mode if its node-config names a ledger. A simulated client is if the run
    says so; it has a ledger for each run, in its state folder.

    Raises
    ------
    LedgerError, SpentError
        As `PrivateMode`.
    """
    if node.has_own_data:
        if not node.privacy_ledger:
            return None
        ledger = PrivacyLedger(Path(node.privacy_ledger), state_folders[0] / HEADS)
    elif not config.client.epsilon:
        return None
    else:
        budget = Budget(config.client.epsilon, config.client.delta)
        ledger = _simulated_ledger(state_folders, client, instructions, budget)
    return PrivateMode(ledger, instructions)


def _simulated_ledger(
    folders: Sequence[Path], client: str, instructions: Instructions, budget: Budget
) -> PrivacyLedger:
    """Return the ledger of a simulated client for a run; a run that goes on takes a copy of the earlier one."""

    def of_run(run_key: str, folder: Path) -> Path:
        return folder.expanduser() / run_key / plain_name(client) / SIMULATED

    path = of_run(instructions.run_key, folders[0])
    earlier: Iterable[Path] = (of_run(key, folder) for key in reversed(instructions.ancestors) for folder in folders)
    if not path.exists():
        if found := next(filter(Path.exists, earlier), None):
            shutil.copyfile(found, path)
        else:
            with suppress(LedgerError):  # Another process made it just now.
                create_ledger(path, budget)
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

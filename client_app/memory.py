"""What a client keeps between rounds, on its own disk: its model, and the last synthetic batches.

A deployed client is a new process for every message, so everything is read back from here. Each file and each
round's model is replaced whole; the folder is that of one run and one client, so that a new run starts fresh
and two runs at once do not mix. A run that resumes another inherits: its clients begin with a copy of their
memory as it was after the round from which the run goes on, and leave the other run's memory as it is.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from client_app.learning import AlignedModel
from common.files import replaced_folder, write_atomically, write_text
from common.payloads import PayloadError, SoftTargets, SyntheticBatch

DEFAULT_FOLDER = Path("~/.fedmmkt/clients")


@dataclass(frozen=True)
class KeptBatch:
    """A synthetic batch and, once they came, its soft targets."""

    batch: SyntheticBatch
    targets: SoftTargets | None


class ClientMemory:
    """The folder of one client in one run.

    Parameters
    ----------
    root : Path
        The client's state folder.
    run_key : str
        Names the run; sent by the server, hence checked to be a plain name.
    client : str
        Names the client.
    """

    def __init__(self, root: Path, run_key: str, client: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_key):
            raise PayloadError(f"run key {run_key!r} is no plain name of letters, digits, - and _")
        self.folder = _folder(root, run_key, client)
        self.client = client
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def inherit(self, roots: Iterable[Path], ancestors: Iterable[tuple[str, int]]) -> None:
        """Begin with what the client kept of an earlier run, if it keeps nothing of this one.

        Files are linked where the disk allows it: none of them is ever changed in place.

        Parameters
        ----------
        roots : iterable of Path
            State folders in which the earlier runs may lie.
        ancestors : iterable of (str, int)
            Keys of earlier runs, oldest first, and the round after which each was left; what the client learned
            or was sent in later rounds stays behind.
        """
        if _kept_of(self.folder):
            return
        for run_key, last in reversed(list(ancestors)):
            for root in roots:
                if found := _kept_of(_folder(root, run_key, self.client), last):
                    with replaced_folder(self.folder, mode=0o700) as folder:
                        for path in found:
                            _link(path, folder / path.name)
                    return

    def save_model(
        self, round: int, model: AlignedModel, optimizer: torch.optim.Optimizer, described: dict[str, Any]
    ) -> None:
        """Keep the model of a round (safetensors), its description (JSON) and the optimiser's state (torch).

        A model of transformers is kept so that ``from_pretrained`` reads the folder.

        Raises
        ------
        OSError
            If the disk is full; the files are then what they were.
        """
        names = _saved_names(model)
        # Cloned, for safetensors takes no two names of one tensor, which models with tied weights have.
        weights = {names[name]: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        with replaced_folder(self.folder / f"model-{round:05d}", mode=0o700) as folder:
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            model.task_model.save_description(folder)
            write_text(folder / "model.json", json.dumps(described, indent=2) + "\n")
            save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def load_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer, before: int | None = None) -> bool:
        """Read back the newest model, or the newest one from before a round, into one of the same architecture.

        Returns
        -------
        bool
            Whether there was one; if not, this client has not learned in this run.
        """
        folders = [path for path in self._model_folders() if before is None or _round(path) < before]
        if not folders:
            return False
        weights, names = load_file(folders[-1] / "model.safetensors"), _saved_names(model)
        model.load_state_dict({name: weights[saved] for name, saved in names.items() if saved in weights})
        optimizer.load_state_dict(torch.load(folders[-1] / "optimizer.pt", weights_only=True))
        return True

    def add_batch(self, batch: SyntheticBatch) -> None:
        """Keep a batch until soft targets come for it, and as long as `prune` lets it."""
        self._write(f"batch-{batch.round:05d}", batch)

    def add_targets(self, targets: SoftTargets) -> bool:
        """Keep soft targets beside their batch; false if that batch is not here."""
        for path in self._batch_files():
            if _read(path)["batch_id"] == targets.batch_id:
                self._write(path.stem.replace("batch", "targets"), targets)
                return True
        return False

    def batches(self) -> list[KeptBatch]:
        """Return the kept batches, oldest first."""
        kept = []
        for path in self._batch_files():
            targets = path.with_name(path.name.replace("batch", "targets"))
            soft = SoftTargets.model_validate(_read(targets)) if targets.exists() else None
            kept.append(KeptBatch(SyntheticBatch.model_validate(_read(path)), soft))
        return kept

    def prune(self, batches: int, models: int) -> None:
        """Forget all but the last batches and models."""
        for path in self._batch_files()[: -batches or None]:
            path.unlink()
            path.with_name(path.name.replace("batch", "targets")).unlink(missing_ok=True)
        for path in self._model_folders()[: -models or None]:
            shutil.rmtree(path)

    def forget(self) -> None:
        """Remove all that the client keeps of this run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _batch_files(self) -> list[Path]:
        return sorted(self.folder.glob("batch-*.npz"))

    def _model_folders(self) -> list[Path]:
        return sorted(self.folder.glob("model-*"))

    def _write(self, name: str, message: SyntheticBatch | SoftTargets) -> None:
        settings, arrays = message.parts()
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays, settings=np.frombuffer(json.dumps(settings).encode(), np.uint8))
        write_atomically(self.folder / f"{name}.npz", lambda path: path.write_bytes(buffer.getvalue()))


def _folder(root: Path, run_key: str, client: str) -> Path:
    return root.expanduser() / run_key / plain_name(client)


def _round(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _kept_of(folder: Path, last: int | None = None) -> list[Path]:
    """List what a folder kept when a round ended, or all."""
    # Soft targets of a round come with the next.
    ends = {"model": last, "batch": last, "targets": None if last is None else last - 1}
    kept = [(path, end) for kind, end in ends.items() for path in sorted(folder.glob(f"{kind}-*"))]
    return [path for path, end in kept if end is None or _round(path) <= end]


def _link(source: Path, target: Path) -> None:
    """Link a file, or the files of a folder; copy where the disk has no links or is another one."""
    if source.is_dir():
        target.mkdir(mode=0o700)
        for path in source.iterdir():
            _link(path, target / path.name)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def plain_name(name: str) -> str:
    """Make a client's name one of a folder."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _saved_names(model: AlignedModel) -> dict[str, str]:
    """Name each weight as it is saved; those of the task model as it likes them."""
    return {
        name: model.task_model.saved_name(own) if (own := name.removeprefix("task_model.")) != name else name
        for name in model.state_dict()
    }


def _read(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "settings"}
        settings: dict[str, Any] = json.loads(archive["settings"].tobytes())
    return settings | arrays

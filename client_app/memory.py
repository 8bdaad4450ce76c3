"""What a client keeps between rounds, on its own disk: its model, and the last synthetic batches.

A deployed client is a new process for every message, so everything is read back from here. Each file is
replaced whole; the folder is that of one run and one client, so that a new run starts fresh and two runs at
once do not mix.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from client_app.learning import AlignedModel
from common.files import write_atomically, write_text
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
        self.folder = root.expanduser() / run_key / plain_name(client)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def has_model(self) -> bool:
        """Whether this client has learned in this run before."""
        return (self.folder / "model.safetensors").exists()

    def save_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer, described: dict[str, Any]) -> None:
        """Keep the model (safetensors), its description (JSON) and the optimiser's state (torch).

        A model of transformers is kept so that ``from_pretrained`` reads the folder.

        Raises
        ------
        OSError
            If the disk is full; the files are then what they were.
        """
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        names = _saved_names(model)
        # Cloned, for safetensors takes no two names of one tensor, which models with tied weights have.
        weights = {names[name]: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        write_atomically(self.folder / "optimizer.pt", lambda path: path.write_bytes(buffer.getvalue()))
        if not (self.folder / "model.json").exists():
            model.task_model.save_description(self.folder)
        write_text(self.folder / "model.json", json.dumps(described, indent=2) + "\n")
        write_atomically(self.folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))

    def load_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer) -> None:
        """Read back what `save_model` kept, into a model of the same architecture."""
        weights = load_file(self.folder / "model.safetensors")
        names = _saved_names(model)
        model.load_state_dict({name: weights[saved] for name, saved in names.items() if saved in weights})
        optimizer.load_state_dict(torch.load(self.folder / "optimizer.pt", weights_only=True))

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

    def prune(self, keep: int) -> None:
        """Forget all but the last ``keep`` batches."""
        for path in self._batch_files()[: -keep or None]:
            path.unlink()
            path.with_name(path.name.replace("batch", "targets")).unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove all that the client keeps of this run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _batch_files(self) -> list[Path]:
        return sorted(self.folder.glob("batch-*.npz"))

    def _write(self, name: str, message: SyntheticBatch | SoftTargets) -> None:
        content = {key: value for key, value in message if value is not None}
        arrays = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
        rest = json.dumps({key: value for key, value in content.items() if key not in arrays})
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays, settings=np.frombuffer(rest.encode(), np.uint8))
        write_atomically(self.folder / f"{name}.npz", lambda path: path.write_bytes(buffer.getvalue()))


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

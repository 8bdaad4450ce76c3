"""What a client keeps on its own disk between rounds: its model, and the last synthetic batches.

A deployed client is a new process for every message, so it reads everything from here. Each run and client has its own
folder: a new run starts fresh, and two simultaneous runs do not mix. It contains one folder for each of the last rounds
that the client learned in. A round's folder is written atomically and never changed. So a run that resumes another run
can continue from the client's state after any of these rounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.common.files import replaced_folder
from fedmmkt.common.payloads import PayloadError, SoftTargets, SyntheticBatch

DEFAULT_FOLDER = Path("~/.fedmmkt/clients")


@dataclass(frozen=True)
class KeptBatch:
    """A synthetic batch, with its soft targets if they have arrived."""

    batch: SyntheticBatch
    targets: SoftTargets | None = None


class ClientMemory:
    """What one client keeps of one run; the constructor reads it, and `save` writes it.

    Parameters
    ----------
    root : Path
        The client's state folder.
    run_key : str
        Key of the run. The server sends it, so it is checked to be a plain name.
    client : str
        Name of the client.
    ancestors : iterable of (str, int)
        Keys of the runs that this run continues, oldest first, and the round after which each was continued. A client
        without memory of this run starts from its memory of the newest of them, as it was after that round.
    elsewhere : sequence of Path
        Other state folders that may hold the memory of those runs.

    Attributes
    ----------
    folder : Path
        Folder of this run and client.

    Raises
    ------
    PayloadError
        If the run key is not a plain name.
    """

    def __init__(
        self,
        root: Path,
        run_key: str,
        client: str,
        ancestors: Iterable[tuple[str, int]] = (),
        elsewhere: Sequence[Path] = (),
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_key):
            raise PayloadError(f"run key {run_key!r} is no plain name of letters, digits, - and _")
        self.folder = _folder(root, run_key, client)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _rounds(self.folder):
            self._inherit(
                [(_folder(place, key, client), last) for key, last in ancestors for place in (root, *elsewhere)]
            )
        self._kept = {item.batch.batch_id: item for item in _read_batches(self.newest)}
        self._unsaved: set[str] = set()

    @property
    def newest(self) -> Path | None:
        """Folder of the last round that the client learned in; None if there is none yet."""
        rounds = _rounds(self.folder)
        return rounds[-1] if rounds else None

    def load_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer) -> bool:
        """Load the newest weights and optimiser state; return False if there are none."""
        if (folder := self.newest) is None:
            return False
        weights, names = load_file(folder / "model.safetensors"), _saved_names(model)
        model.load_state_dict({name: weights[saved] for name, saved in names.items() if saved in weights})
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return True

    def batches(self) -> list[KeptBatch]:
        """Return the kept batches, oldest first."""
        return sorted(self._kept.values(), key=lambda item: item.batch.round)

    def add_batch(self, batch: SyntheticBatch) -> None:
        """Add a batch; its soft targets come later."""
        self._kept[batch.batch_id] = KeptBatch(batch)
        self._unsaved.add(_file("batch", batch))

    def add_targets(self, targets: SoftTargets) -> bool:
        """Add the soft targets of a kept batch; return False if the batch is not kept."""
        if (item := self._kept.get(targets.batch_id)) is None:
            return False
        self._kept[targets.batch_id] = replace(item, targets=targets)
        self._unsaved.add(_file("targets", item.batch))
        return True

    def save(
        self,
        round: int,
        model: AlignedModel,
        optimizer: torch.optim.Optimizer,
        described: dict[str, Any],
        keep_batches: int,
        keep_rounds: int,
    ) -> None:
        """Save a round: model (safetensors), its description (JSON), optimiser state (torch), and batches.

        A transformers model is saved so that ``from_pretrained`` can load the folder. Batches that an earlier round
        already has on disk are hard-linked.

        Parameters
        ----------
        round : int
            The last round that the model learned in.
        model, optimizer
            Their states are saved.
        described : dict
            Description of the model, JSON-serialisable.
        keep_batches, keep_rounds : int
            How many of the last batches and of the last rounds are kept; at least 1.

        Raises
        ------
        OSError
            If the disk is full. Earlier rounds are then still there.
        """
        names, earlier = _saved_names(model), self.newest
        # Clone, because models with tied weights have two names for one tensor, which safetensors refuses.
        weights = {names[name]: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        kept = self.batches()[-keep_batches:]
        with replaced_folder(self.folder / f"round-{round:05d}", mode=0o700) as folder:
            model.task_model.save_description(folder)
            (folder / "model.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            for item in kept:
                for kind, message in (("batch", item.batch), ("targets", item.targets)):
                    if message is None:
                        continue
                    name = _file(kind, item.batch)
                    if earlier is None or name in self._unsaved:
                        _write(folder / name, message)
                    else:
                        _link(earlier / name, folder / name)
        self._kept = {item.batch.batch_id: item for item in kept}
        self._unsaved.clear()
        for old in _rounds(self.folder)[:-keep_rounds]:
            shutil.rmtree(old)

    def _inherit(self, earlier: list[tuple[Path, int]]) -> None:
        """Copy a round of an earlier run, to start from it.

        ``earlier`` lists folders of earlier runs, oldest first, each with the last round that may be used. The newest
        usable round of the newest possible run is copied.
        """
        for folder, last in reversed(earlier):
            rounds = [path for path in _rounds(folder) if int(path.name.removeprefix("round-")) <= last]
            if rounds:
                with replaced_folder(self.folder / rounds[-1].name, mode=0o700) as inherited:
                    shutil.copytree(rounds[-1], inherited, copy_function=_link, dirs_exist_ok=True)
                return


def plain_name(name: str) -> str:
    """Turn a client's name into a valid folder name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _folder(root: Path, run_key: str, client: str) -> Path:
    return root.expanduser() / run_key / plain_name(client)


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _file(kind: str, batch: SyntheticBatch) -> str:
    return f"{kind}-{batch.round:05d}.npz"


def _link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file; copy it if the disk has no links, or if the target is on another disk.

    A link is safe because the file is never changed in place.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _saved_names(model: AlignedModel) -> dict[str, str]:
    """Map the name of each weight to its name in the saved file; the task model chooses its own names."""
    return {
        name: model.task_model.saved_name(own) if (own := name.removeprefix("task_model.")) != name else name
        for name in model.state_dict()
    }


def _write(path: Path, message: SyntheticBatch | SoftTargets) -> None:
    settings, arrays = message.parts()
    np.savez(path, allow_pickle=False, **arrays, settings=np.frombuffer(json.dumps(settings).encode(), np.uint8))


def _read_batches(folder: Path | None) -> list[KeptBatch]:
    kept = []
    for path in folder.glob("batch-*.npz") if folder else ():
        targets = path.with_name(path.name.replace("batch", "targets"))
        soft = SoftTargets.model_validate(_read(targets)) if targets.exists() else None
        kept.append(KeptBatch(SyntheticBatch.model_validate(_read(path)), soft))
    return kept


def _read(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "settings"}
        settings: dict[str, Any] = json.loads(archive["settings"].tobytes())
    return settings | arrays

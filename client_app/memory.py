"""What a client keeps between rounds, on its own disk: its model, and the last synthetic batches.

A deployed client is a new process for every message, so everything is read back from here. The folder is that of
one run and one client, so that a new run starts fresh and two runs at once do not mix. In it lies a folder for each
of the last rounds that the client learned in, written whole and never changed: a run that resumes another finds the
client as it was after any of them.
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

from client_app.learning import AlignedModel
from common.files import replaced_folder
from common.payloads import PayloadError, SoftTargets, SyntheticBatch

DEFAULT_FOLDER = Path("~/.fedmmkt/clients")


@dataclass(frozen=True)
class KeptBatch:
    """A synthetic batch and, once they came, its soft targets."""

    batch: SyntheticBatch
    targets: SoftTargets | None = None


class ClientMemory:
    """What one client keeps of one run: read when this is made, written by `save`.

    Parameters
    ----------
    root : Path
        The client's state folder.
    run_key : str
        Names the run; sent by the server, hence checked to be a plain name.
    client : str
        Names the client.
    ancestors : iterable of (str, int)
        Keys of the runs that this one goes on from, oldest first, and the round after which each was left. A client
        that keeps nothing of this run begins with what it kept of the newest of them; what it learned or was sent
        after that round stays behind.
    elsewhere : sequence of Path
        Other state folders in which those runs may lie.

    Attributes
    ----------
    folder : Path
        Of this run and client.

    Raises
    ------
    PayloadError
        If the run key is no plain name.
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
        """Folder of the last round that the client learned in; None if it has not learned in this run."""
        rounds = _rounds(self.folder)
        return rounds[-1] if rounds else None

    def load_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer) -> bool:
        """Read the newest model back into one of the same architecture; false if there is none."""
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
        """Take in a batch, whose soft targets are still to come."""
        self._kept[batch.batch_id] = KeptBatch(batch)
        self._unsaved.add(_file("batch", batch))

    def add_targets(self, targets: SoftTargets) -> bool:
        """Take in the soft targets of a kept batch; false if that batch is not here."""
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
        """Keep a round: the model (safetensors), its description (JSON), the optimiser's state (torch), the batches.

        A model of transformers is kept so that ``from_pretrained`` reads the folder. Batches that an earlier round
        has on disk are linked.

        Parameters
        ----------
        round : int
            The round that the model has learned in.
        model, optimizer, described
            What to keep.
        keep_batches, keep_rounds : int
            How many of the last batches are kept, and of the last rounds; at least 1.

        Raises
        ------
        OSError
            If the disk is full; what was kept before is then still there.
        """
        names, earlier = _saved_names(model), self.newest
        # Cloned, for safetensors takes no two names of one tensor, which models with tied weights have.
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
        """Begin with the newest round of the last of some folders that has one up to its own last round."""
        for folder, last in reversed(earlier):
            rounds = [path for path in _rounds(folder) if int(path.name.removeprefix("round-")) <= last]
            if rounds:
                with replaced_folder(self.folder / rounds[-1].name, mode=0o700) as inherited:
                    shutil.copytree(rounds[-1], inherited, copy_function=_link, dirs_exist_ok=True)
                return


def plain_name(name: str) -> str:
    """Make a client's name one of a folder."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _folder(root: Path, run_key: str, client: str) -> Path:
    return root.expanduser() / run_key / plain_name(client)


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _file(kind: str, batch: SyntheticBatch) -> str:
    return f"{kind}-{batch.round:05d}.npz"


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file, which is never changed in place; copy it where the disk has no links or is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _saved_names(model: AlignedModel) -> dict[str, str]:
    """Name each weight as it is saved; those of the task model as it likes them."""
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

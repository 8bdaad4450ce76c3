"""What a client keeps on its own disk between rounds: its model, and the last synthetic batches.

A deployed client is a new process for every message, so it reads everything from here. Each run and client has its own
folder: a new run starts fresh, and two simultaneous runs do not mix. It contains one folder for each of the last rounds
that the client learned in. A round's folder is written atomically and never changed. So a run that resumes another run
can continue from the client's state after any of these rounds.

Each round's folder has checksums. A round whose model is damaged is left out, and the client goes on from the round
before; a batch that is damaged is left out, and the server sends it again.

Beside the runs' folders, ``CLIENT/final`` is the model that the client learned last, in whatever run: what predictions
need, and nothing else. Its files are hard links to those of the round.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.common.files import (
    MANIFEST,
    damaged_files,
    locked_folder,
    private_folder,
    remove_leftovers,
    replaced_folder,
    write_manifest,
)
from fedmmkt.common.payloads import PayloadError, SoftTargets, SyntheticBatch

DEFAULT_FOLDER = Path("~/.fedmmkt/clients")
FINAL, DESCRIPTION, WEIGHTS, OPTIMIZER = "final", "model.json", "model.safetensors", "optimizer.pt"
OWN = "private.json"  # What is said of the client itself, and of its data: it is not shared with the model.
OWN_KEYS = ("client", "class_counts", "image_column", "text_column")
RUN_KEY = r"[A-Za-z0-9_-]{1,64}"
LONGEST_FOLDER_NAME = 150
_BATCH_FILE = re.compile(r"(batch|targets)-\d{5,}\.npz")

logger = getLogger("flwr")


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
    newest : Path or None
        Folder of the last round that the client learned in, and that is whole; None if there is none.
    final : Path
        Folder of the model that the client learned last.

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
        if not re.fullmatch(RUN_KEY, run_key):
            raise PayloadError(f"run key {run_key!r} is no plain name of letters, digits, - and _")
        self.folder = _folder(root, run_key, client)  # Made when there is something to keep: a run may be refused.
        self.final = root.expanduser() / plain_name(client) / FINAL
        remove_leftovers(self.folder)
        if not _rounds(self.folder):
            self._inherit(
                [(_folder(place, key, client), last) for key, last in ancestors for place in (root, *elsewhere)]
            )
        self._read()

    def _read(self) -> None:
        """Read the newest round whose model is whole; the log names what is damaged."""
        self.newest, damaged = _newest_whole(_rounds(self.folder))
        self._kept = {item.batch.batch_id: item for item in _read_batches(self.newest, damaged)}
        self._unsaved: set[str] = set()

    def load_model(self, model: AlignedModel, optimizer: torch.optim.Optimizer) -> bool:
        """Load the newest weights and optimiser state; return False if there are none."""
        if (folder := self.newest) is None:
            return False
        load_weights(folder, model)
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
        return True

    def has_learned_in(self, round: int) -> bool:
        """Return whether the newest round that is kept is this one."""
        return self.newest is not None and self.newest.name == _round_name(round)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait for another process that works on this memory, and keep others out inside the block.

        Yield whether the other one has saved a round meanwhile; the memory is then read again.
        """
        before = self.newest
        with locked_folder(self.folder):
            if not _rounds(self.folder) or _rounds(self.folder)[-1] == before:
                yield False
            else:
                self._read()
                yield self.newest != before

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
    ) -> bool:
        """Save a round: model (safetensors), its description (JSON), optimiser state (torch), and batches.

        Then `final` is replaced by this model.

        A transformers model is saved so that ``from_pretrained`` can load the folder. Batches that an earlier round
        already has on disk are hard-linked.

        Parameters
        ----------
        round : int
            The last round that the model learned in.
        model, optimizer
            Their states are saved.
        described : dict
            Description of the model, JSON-serialisable. `OWN_KEYS` lie in a file of their own.
        keep_batches, keep_rounds : int
            How many of the last batches and of the last rounds are kept; at least 1.

        Returns
        -------
        bool
            False if it could not be saved, as on a full disk. The log then says why. Earlier rounds are still there,
            and the memory is again what they hold.
        """
        return self._saved(round, lambda: self._save(round, model, optimizer, described, keep_batches, keep_rounds))

    def save_batches(self, round: int, keep_batches: int) -> bool:
        """Save batches that came after the round was saved; see `save`."""
        return self._saved(round, lambda: self._save_batches(keep_batches))

    def _saved(self, round: int, save: Callable[[], None]) -> bool:
        try:
            save()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own.
            logger.error("Round %s could not be saved in %s: %s", round, self.folder, error)
            self._read()
            return False
        return True

    def _save(
        self,
        round: int,
        model: AlignedModel,
        optimizer: torch.optim.Optimizer,
        described: dict[str, Any],
        keep_batches: int,
        keep_rounds: int,
    ) -> None:
        names, earlier = _saved_names(model), self.newest
        # Clone, because models with tied weights have two names for one tensor, which safetensors refuses.
        weights = {names[name]: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        kept = self.batches()[-keep_batches:]
        with replaced_folder(private_folder(self.folder) / _round_name(round), mode=0o700) as folder:
            model.task_model.save_description(folder)
            own = {key: described[key] for key in OWN_KEYS if key in described}
            shared = {key: value for key, value in described.items() if key not in own}
            for name, content in ((DESCRIPTION, shared), (OWN, own)):
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file(weights, folder / WEIGHTS, {"format": "pt"})
            torch.save(optimizer.state_dict(), folder / OPTIMIZER)
            self._save_kept(kept, earlier, folder)
            write_manifest(folder)
        self.newest = self.folder / _round_name(round)
        self._kept = {item.batch.batch_id: item for item in kept}
        self._unsaved.clear()
        self.publish()
        # Rounds between the earlier one and this one are damaged.
        sound = [path for path in _rounds(self.folder) if path == self.newest or (earlier and path <= earlier)]
        for old in set(_rounds(self.folder)).difference(sound[-keep_rounds:]):
            shutil.rmtree(old, ignore_errors=True)

    def _save_batches(self, keep_batches: int) -> None:
        if (newest := self.newest) is None or not self._unsaved:
            return
        kept = self.batches()[-keep_batches:]
        with replaced_folder(newest, mode=0o700) as folder:
            others = shutil.ignore_patterns(MANIFEST, "batch-*.npz", "targets-*.npz")
            shutil.copytree(newest, folder, ignore=others, copy_function=_link, dirs_exist_ok=True)
            self._save_kept(kept, newest, folder)
            write_manifest(folder)
        self._kept = {item.batch.batch_id: item for item in kept}
        self._unsaved.clear()

    def _save_kept(self, kept: list[KeptBatch], earlier: Path | None, folder: Path) -> None:
        """Write batches and soft targets into a round's folder; link those that an earlier round has on disk."""
        for item in kept:
            for kind, message in (("batch", item.batch), ("targets", item.targets)):
                if message is None:
                    continue
                name = _file(kind, item.batch)
                if earlier is None or name in self._unsaved:
                    _write(folder / name, message)
                else:
                    _link(earlier / name, folder / name)

    def publish(self) -> None:
        """Replace the folder `final` by the model of the newest round, without optimiser state and batches."""
        if (newest := self.newest) is None:
            return
        with replaced_folder(self.final, mode=0o700) as folder:
            shutil.copytree(
                newest,
                folder,
                ignore=shutil.ignore_patterns(OPTIMIZER, MANIFEST, "*.npz"),
                copy_function=_link,
                dirs_exist_ok=True,
            )

    def _inherit(self, earlier: list[tuple[Path, int]]) -> None:
        """Copy a round of an earlier run, to start from it.

        ``earlier`` lists folders of earlier runs, oldest first, each with the last round that may be used. The newest
        usable round of the newest possible run is copied.
        """
        for folder, last in reversed(earlier):
            rounds = [path for path in _rounds(folder) if int(path.name.removeprefix("round-")) <= last]
            newest, _ = _newest_whole(rounds)
            if newest is not None:
                with replaced_folder(private_folder(self.folder) / newest.name, mode=0o700) as inherited:
                    shutil.copytree(newest, inherited, copy_function=_link, dirs_exist_ok=True)
                return


def load_weights(folder: Path, model: AlignedModel) -> None:
    """Load the weights that a client saved in a folder.

    Raises
    ------
    OSError, SafetensorError
        If they cannot be read.
    RuntimeError
        If they do not fit the model.
    """
    weights, names = load_file(folder / WEIGHTS), _saved_names(model)
    model.load_state_dict({name: weights[saved] for name, saved in names.items() if saved in weights})


def plain_name(name: str) -> str:
    """Turn a client's name into a valid folder name; different names give different ones."""
    plain = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    return plain if len(plain) <= LONGEST_FOLDER_NAME else f"{plain[:50]}~{sha256(name.encode()).hexdigest()}"


def remove_old_runs(root: Path, run_keys: Iterable[str], client: str, keep_runs: int, keep_days: float) -> None:
    """Remove what a client keeps of earlier runs.

    Parameters
    ----------
    root : Path
        The client's state folder.
    run_keys : iterable of str
        The runs that stay in any case: the present one, and those that it continues.
    client : str
        Name of the client.
    keep_runs : int
        How many runs are kept, the present one included; 0: any number.
    keep_days : float
        How many days an earlier run is kept after its last round; 0: without end.
    """
    present = [_folder(root, run_key, client) for run_key in run_keys]
    runs = [path for path in root.expanduser().glob(f"*/{plain_name(client)}") if _rounds(path)]
    earlier = sorted(set(runs).difference(present), key=lambda path: path.stat().st_mtime, reverse=True)
    oldest = time.time() - keep_days * 86_400
    for position, path in enumerate(earlier, start=1):
        if (keep_runs and position >= keep_runs) or (keep_days and path.stat().st_mtime < oldest):
            logger.info("%s is removed: keep-runs is %s, keep-days %g", path, keep_runs, keep_days)
            shutil.rmtree(path, ignore_errors=True)


def _folder(root: Path, run_key: str, client: str) -> Path:
    return root.expanduser() / run_key / plain_name(client)


def _round_name(round: int) -> str:
    return f"round-{round:05d}"


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _newest_whole(rounds: list[Path]) -> tuple[Path | None, set[str]]:
    """Return the last of these rounds whose model is whole, and which files of its batches are damaged."""
    for path in reversed(rounds):
        damaged = damaged_files(path)
        of_model = {name for name in damaged if not _BATCH_FILE.fullmatch(name)}
        named = ", ".join(str(path / name) for name in sorted(of_model or damaged))
        if of_model:
            logger.warning("The client goes on from an earlier round: damaged or missing: %s", named)
            continue
        if damaged:
            logger.warning("The server is asked again for what is damaged or missing: %s", named)
        return path, damaged
    return None, set()


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


def _read_batches(folder: Path | None, damaged: set[str]) -> list[KeptBatch]:
    """Read the batches of a round without the damaged ones."""
    kept = []
    for path in folder.glob("batch-*.npz") if folder else ():
        targets = path.with_name(path.name.replace("batch", "targets"))
        if path.name not in damaged:
            has_targets = targets.exists() and targets.name not in damaged
            soft = SoftTargets.model_validate(_read(targets)) if has_targets else None
            kept.append(KeptBatch(SyntheticBatch.model_validate(_read(path)), soft))
    return kept


def _read(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "settings"}
        settings: dict[str, Any] = json.loads(archive["settings"].tobytes())
    return settings | arrays

"""Checkpoints of the server, to resume a run after a round: folders of safetensors and JSON with checksums.

What several checkpoints share, the scored samples and the batches of earlier rounds, is written once, under a name that
is its checksum. The lines of ``metrics.jsonl`` are not written again either: a checkpoint has their checksum.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmmkt.common.files import replaced_folder, write_atomically
from fedmmkt.common.payloads import MAX_ANCESTORS, SoftTargets, SyntheticBatch
from fedmmkt.server_app.guard import NO_TRIAL, GuardState
from fedmmkt.server_app.ledger import Ancestor, Identity, Source, TargetsByClient
from fedmmkt.server_app.record.run_folder import Mark
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.t2i.samples import Samples

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
GUARD = "guard/"  # Begins the names of the tensors that are not of the adapter.
SHARED = "shared"  # folder of what several checkpoints share


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or damaged; the text names the folder and the problem."""


@dataclass(frozen=True)
class ServerState:
    """The state of a run after a round.

    It has no optimiser state, because each update of the adapter makes a new optimiser. It has no state of random
    generators, because each draw is seeded by the run's seed and the round. It does not say which batches clients hold,
    because the server asks the clients.

    Attributes
    ----------
    round : int
        The last finished round.
    run_key : str
        Key under which clients keep their memory of the run.
    ancestors : tuple of (str, int)
        Keys of the runs that this run continues, oldest first, and the round after which each was continued.
    config : mapping
        The run's configuration, as in ``config.json``.
    classes : tuple of str
        The class space.
    clients : tuple of str
        Names of all clients that have taken part.
    identities : dict of int to Identity
        The client's name, model and modality of each node, oldest first.
    adapter : dict of str to torch.Tensor
        The LoRA, in the precision of its training.
    pool : list of Samples
        Scored samples, without images, for later updates.
    history : list of (SyntheticBatch, TargetsByClient)
        The last batches with their soft targets, for clients that lack them.
    line : dict
        The round's line of ``metrics.jsonl``, before the T2I was measured.
    earlier : Mark
        Length and checksum of ``metrics.jsonl`` before this line.
    standings : dict of str to Standing
        How far each client's answers can be relied on, by the last round.
    drawn : tuple of str
        Names of the nodes that had their turn, if a round asks a part of the nodes only.
    guard : GuardState
        The trial of the T2I's last update.
    made_from : Source or None
        What the next round's batch is made from, if batches are made ahead.
    """

    round: int
    run_key: str
    ancestors: tuple[Ancestor, ...]
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    clients: tuple[str, ...]
    identities: dict[int, Identity]
    adapter: dict[str, Tensor]
    pool: list[Samples]
    history: list[tuple[SyntheticBatch, TargetsByClient]]
    line: dict[str, Any]
    earlier: Mark
    standings: dict[str, Standing] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    guard: GuardState = NO_TRIAL
    made_from: Source | None = None

    def lineage(self) -> tuple[Ancestor, ...]:
        """Return the ancestors of a run that continues from this state."""
        return (*self.ancestors, (self.run_key, self.round))[-MAX_ANCESTORS:]


@dataclass
class Checkpoints:
    """The checkpoints of a run, as ``<folder>/round-NNNNN``.

    Attributes
    ----------
    folder : Path
        Where they are.
    keep : int
        How many are kept. If it is 0, none is written.
    """

    folder: Path
    keep: int
    _names: dict[int, tuple[object, str]] = field(default_factory=dict)  # By the id of an object, which it keeps alive.

    def write(self, state: ServerState) -> None:
        """Write a checkpoint atomically, then remove all but the last ones and what no other one shares.

        Raises
        ------
        OSError
            If it could not be written. Earlier checkpoints are then kept.
        """
        if not self.keep:
            return
        path = self.folder / f"round-{state.round:05d}"
        sources = [state.made_from] if state.made_from else []
        earlier = [samples for source in sources for samples in source.pool]
        try:
            shared = {
                "pool": [self._share(samples, *_samples_to_parts(samples)) for samples in state.pool],
                "history": [self._share(item, *_taught_to_parts(*item)) for item in state.history],
                "made_from": [self._share(source, *_source_to_parts(source)) for source in sources],
                "earlier_pool": [self._share(samples, *_samples_to_parts(samples)) for samples in earlier],
            }
            named = list(dict.fromkeys(name for names in shared.values() for name in names))
            self._names = {key: kept for key, kept in self._names.items() if kept[1] in named}
            with replaced_folder(path) as temporary:
                tensors = _with_guard(state.adapter, state.guard)
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
                (temporary / STATE).write_text(json.dumps(_described(state, shared), allow_nan=False), encoding="utf-8")
                sums = {name: _sha256(temporary / name) for name in (STATE, TENSORS)}
                manifest = {"sha256": sums, SHARED: named}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OSError(
                getattr(error, "errno", None), f"{path} could not be written ({reason}); earlier ones are kept"
            ) from error
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        _remove_unshared(self.folder)

    def _share(self, item: object, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Write an object that later checkpoints will share, unless it is there; return its name."""
        if id(item) not in self._names:
            written = self.folder / SHARED / f".{uuid.uuid4().hex}"
            written.parent.mkdir(parents=True, exist_ok=True)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            try:
                save_file(contiguous, written, {"described": json.dumps(described)})  # Holds no copy in memory.
                name = _sha256(written)
                path = _shared(self.folder, name)
                if not path.exists() or _sha256(path) != name:
                    write_atomically(path, written.replace)
            finally:
                written.unlink(missing_ok=True)
            self._names[id(item)] = item, name
        return self._names[id(item)][1]


def read_checkpoint(path: Path) -> ServerState:
    """Read a checkpoint.

    Raises
    ------
    DamagedCheckpointError
        If a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sums = {path / name: manifest["sha256"][name] for name in (STATE, TENSORS)}
        for file, written in (sums | {_shared(path.parent, name): name for name in manifest[SHARED]}).items():
            if _sha256(file) != written:
                raise DamagedCheckpointError(f"{file} is not what was written (its SHA-256 is another)")
        described = json.loads((path / STATE).read_text(encoding="utf-8"))
        return _from_parts(path, described, load_file(path / TENSORS))
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error!r})") from error


def remove_later_checkpoints(folder: Path, round: int) -> None:
    """Remove checkpoints of rounds after ``round``, and incomplete ones; a resumed run writes them again."""
    later = [path for path in checkpoints(folder) if int(path.name.removeprefix("round-")) > round]
    for path in [*later, *folder.glob(".round-*")]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """List a folder's checkpoints, oldest first."""
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _shared(folder: Path, name: str) -> Path:
    return folder / SHARED / f"{name}.safetensors"


def _remove_unshared(folder: Path) -> None:
    """Remove what no checkpoint shares; if one cannot tell, everything stays."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        used = {
            _shared(folder, name).name
            for path in checkpoints(folder)
            for name in json.loads((path / MANIFEST).read_text(encoding="utf-8"))[SHARED]
        }
        for file in (folder / SHARED).iterdir():
            if file.name not in used:
                file.unlink()


def _described(state: ServerState, shared: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return what a checkpoint's JSON holds."""
    plain = ("round", "run_key", "ancestors", "config", "classes", "clients", "drawn", "line", "earlier")
    described = {name: getattr(state, name) for name in plain}
    standings = {name: asdict(standing) for name, standing in state.standings.items()}
    described |= {"standings": standings, "guard": state.guard.to_json()}
    return described | dict(shared) | {"identities": list(state.identities.items())}


def _source_to_parts(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    described = {"round": source.round, "guard": source.guard.to_json()}
    return described, _with_guard(source.adapter, source.guard)


def _samples_to_parts(samples: Samples) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own = {"latents_NCHW": samples.latents_NCHW, "prompted_N": samples.prompted_N, "scores_N": samples.scores_N}
    return {"prompts": samples.prompts}, {name: tensor for name, tensor in own.items() if tensor is not None}


def _taught_to_parts(batch: SyntheticBatch, targets: TargetsByClient) -> tuple[dict[str, Any], dict[str, Tensor]]:
    messages: dict[str, SyntheticBatch | SoftTargets] = {"batch": batch}
    messages |= {f"targets-{number}": one for number, one in enumerate(targets.distinct)}
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, message in messages.items():
        described[name], arrays = message.parts()
        # Copies, because arrays from a message are read-only.
        tensors |= {f"{name}/{key}": torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    return {"messages": described, "of_client": targets.of_client, "of_modality": targets.of_modality}, tensors


def _from_parts(path: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> ServerState:
    return ServerState(
        round=described["round"],
        run_key=described["run_key"],
        ancestors=tuple((run_key, last) for run_key, last in described["ancestors"]),
        config=described["config"],
        classes=tuple(described["classes"]),
        clients=tuple(described["clients"]),
        identities={node_id: Identity(*said) for node_id, said in described["identities"]},
        standings={name: Standing(**known) for name, known in described.get("standings", {}).items()},
        adapter=_without_guard(tensors),
        pool=[_read_samples(*shared) for shared in _read_shared(path, described["pool"])],
        history=[_read_taught(*shared) for shared in _read_shared(path, described["history"])],
        line=described["line"],
        earlier=Mark(*described["earlier"]),
        drawn=tuple(described.get("drawn", ())),
        guard=GuardState.from_parts(described.get("guard", NO_TRIAL.to_json()), _below(tensors, GUARD)),
        made_from=_read_source(path, described) if described.get("made_from") else None,
    )


def _read_source(path: Path, described: Mapping[str, Any]) -> Source:
    ((own, tensors),) = _read_shared(path, described["made_from"])
    pool = tuple(_read_samples(*shared) for shared in _read_shared(path, described["earlier_pool"]))
    guard = GuardState.from_parts(own["guard"], _below(tensors, GUARD))
    return Source(own["round"], _without_guard(tensors), pool, guard)


def _read_shared(path: Path, names: Iterable[str]) -> Iterable[tuple[dict[str, Any], dict[str, Tensor]]]:
    for name in names:
        with safe_open(_shared(path.parent, name), "pt") as file:
            yield json.loads(file.metadata()["described"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _read_samples(described: Mapping[str, Any], own: Mapping[str, Tensor]) -> Samples:
    no_images = np.empty((0, 0, 0, 3), np.uint8)
    samples = Samples(tuple(described["prompts"]), own["prompted_N"], no_images, own["latents_NCHW"])
    return samples.scored(own["scores_N"])


def _read_taught(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[SyntheticBatch, TargetsByClient]:
    messages = {
        name: settings | {key: tensor.numpy() for key, tensor in _below(tensors, f"{name}/").items()}
        for name, settings in described["messages"].items()
    }
    batch = SyntheticBatch.model_validate(messages.pop("batch"))
    distinct = tuple(SoftTargets.model_validate(messages[f"targets-{number}"]) for number in range(len(messages)))
    return batch, TargetsByClient(distinct, described["of_client"], described["of_modality"])


def _with_guard(adapter: Mapping[str, Tensor], guard: GuardState) -> dict[str, Tensor]:
    return dict(adapter) | {f"{GUARD}{name}": tensor for name, tensor in guard.tensors().items()}


def _without_guard(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(GUARD)}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

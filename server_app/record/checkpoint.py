"""Checkpoints of the server, to resume a run after a round: folders of safetensors and JSON with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.supercore import log
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.files import replaced_folder
from fedmmkt.common.payloads import MAX_ANCESTORS, SoftTargets, SyntheticBatch
from fedmmkt.server_app.ledger import Ancestor, Identity, TargetsByClient
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.settings import run_config_option
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.t2i.samples import Samples

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"

# Settings that may change when a run is resumed: its length, its output and control, the nodes it waits for, and how
# it computes.
# If any other setting changed, it would be a different run.
CHANGEABLE_ON_RESUME = {
    *("rounds", "output-dir", "resume-from", "checkpoints-kept", "tracker", "local-only-control", "judge-cache"),
    *("min-available-nodes", "node-timeout", "round-deadline", "quorum", "reply-limit", "client.threads"),
    *("t2i.device", "t2i.offload", "t2i.gradient-checkpointing", "t2i.attention-slicing", "t2i.vae-tiling"),
    *("t2i.generation-batch-size", "t2i.adaptation-micro-batch-size"),
}


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
    measured : tuple of float or None
        Alignment and Frechet distance of the T2I.
    pictures : list of PIL.Image.Image
        Images of the last round for the image grid, all of one size.
    metrics : list of dict
        The lines of ``metrics.jsonl``.
    standings : dict of str to Standing
        How far each client's answers can be relied on, by the last round.
    drawn : tuple of str
        Names of the nodes that had their turn, if a round asks a part of the nodes only.
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
    measured: tuple[float | None, float | None]
    pictures: list[Image.Image]
    metrics: list[dict[str, Any]]
    standings: dict[str, Standing] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()

    def lineage(self) -> tuple[Ancestor, ...]:
        """Return the ancestors of a run that continues from this state."""
        return (*self.ancestors, (self.run_key, self.round))[-MAX_ANCESTORS:]


def write_checkpoint(folder: Path, state: ServerState, keep: int) -> None:
    """Write a checkpoint ``<folder>/round-NNNNN`` atomically, then remove all but the last ``keep`` checkpoints.

    If ``keep`` is 0, nothing is written.

    Raises
    ------
    OSError
        If it could not be written. Earlier checkpoints are then kept.
    """
    if not keep:
        return
    path = folder / f"round-{state.round:05d}"
    described, tensors = _to_parts(state)
    try:
        with replaced_folder(path) as temporary:
            save_file(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(described, allow_nan=False), encoding="utf-8")
            sums = {name: _sha256(temporary / name) for name in (STATE, TENSORS)}
            (temporary / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            getattr(error, "errno", None), f"{path} could not be written ({reason}); earlier ones are kept"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(path: Path) -> ServerState:
    """Read a checkpoint from `write_checkpoint`.

    Raises
    ------
    DamagedCheckpointError
        If a file is missing or damaged.
    """
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in (STATE, TENSORS):
            if _sha256(path / name) != sums[name]:
                raise DamagedCheckpointError(f"{path / name} is not what was written (its SHA-256 is another)")
        described = json.loads((path / STATE).read_text(encoding="utf-8"))
        return _from_parts(described, load_file(path / TENSORS))
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error!r})") from error


def find_state(run: RunFolder) -> ServerState:
    """Read the last complete checkpoint of a run; damaged ones are skipped with a warning.

    Raises
    ------
    ConfigError
        If there is no complete checkpoint.
    """
    found, damage = checkpoints(run.checkpoints), ""
    for checkpoint in reversed(found):
        try:
            return read_checkpoint(checkpoint)
        except DamagedCheckpointError as error:
            damage = f" ({error})"
            log(WARNING, "A damaged checkpoint is skipped: %s", error)
    raise nothing_to_resume(run.path, damage)


def nothing_to_resume(folder: Path, damage: str = "") -> ConfigError:
    """Return the error of a folder that no run can continue from."""
    found = f"holds no checkpoint that can be read{damage}" if folder.is_dir() else "is not there"
    return ConfigError(
        f"run-config key 'resume-from' is '{folder}', which {found}; "
        "allowed: the folder of a run that ended its round 0 with checkpoints-kept above 0"
    )


def check_resumable(state: ServerState, config: RunConfig, classes: tuple[str, ...]) -> None:
    """Check that a configuration can resume a run.

    Raises
    ------
    ConfigError
        If a setting outside `CHANGEABLE_ON_RESUME` has changed; the text names all such settings.
    """
    check_same_settings(state.config, config, state.classes, classes)


def check_same_settings(
    described: Mapping[str, Any], config: RunConfig, were: tuple[str, ...] = (), are: tuple[str, ...] = ()
) -> None:
    """Check that a configuration is that of an earlier run, whose ``config.json`` describes it, and so the classes.

    Raises
    ------
    ConfigError
        As `check_resumable`; the text has the ``--run-config`` to type instead.
    """
    earlier, present = _flat(described), _flat(config.model_dump(mode="json", by_alias=True))
    other = {
        key: value
        for key, value in present.items()
        if key not in CHANGEABLE_ON_RESUME and earlier.get(key, value) != value  # The earlier run may lack a key.
    }
    changed = [f"{key!r} was {earlier[key]!r} and is {value!r}" for key, value in other.items()]
    if were != are:
        changed.append(f"the classes were {', '.join(were)} and are {', '.join(are)}")
    if changed:
        defaults = _flat(RunConfig().model_dump(mode="json", by_alias=True))
        known = present.keys() - CHANGEABLE_ON_RESUME  # An earlier version had other keys.
        merged = present | {key: value for key, value in earlier.items() if key in known or key.startswith("extra.")}
        typed = {key: value for key, value in merged.items() if key in other or defaults.get(key) != value}
        raise ConfigError(
            f"run-config key 'resume-from' is {config.resume_from!r}, a run of another configuration: "
            f"{'; '.join(changed)}; allowed: the values that it had, but for {', '.join(sorted(CHANGEABLE_ON_RESUME))}"
            f"; with its values:{run_config_option(typed)}"
        )


def remove_later_checkpoints(folder: Path, round: int) -> None:
    """Remove checkpoints of rounds after ``round``, and incomplete ones; a resumed run writes them again."""
    later = [path for path in checkpoints(folder) if int(path.name.removeprefix("round-")) > round]
    for path in [*later, *folder.glob(".round-*")]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """List a folder's checkpoints, oldest first."""
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _to_parts(state: ServerState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a state into JSON values and tensors."""
    tensors = {f"adapter/{name}": tensor.contiguous() for name, tensor in state.adapter.items()}
    pool, history = [], []
    for index, samples in enumerate(state.pool):
        pool.append({"prompts": samples.prompts})
        own = {"latents_NCHW": samples.latents_NCHW, "prompted_N": samples.prompted_N, "scores_N": samples.scores_N}
        tensors |= {f"pool/{index}/{name}": tensor.contiguous() for name, tensor in own.items() if tensor is not None}
    for index, (batch, targets) in enumerate(state.history):
        messages = {"batch": batch} | {f"targets-{number}": one for number, one in enumerate(targets.distinct)}
        described = {}
        for name, message in messages.items():
            described[name], arrays = message.parts()
            for key, array in arrays.items():
                # Copy, because arrays from a message are read-only.
                tensors[f"history/{index}/{name}/{key}"] = torch.from_numpy(np.array(array))
        history.append({"messages": described, "of_client": targets.of_client, "of_modality": targets.of_modality})
    if state.pictures:
        tensors["pictures"] = torch.from_numpy(np.stack([np.asarray(picture) for picture in state.pictures]))
    plain = ("round", "run_key", "ancestors", "config", "classes", "clients", "drawn", "measured", "metrics")
    described = {name: getattr(state, name) for name in plain} | {"pool": pool, "history": history}
    standings = {name: asdict(standing) for name, standing in state.standings.items()}
    return described | {"identities": list(state.identities.items()), "standings": standings}, tensors


def _from_parts(described: dict[str, Any], tensors: dict[str, Tensor]) -> ServerState:
    pool = []
    for index, item in enumerate(described["pool"]):
        own = _below(tensors, f"pool/{index}/")
        samples = Samples(
            tuple(item["prompts"]), own["prompted_N"], np.empty((0, 0, 0, 3), np.uint8), own["latents_NCHW"]
        )
        pool.append(samples.scored(own["scores_N"]))
    history = []
    for index, item in enumerate(described["history"]):
        messages = {
            name: settings | {field: t.numpy() for field, t in _below(tensors, f"history/{index}/{name}/").items()}
            for name, settings in item["messages"].items()
        }
        batch = SyntheticBatch.model_validate(messages.pop("batch"))
        distinct = tuple(SoftTargets.model_validate(messages[f"targets-{number}"]) for number in range(len(messages)))
        history.append((batch, TargetsByClient(distinct, item["of_client"], item["of_modality"])))
    pictures = [Image.fromarray(picture.numpy()) for picture in tensors.get("pictures", ())]
    alignment, frechet = described["measured"]
    return ServerState(
        round=described["round"],
        run_key=described["run_key"],
        ancestors=tuple((run_key, last) for run_key, last in described["ancestors"]),
        config=described["config"],
        classes=tuple(described["classes"]),
        clients=tuple(described["clients"]),
        identities={node_id: Identity(*said) for node_id, said in described.get("identities", ())},
        standings={name: Standing(**known) for name, known in described.get("standings", {}).items()},
        adapter=_below(tensors, "adapter/"),
        pool=pool,
        history=history,
        measured=(alignment, frechet),
        pictures=pictures,
        metrics=described["metrics"],
        drawn=tuple(described.get("drawn", ())),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

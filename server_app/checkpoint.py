"""Checkpoints: what the server needs to go on after a round, as a folder of safetensors and JSON with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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

from common.config import ConfigError, RunConfig
from common.files import replaced_folder
from common.payloads import MAX_ANCESTORS, SoftTargets, SyntheticBatch
from server_app.generator import Generated
from server_app.run_folder import RunFolder

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"

# Settings that a run may go on with other values of: how long it is, where it is written, which nodes it waits for,
# and on what it computes. With any other changed it would not be the run that it goes on with.
FREE = {
    *("rounds", "output-dir", "resume-from", "checkpoints-kept", "tensorboard"),
    *("min-nodes", "node-timeout", "round-deadline", "quorum", "client.threads"),
    *("t2i.device", "t2i.offload", "t2i.gradient-checkpointing", "t2i.attention-slicing", "t2i.vae-tiling"),
    *("t2i.generation-batch-size", "t2i.adaptation-micro-batch-size"),
}


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not whole; its text names the folder and what is wrong."""


@dataclass(frozen=True)
class ServerState:
    """A run as it is after a round.

    There is no optimiser in it, since each update of the adapter makes its own, and no state of a random generator,
    since each draw is seeded by the run's seed and the round. Which batches clients hold, they are asked.

    Attributes
    ----------
    round : int
        The last round that is done.
    run_key : str
        Names the run to its clients' memories.
    ancestors : tuple of (str, int)
        Keys of the runs that this one went on from, oldest first, and the round after which each was left.
    config : mapping
        The run's configuration, as in ``config.json``.
    classes : tuple of str
        The class space.
    clients : tuple of str
        Names of all that have taken part.
    adapter : dict of str to torch.Tensor
        The LoRA, in the precision that it is trained in.
    pool : list of (Generated, torch.Tensor)
        Samples, without images, that further updates draw from, with their scores.
    history : list of (SyntheticBatch, SoftTargets)
        The batches last served, for clients that lack them.
    measured : tuple of float or None
        The T2I's alignment and Frechet distance.
    pictures : list of PIL.Image.Image
        The last round's, all of one size.
    metrics : list of dict
        The lines of ``metrics.jsonl``.
    """

    round: int
    run_key: str
    ancestors: tuple[tuple[str, int], ...]
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    clients: tuple[str, ...]
    adapter: dict[str, Tensor]
    pool: list[tuple[Generated, Tensor]]
    history: list[tuple[SyntheticBatch, SoftTargets]]
    measured: tuple[float | None, float | None]
    pictures: list[Image.Image]
    metrics: list[dict[str, Any]]

    def lineage(self) -> tuple[tuple[str, int], ...]:
        """Return the ancestors of a run that goes on from here."""
        return (*self.ancestors, (self.run_key, self.round))[-MAX_ANCESTORS:]


def write_checkpoint(folder: Path, state: ServerState, keep: int) -> None:
    """Write a checkpoint as ``<folder>/round-NNNNN``, whole or not at all; then remove all but the last ``keep``.

    Raises
    ------
    OSError
        If it could not be written; the earlier ones are then kept.
    """
    if not keep:
        return
    path = folder / f"round-{state.round:05d}"
    described, tensors = _taken_apart(state)
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
    """Read what `write_checkpoint` wrote.

    Raises
    ------
    DamagedCheckpointError
        If a file is missing or is not what was written.
    """
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in (STATE, TENSORS):
            if _sha256(path / name) != sums[name]:
                raise DamagedCheckpointError(f"{path / name} is not what was written (its SHA-256 is another)")
        described = json.loads((path / STATE).read_text(encoding="utf-8"))
        return _put_together(described, load_file(path / TENSORS))
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error!r})") from error


def find_state(run: RunFolder) -> ServerState:
    """Read a run's last checkpoint that is whole; each that is not is named in a warning.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found, damage = checkpoints(run.checkpoints), ""
    for checkpoint in reversed(found):
        try:
            return read_checkpoint(checkpoint)
        except DamagedCheckpointError as error:
            damage = f" ({error})"
            log(WARNING, "A checkpoint is damaged and left out: %s", error)
    raise ConfigError(
        f"run-config key 'resume-from' is '{run.path}', which holds no checkpoint that can be read{damage}; "
        "allowed: the folder of a run that ended its round 0 with checkpoints-kept above 0"
    )


def check_continues(state: ServerState, config: RunConfig, classes: tuple[str, ...]) -> None:
    """Check that a configuration goes on with the same run.

    Raises
    ------
    ConfigError
        Names each setting outside `FREE` that has changed.
    """
    earlier, present = _flat(state.config), _flat(config.model_dump(mode="json", by_alias=True))
    changed = [
        f"{key!r} was {earlier[key]!r} and is {value!r}"
        for key, value in present.items()
        if key not in FREE and earlier.get(key, value) != value  # A key of a later version has its default.
    ]
    if state.classes != classes:
        changed.append(f"the classes were {', '.join(state.classes)} and are {', '.join(classes)}")
    if changed:
        raise ConfigError(
            f"run-config key 'resume-from' is {config.resume_from!r}, a run of another configuration: "
            f"{'; '.join(changed)}; allowed: the values that it had, but for {', '.join(sorted(FREE))}"
        )


def drop_later(folder: Path, round: int) -> None:
    """Remove what a run that goes on from a round has no use for: later, damaged checkpoints, and halves of any."""
    later = [path for path in checkpoints(folder) if int(path.name.removeprefix("round-")) > round]
    for path in [*later, *folder.glob(".round-*")]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """List a folder's checkpoints, oldest first."""
    return sorted(folder.glob("round-" + "[0-9]" * 5))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a configuration's settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _taken_apart(state: ServerState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Part a state into JSON and tensors."""
    tensors = {f"adapter/{name}": tensor.contiguous() for name, tensor in state.adapter.items()}
    pool, history = [], []
    for index, (samples, scores_N) in enumerate(state.pool):
        pool.append({"prompts": samples.prompts})
        tensors |= {f"pool/{index}/latents_NCHW": samples.latents_NCHW.contiguous(), f"pool/{index}/scores_N": scores_N}
    for index, messages in enumerate(state.history):
        entry = {}
        for name, message in zip(("batch", "targets"), messages, strict=True):
            entry[name], arrays = message.parts()
            for field, array in arrays.items():
                # A copy, for what comes out of a message is read-only.
                tensors[f"history/{index}/{name}/{field}"] = torch.from_numpy(np.array(array))
        history.append(entry)
    if state.pictures:
        tensors["pictures"] = torch.from_numpy(np.stack([np.asarray(picture) for picture in state.pictures]))
    plain = ("round", "run_key", "ancestors", "config", "classes", "clients", "measured", "metrics")
    return {name: getattr(state, name) for name in plain} | {"pool": pool, "history": history}, tensors


def _put_together(described: dict[str, Any], tensors: dict[str, Tensor]) -> ServerState:
    pool = []
    for index, item in enumerate(described["pool"]):
        latents_NCHW = tensors[f"pool/{index}/latents_NCHW"]
        samples = Generated(tuple(item["prompts"]), np.empty((len(latents_NCHW), 0, 0, 3), np.uint8), latents_NCHW)
        pool.append((samples, tensors[f"pool/{index}/scores_N"]))
    history = []
    for index, item in enumerate(described["history"]):
        arrays = {name: _below(tensors, f"history/{index}/{name}/") for name in item}
        batch = SyntheticBatch.model_validate(item["batch"] | {k: v.numpy() for k, v in arrays["batch"].items()})
        targets = SoftTargets.model_validate(item["targets"] | {k: v.numpy() for k, v in arrays["targets"].items()})
        history.append((batch, targets))
    pictures = [Image.fromarray(picture.numpy()) for picture in tensors.get("pictures", ())]
    alignment, frechet = described["measured"]
    return ServerState(
        round=described["round"],
        run_key=described["run_key"],
        ancestors=tuple((run_key, last) for run_key, last in described["ancestors"]),
        config=described["config"],
        classes=tuple(described["classes"]),
        clients=tuple(described["clients"]),
        adapter=_below(tensors, "adapter/"),
        pool=pool,
        history=history,
        measured=(alignment, frechet),
        pictures=pictures,
        metrics=described["metrics"],
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What a run can continue from: the last checkpoint that can be read, and the settings that have to be the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.supercore import log

from fedmmkt.common.config import ConfigError, RunConfig, to_flower
from fedmmkt.common.flower_settings import flatten
from fedmmkt.server_app.record.checkpoint import DamagedCheckpointError, ServerState, checkpoints, read_checkpoint
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.settings import run_config_option

# Settings that may change when a run is resumed: its length, its output and control, the nodes it waits for, and how
# it computes.
# If any other setting changed, it would be a different run.
CHANGEABLE_ON_RESUME = {
    *("rounds", "output-dir", "resume-from", "checkpoints-kept", "tracker", "local-only-control", "judge-cache"),
    "show-real-images",
    *("min-available-nodes", "node-timeout", "round-deadline", "quorum", "reply-limit", "client.threads"),
    "learn-early",
    *("t2i.device", "t2i.offload", "t2i.gradient-checkpointing", "t2i.attention-slicing", "t2i.vae-tiling"),
    *("t2i.generation-batch-size", "t2i.adaptation-micro-batch-size"),
}


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
            state = read_checkpoint(checkpoint)
            kept_metrics(run, state)
            return state
        except DamagedCheckpointError as error:
            damage = f" ({error})"
            log(WARNING, "A damaged checkpoint is skipped: %s", error)
    raise nothing_to_resume(run.path, damage)


def kept_metrics(run: RunFolder, state: ServerState) -> tuple[int, bool]:
    """Return how many bytes of the metrics belong to a checkpoint, and whether they have the line of its round.

    A run that was cut off while it measured the round has a checkpoint and no line.

    Raises
    ------
    DamagedCheckpointError
        If the earlier lines are not those of the checkpoint.
    """
    content = run.metrics.read_bytes() if run.metrics.exists() else b""
    start, after = content[: state.earlier.bytes], content[state.earlier.bytes :]
    if hashlib.sha256(start).hexdigest() != state.earlier.sha256:
        raise DamagedCheckpointError(f"{run.metrics} is not what was written until round {state.round}")
    line = after[: after.find(b"\n") + 1]
    with suppress(ValueError):
        if line and json.loads(line).get("round") == state.round:
            return len(start) + len(line), True
    return len(start), False


def nothing_to_resume(folder: Path, damage: str = "") -> ConfigError:
    """Return the error of a folder that no run can continue from."""
    found = f"holds no checkpoint that can be read{damage}" if folder.is_dir() else "is not there"
    return ConfigError(
        f"run-config key 'resume-from' is '{folder}', which {found}; "
        "allowed: the folder of a run that ended its round 0 with checkpoints-kept above 0"
    )


def check_unfinished(run: RunFolder, config: RunConfig) -> None:
    """Check that a run has not done and measured all its rounds.

    Raises
    ------
    ConfigError
        If it has; nothing would be left to do.
    """
    try:
        done = run.read_metrics()[-1]["round"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if done >= config.rounds:
        raise ConfigError(
            f"run-config key 'rounds' is {config.rounds}, and the run that resume-from names has done {done} rounds; "
            f"allowed: more than {done} (its page is written anew by `fedmmkt report {run.path}`)"
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
    earlier, present = flatten(described), to_flower(config)
    other = {
        key: value
        for key, value in present.items()
        if key not in CHANGEABLE_ON_RESUME and earlier.get(key, value) != value  # The earlier run may lack a key.
    }
    changed = [f"{key!r} was {earlier[key]!r} and is {value!r}" for key, value in other.items()]
    if were != are:
        changed.append(f"the classes were {', '.join(were)} and are {', '.join(are)}")
    if changed:
        defaults = to_flower(RunConfig())
        known = present.keys() - CHANGEABLE_ON_RESUME  # An earlier version had other keys.
        merged = present | {key: value for key, value in earlier.items() if key in known or key.startswith("extra.")}
        typed = {key: value for key, value in merged.items() if key in other or defaults.get(key) != value}
        raise ConfigError(
            f"run-config key 'resume-from' is {config.resume_from!r}, a run of another configuration: "
            f"{'; '.join(changed)}; allowed: the values that it had, but for {', '.join(sorted(CHANGEABLE_ON_RESUME))}"
            f"; with its values:{run_config_option(typed)}"
        )

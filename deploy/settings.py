"""The settings of a run that is to be checked or started: what is right among them, and those of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmmkt.common.config import ConfigError, RunConfig, Setting, to_flower

# Where a run writes, and on how many nodes, is each run's own.
OWN_OF_A_RUN = ("output-dir", "resume-from", "min-available-nodes")


def right_part(settings: Mapping[str, Setting]) -> tuple[RunConfig, ConfigError | None]:
    """Parse what is right in a run-config, so that it can be checked further; tell what is wrong.

    Keys with mistakes get their defaults. If some are among the data's, or no dataset is named, so do all of the data,
    and the prompts: one could not tell what the others refer to.
    """
    problems: list[str] = []
    rest = dict(settings)
    while True:
        try:
            config = RunConfig.from_flower(rest)
            break
        except ConfigError as error:
            problems.append(str(error))
            wrong = {*error.keys, *(("output-dir", "resume-from") if "" in error.keys else ())}
            kept = {key: value for key, value in rest.items() if not wrong & {key, key.partition(".")[0]}}
            if any(key.startswith("data") for key in wrong) or "data.dataset" not in kept:
                kept = {key: value for key, value in kept.items() if key[:5] != "data." and key != "t2i.prompts"}
            rest = kept if len(kept) < len(rest) else {}
    return config, ConfigError("\n".join(problems)) if problems else None


def with_earlier(settings: Mapping[str, Setting], defaults: Mapping[str, Setting] | None = None) -> dict[str, Setting]:
    """Add the settings of the run that ``resume-from`` names, if it names one; those in ``settings`` have priority.

    Settings that the defaults have already are not added. If the earlier run's ``config.json`` cannot be read, nothing
    is added: whatever checks ``resume-from`` says why.
    """
    folder = settings.get("resume-from")
    if not folder:
        return dict(settings)
    defaults = to_flower(RunConfig()) if defaults is None else defaults
    earlier = {key: value for key, value in _earlier(Path(str(folder)).expanduser()).items() if _is_known(key)}
    return {key: value for key, value in earlier.items() if defaults.get(key) != value} | dict(settings)


def earlier_nodes(folder: Path) -> int | None:
    """Return how many nodes took part in an earlier run, by its last checkpoint; None if that cannot be told."""
    from fedmmkt.server_app.record.checkpoint import STATE, checkpoints
    from fedmmkt.server_app.record.run_folder import RunFolder

    try:
        last = checkpoints(RunFolder(folder.expanduser()).checkpoints)[-1]
        state = json.loads((last / STATE).read_text(encoding="utf-8"))
        config = state["config"]
        needed = config["min-nodes"] if "min-nodes" in config else config["min-available-nodes"]  # Its earlier name.
        return max(len(state["clients"]), int(needed))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _earlier(folder: Path) -> dict[str, Setting]:
    """Return the settings of a run by their dotted keys; lists become texts with commas."""
    try:
        nested: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        sections = [
            (f"{key}.", value) if isinstance(value, dict) else ("", {key: value}) for key, value in nested.items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {
        prefix + key: ",".join(map(str, value)) if isinstance(value, list) else value
        for prefix, section in sections
        for key, value in section.items()
    }


def _is_known(key: str) -> bool:
    """Tell whether this version has a key, and runs do not each have their own."""
    return key not in OWN_OF_A_RUN and (key.startswith("extra.") or key in to_flower(RunConfig()))

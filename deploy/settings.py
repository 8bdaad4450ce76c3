"""The settings of a run that is to be checked or started: those typed, ours, and those of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedmmkt.common.config import BUILT_IN, OWN_OF_A_RUN, ConfigError, RunConfig, Setting, to_flower
from fedmmkt.common.flower_settings import flatten
from fedmmkt.deploy.bundle import default_config, read_app, runs_fedmmkt

FOLDERS = ("output-dir", "resume-from", "client.state-dir")
PATHS = ("data.dataset", "data.classes", "t2i.model", "t2i.adapter", "t2i.prompts")  # Or something else than a path.
NO_PATHS = (*BUILT_IN, "starter", "templates", "clients")


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


def effective_config(app: Path, nodes: int, out: Path | None, run_config: Mapping[str, Setting]) -> dict[str, Setting]:
    """Add the output folder and the number of nodes to a run-config, if the app has these keys.

    A run that goes on with an earlier one (``resume-from``) gets the settings of that too. Values in ``run_config``
    have priority.
    """
    project = read_app(app)
    defaults = default_config(project)
    ours: dict[str, Setting] = {"min-available-nodes": nodes}
    if out is not None:
        ours["output-dir"] = str(out.expanduser().absolute())
    changes = {key: _absolute(key, value) for key, value in run_config.items()}
    if runs_fedmmkt(project):
        changes = with_earlier(changes, defaults)
    return {key: value for key, value in ours.items() if key in defaults} | changes


def _absolute(key: str, value: Setting) -> Setting:
    """Make a path that is relative to this folder absolute, since Flower's processes work elsewhere."""
    if not isinstance(value, str) or not value:
        return value
    if key == "client.models":
        return ",".join(map(_absolute_model, value.split(",")))
    path = Path(value).expanduser()
    is_path = key in FOLDERS or (key in PATHS and value not in NO_PATHS and path.exists())
    return str(path.absolute()) if is_path else value


def _absolute_model(name: str) -> str:
    from fedmmkt.client_app.models.building import TRANSFORMERS  # It imports torch.

    source = name.strip().removeprefix(TRANSFORMERS)
    is_path = source != name.strip() and Path(source).expanduser().exists()
    return TRANSFORMERS + str(Path(source).expanduser().absolute()) if is_path else name


def with_earlier(settings: Mapping[str, Setting], defaults: Mapping[str, Setting] | None = None) -> dict[str, Setting]:
    """Add the settings of the run that ``resume-from`` names, if it names one; those in ``settings`` have priority.

    Settings that the defaults have already are not added, nor those that this version does not know. If the earlier
    run's ``config.json`` cannot be read, nothing is added: whatever checks ``resume-from`` says why.
    """
    folder = settings.get("resume-from")
    if not folder:
        return dict(settings)
    known = to_flower(RunConfig())
    defaults = known if defaults is None else defaults
    earlier = {
        key: value
        for key, value in _earlier(Path(str(folder)).expanduser()).items()
        if key not in OWN_OF_A_RUN and (key in known or key.startswith("extra.")) and defaults.get(key) != value
    }
    return earlier | dict(settings)


def earlier_nodes(folder: Path) -> int | None:
    """Return how many nodes took part in an earlier run, by its last checkpoint; None if that cannot be told."""
    from fedmmkt.server_app.record.checkpoint import STATE, checkpoints
    from fedmmkt.server_app.record.run_folder import RunFolder

    try:
        last = checkpoints(RunFolder(folder.expanduser()).checkpoints)[-1]
        state = json.loads((last / STATE).read_text(encoding="utf-8"))
        return max(len(state["clients"]), int(state["config"]["min-available-nodes"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _earlier(folder: Path) -> dict[str, Setting]:
    """Return the settings of a run by their dotted keys; none if they cannot be read."""
    from fedmmkt.server_app.record.run_folder import RunFolder

    try:
        return flatten(RunFolder(folder).read_config()["config"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}

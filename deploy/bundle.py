"""The app that is submitted to Flower, with all configuration keys of the run.

Flower can override only keys that are in the app's own ``pyproject.toml``. The user's own app contains only some of the
keys, and the app that comes with the package has no folder. So a copy with the whole configuration is submitted.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from flwr.cli.build import build_fab_from_files, get_filtered_fab_paths
from flwr.cli.utils import collect_files, filter_paths_for_publish
from flwr.common.config import flatten_dict, unflatten_dict

from fedmmkt.common.config import ConfigError, RunConfig, Setting, to_flower

PROJECT = "pyproject.toml"
BUILT_IN: dict[str, Any] = {
    "project": {"name": "fedmmkt", "description": "The app that comes with fedmmkt"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedmmkt",
                "components": {
                    "serverapp": "fedmmkt.flower.server:app",
                    "clientapp": "fedmmkt.client:app",
                },
            }
        }
    },
}


def read_app(app: Path) -> dict[str, Any]:
    """Read an app's ``pyproject.toml``.

    Raises
    ------
    ConfigError
        If the folder holds no Flower app.
    """
    path = app / PROJECT
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        project["tool"]["flwr"]["app"]["components"]
    except OSError as error:
        raise ConfigError(f"no Flower app in {str(app)!r}: {path.name} cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except KeyError:
        raise ConfigError(
            f"no Flower app in {str(app)!r}: {path.name} has no [tool.flwr.app.components] table"
        ) from None
    return project


def own_config(project: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the run-config of an app's ``pyproject.toml``, whose keys are those that Flower lets a run change."""
    own: dict[str, Setting] = flatten_dict(project["tool"]["flwr"]["app"].get("config", {}))
    return own


def default_config(project: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the run-config of an app's ``pyproject.toml``; our defaults are added if it runs our ServerApp."""
    own = own_config(project)
    return {**to_flower(RunConfig()), **own} if runs_fedmmkt(project) else own


def runs_fedmmkt(project: Mapping[str, Any]) -> bool:
    """Return whether an app runs this package's ServerApp, and so uses its configuration."""
    return str(project["tool"]["flwr"]["app"]["components"].get("serverapp", "")).startswith("fedmmkt.")


@contextlib.contextmanager
def app_folder(app: Path | None) -> Iterator[Path]:
    """Yield the folder of an app: ``app`` if given, else the current folder if it is an app, else the package's app."""
    if app is not None:
        yield app
        return
    if _holds_app(Path()):
        yield Path()
        return
    with tempfile.TemporaryDirectory(prefix="fedmmkt-") as folder:
        built_in = Path(folder) / "fedmmkt"
        built_in.mkdir()
        project = {**BUILT_IN, "project": {**BUILT_IN["project"], "version": version("fedmmkt")}}
        (built_in / PROJECT).write_text(tomli_w.dumps(project), encoding="utf-8")
        yield built_in


def bundled_files(app: Path) -> set[str]:
    """Return the files that Flower puts into an app's bundle, as paths relative to the app."""
    files = filter_paths_for_publish(collect_files(app.resolve()))
    return set(get_filtered_fab_paths(files, read_app(app)))


def _holds_app(folder: Path) -> bool:
    """Tell whether a folder's ``pyproject.toml`` is that of a Flower app; a broken one is refused."""
    path = folder / PROJECT
    if not path.exists():
        return False
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.absolute()} cannot be read ({error}); mend it, or name an app with --app") from None
    return "app" in project.get("tool", {}).get("flwr", {})


@contextlib.contextmanager
def folder_to_submit(app: Path, config: Mapping[str, Setting]) -> Iterator[Path]:
    """Yield the folder to submit: the app itself if it has all keys, else a copy that has them.

    Raises
    ------
    ConfigError
        If Flower cannot bundle the app.
    """
    project = read_app(app)
    flower = project["tool"]["flwr"]["app"]
    defaults = own_config(project)
    if config.keys() <= defaults.keys():
        yield app
        return
    flower["config"] = unflatten_dict({**defaults, **config})
    with tempfile.TemporaryDirectory(prefix="fedmmkt-") as folder:
        try:
            bundle, _ = build_fab_from_files({**collect_files(app.resolve()), PROJECT: tomli_w.dumps(project).encode()})
        except ValueError as error:
            raise ConfigError(f"the app in {str(app)!r} cannot be bundled: {error}") from None
        copy = Path(folder) / "app"
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            archive.extractall(copy)
        for key in ("fab-include", "fab-exclude"):  # Everything in the copy belongs to the app.
            flower.pop(key, None)
        (copy / PROJECT).write_text(tomli_w.dumps(project), encoding="utf-8")
        yield copy

"""Experiment trackers of a run: TensorBoard, MLflow, Weights & Biases and Trackio.

The run-config key ``tracker`` names them. Each gets the same: the settings, the numbers and the picture of each round,
and at the end the adapter and the run's files (TensorBoard has no place for files). The trackers of `accelerate` do the
work. Where they write is set by each tool's own environment variables, which also hold its login.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from logging import WARNING
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
from flwr.supercore import log
from PIL import Image

from fedmmkt.common.config import ConfigError, RunConfig, Setting, TrackerName, to_flower
from fedmmkt.common.files import write_text
from fedmmkt.server_app.record.run_folder import RunFolder

PROJECT = "fedmmkt"
PICTURES = "images"  # name of the pictures in each tracker
PICTURE_SIDE = 1600  # larger pictures are reduced to this side, in pixels


class Tracker(ABC):
    """One tracker of one run.

    Attributes
    ----------
    package : str
        The package that it needs; also the extra of ``fedmmkt`` that installs it.
    """

    package: ClassVar[str]
    _tracker: Any

    @abstractmethod
    def start(self, folder: Path, run_id: str, settings: Mapping[str, Setting], first_round: int) -> str:
        """Start the tracker.

        Parameters
        ----------
        folder : Path
            The run folder.
        run_id : str
            The tracker's own id of the run if it goes on with one; empty for a new one.
        settings : mapping
            The run-config, flat.
        first_round : int
            The first round that will be logged.

        Returns
        -------
        str
            The tracker's id of the run.
        """

    @abstractmethod
    def log(self, round: int, numbers: Mapping[str, float], picture: Image.Image | None) -> None:
        """Log a round."""

    @abstractmethod
    def log_files(self, run: RunFolder) -> None:
        """Log the adapter, configuration, metrics and report of the run."""

    def finish(self, failed: bool) -> None:
        """End the tracker's run."""
        self._tracker.finish()


class TensorBoard(Tracker):
    """Event files in the folder ``tensorboard`` of the run."""

    package = "tensorboard"

    def start(self, folder: Path, run_id: str, settings: Mapping[str, Setting], first_round: int) -> str:
        """Start the tracker; rounds from ``first_round`` on that are there already are hidden."""
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker("tensorboard", folder, purge_step=first_round)
        self._tracker.start()
        if not run_id:
            rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
            self._tracker.log({"config": f"| key | value |\n|---|---|\n{rows}"}, step=first_round)
        return "tensorboard"

    def log(self, round: int, numbers: Mapping[str, float], picture: Image.Image | None) -> None:
        """Log a round."""
        if picture:
            self._tracker.log_images({PICTURES: np.asarray(picture)[None]}, step=round, dataformats="NHWC")
        self._tracker.log(dict(numbers), step=round)

    def log_files(self, run: RunFolder) -> None:
        """Do nothing: event files cannot hold files, and lie beside them."""


class MLflow(Tracker):
    """A run in MLflow: at ``MLFLOW_TRACKING_URI``, or in a database in the folder ``mlflow`` of the run."""

    package = "mlflow"

    def start(self, folder: Path, run_id: str, settings: Mapping[str, Setting], first_round: int) -> str:
        """Start the tracker."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        self._is_own_store = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if self._is_own_store:
            (folder / "mlflow").mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow/mlflow.db")
            artifacts = (folder / "mlflow" / "artifacts").as_uri()
        self._tracker = MLflowTracker(PROJECT, artifacts, run_id=run_id or None, run_name=folder.name)
        self._tracker.start()
        if not run_id:  # MLflow refuses to change the settings of a run.
            self._tracker.store_init_configuration(dict(settings))
        return str(self._tracker.tracker.info.run_id)

    def log(self, round: int, numbers: Mapping[str, float], picture: Image.Image | None) -> None:
        """Log a round; characters of names that MLflow refuses become underscores."""
        import mlflow

        self._tracker.log({re.sub(r"[^\w\-. :/]", "_", tag): value for tag, value in numbers.items()}, step=round)
        if picture:
            mlflow.log_image(picture, key=PICTURES, step=round)

    def log_files(self, run: RunFolder) -> None:
        """Log the files of the run as artifacts."""
        self._tracker.log_artifacts(str(run.lora), run.lora.name)
        for file in _files(run):
            self._tracker.log_artifact(str(file))

    def finish(self, failed: bool) -> None:
        """End the run, as failed if it did."""
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
        if self._is_own_store:
            mlflow.set_tracking_uri(None)  # It is a setting of the whole process.


class WandB(Tracker):
    """A run in Weights & Biases; its local files are in the folder ``wandb`` of the run."""

    package = "wandb"

    def start(self, folder: Path, run_id: str, settings: Mapping[str, Setting], first_round: int) -> str:
        """Start the tracker; it gets no console output, code or command line, which holds a token of Flower."""
        import wandb
        from accelerate.tracking import WandBTracker

        private: dict[str, Any] = {"console": "off", "disable_git": True, "disable_code": True}
        private |= {"x_disable_meta": True, "quiet": True}
        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id or None,
            resume="allow",
            name=folder.name,
            dir=str(folder),
            settings=wandb.Settings(**private),
        )
        self._tracker.start()
        self._tracker.store_init_configuration(dict(settings))
        # Its own steps cannot go back, but a resumed run repeats rounds.
        self._tracker.tracker.define_metric("*", step_metric="round")
        return str(self._tracker.tracker.id)

    def log(self, round: int, numbers: Mapping[str, float], picture: Image.Image | None) -> None:
        """Log a round."""
        import wandb

        self._tracker.log({"round": round, **numbers} | ({PICTURES: wandb.Image(picture)} if picture else {}))

    def log_files(self, run: RunFolder) -> None:
        """Log the files of the run as one artifact."""
        import wandb

        own = self._tracker.tracker
        own.log_artifact(_filled(wandb.Artifact(f"run-{own.id}-results", type="model"), run))

    def finish(self, failed: bool) -> None:
        """End the run, as failed if it did."""
        self._tracker.tracker.finish(exit_code=int(failed))


class Trackio(Tracker):
    """A run in Trackio: in ``TRACKIO_DIR``, or in Trackio's own folder of the user."""

    package = "trackio"

    def start(self, folder: Path, run_id: str, settings: Mapping[str, Setting], first_round: int) -> str:
        """Start the tracker; its id of a run is the name of the run."""
        from accelerate.tracking import TrackioTracker

        name = run_id or f"{folder.name}-{uuid4().hex[:8]}"
        own: dict[str, Any] = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        self._tracker = TrackioTracker(PROJECT, name=name, resume="allow", config=dict(settings), **own)
        self._tracker.start()
        return name

    def log(self, round: int, numbers: Mapping[str, float], picture: Image.Image | None) -> None:
        """Log a round."""
        import trackio

        self._tracker.log({**numbers} | ({PICTURES: trackio.Image(picture)} if picture else {}), step=round)

    def log_files(self, run: RunFolder) -> None:
        """Log the files of the run as one artifact."""
        import trackio

        own = self._tracker.tracker
        own.log_artifact(_filled(trackio.Artifact(f"{own.name}-results", type="model"), run))


TRACKERS: dict[TrackerName, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the packages of trackers are installed; nothing is imported.

    Raises
    ------
    ConfigError
        If one is not; the text says how to install it.
    """
    for name in names:
        package = TRACKERS[name].package
        if find_spec(package) is None:
            present = ", ".join(other for other, tracker in TRACKERS.items() if find_spec(tracker.package))
            raise ConfigError(
                f"run-config key 'tracker' names {name!r}, which is not installed; install it by "
                f"pip install 'fedmmkt[{package}]'; allowed here: {present}, or none"
            )


class Trackers:
    """All trackers of a run. One that fails is left for the rest of the run, with one warning.

    The ids of the run in each tracker are kept in ``trackers.json`` of the run folder, so that a run that is resumed in
    this folder goes on in the same. A tracker without an id first gets the rounds that are there.

    Parameters
    ----------
    names : sequence of str
        The trackers' names.
    run_folder : RunFolder
        The folder of the run.
    """

    def __init__(self, names: Sequence[TrackerName], run_folder: RunFolder) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.run_folder = run_folder
        self._active: dict[TrackerName, Tracker] = {}

    @contextmanager
    def run(self, config: RunConfig) -> Iterator[None]:
        """Start the trackers for the block, and end them after it; if it ends well, the run's files are logged."""
        failed = True
        for name in self.names:
            self._active[name] = TRACKERS[name]()
            self._attempt(name, partial(self._start, name, to_flower(config)))
        try:
            yield
            failed = False
        finally:
            if not failed:
                self._each(lambda tracker: tracker.log_files(self.run_folder))
            self._each(lambda tracker: tracker.finish(failed))
            self._active.clear()

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of ``metrics.jsonl``, with the picture of its round."""
        self._each(lambda tracker: self._log(tracker, line))

    def _start(self, name: TrackerName, settings: Mapping[str, Setting], tracker: Tracker) -> None:
        from accelerate import PartialState

        PartialState()  # The logger of accelerate's trackers needs it.
        ids, lines = self._ids(), self.run_folder.read_metrics()
        earlier = [] if name in ids else lines
        first = earlier[0]["round"] if earlier else lines[-1]["round"] + 1 if lines else 0
        run_id = tracker.start(self.run_folder.path, ids.get(name, ""), settings, first)
        for line in earlier:
            self._log(tracker, line)
        write_text(self._ids_file, json.dumps({**ids, name: run_id}, indent=2) + "\n")

    def _log(self, tracker: Tracker, line: Mapping[str, Any]) -> None:
        numbers = dict(_numbers({key: value for key, value in line.items() if key != "round"}))
        tracker.log(line["round"], numbers, _picture(self.run_folder.picture(line["round"])))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name in tuple(self._active):
            self._attempt(name, action)

    def _attempt(self, name: TrackerName, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._active[name])
        except Exception as error:  # Each tracker has errors of its own, and none may end the run.
            del self._active[name]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log(
                WARNING,
                "Tracker %s failed (%s) and gets nothing more of this run; the run goes on, and %s holds everything",
                name,
                _without_logins(reason),
                self.run_folder.path,
            )

    @property
    def _ids_file(self) -> Path:
        return self.run_folder.path / "trackers.json"

    def _ids(self) -> dict[str, str]:
        return dict(json.loads(self._ids_file.read_text(encoding="utf-8"))) if self._ids_file.exists() else {}


def _numbers(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers in nested mappings, each with its keys joined by slashes."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            yield from _numbers(content, f"{tag}/{key}" if tag else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield tag, value


def _picture(path: Path) -> Image.Image | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def _files(run: RunFolder) -> list[Path]:
    return [file for file in (run.config, run.metrics, run.report) if file.exists()]


def _filled(artifact: Any, run: RunFolder) -> Any:
    """Add the run's files to an artifact of wandb or trackio, and return it."""
    artifact.add_dir(str(run.lora), name=run.lora.name)
    for file in _files(run):
        artifact.add_file(str(file), name=file.name)
    return artifact


def _without_logins(text: str) -> str:
    """Remove user names and passwords from addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)

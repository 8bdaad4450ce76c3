"""The T2I model of a finished run: it is loaded from the run's folder, and draws a labelled folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from fedmmkt.common.config import ConfigError, RunConfig, Setting
from fedmmkt.server_app.prompts import FilePrompts, build_prompt_source
from fedmmkt.server_app.record.checkpoint import DamagedCheckpointError, checkpoints, read_checkpoint
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.families import families
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import NO_CLASS, sample_seeds

METADATA = "metadata.jsonl"  # Not a CSV file, in which `datasets` would take the class ``None`` for a missing label.
BATCHES_AT_ONCE = 4  # that are held in memory: enough to keep several devices busy


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a run says of its T2I.

    Attributes
    ----------
    folder : RunFolder
        The folder.
    config : RunConfig
        The settings of the run, with changes for its use.
    classes : tuple of str
        The class space.
    rounds : dict of int to (Path or None)
        The rounds after which the adapter is known, in order, and where it lies. Round 0 is before any learning: the
        adapter is then new, or that of ``t2i.adapter``, and lies nowhere in the run folder.
    """

    folder: RunFolder
    config: RunConfig
    classes: tuple[str, ...]
    rounds: dict[int, Path | None]

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Setting] | None = None) -> Self:
        """Read the folder of a run.

        Parameters
        ----------
        path : str or Path
            The run folder.
        changes : mapping, optional
            Settings that are changed, by their run-config keys, such as ``t2i.device``.

        Raises
        ------
        ConfigError
            If it is no run folder, or its settings cannot be used here.
        """
        folder = RunFolder(Path(path).expanduser())
        if not folder.path.is_dir():
            raise ConfigError(f"{folder.path} is not there; allowed: the folder of a run, such as runs/demo")
        try:
            described = folder.read_config()
            settings, classes = dict(described["config"]), tuple(described["classes"])
            lines = folder.read_metrics()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder.path} is no run folder: its {folder.config.name} or {folder.metrics.name} cannot be read "
                f"({error!r:.200}); allowed: the folder of a run, such as runs/demo"
            ) from None
        config = RunConfig.from_flower(settings | dict(changes or {}))
        saved = {int(place.name.removeprefix("round-")): place for place in checkpoints(folder.checkpoints)}
        if lines and folder.lora.is_dir():
            saved[lines[-1]["round"]] = folder.lora
        return cls(folder, config, classes, dict(sorted(({0: None} | saved).items())))

    def chosen_round(self, round: int | None) -> int:
        """Return a round of which the adapter is there: the given one, or the last.

        Raises
        ------
        ConfigError
            If it is not there.
        """
        chosen = max(self.rounds) if round is None else round
        if chosen not in self.rounds:
            raise ConfigError(
                f"the round is {chosen}, whose adapter is not in {self.folder.path}; allowed: "
                f"{', '.join(map(str, self.rounds))} (a run keeps as many as its checkpoints-kept, "
                f"{self.config.checkpoints_kept}; 0 is before any learning)"
            )
        return chosen


def load_generator(
    run: str | Path,
    round: int | None = None,
    with_adapter: bool = True,
    changes: Mapping[str, Setting] | None = None,
) -> Generator:
    """Load the T2I model of a run, with the adapter that it learned.

    Parameters
    ----------
    run : str or Path
        The run folder.
    round : int, optional
        The round after which the adapter is taken; by default the last one. 0 is before any learning.
    with_adapter : bool
        Without it, the model is as it was made, whatever adapter the run began with.
    changes : mapping, optional
        Settings to change, by their run-config keys: ``{"t2i.device": "cuda:1"}``.

    Returns
    -------
    Generator
        Its method `Generator.generate` takes prompts, seeds and a guidance scale.

    Raises
    ------
    ConfigError
        If the folder, the model or the round's adapter cannot be had.
    """
    with _quietly():
        return _load(FinishedRun.read(run, changes), round, with_adapter)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from warning that torchvision is missing, which nothing here needs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(run: FinishedRun, round: int | None, with_adapter: bool) -> Generator:
    chosen = run.chosen_round(round)
    place = run.rounds[chosen] if with_adapter else None
    t2i, extra = run.config.t2i, run.config.extra.as_dict()
    if place or not with_adapter:
        t2i = t2i.model_copy(update={"adapter": ""})
    family = None if t2i.family == "auto" else families.get(t2i.family, extra)
    generator = Generator(t2i, run.config.seed, family)
    if place == run.folder.lora:
        generator.adapter.load(place)
    elif place:
        try:
            generator.adapter.load_state(read_checkpoint(place).adapter, f"the checkpoint {place}")
        except DamagedCheckpointError as error:
            raise ConfigError(str(error)) from None
    return generator


def generate_folder(
    run: str | Path,
    out: str | Path,
    per_class: int | None = None,
    prompts: str | Path | None = None,
    round: int | None = None,
    with_adapter: bool = True,
    guidance: float | None = None,
    seed: int | None = None,
    changes: Mapping[str, Setting] | None = None,
) -> int:
    """Draw images with the T2I model of a run, into a folder that ``datasets.load_dataset("imagefolder")`` reads.

    The folder gets PNG files, and ``metadata.jsonl`` with ``file_name``, ``label`` (null where a prompt
    names no class) and ``prompt``. Images are written as they are made, each with its line, so that memory does not
    grow with their number and what a broken-off call has made can be read.

    Parameters
    ----------
    run : str or Path
        The run folder, whose settings are used.
    out : str or Path
        The folder to write; a new or an empty one.
    per_class : int, optional
        Number of images of each class, with the prompts of the run.
    prompts : str or Path, optional
        Instead of these, a file of prompts as in ``t2i.prompts``: one image for each.
    round, with_adapter
        As in `load_generator`.
    guidance : float, optional
        Guidance scale; by default that of the round.
    seed : int, optional
        Seed of prompts and images; by default that of the run. Equal seeds give equal prompts and noise in all rounds.
    changes : mapping, optional
        As in `load_generator`.

    Returns
    -------
    int
        The number of images.

    Raises
    ------
    ConfigError
        If the folder holds anything, or as in `load_generator`.
    """
    from tqdm import tqdm

    finished, folder = FinishedRun.read(run, changes), Path(out).expanduser()
    if (per_class is None) == (prompts is None) or (per_class is not None and per_class < 1):
        raise ConfigError(
            f"per-class is {per_class} and prompts is {prompts}; allowed: 1 or more, or a file of prompts"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already, and not empty; allowed: a new or an empty folder")
    chosen = finished.chosen_round(round)
    scale, classes = finished.config.t2i.guidance_of(chosen) if guidance is None else guidance, finished.classes
    start = finished.config.seed if seed is None else seed
    if per_class is None:
        asked = FilePrompts(Path(str(prompts)).expanduser(), classes).prompts
    else:
        asked = build_prompt_source(finished.config.t2i, classes).per_class(per_class, np.random.default_rng(start))
    seeds = sample_seeds(start, 0, len(asked))
    generator = _load(finished, chosen, with_adapter)
    folder.mkdir(parents=True, exist_ok=True)
    step, digits = BATCHES_AT_ONCE * generator.images_at_once, len(str(len(asked) - 1))
    with (
        (folder / METADATA).open("w", encoding="utf-8") as stream,
        # Shown, though the command switches off the bars of libraries.
        tqdm(total=len(asked), unit="image", desc="generate", disable=False) as bar,
    ):
        for first in range(0, len(asked), step):
            part = slice(first, first + step)
            texts = [prompt.text for prompt in asked[part]]
            made = generator.generate(texts, seeds[part], scale, partial(_show, bar, first))
            for number, (image, prompt) in enumerate(zip(made.images_NHWC, asked[part], strict=True), start=first):
                name = f"{number:0{digits}}.png"
                Image.fromarray(image).save(folder / name)
                label = None if prompt.class_index == NO_CLASS else classes[prompt.class_index]
                row = {"file_name": name, "label": label, "prompt": prompt.text}
                print(json.dumps(row, ensure_ascii=False), file=stream, flush=True)
    return len(asked)


def _show(bar: Any, before: int, done: int) -> None:
    """Show how many images are made: those of earlier calls, and those of this one."""
    bar.update(before + done - bar.n)

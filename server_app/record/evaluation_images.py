"""The images by which the T2I is measured: the same prompts, seeds and guidance in each round."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedmmkt.common.config import RunConfig
from fedmmkt.common.images import resize_images
from fedmmkt.common.progress import Progress
from fedmmkt.server_app.prompts import Prompt, PromptSource
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import sample_seeds

GRID_ROWS, GRID_COLUMNS = 10, 6


class EvaluationImages:
    """Generates a round's evaluation images, measures them, and writes its grid of pictures.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    classes : tuple of str
        The class space.
    run_folder : RunFolder
        Where pictures are written.
    generator : Generator
        The T2I model.
    prompts : PromptSource
        Source of the prompts.
    judge : Judge, optional
        Measures the images. Without one, only those of the pictures are made.
    """

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[str, ...],
        run_folder: RunFolder,
        generator: Generator,
        prompts: PromptSource,
        judge: Judge | None,
    ) -> None:
        self.config = config
        self.classes = classes
        self.run_folder = run_folder
        self.generator = generator
        self.prompts = prompts
        self.judge = judge
        self._measures: dict[str, Any] = {}
        self._adapter: dict[str, Tensor] = {}
        self._round = -1
        self._has_captions = False

    def remember(self, round: int, adapter: dict[str, Tensor], measures: Mapping[str, Any]) -> None:
        """Remember the measures of a round, for later ones with the same adapter."""
        self._round, self._adapter, self._measures = round, adapter, dict(measures)

    def measure(self, round: int, adapter: dict[str, Tensor]) -> dict[str, Any]:
        """Measure the T2I with an adapter and write its picture; return the measures.

        If the adapter is that of the last measure, it would generate the same images. The measures are then reused.
        """
        earlier = self.run_folder.picture(self._round)
        if self._adapter and _equal(adapter, self._adapter) and earlier.exists():
            if round != self._round:
                shutil.copyfile(earlier, self.run_folder.picture(round))
            self._round = round
            return self._measures
        with self.generator.adapter.holding(adapter):
            measures = self._make(round)
        self.remember(round, adapter, measures)
        return measures

    def _make(self, round: int) -> dict[str, Any]:
        count = self.config.t2i.evaluation_samples if self.judge else len(self.classes) * GRID_COLUMNS
        prompts, seeds = evaluation_prompts(self.prompts, count, self.config.seed)
        shown = pictured([prompt.class_index for prompt in prompts])
        made_for = range(count) if self.judge else shown
        texts = [prompts[index].text for index in made_for]
        guidance = self.config.t2i.evaluation_guidance
        progress = Progress("measure", len(texts), "images")
        made = self.generator.generate(texts, [seeds[index] for index in made_for], guidance, progress)
        measures: dict[str, Any] = {"alignment": None, "frechet": None}
        if self.judge:
            images_NHWC = resize_images(made.images_NHWC, self.judge.image_size)
            judged = asdict(self.judge.measure(images_NHWC, np.array([prompt.class_index for prompt in prompts])))
            measures |= {name: value for name, value in judged.items() if value is not None or name != "public"}
        images = dict(zip(made_for, made.images_NHWC, strict=True))
        pictures = [Image.fromarray(images[index]) for index in shown]
        if not self._has_captions:
            self._write_captions([prompts[index] for index in shown], pictures[0].size)
        self.run_folder.write_images(round, pictures, GRID_COLUMNS)
        return measures

    def _write_captions(self, prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
        """Write the prompts of the image grid, and a real image beside each row if every row is of one class.

        The run's setting ``show-real-images`` leaves them out.
        """
        rows = [prompts[start : start + GRID_COLUMNS] for start in range(0, len(prompts), GRID_COLUMNS)]
        of_rows = [row[0].class_index if len({prompt.class_index for prompt in row}) == 1 else -1 for row in rows]
        real = self.judge.real_images if self.judge and self.config.show_real_images else {}
        known = real if set(of_rows) <= real.keys() else {}
        self.run_folder.write_captions(
            [prompt.text for prompt in prompts],
            GRID_COLUMNS,
            [self.classes[index] if index >= 0 else "" for index in of_rows],
            [Image.fromarray(known[index]).resize(size) for index in of_rows if known],
        )
        self._has_captions = True


def evaluation_prompts(source: PromptSource, count: int, seed: int) -> tuple[list[Prompt], list[int]]:
    """Return the prompts of a run's evaluation images, by class, and a seed for each; in all rounds the same."""
    prompts = sorted(source(count, np.random.default_rng(seed)), key=lambda prompt: prompt.class_index)
    return prompts, sample_seeds(seed, 0, count)


def pictured(class_indices: list[int]) -> list[int]:
    """Choose the samples of the image grid: one row per class, as far as there are enough samples."""
    rows: dict[int, list[int]] = {}
    for index, class_index in enumerate(class_indices):
        rows.setdefault(class_index, []).append(index)
    if len(rows) == 1:
        return list(range(min(len(class_indices), GRID_ROWS * GRID_COLUMNS)))
    return [index for row in list(rows.values())[:GRID_ROWS] for index in row[:GRID_COLUMNS]]


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)

"""The T2I of finished runs, measured again from their folders: on more images, as the last round would make them."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import Lines, Runs, row_folder
from fedmmkt.common.datasets import load_splits
from fedmmkt.common.files import write_atomically
from fedmmkt.common.images import resize_images
from fedmmkt.server_app.prompts import build_prompt_source
from fedmmkt.server_app.record.evaluation_images import evaluation_prompts
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.judge_training import train_judge
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.trained import FinishedRun, load_generator

SEEDS_APART = 1000  # Between draws, so that no draw of one run's seed is another's.


def measured_again(runs: Runs, out: Path, images: int, draws: int = 1) -> Runs:
    """Return runs with the T2I's measures before the first and after the last round made again.

    Both are on equal prompts and seeds, at the guidance scale of the last round. They are kept beside the run. Runs
    without measures, or without a folder of the T2I, stay as they are.

    Parameters
    ----------
    runs : mapping
        As from `rows.run_each`.
    out : Path
        The folder of these runs.
    images : int
        Number of images.
    draws : int
        Sets of so many images, each with its own prompts and seeds, of which a measure is the mean. The first has those
        of the run. Recall most of all differs from set to set.
    """
    return {
        name: [_again(row_folder(out, name, seed), lines, images, draws) for seed, lines in enumerate(seeds)]
        for name, seeds in runs.items()
    }


def _again(folder: Path, lines: Lines, images: int, draws: int) -> Lines:
    run = folder / "run"
    if lines[-1]["generator"].get("frechet") is None or not RunFolder(run).lora.is_dir():
        return lines
    file = folder / f"t2i-on-{f'{draws}-times-' if draws > 1 else ''}{images}-images.json"
    if not file.exists():
        # A process of its own, as the run had: the judge depends on the number of threads that trained it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(_measure, run, images, draws).result()
        write_atomically(file, lambda place: place.write_text(json.dumps(found), encoding="utf-8"))
    before, after = json.loads(file.read_text(encoding="utf-8"))
    last = lines[-1] | {"generator": lines[-1]["generator"] | after}
    return [lines[0] | {"generator": lines[0]["generator"] | before}, *lines[1:-1], last]


def _measure(run: Path, images: int, draws: int) -> list[dict[str, Any]]:
    """Measure the T2I of a run as it was before any round, and as it is now."""
    finished = FinishedRun.read(run)
    config = finished.config
    judge = train_judge(config, load_splits(config.data, config.seed), torch.device("cpu"))  # Taken from its cache.
    if judge is None:
        raise ValueError(f"{run}: its data have no images")
    generators = [load_generator(run, 0), load_generator(run)]
    new, learned = (generator.adapter.state() for generator in generators)
    if all(torch.equal(new[name], learned[name]) for name in new):
        generators.pop()
    guidance = config.t2i.guidance_of(config.rounds)
    seeds = [config.seed + SEEDS_APART * draw for draw in range(draws)]
    found = [
        mean_of([measure(judge, one, finished.classes, images, guidance, seed) for seed in seeds]) for one in generators
    ]
    return [found[0], found[-1]]


def mean_of(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each measure over draws; of several, None where one lacks it, or where it is no number."""
    if len(draws) == 1:
        return dict(draws[0])
    return {
        name: statistics.mean(found[name] for found in draws)
        if all(isinstance(found[name], float) for found in draws)
        else None
        for name in draws[0]
    }


def measure(
    judge: Judge, generator: Generator, classes: tuple[str, ...], images: int, guidance: float, seed: int
) -> dict[str, Any]:
    """Measure a generator as a run does, on so many images of one guidance scale."""
    prompts, seeds = evaluation_prompts(build_prompt_source(generator.config, classes), images, seed)
    made = generator.generate([prompt.text for prompt in prompts], seeds, guidance)
    prompted_N = np.array([prompt.class_index for prompt in prompts])
    return asdict(judge.measure(resize_images(made.images_NHWC, judge.image_size), prompted_N))

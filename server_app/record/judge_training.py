"""Training of the judge for a run: on a bounded sample of its dataset, or taken from an earlier run on the same."""

from __future__ import annotations

from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.supercore import log

from fedmmkt.common.config import DataConfig, RunConfig
from fedmmkt.common.datasets import Examples, Splits, to_examples
from fedmmkt.server_app.record.judge import JUDGE_EXAMPLES, LARGEST_SIDE, Judge

if TYPE_CHECKING:
    import datasets

MOST_BYTES = 2**29  # Of decoded images, of the training and of the test part each: 170,000 of 32 pixels, 43,000 of 64.
NO_CACHE = "none"


def train_judge(config: RunConfig, splits: Splits, device: torch.device) -> Judge | None:
    """Train the judge if the dataset has images; the result depends only on the data, the seed and the device.

    Images are decoded at the judge's size. Of a dataset beyond `MOST_BYTES`, a sample is read.
    """
    if config.data.image_column not in splits.train.column_names:
        return None
    small = config.data.model_copy(update={"image_size": min(config.data.image_size, LARGEST_SIDE)})
    train, test = (_examples(part, small, config.seed) for part in (splits.train, splits.test))
    if train.images_NHWC is None or test.images_NHWC is None:
        return None
    log(INFO, "Training the judge on %s of %s images", len(train.labels_N), len(splits.train))
    judge = Judge(
        train.images_NHWC,
        train.labels_N,
        test.images_NHWC,
        test.labels_N,
        len(splits.classes),
        config.seed,
        device,
        cache_folder(config),
        config.judge_encoder,
    )
    log(INFO, "The judge recognises %.1f%% of the real test images", 100 * judge.accuracy)
    return judge


def cache_folder(config: RunConfig) -> Path | None:
    """Return the folder of trained judges; None if none is kept."""
    named = config.judge_cache or "~/.fedmmkt/judges"
    return None if named == NO_CACHE else Path(named).expanduser()


def _examples(part: datasets.Dataset, config: DataConfig, seed: int) -> Examples:
    most = min(JUDGE_EXAMPLES, MOST_BYTES // (3 * config.image_size**2))
    if len(part) > most:
        part = part.select(np.sort(np.random.default_rng(seed).choice(len(part), most, replace=False)))
    return to_examples(part, config, images=True, texts=False)

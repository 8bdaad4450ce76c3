"""Datasets as examples: class indices, a test part, and the images and texts that a model reads."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmmkt.common.config import ConfigError, DataConfig, OwnDataConfig
from fedmmkt.common.dataset_files import read_dataset
from fedmmkt.common.images import to_rgb_array

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Examples:
    """Labelled examples in memory.

    Attributes
    ----------
    labels_N : numpy.ndarray
        int64 class indices.
    images_NHWC : numpy.ndarray, optional
        uint8 RGB.
    texts : list of str, optional
        One text per example.
    """

    labels_N: NDArray[np.int64]
    images_NHWC: NDArray[np.uint8] | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Splits:
    """The training and test part of a dataset; in both, the label column holds indices into ``classes``."""

    train: datasets.Dataset
    test: datasets.Dataset
    classes: tuple[str, ...]


@lru_cache(maxsize=8)
def load_splits(config: DataConfig, seed: int) -> Splits:
    """Load a dataset, map labels to class indices, and hold out a stratified test part if it has none.

    Parameters
    ----------
    config : DataConfig
        Names the dataset and its columns.
    seed : int
        Seed of the test split.

    Raises
    ------
    ConfigError
        If the dataset cannot be read, or a column is missing or unusable. The text names the key and the columns.
    """
    parts = read_dataset(config)
    _check_columns(parts["train"], config)
    parts = {name: _with_images(part, config.image_column) for name, part in parts.items()}
    classes = _classes(list(parts.values()), config)
    indexed = {name: _indexed(part, config, classes) for name, part in parts.items()}
    if "test" not in indexed:
        indexed |= _split(indexed["train"], config, seed)
    return Splits(indexed["train"], indexed["test"], classes)


def to_examples(dataset: datasets.Dataset, config: DataConfig, images: bool, texts: bool) -> Examples:
    """Load examples into memory: images as RGB squares with sides of ``image_size`` pixels, texts unchanged.

    Rows without a requested image or text are left out; the log shows how many.

    Raises
    ------
    ConfigError
        If a column is missing, an image cannot be decoded, or no row is left.
    """
    for wanted, key, column in (
        (images, config.key("image_column"), config.image_column),
        (texts, config.key("text_column"), config.text_column),
    ):
        if wanted and column not in dataset.column_names:
            raise _no_column(key, column, dataset)
    labels = labels_of(dataset, config)
    pixels = _read_images(dataset, config) if images else None
    words = _read_texts(dataset, config) if texts else None
    complete = [
        row
        for row in range(len(labels))
        if (pixels is None or pixels[row] is not None) and (words is None or words[row])
    ]
    if len(complete) < len(labels):
        logger.warning("%s: %s of %s rows have no image or text and are left out",
                       config.dataset, len(labels) - len(complete), len(labels))  # fmt: skip
    if not complete:
        raise ConfigError(f"{config.key('dataset')} is {config.dataset!r}: no row is complete")
    return Examples(
        labels[complete],
        None
        if pixels is None
        else np.stack([image for image in (pixels[row] for row in complete) if image is not None]),
        None if words is None else [words[row] for row in complete],
    )


def relabel(examples: Examples, own_classes: tuple[str, ...], class_space: tuple[str, ...]) -> Examples:
    """Map a node's class indices to the run's class space, by class name.

    Raises
    ------
    ConfigError
        If the node has examples of a class outside the class space.
    """
    if own_classes == class_space:
        return examples
    held = {own_classes[label] for label in np.unique(examples.labels_N)}
    if unknown := sorted(held - set(class_space)):
        raise ConfigError(
            f"the data's classes {', '.join(unknown)!r} are not in the run; allowed: {', '.join(class_space)}"
        )
    index_C = np.array([class_space.index(name) if name in class_space else -1 for name in own_classes])
    return Examples(index_C[examples.labels_N], examples.images_NHWC, examples.texts)


def _with_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Mark a column of encoded image bytes as images; other tools write parquet files without this mark."""
    import datasets

    feature = dataset.features.get(column)
    encoded = getattr(feature, "dtype", "").endswith("binary") or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )
    return dataset.cast_column(column, datasets.Image()) if encoded else dataset


def read_class_names(config: DataConfig) -> tuple[str, ...]:
    """Return the class names of the configuration: its list, or the lines of its text file; empty if it has none.

    Raises
    ------
    ConfigError
        If the file cannot be read, or if there are fewer than two names or a name is repeated.
    """
    names = config.classes
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            lines = Path(names[0]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config.key('classes')} is {names[0]!r}, which cannot be read: {error}") from None
        names = tuple(line.strip() for line in lines if line.strip())
    if names and (len(names) < 2 or len(set(names)) < len(names)):
        raise ConfigError(f"{config.key('classes')} gives {', '.join(names)!r}; allowed: two or more, each once")
    return names


def labels_of(dataset: datasets.Dataset, config: DataConfig) -> NDArray[np.int64]:
    """Return the label column of a dataset from `load_splits` (int64 class indices)."""
    return np.array(dataset[config.label_column][:], dtype=np.int64)


def _check_columns(dataset: datasets.Dataset, config: DataConfig) -> None:
    if config.label_column not in dataset.column_names:
        raise _no_column(config.key("label_column"), config.label_column, dataset)
    if not {config.image_column, config.text_column} & set(dataset.column_names):
        raise _no_column(config.key("image_column"), config.image_column, dataset)


def _no_column(key: str, column: str, dataset: datasets.Dataset) -> ConfigError:
    return ConfigError(
        f"{key} is {column!r}, and the dataset has no such column; allowed: {', '.join(dataset.column_names)}"
    )


def _classes(parts: list[datasets.Dataset], config: DataConfig) -> tuple[str, ...]:
    feature = parts[0].features[config.label_column]
    if hasattr(feature, "names"):
        classes = tuple(feature.names)
    else:
        if str(getattr(feature, "dtype", "")).startswith(("float", "double")) or not hasattr(feature, "dtype"):
            raise ConfigError(
                f"{config.key('label_column')} is {config.label_column!r}, which holds {feature}; "
                "allowed: a column of class labels, strings or integers"
            )
        values = {value for part in parts for value in part.unique(config.label_column) if value is not None}
        classes = tuple(str(value) for value in sorted(values))
    # One node may hold examples of a single class. A run needs at least two classes.
    if len(classes) < 2 and not isinstance(config, OwnDataConfig):
        raise ConfigError(
            f"{config.key('label_column')} is {config.label_column!r}, which has {len(classes)} class(es); "
            "allowed: two or more"
        )
    return classes


def _indexed(dataset: datasets.Dataset, config: DataConfig, classes: tuple[str, ...]) -> datasets.Dataset:
    """Turn the label column into indices into ``classes``, and leave out rows without a label."""
    import datasets

    column = config.label_column
    feature = dataset.features[column]
    values = dataset[column][:]
    if isinstance(feature, datasets.ClassLabel):
        labels_N = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    else:
        index = {name: position for position, name in enumerate(classes)}
        labels_N = np.array([-1 if value is None else index[str(value)] for value in values], dtype=np.int64)
        feature = datasets.ClassLabel(names=list(classes))
        dataset = dataset.remove_columns(column).add_column(column, labels_N, feature=feature)
    labelled = np.flatnonzero((labels_N >= 0) & (labels_N < len(classes)))
    if not len(labelled):
        raise ConfigError(f"{config.key('label_column')} is {column!r}, in which no row has a label")
    if len(labelled) == len(dataset):
        return dataset
    logger.warning("%s: %s rows have no label and are left out", config.dataset, len(dataset) - len(labelled))
    return dataset.select(labelled)


def _split(dataset: datasets.Dataset, config: DataConfig, seed: int) -> dict[str, datasets.Dataset]:
    from sklearn.model_selection import train_test_split

    labels = labels_of(dataset, config)
    counts = np.bincount(labels)
    held = round(len(labels) * config.test_fraction)
    stratify = labels if counts[counts > 0].min() >= 2 and held >= np.count_nonzero(counts) else None
    if stratify is None:
        logger.warning(
            "%s: a class has too few examples for a stratified split; the test part is random", config.dataset
        )
    if not 0 < held < len(labels):
        raise ConfigError(
            f"{config.key('test_fraction')} is {config.test_fraction}, which leaves nothing to train or "
            f"test on {len(labels)} examples"
        )
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=held, stratify=stratify, random_state=seed)
    return {"train": dataset.select(train), "test": dataset.select(test)}


def _read_texts(dataset: datasets.Dataset, config: DataConfig) -> list[Any]:
    feature = dataset.features[config.text_column]
    if not getattr(feature, "dtype", "").endswith("string"):
        raise ConfigError(
            f"{config.key('text_column')} is {config.text_column!r}, which holds {feature}; "
            "allowed: a column of strings"
        )
    return list(dataset[config.text_column][:])


def _read_images(dataset: datasets.Dataset, config: DataConfig) -> list[NDArray[np.uint8] | None]:
    """Decode a column of images one by one, so that an error can name the row."""
    import datasets
    from PIL import Image

    column = config.image_column
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(
            f"{config.key('image_column')} is {column!r}, which holds {dataset.features[column]}; "
            "allowed: a column of images"
        )
    encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    images: list[NDArray[np.uint8] | None] = []
    for row, item in enumerate(encoded[column]):
        if item is None or (item["bytes"] is None and item["path"] is None):
            images.append(None)
            continue
        try:
            source: Any = io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]
            with Image.open(source) as image:
                images.append(to_rgb_array(image, config.image_size))
        except FileNotFoundError:
            raise ConfigError(
                f"{config.key('image_column')} is {column!r}, and in row {row} it names {item['path']!r}, which is not "
                "there; allowed: a column of images, or of the names of image files beside the table"
            ) from None
        except Exception as error:  # Decoders raise many kinds of errors on broken bytes.
            raise ConfigError(
                f"{config.key('dataset')} is {config.dataset!r}: the image of row {row} does not decode ({error})"
            ) from None
    return images

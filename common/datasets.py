"""Datasets: the built-in digits, image folders and parquet files; their classes, splits and partitions."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config import ConfigError, DataConfig
from common.images import to_rgb_array

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("flwr")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a handwritten {}",
    "the digit {} drawn by hand",
    "someone wrote the number {}",
    "a scribbled {} in pencil",
    "{}, in a child's hand",
)
# What `datasets` calls test data in the names of files and folders.
SPLIT_WORDS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}


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
    """

    labels_N: NDArray[np.int64]
    images_NHWC: NDArray[np.uint8] | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Splits:
    """A dataset's training and test part; the label column of both holds indices into ``classes``."""

    train: datasets.Dataset
    test: datasets.Dataset
    classes: tuple[str, ...]


@lru_cache(maxsize=8)
def load_splits(config: DataConfig, seed: int) -> Splits:
    """Load a dataset, index its classes, and hold out a stratified test part where it has none of its own.

    Parameters
    ----------
    config : DataConfig
        Names the dataset and its columns.
    seed : int
        Seed of the test split.

    Raises
    ------
    ConfigError
        If the dataset cannot be read, or a column is missing or of no use. Names the key and what is there.
    """
    parts = _digits() if config.dataset == "digits" else _local(config)
    _check_columns(parts["train"], config)
    parts = {name: _with_images(part, config.image_column) for name, part in parts.items()}
    classes = _classes(list(parts.values()), config)
    indexed = {name: _indexed(part, config, classes) for name, part in parts.items()}
    if "test" not in indexed:
        indexed |= _split(indexed["train"], config, seed)
    return Splits(indexed["train"], indexed["test"], classes)


@lru_cache(maxsize=8)
def partition_rows(config: DataConfig, num_partitions: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Divide the training rows of `load_splits` among clients, as flwr-datasets does.

    Only labels are read. The parts are disjoint and the same in every process. They cover everything, but under
    ``pathological`` with too few clients for all classes, which the log then names.

    Returns
    -------
    tuple of tuple of int
        Row numbers, one tuple a client.

    Raises
    ------
    ConfigError
        If the data cannot be divided so, or leaves a client fewer than ``min_examples``.
    """
    import datasets

    splits = load_splits(config, seed)
    labels_N = _labels(splits.train, config)
    order_N = np.random.default_rng(seed).permutation(len(labels_N))  # `iid` cuts rows as they come.
    rows = datasets.Dataset.from_dict({"row": order_N, "label": labels_N[order_N]})
    try:
        if num_partitions * config.min_examples > len(labels_N):
            raise ValueError(f"{config.min_examples} for each of them are more than there are.")
        partitioner = _partitioner(config, num_partitions, seed)
        partitioner.dataset = rows
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It draws again until every part is large enough, and says so each time.
            parts = tuple(tuple(partitioner.load_partition(index)["row"][:]) for index in range(num_partitions))
        if (smallest := min(map(len, parts))) < config.min_examples:
            raise ValueError(f"the smallest part has {smallest}.")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run-config key 'data.partitioner' is {config.partitioner!r} (alpha {config.alpha:g}, "
            f"classes-per-client {config.classes_per_client}, min-examples {config.min_examples}), which cannot "
            f"divide {len(labels_N)} examples among {num_partitions} clients: {reason} "
            "Lower data.min-examples or the number of clients, or raise data.alpha."
        ) from None
    if sum(map(len, parts)) < len(labels_N):
        held = np.unique(labels_N[np.concatenate(parts)])
        left_out = [splits.classes[label] for label in np.setdiff1d(labels_N, held)]
        logger.warning("No client holds %s: %s clients are too few", ", ".join(left_out), num_partitions)
    return parts


def to_examples(dataset: datasets.Dataset, config: DataConfig, images: bool, texts: bool) -> Examples:
    """Read examples into memory: images as RGB squares of ``image_size``, texts as they are.

    Rows without the image or text that is asked for are left out, and counted in the log.

    Raises
    ------
    ConfigError
        If a column is not there, an image does not decode, or no row is left.
    """
    for wanted, key, column in (
        (images, "data.image-column", config.image_column),
        (texts, "data.text-column", config.text_column),
    ):
        if wanted and column not in dataset.column_names:
            raise _no_column(key, column, dataset)
    labels = _labels(dataset, config)
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
        raise ConfigError(f"run-config key 'data.dataset' is {config.dataset!r}: no row is complete")
    return Examples(
        labels[complete],
        None
        if pixels is None
        else np.stack([image for image in (pixels[row] for row in complete) if image is not None]),
        None if words is None else [words[row] for row in complete],
    )


def relabel(examples: Examples, own_classes: tuple[str, ...], class_space: tuple[str, ...]) -> Examples:
    """Map a node's own classes into the run's class space, by name.

    Raises
    ------
    ConfigError
        If a class that the node has examples of is not in the class space.
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


# ---------------------------------------------------------------------- partitioning


def _partitioner(config: DataConfig, num_partitions: int, seed: int) -> Any:
    """Make the partitioner of flwr-datasets that the configuration names, for columns ``row`` and ``label``."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    class BalancedPathologicalPartitioner(PathologicalPartitioner):  # type: ignore[misc]
        """Give each client the classes that are held least, ties by lot, so that none is left out that need not be.

        Every mode of its parent leaves classes without a client where clients are fewer than classes.
        """

        def _determine_partition_id_to_unique_labels(self) -> None:
            super()._determine_partition_id_to_unique_labels()
            holders = np.zeros(len(self._unique_labels), dtype=int)
            for partition_id in range(num_partitions):
                chosen = np.lexsort((self._rng.random(len(holders)), holders))[: config.classes_per_client]
                holders[chosen] += 1
                self._partition_id_to_unique_labels[partition_id] = [self._unique_labels[index] for index in chosen]

    if config.partitioner == "iid":
        return IidPartitioner(num_partitions)
    if config.partitioner == "dirichlet":
        return DirichletPartitioner(
            num_partitions, "label", config.alpha, config.min_examples, self_balancing=False, seed=seed
        )
    return BalancedPathologicalPartitioner(num_partitions, "label", config.classes_per_client, seed=seed)


# ---------------------------------------------------------------------- reading


def _digits() -> dict[str, datasets.Dataset]:
    """scikit-learn's handwritten digits, 8x8 pixels brought to 32x32, each with a caption."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    pictures = [Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(DIGIT_CAPTIONS), size=len(grey))
    captions = [
        DIGIT_CAPTIONS[caption].format(DIGIT_NAMES[digit]) for caption, digit in zip(chosen, digits.target, strict=True)
    ]
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=list(DIGIT_NAMES))
    )
    columns = {"image": pictures, "text": captions, "label": digits.target.tolist()}
    return {"train": datasets.Dataset.from_dict(columns, features=features)}


def _local(config: DataConfig) -> dict[str, datasets.Dataset]:
    import datasets

    path = Path(config.dataset).expanduser()
    key = f"run-config key 'data.dataset' is {config.dataset!r}"
    if not path.exists():
        raise ConfigError(
            f"{key}, which is not there; allowed: 'digits', a parquet file, or a folder of parquet or images"
        )
    try:
        with quietly():
            if path.is_file():
                loaded = datasets.load_dataset("parquet", data_files={"train": str(path)})
            elif parquet := sorted(path.rglob("*.parquet")):
                loaded = datasets.load_dataset("parquet", data_files=_by_split(path, parquet))
            else:
                loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
    except Exception as error:  # Whatever its readers raise, the user is told which dataset it was.
        reason = str(error.__cause__ or error).splitlines()[0]
        if "BatchSize must be greater than 0" in reason:  # What reading a parquet file of no rows comes to.
            raise ConfigError(f"{key}, which is empty") from None
        raise ConfigError(f"{key}, which cannot be read: {reason}") from None
    parts = {"train": loaded["train"]} if "train" in loaded else {}
    for name in ("test", "validation"):
        if name in loaded and "test" not in parts:
            parts["test"] = loaded[name]
    if "train" not in parts:
        raise ConfigError(f"{key}, which has the splits {', '.join(loaded)}; allowed: one named train")
    for name, part in parts.items():
        if not len(part):
            raise ConfigError(f"{key}, whose {name} split is empty")
    return parts


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Load without progress bars, and without telling the hub: `datasets` counts loads of local files there too."""
    import datasets

    counting, silent = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.are_progress_bars_disabled()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        if not silent:
            datasets.enable_progress_bars()


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """Sort files by the split that their name or folder names; those that name none are training data."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = set(re.split(r"[-._ 0-9/\\]+", str(file.relative_to(folder)).lower()))
        name = next((split for split, names in SPLIT_WORDS.items() if words & set(names)), "train")
        splits.setdefault(name, []).append(str(file))
    return splits


def _with_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Read encoded images that no one marked as such, which is how other tools write them to parquet."""
    import datasets

    feature = dataset.features.get(column)
    encoded = getattr(feature, "dtype", "").endswith("binary") or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )
    return dataset.cast_column(column, datasets.Image()) if encoded else dataset


def _labels(dataset: datasets.Dataset, config: DataConfig) -> NDArray[np.int64]:
    return np.array(dataset[config.label_column][:], dtype=np.int64)


def _check_columns(dataset: datasets.Dataset, config: DataConfig) -> None:
    if config.label_column not in dataset.column_names:
        raise _no_column("data.label-column", config.label_column, dataset)
    if not {config.image_column, config.text_column} & set(dataset.column_names):
        raise _no_column("data.image-column", config.image_column, dataset)


def _no_column(key: str, column: str, dataset: datasets.Dataset) -> ConfigError:
    return ConfigError(
        f"run-config key {key!r} is {column!r}, and the dataset has no such column; "
        f"allowed: {', '.join(dataset.column_names)}"
    )


def _classes(parts: list[datasets.Dataset], config: DataConfig) -> tuple[str, ...]:
    feature = parts[0].features[config.label_column]
    if hasattr(feature, "names"):
        classes = tuple(feature.names)
    else:
        if str(getattr(feature, "dtype", "")).startswith(("float", "double")) or not hasattr(feature, "dtype"):
            raise ConfigError(
                f"run-config key 'data.label-column' is {config.label_column!r}, which holds {feature}; "
                "allowed: a column of class labels, strings or integers"
            )
        values = {value for part in parts for value in part.unique(config.label_column) if value is not None}
        classes = tuple(str(value) for value in sorted(values))
    if len(classes) < 2:
        raise ConfigError(
            f"run-config key 'data.label-column' is {config.label_column!r}, which has {len(classes)} class(es); "
            "allowed: two or more"
        )
    return classes


def _indexed(dataset: datasets.Dataset, config: DataConfig, classes: tuple[str, ...]) -> datasets.Dataset:
    """Make the label column an index into ``classes``, and leave out rows that have no label."""
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
        raise ConfigError(f"run-config key 'data.label-column' is {column!r}, in which no row has a label")
    if len(labelled) == len(dataset):
        return dataset
    logger.warning("%s: %s rows have no label and are left out", config.dataset, len(dataset) - len(labelled))
    return dataset.select(labelled)


def _split(dataset: datasets.Dataset, config: DataConfig, seed: int) -> dict[str, datasets.Dataset]:
    from sklearn.model_selection import train_test_split

    labels = _labels(dataset, config)
    counts = np.bincount(labels)
    held = round(len(labels) * config.test_fraction)
    stratify = labels if counts[counts > 0].min() >= 2 and held >= np.count_nonzero(counts) else None
    if stratify is None:
        logger.warning(
            "%s: too few examples of a class to hold out some of each; the test part is random", config.dataset
        )
    if not 0 < held < len(labels):
        raise ConfigError(
            f"run-config key 'data.test-fraction' is {config.test_fraction}, which leaves nothing to train or "
            f"test on {len(labels)} examples"
        )
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=held, stratify=stratify, random_state=seed)
    return {"train": dataset.select(train), "test": dataset.select(test)}


def _read_texts(dataset: datasets.Dataset, config: DataConfig) -> list[Any]:
    feature = dataset.features[config.text_column]
    if not getattr(feature, "dtype", "").endswith("string"):
        raise ConfigError(
            f"run-config key 'data.text-column' is {config.text_column!r}, which holds {feature}; "
            "allowed: a column of strings"
        )
    return list(dataset[config.text_column][:])


def _read_images(dataset: datasets.Dataset, config: DataConfig) -> list[NDArray[np.uint8] | None]:
    """Decode a column of images one by one, so that the one that fails can be named."""
    import datasets
    from PIL import Image

    column = config.image_column
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(
            f"run-config key 'data.image-column' is {column!r}, which holds {dataset.features[column]}; "
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
        except Exception as error:  # Decoders raise whatever they like on broken bytes.
            raise ConfigError(
                f"run-config key 'data.dataset' is {config.dataset!r}: the image of row {row} does not decode ({error})"
            ) from None
    return images

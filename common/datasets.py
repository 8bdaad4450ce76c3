"""Datasets as examples: class indices, a test part, and the images and texts that a model reads."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmmkt.common.config import ConfigError, DataConfig, OwnDataConfig
from fedmmkt.common.dataset_files import columns_of, read_tables
from fedmmkt.common.images import GreyError, Square, to_rgb_arrays, to_square, whites_of
from fedmmkt.common.labels import Labels, classes_of, indices_of, matched, named, read_labels, typed
from fedmmkt.common.natural_order import natural_key, normal_form
from fedmmkt.common.progress import Progress
from fedmmkt.common.table_files import LFS_POINTER
from fedmmkt.common.tables import (
    COLUMN_FIELDS,
    ORIGIN,
    Table,
    has_column,
    is_text,
    joined,
    origins_of,
    some,
    with_column,
)

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("flwr")

FROM_CLIENTS = ("clients",)  # The run's classes come from its clients.
# Images that are missing or broken are left out, up to this share, or this number. Beyond, the cause is likely a wrong
# column or folder.
MOST_UNREADABLE, FEW_UNREADABLE = 0.2, 5


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
    whites : mapping
        What was taken for white in images of more than eight bits, as `whites_of` returns it.
    left_out : tuple of str
        What is not among them: rows, each with the reason if it is not an empty cell, and classes.
    """

    labels_N: NDArray[np.int64]
    images_NHWC: NDArray[np.uint8] | None = None
    texts: list[str] | None = None
    whites: Mapping[str, float] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Splits:
    """The training and test part of a dataset; in both, the label column holds indices into ``classes``.

    ``is_held_out`` tells that the dataset has no test part of its own, so that one was drawn.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    classes: tuple[str, ...]
    is_held_out: bool = False


@lru_cache(maxsize=8)
def load_splits(config: DataConfig, seed: int) -> Splits:
    """Load a dataset, map labels to class indices, and hold out a stratified test part if it has none.

    The test part is the split ``test`` if it has labels, else ``validation``. Rows and splits without a label are left
    out, and the log names them.

    Parameters
    ----------
    config : DataConfig
        Names the dataset and its columns.
    seed : int
        Seed of the test split.

    Raises
    ------
    ConfigError
        If the dataset cannot be read, or a column is missing or unusable. The text names key, row and value.
    """
    parts = read_tables(config)
    _check_columns(parts["train"], config)
    labels = _choose_labels(parts, config)
    classes = classes_of(list(labels.values()))
    # One node may hold examples of a single class. A run needs at least two classes.
    if len(classes) < 2 and not isinstance(config, OwnDataConfig):
        raise ConfigError(
            f"{config.key('label_column')} is {config.label_column!r}, which has {len(classes)} class(es); "
            "allowed: two or more"
        )
    indexed = {split: _indexed(parts[split], found, classes, config) for split, found in labels.items()}
    is_held_out = len(indexed) == 1
    train, test = _split(indexed["train"], config, seed) if is_held_out else indexed.values()
    return Splits(train, test, classes, is_held_out)


def check_header(config: DataConfig) -> list[str]:
    """Check the columns of a local dataset by the header of its first table; return them, or none if it has no header.

    Raises
    ------
    ConfigError
        If the header cannot be read, or lacks the labels.
    """
    try:
        columns = [normal_form(name) for name in columns_of(config)]
    except Exception as error:  # Readers raise many kinds of errors.
        raise ConfigError(f"{config.key('dataset')} is {config.dataset!r}, which cannot be read: {error}") from None
    if columns and normal_form(config.label_column) not in columns:
        raise ConfigError(
            f"{config.key('label_column')} is {config.label_column!r}, and the dataset has no such column; "
            f"allowed: {', '.join(columns)}"
        )
    return columns


def to_examples(
    dataset: datasets.Dataset, config: DataConfig, images: bool, texts: bool, tell: bool = True
) -> Examples:
    """Load examples into memory: images as RGB squares with sides of ``image_size`` pixels, texts unchanged.

    Rows without a requested image or text, or with an image whose file is missing or that does not decode, are left
    out; the log names them if ``tell``. With a privacy ledger none of this is an error, so that nobody learns from an
    error what the data hold, and the white of an image with more than eight bits is its own.

    Raises
    ------
    ConfigError
        If a column is missing, an image holds no grey values, more than `MOST_UNREADABLE` of the images are missing or
        broken, or no row is left.
    """
    if images and config.image_column not in dataset.column_names:
        raise _no_column("image_column", dataset, config)
    labels_N, alone = labels_of(dataset, config), config.one_by_one
    squares, broken = _read_images(dataset, config) if images else ([], {})
    words = [text or "" for text in read_texts(dataset, config)] if texts else []
    complete = [
        row for row in range(len(labels_N)) if (not images or squares[row] is not None) and (not texts or words[row])
    ]
    lines: list[str] = []
    if len(complete) < len(labels_N):
        origins = origins_of(dataset)
        lines = [
            f"{origins[row]} ({broken[row]})" if row in broken else origins[row]
            for row in sorted(set(range(len(labels_N))).difference(complete), key=lambda row: natural_key(origins[row]))
        ]
        if not alone:
            _check_share(broken, sum(square is not None for square in squares), origins, config)
        if not complete and not alone:
            raise ConfigError(f"{config.key('dataset')} is {config.dataset!r}: no row is complete: {some(lines, 2)}")
        if tell:
            logger.warning("%s: %s of %s rows have no image or text that can be read, and are left out: %s",
                           config.dataset, len(lines), len(labels_N), some(lines, 2))  # fmt: skip
    kept = [square for square in (squares[row] for row in complete if images) if square is not None]
    whites = {} if alone else whites_of(kept)
    shown = [to_rgb_arrays([square])[0] for square in kept] if alone else to_rgb_arrays(kept, whites)
    side = config.image_size
    return Examples(
        labels_N[complete],
        np.array(shown, dtype=np.uint8).reshape(len(shown), side, side, 3) if images else None,
        [words[row] for row in complete] if texts else None,
        whites,
        tuple(lines),
    )


def with_readable_images(dataset: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Leave out what no image model could read, before a dataset is written elsewhere; the log names it.

    A row whose image is missing or broken goes; if there are texts, only its image goes, since text models may learn
    from it.

    Raises
    ------
    ConfigError
        As `to_examples`, if an image holds no grey values, or too many are missing or broken.
    """
    import datasets

    column = config.image_column
    if column not in dataset.column_names:
        return dataset
    broken = {row: reason for row, square, reason in _decoded(dataset, config) if square is None and reason}
    if not broken:
        return dataset
    origins = origins_of(dataset)
    _check_share(broken, len(dataset) - len(broken), origins, config)
    has_texts = config.text_column in dataset.column_names
    logger.warning("%s: %s of %s images cannot be read, and %s left out: %s",
                   config.dataset, len(broken), len(dataset), "are" if has_texts else "their rows are",
                   some(_told(broken, origins), 2))  # fmt: skip
    if not has_texts:
        return dataset.select([row for row in range(len(dataset)) if row not in broken])
    encoded = dataset.cast_column(column, datasets.Image(decode=False))[column]
    kept = [None if row in broken else item for row, item in enumerate(encoded)]
    return with_column(dataset, column, kept, datasets.Image())


def _told(broken: Mapping[int, str], origins: Sequence[str]) -> list[str]:
    """Say where each broken image is and what is wrong with it, in the order of the files."""
    return [f"{origins[row]} ({broken[row]})" for row in sorted(broken, key=lambda row: natural_key(origins[row]))]


def _check_share(broken: Mapping[int, str], readable: int, origins: Sequence[str], config: DataConfig) -> None:
    """Refuse a column of images of which too many are missing or broken."""
    named = len(broken) + readable
    if len(broken) > max(MOST_UNREADABLE * named, FEW_UNREADABLE if readable else 0):
        listed = some(_told(broken, origins), 2)
        raise ConfigError(
            f"{config.key('image_column')} is {config.image_column!r}, of which {len(broken)} of {named} images cannot "
            f"be read: {listed}; allowed: images, or the names of image files beside the table; up to "
            f"{MOST_UNREADABLE:.0%} that cannot be read are left out"
        )


def relabel(
    examples: Examples, own_classes: tuple[str, ...], class_space: tuple[str, ...], leave_out: bool = False
) -> Examples:
    """Map a node's class indices to the run's class space, by class name.

    Parameters
    ----------
    leave_out : bool
        Whether examples of a class outside the class space are left out; the log names these classes.

    Raises
    ------
    ConfigError
        If the node has examples of a class outside the class space, and they are not left out.
    """
    own_classes, class_space = (tuple(map(normal_form, names)) for names in (own_classes, class_space))
    if own_classes == class_space:
        return examples
    held = {own_classes[label] for label in np.unique(examples.labels_N)}
    unknown = sorted(held - set(class_space))
    if unknown and not leave_out:
        raise ConfigError(
            f"the data's classes {', '.join(unknown)!r} are not in the run; allowed: {', '.join(class_space)}"
        )
    index_C = np.array([class_space.index(name) if name in class_space else -1 for name in own_classes])
    labels_N = index_C[examples.labels_N] if len(index_C) else examples.labels_N
    if not unknown:
        return replace(examples, labels_N=labels_N)
    rows = np.flatnonzero(labels_N >= 0)
    line = f"{len(examples) - len(rows)} of {len(examples)} examples, of classes that the run does not have"
    line = f"{line} ({some(unknown)})"
    logger.warning("Left out: %s", line)
    images, texts = examples.images_NHWC, examples.texts
    return replace(
        examples,
        labels_N=labels_N[rows],
        images_NHWC=None if images is None else images[rows],
        texts=None if texts is None else [texts[row] for row in rows],
        left_out=(line, *examples.left_out),
    )


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
            lines = Path(names[0]).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config.key('classes')} is {names[0]!r}, which cannot be read: {error}") from None
        names = tuple(line.strip() for line in lines if line.strip())
    names = tuple(map(normal_form, names))
    if names and (len(names) < 2 or len(set(names)) < len(names)):
        raise ConfigError(f"{config.key('classes')} gives {', '.join(names)!r}; allowed: two or more, each once")
    return names


def labels_of(dataset: datasets.Dataset, config: DataConfig) -> NDArray[np.int64]:
    """Return the label column of a dataset from `load_splits` (int64 class indices)."""
    return np.array(dataset[config.label_column][:], dtype=np.int64)


def _check_columns(tables: list[Table], config: DataConfig) -> None:
    having = {field: has_column(tables, field, config) for field in COLUMN_FIELDS}
    if not having["label_column"]:
        raise _no_column("label_column", tables[0].rows, config, tables[0].name)
    if not having["image_column"] and not having["text_column"]:
        raise _no_column("image_column", tables[0].rows, config, tables[0].name)


def _no_column(field: str, dataset: datasets.Dataset, config: DataConfig, file: str = "") -> ConfigError:
    allowed = ", ".join(name for name in dataset.column_names if name != ORIGIN)
    return ConfigError(
        f"{config.key(field)} is {getattr(config, field)!r}, and the dataset has no such column; allowed: {allowed}"
        + (f" (the columns of {file})" if file else "")
    )


def _choose_labels(parts: dict[str, list[Table]], config: DataConfig) -> dict[str, Labels]:
    """Return the labels of the training part, and of the split that is the test part, if one has labels."""
    train = typed(read_labels(parts["train"], config), config)
    labels = {"train": train}
    for split in ("test", "validation"):
        if not (tables := parts.get(split)):
            continue
        part = f"the {split} part ({sum(len(table.rows) for table in tables)} rows)"
        if len(labels) > 1:
            logger.warning("%s: %s is not used, since there is a test part", config.dataset, part)
            continue
        found = matched(read_labels(tables, config), train, config)
        if found.has_any:
            labels[split] = found
            _name_new_classes(train, found, config)
        else:
            logger.warning("%s: %s has no labels and is left out", config.dataset, part)
    if len(labels) == 1 and len(parts) > 1:
        logger.warning("%s: a part of the training data is held out as the test part", config.dataset)
    names = () if config.classes == FROM_CLIENTS else read_class_names(config)
    return dict(zip(labels, named(list(labels.values()), names, config), strict=True))


def _name_new_classes(train: Labels, test: Labels, config: DataConfig) -> None:
    if new := sorted({str(value) for value, _ in test.held()}.difference(classes_of([train]))):
        logger.warning("%s: the training part has no class %s of the test part", config.dataset, some(new))


def _indexed(tables: list[Table], labels: Labels, classes: tuple[str, ...], config: DataConfig) -> datasets.Dataset:
    """Join tables, with indices into ``classes`` as labels, and leave out rows without a label."""
    import datasets

    rows, column = joined(tables, config), config.label_column
    feature, indices_N = datasets.ClassLabel(names=list(classes)), indices_of(labels, classes)
    if rows.features.get(column) != feature:
        rows = with_column(rows, column, indices_N, feature)
    labelled = np.flatnonzero(indices_N >= 0)
    if len(labelled) == len(rows):
        return rows
    missing = [labels.origins[row] for row in np.flatnonzero(indices_N < 0)]
    logger.warning("%s: %s of %s rows have no label and are left out: %s",
                   config.dataset, len(missing), len(rows), some(missing))  # fmt: skip
    return rows.select(labelled)


def _split(dataset: datasets.Dataset, config: DataConfig, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    from sklearn.model_selection import train_test_split

    if isinstance(config, OwnDataConfig) and config.split_by_content:
        return _split_by_content(dataset, config, seed)
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
    return dataset.select(train), dataset.select(test)


def _split_by_content(
    dataset: datasets.Dataset, config: DataConfig, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out the examples whose hash is small, so that one example more or less moves no other one."""
    import datasets

    rows, column = dataset, config.image_column
    if isinstance(dataset.features.get(column), datasets.Image):
        rows = dataset.cast_column(column, datasets.Image(decode=False))
    is_test = np.array([_share_of(row, config, seed) < config.test_fraction for row in rows], dtype=bool)
    if is_test.all() or not is_test.any():  # No error: it would tell of single examples.
        logger.warning("%s: test-fraction %s leaves nothing to train or test on %s examples",
                       config.dataset, config.test_fraction, len(dataset))  # fmt: skip
    return dataset.select(np.flatnonzero(~is_test)), dataset.select(np.flatnonzero(is_test))


def _share_of(row: Mapping[str, Any], config: DataConfig, seed: int) -> float:
    """Return a number between 0 and 1 that depends on the content of an example and the seed alone."""
    digest = hashlib.sha256(f"{seed} {row.get(config.text_column)}".encode())
    if isinstance(image := row.get(config.image_column), Mapping):
        content, path = image["bytes"], Path(image["path"] or "")
        digest.update((path.read_bytes() if path.is_file() else b"") if content is None else content)
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def read_texts(dataset: datasets.Dataset, config: DataConfig) -> list[str | None]:
    """Return the column of texts; None stands for an empty cell.

    Raises
    ------
    ConfigError
        If the column is missing, or holds something else.
    """
    if config.text_column not in dataset.column_names:
        raise _no_column("text_column", dataset, config)
    feature = dataset.features[config.text_column]
    if not is_text(feature):
        raise ConfigError(
            f"{config.key('text_column')} is {config.text_column!r}, which holds {feature}; "
            "allowed: a column of strings"
        )
    return list(dataset[config.text_column][:])


def check_image_files(dataset: datasets.Dataset, config: DataConfig) -> None:
    """Check that the image files that a dataset names are there; nothing is decoded. The log names those that are not.

    Raises
    ------
    ConfigError
        If more than `MOST_UNREADABLE` are not there; the text names the first.
    """
    import datasets

    column = config.image_column
    if not isinstance(dataset.features.get(column), datasets.Image):
        return
    encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    named = {row: item["path"] for row, item in enumerate(encoded[column]) if item and item["bytes"] is None}
    missing = {row: _missing(path) for row, path in named.items() if path and not Path(path).exists()}
    if missing:
        origins = origins_of(dataset)
        _check_share(missing, len(named) - len(missing), origins, config)
        logger.warning("%s: %s of %s image files are not there, and are left out: %s",
                       config.dataset, len(missing), len(named),
                       some(_told(missing, origins), 2))  # fmt: skip


def _missing(path: str) -> str:
    return f"its image {path!r:.200} is not there"


def _read_images(dataset: datasets.Dataset, config: DataConfig) -> tuple[list[Square | None], dict[int, str]]:
    """Decode a column of images; return them, and for rows whose image is missing or does not decode, the reason."""
    squares: list[Square | None] = [None] * len(dataset)
    broken: dict[int, str] = {}
    progress = Progress("read", len(dataset), "images")
    for row, square, reason in _decoded(dataset, config):
        progress(row + 1)
        squares[row] = square
        if reason:
            broken[row] = reason
    return squares, broken


def _decoded(dataset: datasets.Dataset, config: DataConfig) -> Iterator[tuple[int, Square | None, str]]:
    """Decode a column of images one by one; yield for each the row, and the image or what is wrong with it.

    An empty cell has neither.
    """
    import datasets

    column = config.image_column
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(
            f"{config.key('image_column')} is {column!r}, which holds {dataset.features[column]}; "
            "allowed: a column of images"
        )
    encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    origins = origins_of(dataset)
    for row, item in enumerate(encoded[column]):
        square, reason = None, ""
        if item is not None and (item["bytes"] is not None or item["path"] is not None):
            try:
                square = read_image(item["bytes"], item["path"], config.image_size)
            except RefusedImageError as error:
                reason = f"it {error}"
                if not config.one_by_one:
                    raise ConfigError(
                        f"{config.key('image_column')} is {column!r}, and in {origins[row]} it {error}"
                    ) from None
            except FileNotFoundError as error:
                reason = str(error)
            except Exception as error:  # Decoders raise many kinds of errors on broken bytes.
                file = item["path"] or ""
                called = f" {file!r}" if file and not file.endswith(origins[row]) else ""
                reason = f"its image{called} does not decode: {error}"
        yield row, square, reason


class RefusedImageError(Exception):
    """An image that is not left out, because others are likely to be the same."""


def read_image(content: bytes | None, path: str, size: int) -> Square:
    """Decode an image from its bytes, or from a file if there are none, and crop and resize it to a square.

    Raises
    ------
    RefusedImageError
        If the file is a pointer of git-lfs, or the values are no grey values.
    FileNotFoundError
        If the file is missing.
    Exception
        Whatever a decoder raises on broken bytes.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = Path(path).read_bytes() if content is None else content
        with Image.open(io.BytesIO(content)) as image:
            return to_square(image, size)
    except FileNotFoundError:
        raise FileNotFoundError(_missing(path)) from None
    except GreyError as error:
        raise RefusedImageError(f"holds an image that cannot be shown: {error}") from None
    except UnidentifiedImageError:
        if content and content.startswith(LFS_POINTER):
            raise RefusedImageError("holds a git-lfs pointer; allowed: the image that `git lfs pull` brings") from None
        raise ValueError("it is of no known format") from None

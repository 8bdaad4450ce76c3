"""Where datasets come from, and how they are split: built-in digits, local files, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmmkt.common.config import BUILT_IN, ConfigError, DataConfig, OwnDataConfig
from fedmmkt.common.hub import unreachable_hub
from fedmmkt.common.image_folders import SPLIT_WORDS, divide_by_folders, image_suffixes, read_class_folders, split_of
from fedmmkt.common.installed import installed
from fedmmkt.common.table_files import SAVED, is_lfs_pointer, kind_of, read_header, read_table, stem_of
from fedmmkt.common.tables import ORIGIN, Table, joined, some, with_column, with_images

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

logger = logging.getLogger("flwr")

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a handwritten {}",
    "the digit {} drawn by hand",
    "someone wrote the number {}",
    "a scribbled {} in pencil",
    "{}, in a child's hand",
)
MNIST_FILE = "starter/mnist.parquet"
KINDS_OF_FOLDERS = (SAVED, "parquet", "csv", "tsv", "jsonl")  # The first that a folder has is read.
METADATA = "metadata"  # the stem of a table that describes the images beside it
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ALLOWED = (
    "'digits', 'mnist', a parquet, CSV, TSV, JSONL or JSON file, a folder of these or of images, a folder that "
    "`save_to_disk` wrote, or a hub id such as owner/name"
)

Parts = dict[str, list[Table]]


def read_tables(config: DataConfig) -> Parts:
    """Read a dataset: for each of its splits ``train``, ``test`` and ``validation``, the tables that have rows.

    A column with names of image files becomes a column of images; the names are relative to the file that holds the
    column. Files and splits that are not read are named in the log.

    Raises
    ------
    ConfigError
        If the dataset is missing, cannot be read or is empty.
    """
    if config.dataset in BUILT_IN:
        return {"train": [Table(config.dataset, _mnist() if config.dataset == "mnist" else _digits())]}
    path = Path(config.dataset).expanduser()
    if not path.exists() and not HUB_ID.fullmatch(config.dataset):
        raise ConfigError(f"{_key(config)}, which is not there; allowed: {ALLOWED}")
    with quietly(), _cache(config) as options:
        parts = _local(path, config, options) if path.exists() else _hub(config, options)
    if "train" not in parts:
        raise ConfigError(f"{_key(config)}, which has the splits {', '.join(parts)}; allowed: one named train")
    return {split: _filled(tables, split, config) for split, tables in parts.items()}


def read_dataset(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Read a dataset as `read_tables` does; the tables of each split become one."""
    return {split: joined(tables, config) for split, tables in read_tables(config).items()}


def size_of_tables(config: DataConfig) -> int:
    """Return how many bytes of tables a local dataset has; 0 for all others."""
    path = Path(config.dataset).expanduser()
    files = _files_below(path) if path.is_dir() else [path] if path.is_file() else []
    try:
        return sum(file.stat().st_size for file in files if file.suffix.lower() not in image_suffixes())
    except OSError:
        return 0  # Whatever reads the files tells what is wrong.


def columns_of(config: DataConfig) -> list[str]:
    """Return the columns of a local dataset's first table by its header; none if only its rows tell them."""
    path = Path(config.dataset).expanduser()
    files = sorted(_files_below(path)) if path.is_dir() else [path]
    tables = _choose_tables([file for file in files if file.suffix.lower() not in image_suffixes()], False)
    return read_header(tables[0]) if tables else []


def _local(path: Path, config: DataConfig, options: dict[str, Any]) -> Parts:
    if path.is_file() or kind_of(path) == SAVED:
        return {"train": [_table(path, path, config, options)]}
    if (path / "dataset_dict.json").is_file():
        saved = sorted(folder for folder in path.iterdir() if kind_of(folder) == SAVED)
        return _known_splits({folder.name: _table(folder, path, config, options) for folder in saved}, config)
    try:
        files = sorted(_files_below(path))
    except OSError as error:
        raise ConfigError(f"{_key(config)}, which cannot be read: {error}") from None
    if odd := [file for file in files if not _is_utf8(file)]:
        raise ConfigError(f"{_key(config)}, in which a file is called {str(odd[0])!r}; allowed: names in UTF-8")
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    chosen = _choose_tables([file for file in files if file.suffix.lower() not in image_suffixes()], bool(images))
    if not chosen and not images:
        raise ConfigError(f"{_key(config)}, which cannot be read: it doesn't contain any data files (tables or images)")
    tables = [_table(file, path, config, options) for file in chosen]
    if not tables:
        parts = read_class_folders(path, images, config)
    elif images and stem_of(chosen[0]) == METADATA:
        parts = divide_by_folders(path, images, tables)
    else:
        parts = {}
        for file, table in zip(chosen, tables, strict=True):
            parts.setdefault(_split_of_table(file.relative_to(path)), []).append(table)
    named = (file for part in parts.values() for table in part for file in table.files if file)
    used = {*chosen, *(Path(os.path.normpath(file)) for file in named)}
    unread = [file for file in files if not {file, file.parent} & used]
    if tables and not any(config.image_column in table.rows.column_names for table in tables):
        unread = [file for file in unread if file not in images]  # The column is told, where a model needs it.
    _name_unread(unread, path, config)
    return parts


def _files_below(folder: Path) -> Iterator[Path]:
    """Find all files that are not hidden, through links too."""
    for path, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(path).resolve()
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and not here.is_relative_to((Path(path) / name).resolve())  # no circles
        ]  # fmt: skip
        yield from (Path(path) / name for name in names if not name.startswith("."))


def _is_utf8(file: Path) -> bool:
    try:
        return bool(str(file).encode())
    except UnicodeEncodeError:
        return False


def _raise(error: OSError) -> None:
    raise error


def _choose_tables(files: list[Path], has_images: bool) -> list[Path]:
    """Choose the tables to read, all of one kind; a table named ``metadata`` if there are images but no others.

    JSON files are often something else than data. They are read if there are neither images nor other tables.
    """
    by_kind: dict[str, list[Path]] = {}
    saved = {file.parent for file in files if file.name == "state.json"}
    for file in sorted(saved.union(files)):
        by_kind.setdefault(kind_of(file), []).append(file)
    for is_metadata in (False, True):
        for kind in KINDS_OF_FOLDERS:
            if found := [file for file in by_kind.get(kind, ()) if (stem_of(file) == METADATA) == is_metadata]:
                return found
    return [] if has_images else by_kind.get("json", [])


def _split_of_table(file: Path) -> str:
    """Return the split of which the name of a table speaks, or else that of the nearest folder that speaks of one."""
    splits = (split_of(set(re.split(r"[-._ 0-9]+", name.lower()))) for name in reversed(file.parts))
    return next(filter(None, splits), "train")


def _table(file: Path, root: Path, config: DataConfig, options: dict[str, Any]) -> Table:
    """Read one table, with images for their names, and with the origin of each row."""
    name = str(file.relative_to(root)) if file != root else file.name
    which = ", which" if file == root else f", whose file {name!r}"
    kind = kind_of(file)
    if pointers := [part for part in (sorted(file.iterdir()) if file.is_dir() else [file]) if is_lfs_pointer(part)]:
        raise ConfigError(
            f"{_key(config)}{which} is not there itself: {pointers[0].name} is a git-lfs pointer; allowed: the file "
            "that `git lfs pull` brings"
        )
    if not kind:
        raise ConfigError(f"{_key(config)}{which} is no table that can be read; allowed: {ALLOWED}")
    try:
        rows = read_table(file, config, options)
        if stem_of(file) == METADATA and config.image_column not in rows.column_names:
            names = (f"{config.image_column}_file_name", "file_name")
            rows = rows.rename_columns({name: config.image_column for name in names if name in rows.column_names})
        rows, files = with_images(rows, config.image_column, file.parent)
        rows = with_column(rows, ORIGIN, [f"row {row} of {name}" for row in range(len(rows))])
    except Exception as error:  # Readers raise many kinds of errors; the text must name the file.
        raise ConfigError(f"{_key(config)}{which} cannot be read: {_reason(error)}") from None
    return Table(name, rows, kind not in ("csv", "tsv"), files)


def _filled(tables: list[Table], split: str, config: DataConfig) -> list[Table]:
    """Return the tables of a split that have rows, and name the others."""
    empty = [table.name for table in tables if not len(table.rows)]
    if len(empty) == len(tables):
        which = f"whose {split} part ({some(empty)})" if Path(config.dataset).expanduser().is_dir() else "which"
        raise ConfigError(f"{_key(config)}, {which} is empty; allowed: data with at least one row")
    if empty:
        logger.warning("%s: %s tables are empty and are left out: %s", config.dataset, len(empty), some(empty))
    return [table for table in tables if len(table.rows)]


def _name_unread(files: list[Path], root: Path, config: DataConfig) -> None:
    if files:
        names = some([str(file.relative_to(root)) for file in files])
        logger.warning("%s: %s files are not read: %s", config.dataset, len(files), names)


def _hub(config: DataConfig, options: dict[str, Any]) -> Parts:
    import datasets

    unreachable = unreachable_hub()
    try:
        loaded = datasets.load_dataset(config.dataset, config.subset or None, **options)
    except Exception as error:  # The library raises many kinds of errors.
        raise ConfigError(
            f"{_key(config)}, which is not a path here and cannot be had from the hub "
            f"({unreachable or _reason(error)}); allowed: {ALLOWED}, which this machine can reach "
            "(a gated one needs `hf auth login`, one of several configurations `data.subset`) or has in its cache"
        ) from None
    tables = {}
    for name, rows in loaded.items():
        origins = [f"row {row} of the split {name}" for row in range(len(rows))]
        rows, _ = with_images(rows, config.image_column, Path())
        tables[name] = Table(f"the split {name}", with_column(rows, ORIGIN, origins))
    return _known_splits(tables, config)


def _known_splits(tables: dict[str, Table], config: DataConfig) -> Parts:
    """Give splits their common names, and name those in the log that have none."""
    known: Parts = {}
    for name in sorted(tables, key=lambda name: (name not in SPLIT_WORDS, name)):
        split = split_of({name.lower()})
        if split and split not in known:
            known[split] = [tables[name]]
    read = [part[0].name for part in known.values()]
    if others := [f"{name} ({len(table.rows)} rows)" for name, table in tables.items() if table.name not in read]:
        logger.warning("%s: the splits %s are not used", config.dataset, some(others))
    return known or {name: [table] for name, table in tables.items()}


def _key(config: DataConfig) -> str:
    return f"{config.key('dataset')} is {config.dataset!r}"


def _reason(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _mnist() -> datasets.Dataset:
    """Return the built-in part of MNIST, 32x32 pixels with a black margin, each image with a caption."""
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    return datasets.Dataset(pyarrow.parquet.read_table(installed(MNIST_FILE)))


def captioned(pictures: list[Image], labels_N: np.ndarray) -> datasets.Dataset:
    """Return a dataset of pictures of digits, each with a caption as a person might write it, and a label."""
    import datasets

    chosen_N = np.random.default_rng(0).integers(len(DIGIT_CAPTIONS), size=len(labels_N))
    captions = [
        DIGIT_CAPTIONS[caption].format(DIGIT_NAMES[digit]) for caption, digit in zip(chosen_N, labels_N, strict=True)
    ]
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=list(DIGIT_NAMES))
    )
    columns = {"image": pictures, "text": captions, "label": labels_N.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _digits() -> datasets.Dataset:
    """Return scikit-learn's handwritten digits, enlarged from 8x8 to 32x32 pixels, each with a caption."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    pictures = [Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    return captioned(pictures, digits.target)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Load datasets without progress bars and without download statistics.

    By default, `datasets` reports even loads of local files to the hub.
    """
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


@contextlib.contextmanager
def _cache(config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield loading options for a dataset; a node's own data is kept out of the library's cache."""
    if not isinstance(config, OwnDataConfig):
        yield {}
        return
    with outside_cache() as options:
        yield options


@contextlib.contextmanager
def outside_cache() -> Iterator[dict[str, Any]]:
    """Yield loading options that keep private data out of the library's cache, which others may be able to read."""
    with tempfile.TemporaryDirectory(prefix="fedmmkt-") as folder:
        yield {"cache_dir": folder, "keep_in_memory": True}

"""Reading of datasets: the built-in digits, local files, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmmkt.common.config import ConfigError, DataConfig, OwnDataConfig

if TYPE_CHECKING:
    import datasets

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a handwritten {}",
    "the digit {} drawn by hand",
    "someone wrote the number {}",
    "a scribbled {} in pencil",
    "{}, in a child's hand",
)
# Words in file and folder names that mark test data, as in the `datasets` library.
SPLIT_WORDS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ALLOWED = "'digits', a parquet, CSV or JSONL file, a folder of these or of images, or a hub id such as owner/name"


def read_dataset(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Read a dataset's ``train`` split and, if there is one, its ``test`` split.

    A ``validation`` split is used as the test split if there is no other. A column with names of image files becomes
    a column of images; the names are relative to the file that holds the column.

    Raises
    ------
    ConfigError
        If the dataset is missing, cannot be read or is empty.
    """
    if config.dataset == "digits":
        return _digits()
    key = f"{config.key('dataset')} is {config.dataset!r}"
    path = Path(config.dataset).expanduser()
    if not path.exists() and not HUB_ID.fullmatch(config.dataset):
        raise ConfigError(f"{key}, which is not there; allowed: {ALLOWED}")
    try:
        with quietly(), _cache(config) as options:
            loaded = _local(path, config, options) if path.exists() else _hub(config, options)
    except Exception as error:  # Readers raise many kinds of errors; the text must name the dataset.
        raise ConfigError(f"{key}, {_reason(error, path)}") from None
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


def _reason(error: Exception, path: Path) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    # The errors for a file without rows.
    if "BatchSize must be greater than 0" in reason or "No columns to parse" in reason:
        return "which is empty"
    if path.exists():
        return f"which cannot be read: {reason}"
    return (
        f"which is not a path here and cannot be had from the hub ({reason}); allowed: {ALLOWED}, which this machine "
        "can reach (a gated one needs `hf auth login`, one of several configurations `data.subset`) or has in its cache"
    )


def _local(path: Path, config: DataConfig, options: dict[str, Any]) -> dict[str, datasets.Dataset]:
    import datasets

    files = [path] if path.is_file() else _tables(path)
    if not files:
        return dict(datasets.load_dataset("imagefolder", data_dir=str(path), **options))
    suffix = files[0].suffix.lower()
    kind = TABLES.get(suffix, "parquet")
    if suffix == ".tsv":
        options = options | {"sep": "\t"}
    parts: dict[str, list[datasets.Dataset]] = {}
    for (split, folder), group in _by_split_and_folder(path, files).items():
        table = datasets.load_dataset(kind, data_files=[str(file) for file in group], split="train", **options)
        parts.setdefault(split, []).append(_with_files(table, folder, config.image_column))
    return {split: datasets.concatenate_datasets(tables) for split, tables in parts.items()}


def _tables(folder: Path) -> list[Path]:
    """List the tables in a folder, all of one kind: parquet, else CSV, else TSV, else JSON lines.

    A table named ``metadata`` is skipped: it describes images and belongs to the `imagefolder` loader.
    """
    for suffixes in ({".parquet"}, {".csv"}, {".tsv"}, {".jsonl"}):
        found = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.stem != "metadata")
        if files := sorted(found):
            return files
    return []


def _with_files(dataset: datasets.Dataset, folder: Path, column: str) -> datasets.Dataset:
    """Turn a column of image file names into a column of images, which are loaded on access."""
    import datasets

    if not str(getattr(dataset.features.get(column), "dtype", "")).endswith("string"):
        return dataset
    paths = [str(folder / name) if name else None for name in dataset[column][:]]
    return dataset.remove_columns(column).add_column(column, paths).cast_column(column, datasets.Image())


def _hub(config: DataConfig, options: dict[str, Any]) -> dict[str, datasets.Dataset]:
    import datasets

    return dict(datasets.load_dataset(config.dataset, config.subset or None, **options))


def _digits() -> dict[str, datasets.Dataset]:
    """Return scikit-learn's handwritten digits, enlarged from 8x8 to 32x32 pixels, each with a caption."""
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


def _by_split_and_folder(root: Path, files: list[Path]) -> dict[tuple[str, Path], list[Path]]:
    """Group files by split and folder.

    A word in the path names the split, such as ``test``. Files without such a word are training data.
    """
    groups: dict[tuple[str, Path], list[Path]] = {}
    for file in files:
        words = set() if file == root else set(re.split(r"[-._ 0-9/\\]+", str(file.relative_to(root)).lower()))
        split = next((split for split, names in SPLIT_WORDS.items() if words & set(names)), "train")
        groups.setdefault((split, file.parent), []).append(file)
    return groups


@contextlib.contextmanager
def _cache(config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield loading options that keep a node's own data out of the library's cache.

    Other users of the machine may be able to read that cache.
    """
    if not isinstance(config, OwnDataConfig):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="fedmmkt-") as folder:
        yield {"cache_dir": folder, "keep_in_memory": True}

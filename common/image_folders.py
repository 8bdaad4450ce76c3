"""Folders of images: the folders that hold the images are the classes, or a table beside the images describes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.natural_order import normal_form
from fedmmkt.common.tables import ORIGIN, Table, some

logger = logging.getLogger("flwr")

# Words in the names of tables, of folders above class folders, and of a hub dataset's splits.
SPLIT_WORDS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
    "train": ("train", "training"),
}


def split_of(words: set[str]) -> str | None:
    """Return the split of which one of the words speaks, if any."""
    return next((split for split, names in SPLIT_WORDS.items() if words & set(names)), None)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the ends of names of image files, with the dot and in lower case."""
    from PIL import Image

    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read_class_folders(root: Path, images: Sequence[Path], config: DataConfig) -> dict[str, list[Table]]:
    """Read images whose parent folders are their classes.

    The topmost folders are splits if all that hold images are called like splits and class folders lie in them. An
    image outside a class folder has no label.

    Raises
    ------
    ConfigError
        If no image lies in a class folder.
    """
    top = _without_wrappers(root, images)
    splits = _split_folders(top, images, least_depth=2)
    labels: dict[str, dict[Path, str | None]] = {}
    for image in images:
        folders = image.relative_to(top).parts[:-1]
        split = splits[folders[0]] if splits and folders else "train"
        is_in_class = len(folders) > bool(splits)
        labels.setdefault(split, {})[image] = normal_form(image.parent.name) if is_in_class else None
    if not any(label for part in labels.values() for label in part.values()):
        raise ConfigError(
            f"{config.key('dataset')} is {config.dataset!r}, whose {len(images)} images lie in no class folder; "
            f"allowed: a folder for each class, or a metadata.csv with the columns file_name and {config.label_column}"
        )
    return {split: [_table(root, part, config)] for split, part in labels.items()}


def divide_by_folders(root: Path, images: Sequence[Path], tables: Sequence[Table]) -> dict[str, list[Table]]:
    """Divide tables that describe images; the topmost folders are splits if all with images are called like splits."""
    splits = _split_folders(root, images, least_depth=1)
    if not splits:
        return {"train": list(tables)}
    parts: dict[str, list[Table]] = {}
    for table in tables:
        rows_of: dict[str, list[int]] = {}
        for row, file in enumerate(table.files or [None] * len(table.rows)):
            folder = Path(os.path.relpath(file or root / table.name, root)).parts[0]
            rows_of.setdefault(splits.get(folder, "train"), []).append(row)
        for split, rows in rows_of.items():
            parts.setdefault(split, []).append(replace(table, rows=table.rows.select(rows)))
    return parts


def _without_wrappers(root: Path, images: Sequence[Path]) -> Path:
    """Descend while all images lie in one folder that is neither a class nor called like a split."""
    paths = [image.relative_to(root).parts for image in images]
    folders = {path[0] for path in paths}
    if len(folders) > 1 or min(map(len, paths)) < 3 or split_of({folder.lower() for folder in folders}):
        return root
    return _without_wrappers(root / folders.pop(), images)


def _split_folders(root: Path, images: Sequence[Path], least_depth: int) -> dict[str, str]:
    """Return the split of each topmost folder; nothing if these are no splits.

    One of them has to hold images in folders, of which ``least_depth`` is the number.
    """
    depths: dict[str, int] = {}
    for image in images:
        first, *others = image.relative_to(root).parts
        if others:
            depths[first] = max(len(others), depths.get(first, 0))
    splits = {folder: split_of({folder.lower()}) for folder in depths}
    if max(depths.values(), default=0) < least_depth or not any(splits.values()):
        return {}
    if others := [folder for folder, split in splits.items() if not split]:
        logger.warning(
            "%s: the folders %s are not taken for splits, since %s are beside them",
            root, some([folder for folder, split in splits.items() if split]), some(others),
        )  # fmt: skip
        return {}
    return {folder: split for folder, split in splits.items() if split}


def _table(root: Path, labels: Mapping[Path, str | None], config: DataConfig) -> Table:
    import datasets

    files = list(map(str, labels))
    columns = {
        config.image_column: files,
        config.label_column: list(labels.values()),
        ORIGIN: [str(image.relative_to(root)) for image in labels],
    }
    features = datasets.Features(
        {name: datasets.Image() if name == config.image_column else datasets.Value("string") for name in columns}
    )
    return Table("its folders", datasets.Dataset.from_dict(columns, features), is_typed=False, files=files)

"""What is likely a mistake in a dataset that can be read: other classes than asked for, and splits that are none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.datasets import FROM_CLIENTS, Splits, read_class_names
from fedmmkt.common.image_folders import split_of
from fedmmkt.common.tables import files_of, is_text, origins_of, some

if TYPE_CHECKING:
    import datasets

MOST_NAMED = 20  # classes in a text
MOST_SPLITS = 8  # A column with more values does not name splits.
MOST_SHARED = 0.01  # of the test images that are among those to learn: single ones are twice in many datasets.


def check_classes(splits: Splits, config: DataConfig, are_all_held: bool) -> None:
    """Check that the classes that ``data.classes`` names are those of the dataset.

    Parameters
    ----------
    splits : Splits
        The dataset.
    config : DataConfig
        Names the classes.
    are_all_held : bool
        Whether the dataset must have each of them; a judge needs examples of all.

    Raises
    ------
    ConfigError
        If the dataset has others, or lacks some that it must have. The text has both lists.
    """
    named = () if config.classes == FROM_CLIENTS else read_class_names(config)
    if not named:
        return
    lacking = [name for name in named if name not in splits.classes]
    unnamed = [name for name in splits.classes if name not in named]
    if unnamed or (lacking and are_all_held):
        without = [f"the column has no {some(lacking, MOST_NAMED)}"] if lacking else []
        without += [f"the key does not name {some(unnamed, MOST_NAMED)}"] if unnamed else []
        or_else = "" if unnamed else "; or with judge=false, names of which the dataset has no examples"
        raise ConfigError(
            f"{config.key('classes')} is {some(named, MOST_NAMED)!r}, and the column {config.label_column!r} of "
            f"{config.dataset!r} holds {some(splits.classes, MOST_NAMED)!r}: {'; '.join(without)}; allowed: the "
            f"classes of the column, or empty for these{or_else}"
        )


def unused_splits(rows: datasets.Dataset, config: DataConfig) -> str:
    """Say that a column of texts names splits, such as ``train`` and ``test``; empty if none does.

    Splits are taken from the names of files and folders alone, which a dataset of one file has not.
    """
    if not Path(config.dataset).expanduser().is_file():
        return ""
    used = (config.image_column, config.text_column, config.label_column)
    for column in rows.column_names:
        if column in used or not is_text(rows.features[column]):
            continue
        values = sorted({value for value in rows[column][:] if value})
        if 0 < len(values) <= MOST_SPLITS and all(split_of({value.strip().lower()}) for value in values):
            return (
                f"the column {column!r} ({some(values)}) is not used: splits are files; write the rows of each of its "
                "values to a file such as train.csv or test.csv beside this one, where names of image files stay "
                f"right, move {Path(config.dataset).name} out of the folder, since all tables in a folder are read, "
                f"and give the folder as {config.key('dataset')}"
            )
    return ""


def shared_images(splits: Splits, config: DataConfig) -> str:
    """Say how many images of a dataset's own test part are also among those to learn; empty if very few are.

    Images are the same if all bytes of their files are.
    """
    column = config.image_column
    if splits.is_held_out or column not in splits.train.column_names:
        return ""
    train, test = (_encoded(part, column) for part in (splits.train, splits.test))
    sizes = {_size(item) for item in train} & {_size(item) for item in test} - {0}  # Most need not be read.
    learned = {_digest(item): row for row, item in enumerate(train) if _size(item) in sizes}
    shared = [(learned.get(_digest(item)), row) for row, item in enumerate(test) if _size(item) in sizes]
    pairs = [(ours, row) for ours, row in shared if ours is not None]
    if len(pairs) <= MOST_SHARED * len(splits.test):
        return ""
    origins = origins_of(splits.train), origins_of(splits.test)
    named = [f"{origins[1][row]} is {origins[0][ours]}" for ours, row in pairs]
    read = f"; read are {some(files)} to learn" if (files := files_of(splits.train)) else ""
    read += f" and {some(files)} to test" if read and (files := files_of(splits.test)) else ""
    return (
        f"{config.key('dataset')} is {config.dataset!r}, of whose {len(splits.test)} test images {len(pairs)} are also "
        f"among those to learn, so that accuracy would be that of images already seen: {some(named, 2)}{read}; "
        "allowed: each image in one of the two; a table that is not to be read lies in another folder"
    )


def _encoded(rows: datasets.Dataset, column: str) -> Any:
    """Return a column of images as they are stored, each read when it is asked for."""
    import datasets

    return rows.select_columns(column).cast_column(column, datasets.Image(decode=False))[column]


def _size(item: dict[str, Any] | None) -> int:
    """Return the bytes of an image's file; 0 if there is none."""
    if not item:
        return 0
    if item["bytes"] is not None:
        return len(item["bytes"])
    path = Path(item["path"] or "")
    return path.stat().st_size if path.is_file() else 0


def _digest(item: dict[str, Any]) -> bytes:
    content = item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()
    return hashlib.sha256(content).digest()

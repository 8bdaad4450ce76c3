"""What is likely a mistake in a dataset that can be read: other classes than asked for, and splits in a column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.datasets import FROM_CLIENTS, Splits, read_class_names
from fedmmkt.common.image_folders import split_of
from fedmmkt.common.tables import is_text, some

if TYPE_CHECKING:
    import datasets

MOST_NAMED = 20  # classes in a text
MOST_SPLITS = 8  # A column with more values does not name splits.


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
                f"the column {column!r} ({some(values)}) is not used: splits are files, so that it needs a folder with "
                "train.csv and test.csv, one for each of its values"
            )
    return ""

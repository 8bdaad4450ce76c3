"""Tables: rows from one place, which know where they were read, and how several become one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.natural_order import normal_form

if TYPE_CHECKING:
    import datasets

ORIGIN = "_origin"  # a column that says where each row was read, for warnings and error texts
WRITTEN_AT_ONCE = 100  # rows, since images may be large
COLUMN_FIELDS = ("image_column", "text_column", "label_column")  # of the configuration: the columns that are read


@dataclass(frozen=True)
class Table:
    """Rows from one place.

    Attributes
    ----------
    name : str
        The place, for error texts: a file, relative to the dataset's folder.
    rows : datasets.Dataset
        The rows. Those of files have a column `ORIGIN`.
    is_typed : bool
        Whether the place tells integers from texts; a CSV file does not, nor do the names of folders.
    files : sequence of (str or None)
        The image file that each row names; empty if the rows hold the images themselves, or none.
    """

    name: str
    rows: datasets.Dataset
    is_typed: bool = True
    files: Sequence[str | None] = ()


def origins_of(rows: datasets.Dataset) -> Sequence[str]:
    """Return where each row was read, as far as that is known."""
    return rows[ORIGIN][:] if ORIGIN in rows.column_names else [f"row {row}" for row in range(len(rows))]


def files_of(rows: datasets.Dataset) -> list[str]:
    """Return the tables, or the splits of the hub, that rows were read from; none for folders of images."""
    places = (origin.partition(" of ") for origin in origins_of(rows))
    return sorted({file for row, _, file in places if row.startswith("row ") and file})


def write_parquet(rows: datasets.Dataset, path: Path) -> None:
    """Write the columns of files as parquet; images that are files are written with their content, not their names.

    Raises
    ------
    ConfigError
        If an image file is missing.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets.table import embed_table_storage

    rows = rows.remove_columns(ORIGIN) if ORIGIN in rows.column_names else rows
    with pyarrow.parquet.ParquetWriter(path, rows.features.arrow_schema) as writer:
        for table in rows.with_format("arrow").iter(WRITTEN_AT_ONCE):
            try:
                writer.write_table(embed_table_storage(table))
            except FileNotFoundError as error:
                raise ConfigError(f"the image file {error.filename} is not there, and a row names it") from None


def with_column(rows: datasets.Dataset, name: str, values: Any, feature: Any = None) -> datasets.Dataset:
    """Add or replace a column."""
    return (rows.remove_columns(name) if name in rows.column_names else rows).add_column(name, values, feature=feature)


def some(items: Sequence[object], most: int = 5) -> str:
    """List a few of many, and the number of the others."""
    listed = ", ".join(map(str, items[:most]))
    return f"{listed} and {len(items) - most} more" if len(items) > most else listed


def is_text(feature: Any) -> bool:
    """Tell whether a column holds strings."""
    return str(getattr(feature, "dtype", "")).startswith(("string", "large_string"))


def with_images(rows: datasets.Dataset, column: str, folder: Path) -> tuple[datasets.Dataset, list[str | None]]:
    """Make a column of images from image files' names or from encoded bytes, if it is one; images load on access.

    Parameters
    ----------
    folder : Path
        The folder to which names are relative. Letters may be composed differently on disk.

    Returns
    -------
    rows : datasets.Dataset
        The rows.
    files : list of (str or None)
        The image file that each row names; empty if the rows hold the images themselves, or none.
    """
    import datasets

    feature = rows.features.get(column)
    if is_text(feature) or _is_empty(feature):
        entries = lru_cache(maxsize=None)(_entries)
        paths = [_on_disk(folder, name, entries) if name else None for name in rows[column][:]]
        named = with_column(rows, column, paths, datasets.Value("string"))
        return named.cast_column(column, datasets.Image()), paths
    is_encoded = str(getattr(feature, "dtype", "")).endswith("binary")
    is_encoded |= isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    is_image = isinstance(feature, datasets.Image) and feature != datasets.Image()
    return rows.cast_column(column, datasets.Image()) if is_encoded or is_image else rows, []


def has_column(tables: Sequence[Table], field: str, config: DataConfig) -> bool:
    """Tell whether tables have the column that a field of the configuration names.

    Raises
    ------
    ConfigError
        If some have it and some have not.
    """
    column = getattr(config, field)
    having = [table.name for table in tables if column in table.rows.column_names]
    if lacking := [table.name for table in tables if having and column not in table.rows.column_names]:
        raise ConfigError(
            f"{config.key(field)} is {column!r}, and {some(lacking)} has no such column, but {having[0]} has; "
            "allowed: a column that all files have"
        )
    return bool(having)


def joined(tables: Sequence[Table], config: DataConfig) -> datasets.Dataset:
    """Make one dataset of the tables of a split; other columns than those of images and texts go if they differ.

    Raises
    ------
    ConfigError
        If only some tables have a column of images or texts, or its types differ.
    """
    import datasets

    if len(tables) == 1:
        return tables[0].rows
    parts = {table.name: _with_plain_texts(table.rows, config) for table in tables}
    (first_name, first), *others = parts.items()
    kept = [name for name, feature in first.features.items() if all(r.features.get(name) == feature for _, r in others)]
    for field in ("image_column", "text_column"):
        column = getattr(config, field)
        if not has_column(tables, field, config) or column in kept:
            continue
        name, other = next((n, r) for n, r in others if r.features[column] != first.features[column])
        raise ConfigError(
            f"{config.key(field)} is {column!r}, which holds {other.features[column]} in {name} and "
            f"{first.features[column]} in {first_name}; allowed: one type"
        )
    return datasets.concatenate_datasets([rows.select_columns(kept) for rows in parts.values()])


def _with_plain_texts(rows: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Give texts of all lengths, and a column that is empty, the one type of texts."""
    import datasets

    feature = rows.features.get(config.text_column)
    is_other = is_text(feature) or _is_empty(feature)
    return rows.cast_column(config.text_column, datasets.Value("string")) if is_other else rows


def _is_empty(feature: Any) -> bool:
    return getattr(feature, "dtype", "") == "null"


def _on_disk(folder: Path, name: str, entries: Any) -> str:
    """Return the path of a file that is there in a form of its name; else the path as it is named."""
    if os.path.exists(folder / name):  # noqa: PTH110 - Path.exists raises an error if a name is too long.
        return str(folder / name)
    found = folder
    for part in Path(name).parts:
        found = found / entries(found).get(normal_form(part), part)
    return str(found if found != folder / name and found.exists() else folder / name)


def _entries(folder: Path) -> dict[str, str]:
    try:
        return {normal_form(entry.name): entry.name for entry in folder.iterdir()}
    except OSError:
        return {}

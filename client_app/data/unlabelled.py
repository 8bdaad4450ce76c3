"""Examples without labels, from files as they are: images, folders of images, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.dataset_files import outside_cache, quietly
from fedmmkt.common.image_folders import image_suffixes
from fedmmkt.common.natural_order import natural_key
from fedmmkt.common.table_files import KINDS, kind_of, read_table
from fedmmkt.common.tables import is_text, with_images

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Unlabelled:
    """An example without a label.

    Attributes
    ----------
    file : str
        The image file, or the table.
    row : int, optional
        The row of a table, from 0.
    image : str or bytes, optional
        The image's file, or its encoded bytes.
    text : str, optional
        The text.
    named : str
        The file of a table's image, as the table names it, or as it was called when it was put into the table.
    id : str
        The row's entry in a column of the user's choice.
    """

    file: str
    row: int | None = None
    image: str | bytes | None = None
    text: str | None = None
    named: str = ""
    id: str = ""


def read_unlabelled(
    files: Iterable[Path], images: bool, texts: bool, image_column: str, text_column: str, id_column: str = ""
) -> Iterator[Unlabelled]:
    """Return the examples of files, in order; tables are read as they come, and no image is decoded.

    Parameters
    ----------
    files : iterable of Path
        Images, folders (all images below them) or tables.
    images, texts : bool
        Whether examples need an image, and a text. Where they need a text, only tables will do.
    image_column, text_column : str
        The columns of tables.
    id_column : str
        A further column of tables, which tells their rows apart; empty for none.

    Raises
    ------
    ConfigError
        If a file is missing, is not of a kind that will do, or a table cannot be read or lacks a column.
    """
    files = list(files)
    for file in files:  # All of them first, before anything is predicted.
        if not file.exists():
            raise ConfigError(f"{file} is not there; allowed: {_allowed(texts)}")
        if texts and not kind_of(file):
            raise ConfigError(f"{file} is no table, and the model reads texts; allowed: {_allowed(texts)}")
    return chain.from_iterable(
        _rows(file, images, texts, image_column, text_column, id_column) if kind_of(file) else _images(file)
        for file in files
    )


def _images(place: Path) -> list[Unlabelled]:
    """Return an image file, or those below a folder."""
    found = [place]
    if place.is_dir():
        found = [path for path in place.rglob("*") if path.suffix.lower() in image_suffixes() and path.is_file()]
    if not found:
        raise ConfigError(f"{place} holds no images; allowed: {_allowed(texts=False)}")
    return [Unlabelled(name, image=name) for name in sorted(map(str, found), key=natural_key)]


def _rows(
    file: Path, images: bool, texts: bool, image_column: str, text_column: str, id_column: str
) -> Iterator[Unlabelled]:
    import datasets

    config = DataConfig(dataset=str(file), image_column=image_column, text_column=text_column)
    with quietly(), outside_cache() as options:
        try:
            rows = read_table(file, config, options)
        except Exception as error:  # Readers raise many kinds of errors on damaged files.
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{file} cannot be read: {reason}") from None
        names: Sequence[str | None] = ()
        if id_column:
            _check_column(rows, "id", id_column, file)
        if images:
            _check_column(rows, "image", image_column, file)
            names = rows[image_column][:] if is_text(rows.features[image_column]) else ()
            rows, _ = with_images(rows, image_column, file.parent)
            if not isinstance(rows.features[image_column], datasets.Image):
                raise ConfigError(f"{file}: its column {image_column!r} holds no images; allowed: a column of images")
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        if texts:
            _check_column(rows, "text", text_column, file)
            if not is_text(rows.features[text_column]):
                raise ConfigError(f"{file}: its column {text_column!r} holds no texts; allowed: a column of strings")
        for number, row in enumerate(rows):
            image = (row[image_column] or {}) if images else {}
            yield Unlabelled(
                str(file),
                number,
                image.get("bytes") or image.get("path"),
                row[text_column] if texts else None,
                (names[number] if names else image.get("path")) or "",
                "" if not id_column or row[id_column] is None else str(row[id_column]),
            )


def _check_column(rows: datasets.Dataset, kind: str, column: str, file: Path) -> None:
    if column not in rows.column_names:
        raise ConfigError(
            f"{file} has no {kind} column {column!r}; allowed: --{kind}-column with one of "
            f"{', '.join(rows.column_names)}"
        )


def _allowed(texts: bool) -> str:
    tables = f"tables ({', '.join(KINDS)})"
    return tables if texts else f"images, folders of images, and {tables}"

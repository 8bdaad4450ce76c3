"""Files of tables, read as they are, without guesses of types.

Cells of a CSV file are texts, and only an empty one is missing. The library's readers for CSV and JSON would take the
text ``None`` for a missing value, ``007`` for a seven, a date for a time, and a long first row for one with an index.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedmmkt.common.config import DataConfig
from fedmmkt.common.natural_order import normal_form

if TYPE_CHECKING:
    import datasets

SAVED = "saved dataset"
KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "json"}
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LFS_POINTER = b"version https://git-lfs"


def kind_of(file: Path) -> str:
    """Return the kind of a table by the end of its name; empty if the file is no table."""
    if (file / "state.json").is_file() and (file / "dataset_info.json").is_file():
        return SAVED
    if file.suffix.lower() in PACKED:
        kind = KINDS.get(Path(file.stem).suffix.lower(), "")
        return "" if kind == "parquet" else kind
    return KINDS.get(file.suffix.lower(), "")


def stem_of(file: Path) -> str:
    """Return a file's name without its ends: ``a.csv.gz`` is ``a``."""
    return Path(file.stem).stem if file.suffix.lower() in PACKED else file.stem


def read_table(file: Path, config: DataConfig, options: dict[str, Any]) -> datasets.Dataset:
    """Read the rows of one file, or of one folder that `save_to_disk` wrote.

    Columns that the configuration names are found in whatever form their letters are composed.

    Parameters
    ----------
    options : dict
        Options of `datasets.load_dataset`, for kinds that go through the library's cache.

    Raises
    ------
    Exception
        Whatever a reader raises on a damaged file.
    """
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    kind = kind_of(file)
    if kind == SAVED:
        rows = datasets.load_from_disk(str(file), keep_in_memory=options.get("keep_in_memory"))
    elif kind == "parquet" and not pyarrow.parquet.read_metadata(file).num_rows:
        rows = datasets.Dataset.from_dict({})  # The library's reader fails.
    elif kind == "parquet":
        rows = datasets.load_dataset("parquet", data_files=[glob.escape(str(file))], split="train", **options)
    else:
        columns = config.image_column, config.text_column, config.label_column
        try:
            with _opened(file) as stream:
                rows = READERS[kind](stream, columns)
        except UnicodeDecodeError as error:
            raise ValueError(f"its text is not UTF-8 ({error.reason} at byte {error.start})") from None
    return _with_names_of(rows, config)


def read_header(file: Path) -> list[str]:
    """Return the columns of a table without reading its rows; none for kinds whose header does not tell them.

    Raises
    ------
    Exception
        Whatever a reader raises on a damaged file.
    """
    kind = kind_of(file)
    if kind == "parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    if kind not in ("csv", "tsv"):
        return []
    with _opened(file) as stream:
        return next(csv.reader(stream, delimiter="\t" if kind == "tsv" else ","), [])


def is_lfs_pointer(file: Path) -> bool:
    """Tell whether a file is what git-lfs leaves in place of a large file."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _opened(file: Path) -> TextIO:
    opener = PACKED.get(file.suffix.lower(), open)
    return opener(file, "rt", encoding="utf-8-sig", newline="")


def _with_names_of(rows: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Spell the columns that the configuration names as it does."""
    wanted = {normal_form(name): name for name in (config.image_column, config.text_column, config.label_column)}
    known = set(rows.column_names)
    other = {name: wanted[normal_form(name)] for name in known if wanted.get(normal_form(name), name) not in known}
    return rows.rename_columns(other) if other else rows


def _read_csv(stream: TextIO, needed: Iterable[str], separator: str = ",") -> datasets.Dataset:
    header, *lines = _csv_lines(stream, separator)
    if twice := [name for name in needed if header.count(name) > 1]:
        raise ValueError(f"its header has the column {twice[0]!r} twice")
    columns = zip(*lines, strict=True) if lines else ([] for _ in header)
    cells = {name: [cell or None for cell in column] for name, column in zip(header, columns, strict=True)}
    return _from_columns(cells, needed, "string")


def _csv_lines(stream: TextIO, separator: str) -> list[list[str]]:
    """Return the header and the lines of a CSV file that are not empty, all of one length."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(stream, delimiter=separator, strict=True)
    lines: list[list[str]] = []
    try:
        for cells in reader:
            if not cells or (lines and len(cells) == 1 < len(lines[0]) and not cells[0].strip()):
                continue
            if lines and len(cells) != len(lines[0]):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, and the header {len(lines[0])}")
            lines.append(cells)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return lines or [[]]


def _read_json(stream: TextIO, needed: Iterable[str], by_line: bool = False) -> datasets.Dataset:
    rows = _json_rows(stream.read(), by_line)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {row!r:.60}, and not an object with the columns as its keys")
    names = dict.fromkeys(name for row in rows for name in row)
    return _from_columns({name: [row.get(name) for row in rows] for name in names}, needed)


def _json_rows(text: str, by_line: bool) -> list[Any]:
    """Return the rows of a JSON file: a list of rows, an object of columns, a single row, or one row a line."""
    is_list = text.lstrip().startswith("[")
    try:
        whole = json.loads(text) if is_list or not by_line else None
    except json.JSONDecodeError:
        if is_list:
            raise
        whole = None
    if whole is None:
        return [_json_row(line, number) for number, line in enumerate(io.StringIO(text), 1) if line.strip()]
    if isinstance(whole, dict):
        columns = [list(column.values()) if isinstance(column, dict) else column for column in whole.values()]
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return [dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return whole if isinstance(whole, list) else [whole]


def _json_row(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is no JSON ({error.msg}): {line.strip()!r:.60}") from None


def _from_columns(columns: dict[str, list[Any]], needed: Iterable[str], kind: str | None = None) -> datasets.Dataset:
    """Make a dataset of columns; a column of several types is left out if no one needs it."""
    import datasets
    import pyarrow

    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values, kind)
        except (pyarrow.ArrowException, OverflowError):
            if name in needed:
                raise ValueError(f"its column {name!r} has {_two_types(values)}; allowed: values of one type") from None
    return datasets.Dataset.from_dict(arrays)


def _two_types(values: list[Any]) -> str:
    """Describe the first two rows whose values have different types."""
    present = [(row, value) for row, value in enumerate(values) if value is not None]
    others = [(row, value) for row, value in present if type(value) is not type(present[0][1])]
    return " and ".join(f"{value!r:.60} in row {row}" for row, value in (present[0], *others[:1]))


READERS: dict[str, Callable[[TextIO, Iterable[str]], datasets.Dataset]] = {
    "csv": _read_csv,
    "tsv": partial(_read_csv, separator="\t"),
    "jsonl": partial(_read_json, by_line=True),
    "json": _read_json,
}

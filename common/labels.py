"""Labels: what a column of labels holds, which classes that makes, and the class of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.natural_order import normal_form
from fedmmkt.common.tables import Table, has_column, origins_of

KINDS = "class names, integers, truth values, or a class feature; nothing where there is no label"


@dataclass(frozen=True)
class Labels:
    """The labels of a split.

    Attributes
    ----------
    values : list of (str or int or bool or None)
        The label of each row; None where there is none.
    origins : list of str
        Where each row was read.
    names : tuple of str
        The names of a class feature, in its order.
    is_typed : bool
        Whether the source tells the integer 1 from the text "1".
    """

    values: list[Any]
    origins: list[str]
    names: tuple[str, ...] = ()
    is_typed: bool = True

    @property
    def has_any(self) -> bool:
        """Whether any row has a label."""
        return any(value is not None for value in self.values)

    def held(self) -> Iterator[tuple[Any, str]]:
        """Yield each label and where it was read."""
        return ((value, origin) for value, origin in zip(self.values, self.origins, strict=True) if value is not None)


def read_labels(tables: Sequence[Table], config: DataConfig) -> Labels:
    """Read the labels of a split; no row has one if there is no such column.

    Raises
    ------
    ConfigError
        If only some tables have the column, or it holds no labels.
    """
    if not has_column(tables, "label_column", config):
        count = sum(len(table.rows) for table in tables)
        return Labels([None] * count, [""] * count)
    columns = [_read_column(table, config) for table in tables]
    return Labels(
        [value for column in columns for value in column.values],
        [origin for column in columns for origin in column.origins],
        tuple(dict.fromkeys(name for column in columns for name in column.names)),
        all(column.is_typed for column in columns),
    )


def typed(labels: Labels, config: DataConfig) -> Labels:
    """Return labels of one type: texts of an untyped source are integers if all are written as integers are.

    Raises
    ------
    ConfigError
        If there are no labels, or labels of several types.
    """
    first, origin = next(labels.held(), (None, ""))
    if first is None:
        raise ConfigError(f"{_key(config)}, in which no row has a label; allowed: {KINDS}")
    for value, where in labels.held():
        if type(value) is not type(first):
            raise ConfigError(
                f"{_key(config)}, which holds {first!r} in {origin}, and {value!r} in {where}; allowed: labels of one "
                f"type: {KINDS}"
            )
    if labels.is_typed or not all(_is_integer(value) for value, _ in labels.held()):
        return labels
    return replace(labels, values=[None if value is None else int(value) for value in labels.values])


def matched(labels: Labels, train: Labels, config: DataConfig) -> Labels:
    """Return the labels of another split with the type of the training part's.

    -1 is no label, unless it is a label of the training part.

    Raises
    ------
    ConfigError
        If a label has another type, and its text is no class of the training part.
    """
    known = {str(value): value for value, _ in train.held()} | {name: name for name in train.names}
    kind = type(next(train.held())[0])

    def match(value: Any, origin: str) -> Any:
        if kind is int and not labels.is_typed and _is_integer(value):
            value = int(value)
        value = known.get(str(value), value)
        if str(value) == "-1" and "-1" not in known:
            return None
        if type(value) is not kind:
            raise ConfigError(
                f"{_key(config)}, which holds {value!r} in {origin}, and {_TYPES[kind]} in the training part; allowed: "
                f"{_TYPES[kind]}, or nothing where there is no label"
            )
        return value

    values = [
        None if value is None else match(value, origin)
        for value, origin in zip(labels.values, labels.origins, strict=True)
    ]
    return replace(labels, values=values)


def named(parts: Sequence[Labels], names: tuple[str, ...], config: DataConfig) -> list[Labels]:
    """Give integer labels the names of the run's classes, in order from 0, unless a name is an integer itself.

    With a privacy ledger, each label is named by itself, and an integer that is not the number of a name is no label.

    Raises
    ------
    ConfigError
        If an integer is not the number of a name.
    """
    if config.one_by_one:
        return [_named_by_itself(part, names) for part in parts]
    held = {value: origin for part in parts for value, origin in part.held()}
    if not all(type(value) is int for value in held) or not names or any(map(_is_integer, names)):
        return list(parts)
    if wrong := sorted(value for value in held if not 0 <= value < len(names)):
        raise ConfigError(
            f"{_key(config)}, which holds {wrong[0]} in {held[wrong[0]]}, and {config.key('classes')} gives "
            f"{len(names)} names; allowed: these names, or integers from 0 to {len(names) - 1} for them in order"
        )
    return [
        replace(part, names=names, values=[None if value is None else names[value] for value in part.values])
        for part in parts
    ]


def _named_by_itself(part: Labels, names: tuple[str, ...]) -> Labels:
    """Name the labels that are integers, or are written so, whatever the other labels are."""
    if not names or any(map(_is_integer, names)):
        return part

    def name_of(value: Any) -> Any:
        if value is None or isinstance(value, bool) or not _is_integer(str(value)):
            return value
        return names[int(value)] if 0 <= int(value) < len(names) else None

    return replace(part, values=list(map(name_of, part.values)))


def classes_of(parts: Sequence[Labels]) -> tuple[str, ...]:
    """Return the classes of all parts: those of class features, then the others, sorted as texts or as numbers."""
    names = [name for part in parts for name in part.names]
    return tuple(dict.fromkeys([*names, *map(str, sorted({value for part in parts for value, _ in part.held()}))]))


def indices_of(labels: Labels, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the index of each row's class, and -1 where there is no label."""
    index = {name: position for position, name in enumerate(classes)}
    return np.array([-1 if value is None else index[str(value)] for value in labels.values], dtype=np.int64)


def _read_column(table: Table, config: DataConfig) -> Labels:
    import datasets

    feature, values = table.rows.features[config.label_column], table.rows[config.label_column][:]
    origins = list(origins_of(table.rows))
    names = tuple(map(normal_form, feature.names)) if isinstance(feature, datasets.ClassLabel) else ()
    allowed = f"labels from 0 to {len(names) - 1}" if names else KINDS

    def label(value: Any, origin: str) -> Any:
        if value is None or value == "" or value != value or (names and value == -1):
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str):
            return normal_form(value)
        if not isinstance(value, int) or (names and not 0 <= value < len(names)):
            raise ConfigError(f"{_key(config)}, which holds {feature}: {value!r} in {origin}; allowed: {allowed}")
        return names[value] if names else value

    values = [label(value, origin) for value, origin in zip(values, origins, strict=True)]
    return Labels(values, origins, names, table.is_typed)


def _is_integer(text: str) -> bool:
    """Tell whether a text is written as an integer is: ``7``, not ``007`` or ``7.0``."""
    return text.removeprefix("-").isdecimal() and text.isascii() and str(int(text)) == text


def _key(config: DataConfig) -> str:
    return f"{config.key('label_column')} is {config.label_column!r}"


_TYPES = {str: "class names", int: "integers", bool: "truth values"}

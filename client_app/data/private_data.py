"""A node's private data: in simulation a partition of the run's dataset, else its own dataset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig, RunConfig
from fedmmkt.common.datasets import FROM_CLIENTS, Examples, Splits, labels_of, load_splits, relabel, to_examples
from fedmmkt.common.partitioning import partition_rows

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class PrivateData:
    """Training examples, and test examples on which the client's model is measured."""

    train: Examples
    test: Examples


def load_private_data(
    config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> PrivateData:
    """Load the data of one node, with labels as indices into the run's class space.

    In simulation, all clients share the dataset's test part. A node with its own data has its own test part.

    Parameters
    ----------
    images, texts : bool
        Whether the node's model reads images, and whether it reads texts. Nothing else is decoded.

    Raises
    ------
    ConfigError
        If the data cannot be read or, without a privacy ledger, has classes outside the class space.
    """
    data, splits, train = _own_part(config, node, class_space)
    # The images of simulated clients are also read for the server's judge, and what is left out is named there.
    tell = bool(node.data_path) or not config.judge or texts
    examples = (
        to_examples(train, data, images=images, texts=texts, tell=tell),
        _test_part(data, config.seed, images, texts, tell),
    )
    return PrivateData(*(relabel(part, splits.classes, class_space, data.one_by_one) for part in examples))


@lru_cache(maxsize=4)
def _test_part(data: DataConfig, seed: int, images: bool, texts: bool, tell: bool) -> Examples:
    """Decode the test part; all simulated clients in a process share it."""
    return to_examples(load_splits(data, seed).test, data, images=images, texts=texts, tell=tell)


def held_classes(config: RunConfig, node: NodeConfig) -> tuple[str, ...]:
    """Return the classes of which a node holds examples; only labels are read.

    Raises
    ------
    ConfigError
        If the data cannot be read.
    """
    data, splits, train = _own_part(config, node)
    return tuple(splits.classes[label] for label in np.unique(labels_of(train, data)))


def _own_part(
    config: RunConfig, node: NodeConfig, class_space: tuple[str, ...] = ()
) -> tuple[DataConfig, Splits, datasets.Dataset]:
    """Return data settings, splits and training rows of a node: of its own dataset, or of its partition."""
    if node.data_path:
        data: DataConfig = node.own_data(config.data)
        if data.classes and data.classes != FROM_CLIENTS:  # The file that lists them may be at the server alone.
            data = data.model_copy(update={"classes": class_space})
        splits = load_splits(data, config.seed)
        return data, splits, splits.train
    if node.partition_id is None or node.num_partitions is None or node.partition_id >= node.num_partitions:
        raise ConfigError(
            f"node-config key 'partition-id' is {node.partition_id}; allowed: 0 up to 'num-partitions' "
            f"({node.num_partitions}) less one, or a 'data-path'"
        )
    splits = load_splits(config.data, config.seed)
    rows = partition_rows(config.data, node.num_partitions, config.seed)[node.partition_id]
    return config.data, splits, splits.train.select(rows)

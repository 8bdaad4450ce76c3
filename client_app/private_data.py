"""A node's private data: a partition of the run's dataset in simulation, its own dataset elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ConfigError, NodeConfig, RunConfig
from common.datasets import Examples, load_splits, relabel, to_examples
from common.partitioning import partition_rows


@dataclass(frozen=True)
class PrivateData:
    """Training examples, and those that the client's model is measured on."""

    train: Examples
    test: Examples


def load_private_data(
    config: RunConfig, node: NodeConfig, class_space: tuple[str, ...], images: bool, texts: bool
) -> PrivateData:
    """Load what one node holds, labelled in the run's class space.

    In simulation all clients share the dataset's test split; a node with data of its own holds out a part.

    Parameters
    ----------
    images, texts : bool
        What the node's model reads; the rest is never decoded.

    Raises
    ------
    ConfigError
        If the data cannot be read or has classes outside the class space.
    """
    data = node.own_data(config.data) if node.data_path else config.data
    splits = load_splits(data, config.seed)
    train = splits.train
    if not node.data_path:
        if node.partition_id is None or node.num_partitions is None or node.partition_id >= node.num_partitions:
            raise ConfigError(
                f"node-config key 'partition-id' is {node.partition_id}; allowed: 0 up to 'num-partitions' "
                f"({node.num_partitions}) less one, or a 'data-path'"
            )
        train = train.select(partition_rows(data, node.num_partitions, config.seed)[node.partition_id])
    examples = [to_examples(part, data, images=images, texts=texts) for part in (train, splits.test)]
    return PrivateData(*(relabel(part, splits.classes, class_space) for part in examples))

"""Division of a dataset's training part among simulated clients."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.datasets import labels_of, load_splits

logger = logging.getLogger("flwr")


@lru_cache(maxsize=8)
def partition_rows(config: DataConfig, num_partitions: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Divide the training rows of `load_splits` among clients, with flwr-datasets.

    Only labels are read. The parts are disjoint and the same in every process. Together they cover all rows, with one
    exception: if ``pathological`` has too few clients for all classes, it leaves classes out, and the log names them.

    Returns
    -------
    tuple of tuple of int
        Row numbers, one tuple per client.

    Raises
    ------
    ConfigError
        If the data cannot be divided this way, or a client would get fewer than ``min_examples``.
    """
    import datasets

    splits = load_splits(config, seed)
    labels_N = labels_of(splits.train, config)
    order_N = np.random.default_rng(seed).permutation(len(labels_N))  # `iid` does not shuffle.
    rows = datasets.Dataset.from_dict({"row": order_N, "label": labels_N[order_N]})
    try:
        if num_partitions * config.min_examples > len(labels_N):
            raise ValueError(f"{config.min_examples} for each of them are more than there are.")
        partitioner = _partitioner(config, num_partitions, seed)
        partitioner.dataset = rows
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It redraws until every part is large enough, and warns each time.
            parts = tuple(tuple(partitioner.load_partition(index)["row"][:]) for index in range(num_partitions))
        if (smallest := min(map(len, parts))) < config.min_examples:
            raise ValueError(f"the smallest part has {smallest}.")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run-config key 'data.partitioner' is {config.partitioner!r} (alpha {config.alpha:g}, "
            f"classes-per-client {config.classes_per_client}, min-examples {config.min_examples}), which cannot "
            f"divide {len(labels_N)} examples among {num_partitions} clients: {reason} "
            "Lower data.min-examples or the number of clients, or raise data.alpha."
        ) from None
    if sum(map(len, parts)) < len(labels_N):
        held = np.unique(labels_N[np.concatenate(parts)])
        left_out = [splits.classes[label] for label in np.setdiff1d(labels_N, held)]
        logger.warning("No client holds %s: %s clients are too few", ", ".join(left_out), num_partitions)
    return parts


def _partitioner(config: DataConfig, num_partitions: int, seed: int) -> Any:
    """Build the configured partitioner of flwr-datasets, for data with the columns ``row`` and ``label``."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    class BalancedPathologicalPartitioner(PathologicalPartitioner):  # type: ignore[misc]
        """Give each client the classes that the fewest clients hold so far; ties are broken at random.

        So a class is left out only if there are too few clients for all classes. With fewer clients than classes, the
        parent class always leaves classes out, in all its modes.
        """

        def _determine_partition_id_to_unique_labels(self) -> None:
            super()._determine_partition_id_to_unique_labels()
            holders = np.zeros(len(self._unique_labels), dtype=int)
            for partition_id in range(num_partitions):
                chosen = np.lexsort((self._rng.random(len(holders)), holders))[: config.classes_per_client]
                holders[chosen] += 1
                self._partition_id_to_unique_labels[partition_id] = [self._unique_labels[index] for index in chosen]

    if config.partitioner == "iid":
        return IidPartitioner(num_partitions)
    if config.partitioner == "dirichlet":
        return DirichletPartitioner(
            num_partitions, "label", config.alpha, config.min_examples, self_balancing=False, seed=seed
        )
    return BalancedPathologicalPartitioner(num_partitions, "label", config.classes_per_client, seed=seed)

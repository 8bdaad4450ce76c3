"""Data for real machines: divide a dataset like a simulation, and write one folder per node.

``fedmmkt partition FOLDER --nodes 4 --run-config 'data.alpha=0.5'`` writes ``FOLDER/node-0`` and so on. Each folder has
``train.parquet``, the node's own part, and ``test.parquet``, the test examples that all nodes share. A node reads its
folder if the key ``data-path`` of its node-config names it.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from fedmmkt.common.config import ConfigError, DataConfig, RunConfig
from fedmmkt.common.dataset_files import quietly
from fedmmkt.common.datasets import load_splits, with_readable_images
from fedmmkt.common.files import write_atomically
from fedmmkt.common.partitioning import partition_rows
from fedmmkt.common.tables import write_parquet
from fedmmkt.deploy.run_config_text import parse_run_config


def write_partitions(config: DataConfig, partitions: int, seed: int, folder: Path) -> list[Path]:
    """Write the parts of a dataset.

    Parameters
    ----------
    config : DataConfig
        Which dataset, and how it is divided.
    partitions : int
        Number of nodes.
    seed : int
        Seed of the division. With the seed of a run, the parts are those of a simulation with this seed.
    folder : Path
        Parent of the nodes' folders.

    Returns
    -------
    list of Path
        The nodes' folders.

    Raises
    ------
    ConfigError
        If the dataset cannot be read or divided this way, or a folder already has data or cannot be written.
    """
    splits = load_splits(config, seed)
    rows = partition_rows(config, partitions, seed)
    folders = [folder / f"node-{index}" for index in range(partitions)]
    for path in folders:
        if (path / "train.parquet").exists():
            raise ConfigError(f"{path} holds data already; allowed: a folder without train.parquet")
    test = with_readable_images(splits.test, config)
    try:
        with quietly():
            for path, own in zip(folders, rows, strict=True):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)  # The data may be private.
                train = with_readable_images(splits.train.select(own), config)
                for name, part in (("test", test), ("train", train)):
                    write_atomically(path / f"{name}.parquet", partial(write_parquet, part))
    except OSError as error:
        raise ConfigError(f"the parts cannot be written: {error.strerror}") from error
    return folders


def main(arguments: list[str] | None = None) -> int:
    """Write the parts that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="fedmmkt partition", description=__doc__)
    parser.add_argument("folder", type=Path, help="parent of the nodes' folders")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument(
        "--run-config", action="append", default=[], metavar="PAIRS", help="run-config; only `data.` and `seed` matter"
    )
    options = parser.parse_args(arguments)
    try:
        if options.nodes < 1:
            raise ConfigError(f"--nodes is {options.nodes}; allowed: 1 or more")
        config = RunConfig.from_flower(parse_run_config([text for text in options.run_config if text.strip()]))
        folders = write_partitions(config.data, options.nodes, config.seed, options.folder)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for path in folders:
        print(path)
    return 0

"""Data for real machines: the same parts that a simulation would use."""

import stat

import numpy as np
import pytest

from fedmmkt.client_app.data.private_data import load_private_data
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.common.datasets import load_splits
from fedmmkt.deploy.partition import main, write_partitions


def test_a_node_reads_the_part_that_a_simulation_gives_it(tmp_path):
    config = RunConfig(seed=3)
    classes = load_splits(config.data, config.seed).classes

    folders = write_partitions(config.data, 3, config.seed, tmp_path)

    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    for index, folder in enumerate(folders):
        own, simulated = (
            load_private_data(config, node, classes, images=True, texts=True)
            for node in (NodeConfig(data_path=str(folder)), NodeConfig(partition_id=index, num_partitions=3))
        )
        for ours, theirs in ((own.train, simulated.train), (own.test, simulated.test)):
            np.testing.assert_array_equal(ours.images_NHWC, theirs.images_NHWC)
            np.testing.assert_array_equal(ours.labels_N, theirs.labels_N)
            assert ours.texts == theirs.texts


def test_a_folder_that_holds_data_is_left_alone(tmp_path):
    write_partitions(RunConfig().data, 2, 0, tmp_path)

    with pytest.raises(ConfigError, match="holds data already"):
        write_partitions(RunConfig().data, 2, 0, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes is 0"),
        (["--nodes", "2", "--run-config", "data.alhpa=1"], "'data.alhpa' is unknown"),
        (["--nodes", "500"], "min-examples"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, said):
    assert main([str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err

"""Data for real machines: the same parts that a simulation would use."""

import shutil
import stat

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fedmmkt.client_app.data.private_data import load_private_data
from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig, RunConfig
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


def test_images_that_are_files_travel_with_their_content(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{index}.png")
    lines = [f"{index}.png,{'ab'[index % 2]}" for index in range(40)]
    (source / "table.csv").write_text("\n".join(["image,label", *lines]))
    config = RunConfig(data=DataConfig(dataset=str(source / "table.csv"), alpha=1.0, min_examples=2))
    simulated = load_private_data(config, NodeConfig(partition_id=1, num_partitions=2), ("a", "b"), True, False)

    folders = write_partitions(config.data, 2, 0, tmp_path / "nodes")
    shutil.rmtree(source)

    own = load_private_data(config, NodeConfig(data_path=str(folders[1])), ("a", "b"), True, False)
    np.testing.assert_array_equal(own.train.images_NHWC, simulated.train.images_NHWC)
    np.testing.assert_array_equal(own.train.labels_N, simulated.train.labels_N)
    assert "_origin" not in pyarrow.parquet.read_schema(folders[1] / "train.parquet").names


def test_an_image_file_that_is_not_there_is_named(tmp_path):
    lines = [f"{index}.png,{'ab'[index % 2]}" for index in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *lines]))
    config = DataConfig(dataset=str(tmp_path / "table.csv"), alpha=1.0, min_examples=2)
    with pytest.raises(
        ConfigError, match=rf"of 8 images cannot be read: row \d+ of .* '{tmp_path}/\d+.png' is not there"
    ):
        write_partitions(config, 2, 0, tmp_path / "nodes")


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

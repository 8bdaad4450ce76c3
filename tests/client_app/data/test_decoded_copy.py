"""A node's own data: a decoded copy that spares each message's process the reading, and never goes stale."""

import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fedmmkt.client_app.data import decoded_copy
from fedmmkt.client_app.data.decoded_copy import load_own_data
from fedmmkt.common.config import DataConfig, NodeConfig, RunConfig
from fedmmkt.common.dataset_files import DIGIT_NAMES
from fedmmkt.deploy.partition import write_partitions
from tests import ROOT


@pytest.fixture
def own(tmp_path):
    """Return a node's data folder, and a function that loads it and says how often the data itself was read."""
    folders = write_partitions(DataConfig(), 3, 0, tmp_path / "parts")

    def load(config=None, texts=True, images=True):
        node = NodeConfig(data_path=str(folders[0]))
        return load_own_data(tmp_path / "state", "one", config or RunConfig(), node, DIGIT_NAMES, images, texts)

    return folders, load


@pytest.fixture
def readings(monkeypatch):
    count = []
    read = decoded_copy.load_private_data
    monkeypatch.setattr(decoded_copy, "load_private_data", lambda *wanted: count.append(1) or read(*wanted))
    return count


def assert_equal(one, other):
    for ours, theirs in ((one.train, other.train), (one.test, other.test)):
        np.testing.assert_array_equal(ours.labels_N, theirs.labels_N)
        assert (ours.images_NHWC is None) == (theirs.images_NHWC is None)
        if ours.images_NHWC is not None:
            np.testing.assert_array_equal(ours.images_NHWC, theirs.images_NHWC)
        assert ours.texts == theirs.texts
        assert ours.whites == theirs.whites


@pytest.mark.parametrize(("images", "texts"), [(True, True), (True, False), (False, True)])
def test_the_copy_is_the_data_and_is_read_in_its_place(own, readings, images, texts):
    _, load = own
    first, second = load(images=images, texts=texts), load(images=images, texts=texts)
    assert len(readings) == 1
    assert_equal(first, second)
    assert second.train.labels_N.dtype == np.int64


def test_the_white_of_deep_images_is_kept(tmp_path, readings):
    for index, value in enumerate((1000, 2000, 4000) * 4):
        folder = tmp_path / "scans" / ("a", "b")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(folder / f"{index}.png")
    arguments = RunConfig(), NodeConfig(data_path=str(tmp_path / "scans")), ("a", "b"), True, False

    first, second = (load_own_data(tmp_path / "state", "one", *arguments) for _ in range(2))

    assert len(readings) == 1
    assert_equal(first, second)
    assert second.train.whites == {"PNG I;16": 4095}  # twelve bits


def test_a_changed_setting_or_file_or_a_damaged_copy_means_reading_again(own, readings, tmp_path):
    folders, load = own
    load()
    load(RunConfig(data=DataConfig(image_size=16)))
    assert load().train.images_NHWC.shape[1] == 32
    assert len(readings) == 3
    (folders[0] / "train.parquet").write_bytes((folders[1] / "train.parquet").read_bytes())
    changed = load()
    assert len(readings) == 4
    (tmp_path / "state" / "data" / "one" / "examples.npz").write_bytes(b"PK\x03\x04 half")
    assert_equal(load(), changed)
    assert len(readings) == 5


def test_state_within_the_data_is_none_of_it(own, readings):
    folders, _ = own
    node, state = NodeConfig(data_path=str(folders[0])), folders[0] / "state"
    for round_ in range(3):
        (state / "run").mkdir(parents=True, exist_ok=True)
        (state / "run" / "model.safetensors").write_text("a longer model each round" * round_)
        load_own_data(state, "one", RunConfig(), node, DIGIT_NAMES, images=False, texts=True)
    assert len(readings) == 1


def test_only_the_owner_reads_the_copy(own, tmp_path):
    _, load = own
    load()
    assert stat.S_IMODE((tmp_path / "state" / "data" / "one").stat().st_mode) == 0o700


def test_a_disk_that_takes_no_copy_costs_a_warning(own, tmp_path, caplog):
    _, load = own
    (tmp_path / "state").touch()
    assert len(load().train) > 0
    assert "will be read again" in caplog.text


MESSAGE = """
import sys
from flwr.app import Context, RecordDict
from fedmmkt.client_app.client import Client
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.dataset_files import DIGIT_NAMES
from fedmmkt.common.payloads import Instructions

run = to_flower(RunConfig()) | {"client.warmup-epochs": 1, "client.distillation-steps": 0}
node = {"data-path": sys.argv[1], "state-dir": sys.argv[2], "model": sys.argv[3], "name": "one"}
instructions = Instructions(run_key="run", round=1, classes=DIGIT_NAMES, votes=True, anchor_size=0)
client = Client(Context(1, 1, node, RecordDict(), run), instructions)
client.learn()
client.report()
print(sorted({"datasets", "pandas", "pyarrow", "torch._dynamo", "transformers", "diffusers"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("model", ["text", "cnn"])
def test_a_message_imports_no_more_than_it_needs(own, tmp_path, model):
    """From the second message on; each import below would cost every message half a second or more."""
    folders, _ = own
    arguments = [str(folders[0]), str(tmp_path / "state"), model]
    loaded = [
        subprocess.run(
            [sys.executable, "-c", MESSAGE, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        for _ in range(2)
    ]
    assert "'datasets'" in loaded[0]
    assert loaded[1] == "[]"

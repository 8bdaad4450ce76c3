"""Datasets from real files: classes, splits, partitions, and errors that name the key."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from common.config import ConfigError, DataConfig
from common.datasets import Examples, load_splits, partition_rows, relabel, to_examples

SHARED = Path(os.environ.get("FEDMMKT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


def picture(value, size=(10, 10)):
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


@pytest.fixture
def parquet(tmp_path):
    """Return a function that writes columns to a parquet file and gives the configuration that reads it."""

    def write(columns, features=None, name="data.parquet", **changes):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name)
        return DataConfig(dataset=str(tmp_path / name), **changes)

    return write


def rows(count=20, **changes):
    columns = {
        "image": [picture(10 * i) for i in range(count)],
        "text": [f"number {i}" for i in range(count)],
        "label": [("cat", "dog")[i % 2] for i in range(count)],
    } | changes
    features = datasets.Features(
        {
            name: datasets.Image() if name == "image" else datasets.Value("string" if name == "text" else values[0].__class__.__name__.replace("str", "string").replace("int", "int64").replace("float", "float64"))
            for name, values in columns.items()
        }
    )  # fmt: skip
    return {"columns": columns, "features": features}


def test_digits_are_real_captioned_and_split_by_seed():
    splits = load_splits(DataConfig(), 0)
    assert splits.classes[:3] == ("zero", "one", "two")
    assert (len(splits.train), len(splits.test)) == (1438, 359)
    examples = to_examples(splits.test, DataConfig(), images=True, texts=True)
    assert examples.images_NHWC.shape == (359, 32, 32, 3)
    assert all(splits.classes[label] in text for label, text in zip(examples.labels_N, examples.texts, strict=True))
    assert np.bincount(examples.labels_N).min() >= 34
    assert load_splits(DataConfig(), 1).test["text"] != splits.test["text"]


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("nodes", [2, 7])
def test_partitions_are_disjoint_and_cover_everything(partitioner, nodes):
    config = DataConfig(partitioner=partitioner, alpha=0.5)
    parts = partition_rows(config, nodes, 3)
    together = [row for part in parts for row in part]
    assert len(parts) == nodes
    assert sorted(together) == list(range(1438)) or partitioner == "pathological"
    assert len(set(together)) == len(together)
    assert min(map(len, parts)) >= 10
    partition_rows.cache_clear()
    assert partition_rows(config, nodes, 3) == parts


def test_small_alpha_is_more_skewed_than_large():
    labels = np.array(load_splits(DataConfig(), 0).train["label"])

    def skew(alpha):
        parts = partition_rows(DataConfig(alpha=alpha), 6, 0)
        return np.mean([np.bincount(labels[list(part)], minlength=10).max() / len(part) for part in parts])

    assert skew(0.1) > skew(100) + 0.2


def test_data_that_cannot_be_divided_is_named():
    with pytest.raises(ConfigError, match=r"'data.partitioner' is 'dirichlet' .*1438 examples among 6 clients"):
        partition_rows(DataConfig(min_examples=1000), 6, 0)


def test_a_parquet_file_with_string_labels(parquet):
    config = parquet(**rows(), image_size=8)
    splits = load_splits(config, 0)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.test)) == (16, 4)
    examples = to_examples(splits.train, config, images=True, texts=True)
    assert examples.images_NHWC.shape == (16, 8, 8, 3)
    number = int(examples.texts[0].split()[1])
    assert examples.labels_N[0] == number % 2
    assert examples.images_NHWC[0, 0, 0].tolist() == [10 * number] * 3


def test_a_folder_of_parquet_files_keeps_its_test_split(parquet, tmp_path):
    parquet(**rows(), name="train-0.parquet")
    parquet(**rows(6), name="test-0.parquet")
    splits = load_splits(DataConfig(dataset=str(tmp_path)), 0)
    assert (len(splits.train), len(splits.test)) == (20, 6)


def test_a_folder_of_images_takes_classes_from_its_folders(tmp_path):
    for name, value in (("owl", 10), ("wren", 200)):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for index in range(5):
            picture(value, (12, 20)).save(tmp_path / "birds" / name / f"{index}.png")
    config = DataConfig(dataset=str(tmp_path / "birds"), image_size=8)
    splits = load_splits(config, 0)
    examples = to_examples(splits.train, config, images=True, texts=False)
    assert splits.classes == ("owl", "wren")
    assert examples.texts is None
    assert (examples.images_NHWC[:, 0, 0, 0] == np.where(examples.labels_N == 0, 10, 200)).all()


def test_integer_labels_need_not_begin_at_zero(parquet):
    splits = load_splits(parquet(**rows(label=[3 + i % 2 for i in range(20)])), 0)
    assert splits.classes == ("3", "4")
    assert set(splits.train["label"]) == {0, 1}


def test_incomplete_rows_are_left_out(parquet):
    columns = rows()
    columns["columns"]["text"][3] = None
    columns["columns"]["label"][5] = None
    config = parquet(**columns)
    splits = load_splits(config, 0)
    parts = [to_examples(part, config, images=False, texts=True) for part in (splits.train, splits.test)]
    assert sum(map(len, parts)) == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "species"}, r"'data.label-column' is 'species', .*allowed: image, text, label"),
        ({"image_column": "photo", "text_column": "note"}, r"'data.image-column' is 'photo', .*allowed: image, text"),
        ({"test_fraction": 0.001}, r"'data.test-fraction' is 0.001, which leaves nothing"),
    ],
)
def test_bad_columns_are_named(parquet, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_splits(parquet(**rows(), **changes), 0)


def test_bad_labels_are_named(parquet):
    with pytest.raises(ConfigError, match=r"'data.label-column' is 'label', which holds .*float64"):
        load_splits(parquet(**rows(label=[0.5] * 20), name="floats.parquet"), 0)
    with pytest.raises(ConfigError, match=r"has 1 class\(es\); allowed: two or more"):
        load_splits(parquet(**rows(label=["cat"] * 20), name="one.parquet"), 0)


def test_a_missing_column_is_named_when_it_is_needed(parquet):
    config = parquet(**rows(), text_column="note")
    with pytest.raises(ConfigError, match=r"'data.text-column' is 'note', and the dataset has no such column"):
        to_examples(load_splits(config, 0).train, config, images=False, texts=True)
    config = config.model_copy(update={"image_column": "text"})
    with pytest.raises(ConfigError, match=r"'data.image-column' is 'text', which holds .*allowed: a column of images"):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)


def test_unreadable_data_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'data.dataset' is '/no/such/data', which is not there"):
        load_splits(DataConfig(dataset="/no/such/data"), 0)
    (tmp_path / "bad.parquet").write_bytes(b"this is no parquet file")
    with pytest.raises(ConfigError, match=r"bad.parquet', which cannot be read"):
        load_splits(DataConfig(dataset=str(tmp_path / "bad.parquet")), 0)


def test_an_image_that_does_not_decode_is_named_by_its_row(parquet):
    columns = rows()
    columns["columns"]["image"] = [{"bytes": b"no image", "path": None}] * 20
    config = parquet(**columns)
    with pytest.raises(ConfigError, match="the image of row 0 does not decode"):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)


def test_relabelling_goes_by_name():
    examples = Examples(np.array([0, 1, 1]))
    assert relabel(examples, ("dog", "cat"), ("ant", "cat", "dog")).labels_N.tolist() == [2, 1, 1]
    assert relabel(Examples(np.array([1])), ("yak", "cat"), ("ant", "cat")).labels_N.tolist() == [1]
    with pytest.raises(ConfigError, match="'yak' are not in the run; allowed: ant, cat"):
        relabel(Examples(np.array([0])), ("yak", "cat"), ("ant", "cat"))


@pytest.mark.parametrize(("name", "classes", "train"), [("emoji", 9, 1287), ("cifar10", 10, 50_000)])
def test_real_benchmarks_load(name, classes, train):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here; FEDMMKT_DATA names its folder")
    config = DataConfig(dataset=str(SHARED / name))
    splits = load_splits(config, 0)
    assert (len(splits.classes), len(splits.train)) == (classes, train)
    few = to_examples(splits.test.select(range(5)), config, images=True, texts=name == "emoji")
    assert few.images_NHWC.shape == (5, 32, 32, 3)

"""Datasets from real files: classes, splits, partitions, and errors that name the key."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig
from fedmmkt.common.datasets import Examples, load_splits, read_class_names, relabel, to_examples
from fedmmkt.common.partitioning import partition_rows
from tests import ROOT

SHARED = Path(os.environ.get("FEDMMKT_DATA", ROOT.parent / "shared" / "data"))


def picture(value, size=(10, 10)):
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """Return a function that writes columns to a parquet file and gives the configuration that reads it."""

    def write(columns, features=None, name="data.parquet", **changes):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name)
        return DataConfig(dataset=str(tmp_path / name), **changes)

    return write


def rows(count=20, **changes):
    columns = {
        "image": [picture(10 * i) for i in range(count)],
        "text": [f"number {i}" for i in range(count)],
        "label": [("cat", "dog")[i % 2] for i in range(count)],
    } | changes
    types = {str: "string", int: "int64", float: "float64"}
    features = datasets.Features(
        {
            name: datasets.Image() if name == "image" else datasets.Value(types[type(values[0])])
            for name, values in columns.items()
        }
    )
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
    covers = partitioner != "pathological" or nodes * config.classes_per_client >= 10
    assert (sorted(together) == list(range(1438))) == covers
    assert len(set(together)) == len(together)
    assert min(map(len, parts)) >= 10
    partition_rows.cache_clear()
    assert partition_rows(config, nodes, 3) == parts


@settings(max_examples=12, deadline=None)
@given(
    partitioner=st.sampled_from(["iid", "dirichlet", "pathological"]),
    nodes=st.integers(4, 12),
    classes=st.integers(3, 10),
    alpha=st.floats(0.5, 100),
    seed=st.integers(0, 3),
)
def test_any_partitions_are_disjoint_and_cover_everything(partitioner, nodes, classes, alpha, seed):
    config = DataConfig(partitioner=partitioner, classes_per_client=classes, alpha=alpha, min_examples=1)
    parts = partition_rows(config, nodes, seed)
    assert sorted(row for part in parts for row in part) == list(range(1438))
    if partitioner == "pathological":
        labels = np.array(load_splits(config, seed).train["label"][:])
        assert {len(np.unique(labels[list(part)])) for part in parts} == {classes}


def test_partitions_are_the_same_in_every_process():
    code = (
        "from fedmmkt.common.config import DataConfig; from fedmmkt.common.partitioning import partition_rows\n"
        "for name in ('iid', 'dirichlet', 'pathological'): print(partition_rows(DataConfig(partitioner=name), 5, 1))"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    for name, printed in zip(("iid", "dirichlet", "pathological"), other.stdout.splitlines(), strict=True):
        assert str(partition_rows(DataConfig(partitioner=name), 5, 1)) == printed


def test_classes_that_no_client_holds_are_named_in_the_log(caplog):
    config = DataConfig(partitioner="pathological", classes_per_client=2)
    held = {load_splits(config, 5).train["label"][row] for part in partition_rows(config, 4, 5) for row in part}
    assert len(held) == 8
    (message,) = [record.getMessage() for record in caplog.records if "No client holds" in record.getMessage()]
    assert all((name in message) == (label not in held) for label, name in enumerate(load_splits(config, 5).classes))


def test_small_alpha_is_more_skewed_than_large():
    labels = np.array(load_splits(DataConfig(), 0).train["label"])

    def skew(alpha):
        parts = partition_rows(DataConfig(alpha=alpha), 6, 0)
        return np.mean([np.bincount(labels[list(part)], minlength=10).max() / len(part) for part in parts])

    assert skew(0.1) > skew(100) + 0.2


def test_data_that_cannot_be_divided_is_named():
    with pytest.raises(ConfigError, match=r"'data.partitioner' is 'dirichlet' .*1438 examples among 6 clients"):
        partition_rows(DataConfig(min_examples=1000), 6, 0)
    with pytest.raises(ConfigError, match=r"'iid' .*min-examples 10.* among 2000 clients: 10 for each of them"):
        partition_rows(DataConfig(partitioner="iid"), 2000, 0)
    with pytest.raises(ConfigError, match=r"'pathological' .*classes-per-client 11.* among 6 clients"):
        partition_rows(DataConfig(partitioner="pathological", classes_per_client=11), 6, 0)
    with pytest.raises(ConfigError, match=r"'pathological' .*min-examples 430.* the smallest part has \d+"):
        partition_rows(DataConfig(partitioner="pathological", min_examples=430), 3, 0)


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


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0.parquet", "test/0.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("my_train.parquet", "my_eval.parquet"),
        ("contest.parquet", "validation.parquet"),
    ],
)
def test_the_test_split_is_found_by_the_name_of_file_or_folder(parquet, tmp_path, train, test):
    parquet(**rows(), name="all/" + train)
    parquet(**rows(6), name="all/" + test)
    splits = load_splits(DataConfig(dataset=str(tmp_path / "all")), 0)
    assert (len(splits.train), len(splits.test)) == (20, 6)


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_encoded_images_need_no_mark_of_the_datasets_library(tmp_path, kind):
    pngs = [png_bytes(picture(10 * i)) for i in range(20)]
    images = pngs if kind == "binary" else [{"bytes": png, "path": None} for png in pngs]
    struct_type = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = {
        "image": pyarrow.array(images, pyarrow.binary() if kind == "binary" else struct_type),
        "label": ["cat", "dog"] * 10,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "plain.parquet")
    config = DataConfig(dataset=str(tmp_path / "plain.parquet"), image_size=8)
    examples = to_examples(load_splits(config, 0).train, config, images=True, texts=False)
    assert examples.images_NHWC.shape == (16, 8, 8, 3)


def test_loading_tells_nobody(parquet, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("session"))
    load_splits(parquet(**rows()), 0)
    assert not asked
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


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


@pytest.fixture
def pictures(tmp_path):
    """Save pictures in a folder beside which a table can name them."""
    (tmp_path / "table" / "pictures").mkdir(parents=True)
    for index in range(20):
        picture(10 * index).save(tmp_path / "table" / "pictures" / f"{index}.png")
    return tmp_path / "table"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_table_names_image_files_beside_it(pictures, suffix, whole_folder):
    columns = {"image": [f"pictures/{i}.png" for i in range(20)], "label": ["cat", "dog"] * 10, "text": ["a b"] * 20}
    table = datasets.Dataset.from_dict(columns)
    write = {"csv": table.to_csv, "tsv": lambda path: table.to_csv(path, sep="\t"), "jsonl": table.to_json,
             "parquet": table.to_parquet}[suffix]  # fmt: skip
    write(str(pictures / f"birds.{suffix}"))
    config = DataConfig(dataset=str(pictures if whole_folder else pictures / f"birds.{suffix}"), image_size=8)
    splits = load_splits(config, 0)
    examples = to_examples(splits.train, config, images=True, texts=True)
    assert splits.classes == ("cat", "dog")
    assert len(examples) == 16
    assert examples.texts == ["a b"] * 16
    assert (examples.images_NHWC[:, 0, 0, 0] // 10 % 2 == examples.labels_N).all()


def test_a_missing_value_in_a_table_leaves_its_row_out(pictures):
    lines = ["image,label", "pictures/0.png,cat", ",cat", "pictures/1.png,dog", "pictures/2.png,", "pictures/3.png,dog"]
    (pictures / "birds.csv").write_text("\n".join([*lines, *(f"pictures/{i}.png,cat" for i in range(4, 12))]))
    config = DataConfig(dataset=str(pictures / "birds.csv"), image_size=8)
    splits = load_splits(config, 0)
    parts = [to_examples(part, config, images=True, texts=False) for part in (splits.train, splits.test)]
    assert sum(map(len, parts)) == 11


def test_a_folder_of_images_may_have_metadata_with_texts(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        lines = ["file_name,label,text"]
        for index in range(6):
            picture(index).save(tmp_path / split / f"{index}.png")
            lines.append(f"{index}.png,{('owl', 'wren')[index % 2]},number {index}")
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    config = DataConfig(dataset=str(tmp_path), image_size=8)
    splits = load_splits(config, 0)
    examples = to_examples(splits.test, config, images=True, texts=True)
    assert splits.classes == ("owl", "wren")
    assert examples.texts == [f"number {index}" for index in range(6)]


def test_a_nodes_own_data_is_named_by_its_own_keys_and_stays_out_of_shared_caches(parquet, monkeypatch, tmp_path):
    caches = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **named: caches.append(named["cache_dir"]) or load(*a, **named)
    )
    file = parquet(**rows(label=["cat"] * 20)).dataset
    node = NodeConfig(data_path=file, text_column="text")
    own = node.own_data(DataConfig(text_column="note", image_size=8))
    splits = load_splits(own, 0)
    assert splits.classes == ("cat",)  # One class is enough for a node.
    assert len(to_examples(splits.train, own, images=True, texts=True)) == 16
    assert caches
    assert not any(Path(cache).exists() for cache in caches)
    with pytest.raises(ConfigError, match=r"node-config key 'label-column' is 'kind', and the dataset has no such"):
        load_splits(NodeConfig(data_path=file, label_column="kind").own_data(DataConfig()), 0)
    with pytest.raises(ConfigError, match=r"run-config key 'data.label-column' is 'kind', and the dataset has no such"):
        load_splits(NodeConfig(data_path=file).own_data(DataConfig(label_column="kind")), 0)
    with pytest.raises(ConfigError, match=r"node-config key 'data-path' is '/no/such', which is not there"):
        load_splits(NodeConfig(data_path="/no/such").own_data(DataConfig()), 0)


def test_a_hub_dataset_that_cannot_be_had_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing', which is not a path here and cannot be had from the hub"):
        load_splits(DataConfig(dataset="nobody/nothing"), 0)


def test_class_names_may_come_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("owl\n\nwren, the small\n")
    assert read_class_names(DataConfig(classes=(str(tmp_path / "names.txt"),))) == ("owl", "wren, the small")
    assert read_class_names(DataConfig(classes=("owl", "wren"))) == ("owl", "wren")
    assert read_class_names(DataConfig()) == ()
    with pytest.raises(ConfigError, match=r"'data.classes' is '/no/names.txt', which cannot be read"):
        read_class_names(DataConfig(classes=("/no/names.txt",)))
    with pytest.raises(ConfigError, match=r"gives 'owl, owl'; allowed: two or more, each once"):
        read_class_names(DataConfig(classes=("owl", "owl")))


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


def test_rows_of_label_minus_one_have_no_label(parquet):
    columns = rows(label=[0, 1] * 9 + [-1, -1])
    columns["features"]["label"] = datasets.ClassLabel(names=["cat", "dog"])
    splits = load_splits(parquet(**columns), 0)
    assert (len(splits.train), len(splits.test)) == (14, 4)
    columns["columns"]["label"] = [-1] * 20
    with pytest.raises(ConfigError, match=r"'data.label-column' is 'label', in which no row has a label"):
        load_splits(parquet(**columns, name="none.parquet"), 0)


def test_a_class_too_rare_to_split_makes_the_test_part_random(parquet, caplog):
    splits = load_splits(parquet(**rows(label=["cat"] + ["dog"] * 19)), 0)
    assert (len(splits.train), len(splits.test)) == (16, 4)
    assert "the test part is random" in caplog.text


def test_no_complete_row_is_an_error(parquet):
    columns = rows()
    columns["columns"]["text"] = [None] * 20
    config = parquet(**columns)
    with pytest.raises(ConfigError, match=r"'data.dataset' is '.*data.parquet': no row is complete"):
        to_examples(load_splits(config, 0).train, config, images=False, texts=True)


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
    with pytest.raises(
        ConfigError, match=r"'data.image-column' is 'text', and in row 0 it names '.*', which is not there"
    ):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)


def test_texts_must_be_strings(parquet):
    config = parquet(**rows(), text_column="image")
    with pytest.raises(ConfigError, match=r"'data.text-column' is 'image', which holds .*allowed: a column of strings"):
        to_examples(load_splits(config, 0).train, config, images=False, texts=True)


def test_empty_data_is_named(tmp_path):
    empty = pyarrow.table({"text": pyarrow.array([], "string"), "label": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match=r"'data.dataset' is '.*empty.parquet', which is empty"):
        load_splits(DataConfig(dataset=str(tmp_path / "empty.parquet")), 0)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"nothing', which cannot be read: .*doesn't contain any data files"):
        load_splits(DataConfig(dataset=str(tmp_path / "nothing")), 0)


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
    with pytest.raises(ConfigError, match=r"'data.dataset' is .* the image of row 0 does not decode"):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)


def test_an_image_of_absurd_size_is_named_too(parquet):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    config = parquet(**rows(image=[{"bytes": bomb, "path": None}] * 20))
    with pytest.raises(ConfigError, match=r"the image of row 0 does not decode \(Image size"):
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

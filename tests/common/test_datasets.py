"""Datasets from real files: classes, splits, partitions, and errors that name the key."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmmkt.client_app.data.private_data import held_classes, load_private_data
from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig, RunConfig
from fedmmkt.common.datasets import Examples, load_splits, read_class_names, relabel, to_examples, with_readable_images
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


def test_mnist_has_the_labels_of_the_digits_so_that_clients_hold_as_many_of_each_class():
    digits, mnist = (load_splits(DataConfig(dataset=name), 0) for name in ("digits", "mnist"))

    assert mnist.classes == digits.classes
    assert [mnist.train["label"], mnist.test["label"]] == [digits.train["label"], digits.test["label"]]
    images_NHWC = to_examples(mnist.test, DataConfig(), images=True, texts=True).images_NHWC
    assert images_NHWC.shape == (359, 32, 32, 3)
    assert not images_NHWC[:, :2].any()  # The black margin around 28 x 28 pixels.
    assert images_NHWC[:, 2:30, 2:30].reshape(359, -1).max(1).min() > 200


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
    with pytest.raises(ConfigError, match=r"node-config key 'data-path' is '/no/such', which is not there"):
        load_splits(NodeConfig(data_path="/no/such").own_data(DataConfig()), 0)


def test_a_run_cannot_choose_what_is_read_of_a_nodes_own_data(parquet):
    """A run that names another column would learn its values: class names, and error texts with them."""
    file = parquet(**rows(label=["cat"] * 20, ssn=[f"12-{number}" for number in range(20)])).dataset
    asked = DataConfig(label_column="ssn", image_column="photo", text_column="note", subset="secret", dataset="/other")

    own = NodeConfig(data_path=file).own_data(asked)

    assert (own.dataset, own.subset) == (file, "")
    assert (own.image_column, own.text_column, own.label_column) == ("image", "text", "label")
    assert load_splits(own, 0).classes == ("cat",)


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
        ConfigError,
        match=r"'data.image-column' is 'text', of which 16 of 16 images .*: row \d+ .* is not there",
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
    with pytest.raises(
        ConfigError, match=r"'data.image-column' is .*row 1 of data.parquet \(its image does not decode: it"
    ):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)


def test_an_image_of_absurd_size_is_named_too(parquet):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    config = parquet(**rows(image=[{"bytes": bomb, "path": None}] * 20))
    with pytest.raises(ConfigError, match=r"row 1 of data.parquet \(its image does not decode: Image size"):
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


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes files: images for numbers, and texts; and gives the configuration to read them."""

    def write(files, **changes):
        load_splits.cache_clear()
        for name, content in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                (content if isinstance(content, Image.Image) else picture(content)).save(path)
        return DataConfig(dataset=str(tmp_path / "tree"), image_size=8, **changes)

    return write


def seen(config):
    """Return the pairs of class and grey value in the training and in the test part."""
    splits = load_splits(config, 0)
    pairs = []
    for part in (splits.train, splits.test):
        examples = to_examples(part, config, images=True, texts=False)
        names = [splits.classes[label] for label in examples.labels_N]
        pairs.append(sorted(zip(names, examples.images_NHWC[:, 4, 4, 0].tolist(), strict=True)))
    return pairs


def table(rows, header="text,label"):
    return "\n".join([header, *rows]) + "\n"


ANIMALS = [f"a {name} {index},{name}" for index in range(10) for name in ("cat", "dog")]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_words_of_splits_in_the_names_of_images_and_classes_are_only_names(tree):
    names = ("0.png", "training_3.png", "test.png", "val-1.png", "dev.2.png")
    classes = (("bus", 10), ("train", 60), ("test", 90))
    train, test = seen(tree({f"{folder}/{name}": value for folder, value in classes for name in names}))
    assert sorted(train + test) == [("bus", 10)] * 5 + [("test", 90)] * 5 + [("train", 60)] * 5


@pytest.mark.parametrize("above", ["", "all/pictures/"])
def test_top_folders_are_splits_if_class_folders_lie_in_them(tree, above):
    files = {f"{above}{split}/{name}/{index}.png": value
             for split, value in (("Training", 10), ("eval", 60))
             for name in ("cat", "train") for index in range(4)}  # fmt: skip
    train, test = seen(tree(files))
    assert train == [("cat", 10)] * 4 + [("train", 10)] * 4
    assert test == [("cat", 60)] * 4 + [("train", 60)] * 4


def test_folders_called_like_splits_beside_others_are_no_splits(tree, caplog):
    files = {f"{above}/{name}/{index}.png": 10
             for above in ("train", "test", "more") for name in ("cat", "dog") for index in range(2)}  # fmt: skip
    train, test = seen(tree(files))
    assert len(train + test) == 12
    assert "the folders test, train are not taken for splits, since more are beside them" in caplog.text


def test_a_folder_with_one_class_is_enough_for_a_node(tree):
    folder = tree({f"cat/{index}.png": 10 * index for index in range(5)}).dataset
    own = NodeConfig(data_path=folder).own_data(DataConfig(image_size=8))
    train, test = seen(own)
    assert sorted(train + test) == [("cat", 10 * index) for index in range(5)]


def test_images_outside_class_folders_are_left_out_and_named(tree, caplog):
    files = {f"train/{name}/{index}.png": 10 for name in ("cat", "dog") for index in range(5)}
    files |= {f"test/{index}.png": 90 for index in range(4)}
    files |= {"train/stray.png": 90, "notes.pdf": "x", "cat.html": "x"}
    train, test = seen(tree(files))
    assert sorted(train + test) == [("cat", 10)] * 5 + [("dog", 10)] * 5
    assert "the test part (4 rows) has no labels and is left out" in caplog.text
    assert "a part of the training data is held out as the test part" in caplog.text
    assert "1 of 11 rows have no label and are left out: train/stray.png" in caplog.text
    assert "2 files are not read: cat.html, notes.pdf" in caplog.text
    loose = Path(tree({"loose/1.png": 1, "loose/2.png": 2}).dataset, "loose")
    with pytest.raises(
        ConfigError, match="whose 2 images lie in no class folder; allowed: a folder for each class, or"
    ):
        load_splits(DataConfig(dataset=str(loose)), 0)


def test_images_that_a_wrong_column_does_not_name_are_not_called_unread(tree, caplog):
    rows = [f"{index}.png,{'ab'[index % 2]}" for index in range(4)]
    config = tree({f"{index}.png": 10 for index in range(4)} | {"t.csv": table(rows, "photo,label"), "notes.pdf": "x"})

    with pytest.raises(ConfigError, match=r"'data\.image-column' is 'image', and the dataset has no such column"):
        load_splits(config, 0)

    assert "1 files are not read: notes.pdf" in caplog.text


def test_links_to_folders_are_followed_but_not_in_a_circle(tree, tmp_path):
    config = tree({f"cat/{index}.png": 10 for index in range(5)} | {"../far/0.png": 20, "../far/1.png": 30})
    (tmp_path / "tree" / "dog").symlink_to(tmp_path / "far")
    (tmp_path / "tree" / "cat" / "again").symlink_to(tmp_path / "tree")
    train, test = seen(config)
    assert sorted(train + test) == [("cat", 10)] * 5 + [("dog", 20), ("dog", 30)]


def test_metadata_may_lie_above_the_folders_of_splits(tree, caplog):
    rows = [f"{split}/{index}.png,{('None', 'cat')[index % 2]}" for split in ("train", "test") for index in range(4)]
    files = {f"{split}/{index}.png": 10 * index for split in ("train", "test") for index in range(5)}
    train, test = seen(tree(files | {"metadata.csv": table(rows, "file_name,label")}))
    assert train == test == [("None", 0), ("None", 20), ("cat", 10), ("cat", 30)]
    assert "2 files are not read: test/4.png, train/4.png" in caplog.text


def test_a_test_part_with_its_classes_in_another_order_is_read_by_name(parquet, tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("test", ["ant", "dog", "cat"])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        labels = [names.index(name) for name in ("cat", "dog", "dog")]
        parquet({"text": ["cat", "dog", "dog"], "label": labels}, features, name=f"both/{split}.parquet")
    splits = load_splits(DataConfig(dataset=str(tmp_path / "both")), 0)
    assert splits.classes == ("cat", "dog", "ant")
    for part in (splits.train, splits.test):
        assert [splits.classes[label] for label in part["label"]] == part["text"][:] == ["cat", "dog", "dog"]


def test_a_csv_file_holds_texts_and_only_an_empty_cell_is_missing(tree, caplog):
    words = ["None", "NA", "null", "nan", "007", "", "1.0"]
    config = tree({"t.csv": table([f"{words[i % 7]},{words[i % 7]}" for i in range(70)])})
    splits = load_splits(config, 0)
    assert splits.classes == ("007", "1.0", "NA", "None", "nan", "null")
    for part in (splits.train, splits.test):
        examples = to_examples(part, config, images=False, texts=True)
        assert [splits.classes[label] for label in examples.labels_N] == examples.texts
    assert len(splits.train) + len(splits.test) == 60
    assert "10 of 70 rows have no label and are left out: row 5 of t.csv, row 12 of t.csv" in caplog.text


def test_a_csv_file_that_is_no_clean_table_is_refused_by_line(tree):
    for rows, message in (
        (["a,cat", "a nice, warm day,cat"], "whose file 't.csv' cannot be read: line 3 has 3 cells, and the header 2"),
        (['"a,cat', "b,dog"], "whose file 't.csv' cannot be read: line 3: unexpected end of data"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_splits(tree({"t.csv": table(rows)}), 0)
    with pytest.raises(ConfigError, match="its text is not UTF-8"):
        load_splits(tree({"t.csv": "text,label\nöl,cat\n".encode("latin-1")}), 0)
    with pytest.raises(ConfigError, match="its header has the column 'label' twice"):
        load_splits(tree({"t.csv": table(["a,b,c"], "text,label,label")}), 0)


def test_canonical_integers_sort_as_numbers_and_other_codes_as_texts(tree):
    numbers = [f"t,{number}" for number in ("10", "9", "0", "") for _ in range(5)]
    assert load_splits(tree({"t.csv": table(numbers)}), 0).classes == ("0", "9", "10")
    assert load_splits(tree({"t.csv": table([*numbers, "t,010"])}), 0).classes == ("0", "010", "10", "9")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_integers_as_floats_with_gaps_and_truth_values_are_labels(tree, tmp_path, kind, caplog):
    for name, labels, classes in (("f", [10.0, 9.0, None, 0.0] * 5, ("0", "9", "10")),
                                  ("b", [True, False, None, True] * 5, ("False", "True"))):  # fmt: skip
        data = datasets.Dataset.from_dict({"text": ["a"] * 20, "label": labels})
        (data.to_parquet if kind == "parquet" else data.to_json)(tmp_path / f"{name}.{kind}")
        splits = load_splits(DataConfig(dataset=str(tmp_path / f"{name}.{kind}")), 0)
        assert splits.classes == classes
        assert len(splits.train) + len(splits.test) == 15
        assert f"5 of 20 rows have no label and are left out: row 2 of {name}.{kind}" in caplog.text


def test_integers_take_the_names_that_the_run_gives(tree, tmp_path):
    rows = [f"{name},{number}" for number, name in ((0, "cat"), (1, "dog")) for _ in range(6)]
    config = tree({"t.csv": table(rows)}, classes=("cat", "dog", "owl"))
    splits = load_splits(config, 0)
    assert splits.classes == ("cat", "dog", "owl")
    assert all(splits.classes[row["label"]] == row["text"] for part in (splits.train, splits.test) for row in part)
    # At a node, a file of the server's that lists the classes is not there.
    run = RunConfig(data=DataConfig(classes=("/no/names.txt",)))
    data = load_private_data(run, NodeConfig(data_path=config.dataset), ("cat", "dog"), images=False, texts=True)
    assert [("cat", "dog")[label] for label in data.train.labels_N] == data.train.texts
    run = RunConfig(data=DataConfig(classes=("clients",)))
    assert held_classes(run, NodeConfig(data_path=config.dataset)) == ("0", "1")
    assert load_splits(config.model_copy(update={"classes": ("0", "1")}), 0).classes == ("0", "1")
    with pytest.raises(ConfigError, match=r"holds 2 in row 12 of t.csv, .*'data.classes' gives 2 names.* from 0 to 1"):
        load_splits(tree({"t.csv": table([*rows, "owl,2"])}, classes=("cat", "dog")), 0)


@pytest.mark.parametrize("labels", [None, "", "-1"])
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("names", ["01", "ab"])
def test_a_test_part_without_labels_is_left_out(tree, labels, validation, names, caplog):
    rows = [f"t,{names[index % 2]}" for index in range(20)]
    test = table(["t"] * 5, "text") if labels is None else table([f"t,{labels}"] * 5)
    files = {"train.csv": table(rows), "test.csv": test} | ({"val.csv": table(rows[:7])} if validation else {})
    splits = load_splits(tree(files), 0)
    assert (len(splits.train), len(splits.test)) == ((20, 7) if validation else (16, 4))
    assert "the test part (5 rows) has no labels and is left out" in caplog.text
    assert ("a part of the training data is held out" in caplog.text) != validation


def test_a_validation_part_beside_a_test_part_is_not_used_and_named(tree, caplog):
    files = {f"{name}.csv": table(ANIMALS[:count]) for name, count in (("train", 20), ("test", 4), ("dev", 6))}
    splits = load_splits(tree(files), 0)
    assert (len(splits.train), len(splits.test)) == (20, 4)
    assert "the validation part (6 rows) is not used, since there is a test part" in caplog.text


def test_classes_of_the_test_part_alone_are_named(tree, caplog):
    rows = [f"t,{name}" for name in ("cat", "dog") for _ in range(5)]
    splits = load_splits(tree({"train.csv": table(rows), "test.csv": table(["t,ant", "t,dog", "t,yak"])}), 0)
    assert splits.classes == ("ant", "cat", "dog", "yak")
    assert "the training part has no class ant, yak of the test part" in caplog.text


def test_labels_of_another_type_are_refused_by_file_row_and_value(tree):
    files = {"train.csv": table([f"t,{i % 2}" for i in range(10)]), "test.csv": table(["t,0", "t,unknown"])}
    with pytest.raises(ConfigError, match=r"'label', which holds 'unknown' in row 1 of test.csv, and integers in"):
        load_splits(tree(files), 0)
    # The same texts are names if the training part has names.
    files["train.csv"] = table([f"t,{('0', '1', 'unknown')[i % 3]}" for i in range(12)])
    assert load_splits(tree(files), 0).classes == ("0", "1", "unknown")


def test_only_columns_that_are_read_are_compared(tree):
    files = {"train-0.csv": table(ANIMALS), "train-1.csv": table([row + ",n" for row in ANIMALS], "text,label,note")}
    splits = load_splits(tree(files), 0)
    assert len(splits.train) + len(splits.test) == 40
    files["train-1.csv"] = table(["cat,n"], "label,note")
    with pytest.raises(ConfigError, match=r"'data.text-column' is 'text', and train-1.csv has no such column, but"):
        load_splits(tree(files), 0)
    files["train-1.csv"] = table(["a,n"], "text,note")
    with pytest.raises(ConfigError, match=r"'data.label-column' is 'label', and train-1.csv has no such column"):
        load_splits(tree(files), 0)


def deep(value, dtype=np.uint16):
    return Image.fromarray(np.full((10, 10), value, dtype))


def test_the_depth_of_grey_values_is_that_of_the_brightest_image(tree):
    files = {f"a/{index}.png": deep(value) for index, value in enumerate((100, 2048, 4095, 0, 1000))}
    files |= {f"b/{index}.tif": deep(value, np.float32) for index, value in enumerate((0.5, 1, 0, 128, 255))}
    files |= {f"c/{index}.tif": deep(value, np.float32) for index, value in enumerate((0.5, 1, 0))}
    config = tree({name: image for name, image in files.items() if name[0] != "c"})
    rows = load_splits(config, 0)
    examples = to_examples(datasets.concatenate_datasets([rows.train, rows.test]), config, images=True, texts=False)
    values = sorted(zip(examples.labels_N.tolist(), examples.images_NHWC[:, 0, 0, 0].tolist(), strict=True))
    assert values == [(0, 0), (0, 6), (0, 62), (0, 128), (0, 255), (1, 0), (1, 0), (1, 1), (1, 128), (1, 255)]


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "from nan to nan"), (-1, "from -1 to"), (300, "300; allowed: 0 to")]
)
def test_floats_that_are_no_grey_values_are_refused_by_name(tree, value, said):
    files = {f"{name}/{index}.png": 10 for name in ("cat", "dog") for index in range(5)}
    config = tree({**files, "cat/odd.tif": deep(value, np.float32)})
    splits = load_splits(config, 0)
    with pytest.raises(ConfigError, match=rf"'data.image-column' is 'image', and in cat/odd.tif it holds .*{said}"):
        [to_examples(part, config, images=True, texts=False) for part in (splits.train, splits.test)]


def test_a_broken_image_is_left_out_and_named_by_its_file_or_row(tree, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    broken = png_bytes(Image.fromarray(noise))[:900]
    files = {f"{name}/{index}.png": 10 for name in ("cat", "dog") for index in range(5)}
    train, test = seen(tree(files | {"dog/broken.png": broken, "dog/empty.jpg": b""}))
    assert sorted(train + test) == [("cat", 10)] * 5 + [("dog", 10)] * 5
    assert "dog/broken.png (its image does not decode: " in caplog.text
    assert "dog/empty.jpg (its image does not decode: it is of no known format)" in caplog.text
    assert sum("rows have no image or text that can be read" in r.getMessage() for r in caplog.records) in (1, 2)
    images = [broken if row == 7 else png_bytes(picture(10)) for row in range(10)]
    datasets.Dataset.from_dict({"image": images, "label": ["cat", "dog"] * 5}).to_parquet(tmp_path / "t.parquet")
    train, test = seen(DataConfig(dataset=str(tmp_path / "t.parquet"), image_size=8))
    assert len(train + test) == 9
    assert "row 7 of t.parquet (its image does not decode: " in caplog.text


def test_pointers_of_git_lfs_are_refused_with_the_remedy(tree):
    files = {f"{name}/{index}.png": POINTER for name in ("cat", "dog") for index in range(5)}
    config = tree(files)
    with pytest.raises(ConfigError, match=r"in (cat|dog)/\d.png it holds a git-lfs pointer; .*`git lfs pull`"):
        to_examples(load_splits(config, 0).train, config, images=True, texts=False)
    for name in ("t.csv", "t.jsonl", "t.parquet", "t.csv.gz"):
        with pytest.raises(ConfigError, match=f"whose file '{name}' is .* a git-lfs pointer; .*`git lfs pull`"):
            load_splits(tree({name: POINTER}), 0)
        Path(config.dataset, name).unlink()


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("on_disk", "in_table"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_are_compared_in_one_form(tree, on_disk, in_table):
    files = {f"{on_disk}/{on_disk} {index}.png": 10 * index for index in range(10)} | {"tea/0.png": 5, "tea/1.png": 6}
    config = tree(files, classes=(in_table, "tea"))
    assert load_splits(config, 0).classes == (COMPOSED, "tea") == read_class_names(config)
    examples = Examples(np.array([0, 1]))
    assert relabel(examples, (on_disk, "tea"), ("tea", in_table)).labels_N.tolist() == [1, 0]
    rows = [f"{in_table}/{in_table} {index}.png,{(on_disk, in_table, 'tea')[index % 3]}" for index in range(10)]
    train, test = seen(tree({"t.csv": table(rows, "image,label")}))
    assert sorted(train + test) == sorted(((COMPOSED, COMPOSED, "tea")[index % 3], 10 * index) for index in range(10))


def test_a_folder_of_json_files_is_read_if_nothing_else_is_there(tree):
    rows = [{"text": f"t{index}", "label": ("cat", "dog")[index % 2]} for index in range(20)]
    files = {f"{index}.json": json.dumps(row) for index, row in enumerate(rows[:10])}  # one row
    files |= {"list.json": json.dumps(rows[10:15]), "lines.json": "\n".join(map(json.dumps, rows[15:17]))}
    columns = {name: {str(index): row[name] for index, row in enumerate(rows[17:])} for name in ("text", "label")}
    files |= {"columns.json": json.dumps(columns)}  # as pandas writes it
    config = tree(files)
    splits = load_splits(config, 0)
    read = [(row["text"], splits.classes[row["label"]]) for part in (splits.train, splits.test) for row in part]
    assert sorted(read) == sorted((row["text"], row["label"]) for row in rows)
    files = {"cat/0.png": 1, "cat/1.png": 2, "dog/0.png": 3, "dog/1.png": 4, "dog/2.png": 5}
    train, test = seen(tree(files))
    assert len(train + test) == 5


def test_dates_in_json_stay_texts(tree):
    lines = [json.dumps({"text": "2020-01-01", "label": f"2020-01-0{1 + index % 2}"}) for index in range(10)]
    config = tree({"t.jsonl": "\n".join(lines)})
    splits = load_splits(config, 0)
    assert splits.classes == ("2020-01-01", "2020-01-02")
    assert set(to_examples(splits.train, config, images=False, texts=True).texts) == {"2020-01-01"}


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("train", "eval"), None])
def test_saved_datasets_are_read(tmp_path, splits, caplog):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    saved = datasets.Dataset.from_dict({"text": ["no", "yes"] * 10, "label": [0, 1] * 10}, features)
    if splits:
        datasets.DatasetDict(dict.fromkeys((*splits, "unsupervised"), saved)).save_to_disk(tmp_path / "saved")
    else:
        saved.save_to_disk(tmp_path / "saved")
    read = load_splits(DataConfig(dataset=str(tmp_path / "saved")), 0)
    assert (len(read.train), len(read.test)) == ((20, 20) if splits and len(splits) > 1 else (16, 4))
    assert all(read.classes[row["label"]] == row["text"] for part in (read.train, read.test) for row in part)
    assert ("the splits unsupervised (20 rows) are not used" in caplog.text) == bool(splits)


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_tables_are_read(tree, end, pack):
    lines = "\n".join(json.dumps(dict(zip(("text", "label"), row.split(","), strict=True))) for row in ANIMALS)
    for name, text in (("t.csv", table(ANIMALS)), ("t.jsonl", lines), ("t.tsv", table(ANIMALS).replace(",", "\t"))):
        folder = Path(tree({name + end: pack(text.encode())}).dataset)
        splits = load_splits(DataConfig(dataset=str(folder / (name + end))), 0)
        assert splits.classes == ("cat", "dog")
        assert len(splits.train) + len(splits.test) == 20


def test_empty_tables_are_refused_and_empty_shards_named(tree, caplog):
    config = tree({"header.csv": "text,label\n", "nothing.csv": ""})
    for name in ("header.csv", "nothing.csv"):
        with pytest.raises(ConfigError, match=f"{name}', which is empty; allowed: data with at least one row"):
            load_splits(DataConfig(dataset=f"{config.dataset}/{name}"), 0)
    with pytest.raises(ConfigError, match=r"whose train part \(header.csv, nothing.csv\) is empty"):
        load_splits(config, 0)
    config = tree({"full.csv": table(ANIMALS)})
    splits = load_splits(config, 0)
    assert len(splits.train) + len(splits.test) == 20
    assert "2 tables are empty and are left out: header.csv, nothing.csv" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "truncated"])
@pytest.mark.parametrize(("count", "is_refused"), [(0, False), (5, False), (6, True), (24, True)])
def test_missing_and_broken_images_are_left_out_by_one_rule(tree, caplog, kind, count, is_refused):
    """Of 24 images: up to five are always left out, then up to a fifth."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    files = {f"photos/{index}.png": Image.fromarray(noise) for index in range(24)}
    for index in range(count):
        files[f"photos/{index}.png"] = b"\x89PNG broken" if kind == "truncated" else None
    lines = [f"photos/{index}.png,{'ab'[index % 2]}" for index in range(24)]
    table = "\n".join(["image,label", *lines]).encode()
    config = tree({name: content for name, content in files.items() if content is not None} | {"t.csv": table})
    rows = datasets.concatenate_datasets([load_splits(config, 0).train, load_splits(config, 0).test])
    reason = "is not there" if kind == "missing" else "does not decode: it is of no known format"

    if is_refused:
        for read in (partial(to_examples, images=True, texts=False), with_readable_images):
            with pytest.raises(ConfigError, match=rf"of which {count} of 24 images cannot be read: .*{reason}"):
                read(rows, config)
        return
    examples, kept = to_examples(rows, config, images=True, texts=False), with_readable_images(rows, config)

    assert len(examples) == len(kept) == 24 - count
    assert len(examples.left_out) == count
    for index in range(count):
        (said,) = (line for line in examples.left_out if line.startswith(f"row {index} of t.csv (its image "))
        assert f"photos/{index}.png' {reason}" in said
    assert bool(caplog.text) == bool(count)


def test_a_text_stays_where_only_its_image_is_broken(tree):
    lines = ["0.png,no image,a", *(f"{index}.png,text {index},{'ab'[index % 2]}" for index in range(1, 8))]
    table = "\n".join(["image,text,label", *lines]).encode()
    config = tree({f"{index}.png": 10 for index in range(1, 8)} | {"t.csv": table})
    rows = datasets.concatenate_datasets([load_splits(config, 0).train, load_splits(config, 0).test])

    kept = with_readable_images(rows, config)

    assert len(to_examples(kept, config, images=False, texts=True)) == 8
    assert len(to_examples(kept, config, images=True, texts=False)) == 7


def test_what_the_judge_names_simulated_clients_do_not_name_again(tmp_path, caplog):
    for index in range(1, 20):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")  # 0.png is not there.
    lines = [f"{index}.png,{'ab'[index % 2]}" for index in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *lines]))
    data = DataConfig(dataset=str(tmp_path / "t.csv"), partitioner="iid")
    node = NodeConfig(partition_id=0, num_partitions=1)

    load_private_data(RunConfig(data=data, judge=True), node, ("a", "b"), images=True, texts=False)
    judged = caplog.text
    load_private_data(RunConfig(data=data, judge=False), node, ("a", "b"), images=True, texts=False)

    assert "left out" not in judged
    assert "1 of " in caplog.text
    assert "left out: row 0 of t.csv" in caplog.text

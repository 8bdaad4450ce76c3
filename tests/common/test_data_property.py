"""Random small datasets in every format: what was written is read, or the error names the culprit.

``FEDMMKT_EXAMPLES=2000`` tries more of them.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig
from fedmmkt.common.datasets import load_splits, to_examples

many = settings(
    max_examples=int(os.environ.get("FEDMMKT_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# The first may be names of folders, the others need quotes in some tables.
WORDS = ("None", "NA", "null", "nan", "NaN", "train", "test", "val", "007", "7", "-0", "10", "9", "1e3", "0.0", "True",
         "2020-01-01", "cat", "dög", "do\u0308g", "zoe\u0308", "日本", "a b")  # fmt: skip
ODD_WORDS = ("N/A", "a,b", 'say "no"', "two\nlines", "tab\there", " padded ", "#1", "=1+1", "'", "-")
ODD_NAMES = ("", " (1)", "[1]", "#x", "*", "{a}", "e\u0301", "%20", "?")
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TYPES = {"words": "string", "integers": "int32", "floats": "float64", "booleans": "bool"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def plain(value):
    """Return a label as the name of its class."""
    return unicodedata.normalize("NFC", str(int(value) if isinstance(value, float) else value))


def write_text(path, kind, columns, packed=""):
    """Write a table of texts; an empty cell is None."""
    rows = list(zip(*columns.values(), strict=True))
    if kind in ("csv", "tsv"):
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter="\t" if kind == "tsv" else ",").writerows([list(columns), *rows])
        text = stream.getvalue()
    else:
        objects = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        text = "\n".join(objects) if kind == "jsonl" else f"[{', '.join(objects)}]"
    path.write_bytes(PACKED[packed](text.encode()))


def write_typed(path, kind, columns, labels, typed):
    """Write a table with types, as the `datasets` library or pandas does."""
    if typed == "categories" and "label" in columns and kind == "parquet":
        categories = pandas.Categorical(columns["label"], categories=labels)
        pandas.DataFrame({**columns, "label": categories}).to_parquet(path)
        return
    label = datasets.ClassLabel(names=labels) if typed == "feature" else datasets.Value(TYPES.get(typed, "string"))
    features = datasets.Features({name: label if name == "label" else datasets.Value("string") for name in columns})
    table = datasets.Dataset.from_dict(columns, features)
    (table.to_parquet if kind == "parquet" else table.save_to_disk)(path)


@st.composite
def texts_and_labels(draw):
    """Draw a kind of files, the type and values of labels, and files: their split and rows of text and label."""
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "saved"]))
    types = ["words", "integers"] + ([] if kind in ("csv", "tsv") else ["booleans", "floats"])
    typed = draw(st.sampled_from(types + (["feature", "categories"] if kind in ("parquet", "saved") else [])))
    number = st.integers(-1, 1200).map(float if typed == "floats" else int)
    one = {"integers": number, "floats": number, "booleans": st.booleans()}.get(
        typed, st.sampled_from(WORDS + ODD_WORDS)
    )
    labels = draw(st.lists(one, min_size=2, max_size=2 if typed == "booleans" else 4, unique_by=plain))
    row = st.tuples(st.sampled_from([*WORDS, *ODD_WORDS, ""]), st.sampled_from([*labels, None]))
    files = [("train", [("a text", label) for label in labels for _ in range(3)] + draw(st.lists(row, max_size=6)))]
    files += [("train", draw(st.lists(row, min_size=1, max_size=6))) for _ in range(draw(st.integers(0, 1)))]
    for split in ("test", "validation"):
        what = draw(st.sampled_from(["", "", "labels", "no label", "no column"]))
        rows = [("a text", labels[0]), *draw(st.lists(row, max_size=6))]
        if what:
            files.append((split, rows if what == "labels" else [(text, what) for text, _ in rows]))
    return kind, typed, labels, files


def write_files(root, kind, typed, labels, files, packed, odd=""):
    for number, (split, rows) in enumerate(files):
        values = [label for _, label in rows]
        columns = {"text": [text for text, _ in rows], "other": [str(number)] * len(rows)}
        if "no column" not in values:
            columns["label"] = [None if value == "no label" else value for value in values]
        if typed == "feature" and "label" in columns:
            columns["label"] = [-1 if value is None else labels.index(value) for value in columns["label"]]
        if number == 1:
            del columns["other"]
        if kind in ("parquet", "saved"):
            write_typed(root / f"{split}-{number}{odd}{'.parquet' * (kind == 'parquet')}", kind, columns, labels, typed)
        else:
            write_text(root / f"{split}-{number}{odd}.{kind}{packed}", kind, columns, packed)


def text_pairs(part, config, classes):
    """Count the texts that are read, each with its class."""
    if not any(part["text"]):
        with pytest.raises(ConfigError, match=r"no row is complete: row \d+ of \S+-\d"):
            to_examples(part, config, images=False, texts=True)
        return Counter()
    examples = to_examples(part, config, images=False, texts=True)
    return Counter(zip(examples.texts, (classes[label] for label in examples.labels_N), strict=True))


def in_order(kind, typed, labels, names):
    if typed == "feature":
        return tuple(map(plain, labels))
    is_text = typed in ("words", "categories") and kind not in ("csv", "tsv")
    integers = not is_text and all(re.fullmatch(r"0|-?[1-9]\d*", name) for name in names)
    return tuple(sorted(names, key=int if integers else str))


@many
@given(texts_and_labels(), st.sampled_from(list(PACKED)), st.sampled_from(ODD_NAMES), st.booleans())
def test_texts_and_labels_are_read_as_they_were_written(drawn, packed, odd, is_own):
    kind, typed, labels, files = drawn
    written = {"train": Counter()}
    for split, rows in files:
        for text, label in rows:
            if label is not None and label not in ("no label", "no column"):
                written.setdefault(split, Counter())[text, plain(label)] += 1
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), kind, typed, labels, files, packed, odd)
        (Path(folder) / "README.md").write_text("not data")
        config = NodeConfig(data_path=folder).own_data(DataConfig()) if is_own else DataConfig(dataset=folder)
        splits = load_splits(config, 0)
        train, test = (text_pairs(part, config, splits.classes) for part in (splits.train, splits.test))
    tested = written.get("test") or written.get("validation") or Counter()
    names = {name for _, name in [*written["train"], *tested]}
    assert splits.classes == in_order(kind, typed, labels, names)
    written, tested = (Counter({pair: count for pair, count in part.items() if pair[0]})
                       for part in (written["train"], tested))  # fmt: skip
    assert (train, test) == (written, tested) if tested else train + test == written


# Kinds of images, with the end of their files' names.
MODES = {"L": ".png", "LA": ".png", "P": ".png", "RGB": ".webp", "RGBA": ".PNG", "CMYK": ".tif", "JPEG": ".JPG",
         "integers": ".png", "long": ".tif", "floats": ".tiff", "PGM": ".pgm"}  # fmt: skip
DEEP = {"integers": np.uint16, "long": np.int32, "floats": np.float32, "PGM": ">u2"}
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
STEMS = ("training_1", "test", "val-3", "dev.2", "e\u0301te\u0301", "été 2", "metadata", "1", "(1)", "#2", "100%")
LAYOUTS = ("folders", "folders", "embedded", "csv", "jsonl", "metadata.csv", "metadata.jsonl")
STEP = 15  # Grey values are multiples, so that a value is known again after a lossy format.


def encoded(mode, grey, bits):
    """Encode a wide image of one grey; its edge, which will be cropped away, shows what white is."""
    white = {"integers": 2**bits - 1, "long": 2**bits - 1, "floats": 1 if bits < 14 else 255, "PGM": 2**16 - 1}
    pixels = np.full((8, 12), grey / 255 * white.get(mode, 255))
    pixels[:, 0] = grey if mode == "JPEG" else white.get(mode, 255)  # JPEG would smear the edge.
    pixels = (pixels if mode == "floats" else pixels.round()).astype(DEEP.get(mode, np.uint8))
    if mode == "PGM":
        return b"P5\n12 8\n65535\n" + pixels.tobytes()
    image, stream = Image.fromarray(pixels), io.BytesIO()
    if mode not in (*DEEP, "JPEG"):
        image = image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)
    image.save(stream, FORMATS[MODES[mode].lower()], lossless=True)
    return stream.getvalue()


@st.composite
def pictures(draw):
    """Draw images: split, label, grey value, mode, and the stem of their files' names."""
    labels = draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=3, unique_by=plain))
    image = st.tuples(st.integers(0, 255 // STEP), st.sampled_from(list(MODES)), st.sampled_from(STEMS))
    test = draw(st.sampled_from(["", "", "test", "Testing", "eval", "val", "dev"]))
    return [
        (split, label, grey * STEP, mode, stem)
        for split in (["train", test] if test else [""])
        for label in labels
        for grey, mode, stem in draw(st.lists(image, min_size=3, max_size=4))
    ]


def write_pictures(root, layout, images, bits):
    """Write images in class folders, beside a table that names them, or into a table."""
    rows = {}
    for number, (split, label, grey, mode, stem) in enumerate(images):
        name, content = f"{stem}{number}{MODES[mode]}", encoded(mode, grey, bits)
        folder = root / split / (label if layout == "folders" else "bilder")
        folder.mkdir(parents=True, exist_ok=True)
        if layout != "embedded":
            (folder / name).write_bytes(content)
        image = {"bytes": content, "path": None} if layout == "embedded" else "bilder/" + plain(name)
        rows.setdefault(split, []).append((image, label))
    for split, pairs in rows.items():
        columns = dict(zip(("image", "label"), map(list, zip(*pairs, strict=True)), strict=True))
        if layout == "embedded":
            datasets.Dataset.from_dict(columns).to_parquet(root / split / "images.parquet")
        elif layout.startswith("metadata"):
            columns = {"file_name": columns["image"], "label": columns["label"]}
            write_text(root / split / layout, layout.split(".")[1], columns)
        elif layout != "folders":
            write_text(root / split / f"table.{layout}", layout, columns)


def grey_pairs(part, config, classes):
    """Count the grey values that are read, each with its class."""
    examples = to_examples(part, config, images=True, texts=False)
    values = examples.images_NHWC.reshape(len(examples), -1).astype(int)
    steps = (values.mean(1) / STEP).round().astype(int)
    assert np.abs(values - STEP * steps[:, None]).max() <= 3
    return Counter((classes[label], step) for label, step in zip(examples.labels_N, steps, strict=True))


@many
@given(st.sampled_from(["csv", "jsonl", "parquet"]), st.lists(st.integers(0, 5), min_size=10, max_size=20))
def test_integers_take_the_names_of_the_run(kind, numbers):
    names = ("zero", "one", "do\u0308g", "None")
    with tempfile.TemporaryDirectory() as folder:
        file, columns = Path(folder) / f"t.{kind}", {"text": list(map(str, numbers)), "label": numbers}
        write_typed(file, kind, columns, [], "integers") if kind == "parquet" else write_text(file, kind, columns)
        config = DataConfig(dataset=str(file), classes=names)
        if max(numbers) > 3:
            with pytest.raises(
                ConfigError, match=rf"holds [45] in row \d+ of t.{kind}, .*gives 4 names; .* from 0 to 3"
            ):
                load_splits(config, 0)
            return
        splits = load_splits(config, 0)
    assert splits.classes == tuple(map(plain, names))
    for part in (splits.train, splits.test):
        assert part["label"][:] == list(map(int, part["text"]))


@many
@given(pictures(), st.sampled_from(LAYOUTS), st.sampled_from([10, 12, 14, 16]), st.sampled_from(["", "", "all/data"]))
def test_images_and_their_classes_are_read_as_they_were_written(images, layout, bits, wrapper):
    written = {"train": Counter(), "test": Counter()}
    for split, label, grey, *_ in images:
        written["train" if split in ("", "train") else "test"][plain(label), grey // STEP] += 1
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / ("" if layout.startswith("metadata") else wrapper), layout, images, bits)
        config = DataConfig(dataset=folder, image_size=8)
        splits = load_splits(config, 0)
        train, test = (grey_pairs(part, config, splits.classes) for part in (splits.train, splits.test))
    assert set(splits.classes) == {plain(label) for _, label, *_ in images}
    assert (train, test) == tuple(written.values()) if written["test"] else train + test == written["train"]


def a_pointer(file, kind, columns, row, packed):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    return "git-lfs pointer; allowed: the file that `git lfs pull` brings"


def half_a_file(file, kind, columns, row, packed):
    write_text(file, kind, columns, packed)
    file.write_bytes(file.read_bytes()[:-3])
    return "cannot be read: "


def no_label_column(file, kind, columns, row, packed):
    write_text(file, kind, {"text": columns["text"]}, packed)
    return "'label', and FILE has no such column"


def labels_of_another_type(file, kind, columns, row, packed):
    write_text(file, kind, columns | {"label": ["other"] * 4}, packed)
    return r"'label', which holds 0 in row 0 of train-0.*, and 'other' in row 0 of FILE; allowed: labels of one type"


def a_fraction(file, kind, columns, row, packed):
    write_text(file, kind, columns | {"label": [0.0] * row + [0.5] * (4 - row)}, packed)
    return f"'label', which holds .*: 0.5 in row {row} of FILE; allowed: class names, integers"


def two_types(file, kind, columns, row, packed):
    write_text(file, kind, columns | {"label": [0] * row + ["x"] + [0] * (3 - row)}, packed)
    return r"cannot be read: its column 'label' has .* in row \d.*; allowed: values of one type"


def a_longer_line(file, kind, columns, row, packed):
    lines = [["text", "label"], *([text, "0"] for text in columns["text"])]
    lines[row + 1].append("")
    text = "\n".join(("\t" if kind == "tsv" else ",").join(line) for line in lines)
    file.write_bytes(PACKED[packed](text.encode()))
    return f"cannot be read: line {row + 2} has 3 cells, and the header 2"


FAULTS = [
    *[(kind, fault) for kind in ("csv", "tsv") for fault in (a_pointer, no_label_column, a_longer_line)],
    *[(kind, fault) for kind in ("json", "jsonl")
      for fault in (a_pointer, no_label_column, half_a_file, labels_of_another_type, a_fraction, two_types)],
]  # fmt: skip


@many
@given(st.sampled_from(FAULTS), st.integers(0, 3), st.sampled_from(list(PACKED)))
def test_an_error_names_the_file_and_the_row(fault, row, packed):
    kind, spoil = fault
    columns = {"text": list("abcd"), "label": [0, 1, 0, 1]}
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(folder) / f"train-{number}.{kind}{packed}" for number in range(2))
        write_text(first, kind, columns, packed)
        pattern = spoil(second, kind, columns, row, packed)
        with pytest.raises(ConfigError, match=second.name) as error:
            load_splits(DataConfig(dataset=folder), 0)
    assert re.search(pattern.replace("FILE", second.name), str(error.value))


@many
@given(st.sampled_from(["csv", "tsv", "parquet"]), st.integers(0, 3), st.sampled_from(["0", "1"]))
def test_a_label_of_another_type_in_the_test_part_is_named(kind, row, label):
    values = [label] * 4
    values[row] = "other"
    with tempfile.TemporaryDirectory() as folder:
        for split, labels in (("train", [0, 1]), ("test", values)):
            path, columns = Path(folder) / f"{split}.{kind}", {"text": ["a"] * len(labels), "label": labels}
            if kind == "parquet":
                datasets.Dataset.from_dict(columns).to_parquet(path)
            else:
                write_text(path, kind, columns)
        with pytest.raises(ConfigError, match=f"'label', which holds 'other' in row {row} of test.{kind}, and int"):
            load_splits(DataConfig(dataset=folder), 0)

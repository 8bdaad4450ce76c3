"""The T2I model of a finished run: which adapters are there, and the labelled folder that it draws."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from fedmmkt.common.config import ConfigError, RunConfig, to_flower
from fedmmkt.deploy.generate import main
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.trained import FinishedRun, generate_folder, load_generator
from tests.conftest import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run two clients for two rounds."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    changes = {"client.models": "mlp", "t2i.samples-per-round": 20, "output-dir": str(folder)}
    run_config = to_flower(RunConfig()) | TINY | changes | {"t2i.guidance": "1.5,2"}
    nodes = [{"partition-id": index, "num-partitions": 2} for index in range(2)]
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes)
    build_strategy(RunConfig.from_flower(run_config), 1).start(grid)
    return folder


def table_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(folder / row["file_name"])) for row in table_of(folder)])


def test_it_draws_as_many_of_each_class_as_are_asked_for(run, tmp_path, capsys):
    code = main([str(run), "--per-class", "3", "--out", str(tmp_path / "drawn")])

    rows = table_of(tmp_path / "drawn")
    classes = json.loads((run / "config.json").read_text())["classes"]
    assert code == 0
    assert capsys.readouterr().out == f"30 images in {tmp_path / 'drawn'}\n"
    assert [row["label"] for row in rows] == [name for name in classes for _ in range(3)]
    assert all(row["label"] in row["prompt"] for row in rows)
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "drawn"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read["label"][:] == [row["label"] for row in rows]
    assert read[0]["image"].size == (32, 32)


def test_loading_says_nothing_of_packages_that_it_does_not_need(run):
    program = f"from fedmmkt import load_generator; load_generator({str(run)!r})"
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr + done.stdout


def test_images_are_those_of_the_runs_generator_whatever_is_held_at_once(run, tmp_path):
    few = {"t2i.generation-batch-size": 2}  # Eight at once, with a rest.

    generate_folder(run, tmp_path / "drawn", per_class=1, seed=7, changes=few)

    generator, rows = load_generator(run), table_of(tmp_path / "drawn")
    seeds = [int(seed) for seed in np.random.SeedSequence((7, 0)).generate_state(10)]
    whole = generator.generate([row["prompt"] for row in rows], seeds, guidance=2.0)  # That of round 2.
    difference = np.abs(pixels_of(tmp_path / "drawn").astype(int) - whole.images_NHWC)
    assert difference.max() <= 1  # Sums of batches of other sizes are rounded otherwise.


def test_the_adapter_is_of_the_round_or_none(run, tmp_path):
    pictures = {}
    for name, chosen in {"last": {}, "two": {"round": 2}, "one": {"round": 1}, "zero": {"round": 0},
                         "none": {"with_adapter": False}}.items():  # fmt: skip
        generate_folder(run, tmp_path / name, per_class=1, guidance=1.0, **chosen)
        pictures[name] = pixels_of(tmp_path / name)

    assert np.array_equal(pictures["last"], pictures["two"])
    assert np.array_equal(pictures["zero"], pictures["none"])
    assert not np.array_equal(pictures["last"], pictures["one"])
    assert not np.array_equal(pictures["one"], pictures["zero"])


def test_a_round_without_an_adapter_is_refused_with_those_that_have_one(run, tmp_path, capsys):
    assert list(FinishedRun.read(run).rounds) == [0, 1, 2]
    assert main([str(run), "--per-class", "1", "--round", "3", "--out", str(tmp_path / "drawn")]) == 2
    assert "the round is 3, whose adapter is not in" in (shown := capsys.readouterr().err)
    assert "allowed: 0, 1, 2 (a run keeps as many as its checkpoints-kept, 2; 0 is before any learning)" in shown
    assert not (tmp_path / "drawn").exists()


def test_a_file_of_prompts_gives_an_image_each(run, tmp_path):
    lines = ({"prompt": "the digit two", "class": "two"}, {"prompt": "a scribble"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    generate_folder(run, tmp_path / "drawn", prompts=tmp_path / "prompts.jsonl")

    assert [(row["label"], row["prompt"]) for row in table_of(tmp_path / "drawn")] == [
        ("two", "the digit two"),
        (None, "a scribble"),
    ]


def test_a_folder_with_anything_in_it_is_refused(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and not empty; allowed: a new or an empty folder"):
        generate_folder(run, tmp_path, per_class=1)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_neither_and_both_kinds_of_prompts_are_refused(run, tmp_path):
    for asked in ({}, {"per_class": 1, "prompts": "a.jsonl"}, {"per_class": 0}):
        with pytest.raises(ConfigError, match="allowed: 1 or more, or a file of prompts"):
            generate_folder(run, tmp_path / "drawn", **asked)


def test_what_is_no_run_folder_and_a_damaged_checkpoint_are_named(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is no run folder: its config.json or metrics.jsonl cannot be read"):
        load_generator(tmp_path)
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "round-00001" / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"tensors.safetensors is not what was written"):
        load_generator(tmp_path / "copy", round=1)

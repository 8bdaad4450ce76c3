"""A T2I of a public part of a dataset, and the benchmark that begins with it, on a tiny dataset made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import cifar10, curves
from benchmarks.emoji import ACROSS, WHOLE, WITHIN, PairJudge, measures, paired_tests, run_row, table
from benchmarks.references import centralised
from benchmarks.rows import keep
from fedmmkt.__main__ import main as fedmmkt
from fedmmkt.common.config import ConfigError, DataConfig, RunConfig, T2IConfig, to_flower
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.starter import public
from fedmmkt.starter.pretraining import warm_up

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = {"image": [], "name": [], "label": [], "row": []}
    for index in range(90):
        colour = list(COLOURS)[index % 3]
        image = np.clip(np.array(COLOURS[colour]) + rng.integers(-40, 40, (20, 20, 3)), 0, 255).astype(np.uint8)
        for column, value in zip(rows, (image, f"{colour} thing {index}", index % 3, index), strict=True):
            rows[column].append(value)
    features = datasets.Features(
        image=datasets.Image(),
        name=datasets.Value("string"),
        label=datasets.ClassLabel(names=list(COLOURS)),
        row=datasets.Value("int64"),
    )
    folder = tmp_path_factory.mktemp("data")
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def start(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "made"
    sizes = ["--image-size", "16", "--autoencoder", "8", "16", "--unet", "16", "16"]
    steps = ["--autoencoder-steps", "3", "--diffusion-steps", "3", "--tokens", "8"]
    columns = ["--caption-column", "name", "--public", "21"]
    public.main(["--dataset", str(dataset), "--out", str(folder), *columns, *sizes, *steps])
    return folder


def rows_of(folder):
    return datasets.load_dataset("parquet", data_files=str(folder), split="train", cache_dir=str(folder.parent / "c"))


def test_the_public_part_is_never_in_the_clients_data(start):
    parts = [rows_of(start / name) for name in ("public/train.parquet", "data/train.parquet", "data/test.parquet")]

    seen = [set(part["row"]) for part in parts]
    assert [len(rows) for rows in seen] == [21, 51, 18]
    assert set.union(*seen) == set(range(90))
    assert np.bincount(parts[0]["label"]).tolist() == [7, 7, 7]


def test_broken_and_missing_photos_are_found_before_anything_is_written(tmp_path, caplog):
    for index in range(40):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"photo-{index}.png")
    (tmp_path / "photo-7.png").write_bytes((tmp_path / "photo-7.png").read_bytes()[:50])
    (tmp_path / "photo-8.png").unlink()
    lines = [f"photo-{index}.png,{'ab'[index % 2]}" for index in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *lines]))

    part = public.divide(DataConfig(dataset=str(tmp_path / "t.csv")), 10, 0)

    assert len(part.public) == 10
    assert len(part.public) + len(part.private) + len(part.test) == 38
    assert f"row 7 of t.csv (its image '{tmp_path / 'photo-7.png'}' does not decode: " in caplog.text
    assert f"row 8 of t.csv (its image '{tmp_path / 'photo-8.png'}' is not there)" in caplog.text


def write_marked(folder, marks):
    for index, _ in enumerate(marks):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
    lines = [f"{index}.png,{'ab'[index % 2]},{mark}" for index, mark in enumerate(marks)]
    (folder / "t.csv").write_text("\n".join(["image,label,consent", *lines]))
    return DataConfig(dataset=str(folder / "t.csv"), image_size=16)


def files_of(rows):
    return {Path(item["path"]).name for item in rows.cast_column("image", datasets.Image(decode=False))["image"]}


def test_a_column_says_which_rows_are_public(tmp_path):
    config = write_marked(tmp_path, ["yes" if index % 4 < 2 else "no" for index in range(40)])

    part = public.divide(config, "consent=yes", 0)

    assert files_of(part.public) == {f"{index}.png" for index in range(40) if index % 4 < 2}
    assert files_of(part.private) | files_of(part.test) == {f"{index}.png" for index in range(40) if index % 4 >= 2}
    assert len(part.test) > 0


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("split=yes", "has no column 'split'; allowed: a number, or COLUMN=VALUE with one of consent, image, label"),
        ("consent=maybe", "no row has this value; the column's values: no, yes"),
        ("consent=", "no row has this value"),
        ("label=a", ""),
    ],
)
def test_a_mark_that_is_not_there_is_refused(tmp_path, condition, said):
    config = write_marked(tmp_path, ["yes", "no"] * 20)

    if not said:  # the label is a column too
        assert len(public.divide(config, condition, 0).public) == 20
        return
    with pytest.raises(ConfigError, match=said):
        public.divide(config, condition, 0)


def test_what_is_made_is_a_pipeline_with_its_prompts_and_cost(start):
    pipeline = DiffusionPipeline.from_pretrained(start / "model")
    prompts = [json.loads(line) for line in (start / "prompts.jsonl").read_text().splitlines()]
    cost = json.loads((start / "cost.json").read_text())

    assert pipeline("red thing", num_inference_steps=2).images[0].size == (16, 16)
    assert {prompt["prompt"].split()[0] == prompt["class"] for prompt in prompts} == {True}
    assert len(prompts) == 21
    assert (cost["public"], cost["private"]) == (21, 51)
    assert cost["seconds"] > 0
    assert (start / "model" / "samples.png").exists()


def test_clients_and_test_part_may_get_a_part_of_the_others(dataset):
    config = DataConfig(dataset=str(dataset))

    part = public.divide(config, 21, 0, private=12, test=6)

    seen = [set(rows["row"][:]) for rows in (part.public, part.private, part.test)]
    assert [len(rows) for rows in seen] == [21, 12, 6]
    assert len(set.union(*seen)) == 39
    assert np.bincount(part.private["label"]).tolist() == [4, 4, 4]
    assert len(public.divide(config, 21, 0, private=1000).private) == 51


@pytest.mark.parametrize("count", ["2", "70", "1000"])
def test_too_few_or_too_many_public_examples_are_refused(dataset, tmp_path, capsys, count):
    with pytest.raises(SystemExit):
        public.main(["--dataset", str(dataset), "--out", str(tmp_path / "out"), "--public", count])
    assert f"--public is {count}; allowed: 3 (the classes) up to 69" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image-size", "20"], "option --image-size is 20; allowed: a multiple of 8"),
        (["--diffusion-steps", "2"], "option --diffusion-steps is 2; allowed: 3 or more"),
        (["--unet", "12", "16"], "option --unet is [12, 16]; allowed: multiples of eight"),
        (["--label-column", "class"], "option --label-column is 'class', and the dataset has no such column"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
    ],
)
def test_what_would_fail_in_the_midst_is_refused_by_its_option(dataset, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit):
        public.main(["--dataset", str(dataset), "--out", str(tmp_path / "out"), "--public", "21", *options])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(dataset, capsys):
    with pytest.raises(SystemExit):
        public.main(["--dataset", str(dataset), "--out", str(dataset), "--public", "21"])
    assert "which holds something else; allowed: a new or an empty folder" in capsys.readouterr().err
    assert (dataset / "train.parquet").is_file()


@pytest.mark.parametrize("row", [WHOLE, WITHIN])
def test_the_benchmark_of_pairs_runs_a_federation_and_measures_its_t2i(start, tmp_path, row):
    judge = PairJudge(start)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in judge.prompts))
    tiny = {"data.min-examples": 2, "data.text-column": "name", "data.image-size": 16, "t2i.inference-steps": 2}
    tiny |= {"client.distillation-steps": 2, "client.warmup-epochs": 1, "t2i.adaptation-steps": 1}

    lines = run_row(row, 0, 2, 100.0, start, tmp_path, tiny)
    generator = Generator(T2IConfig(model=str(start / "model"), inference_steps=2), 0)
    pairs = judge.measure(generator, 1.0)

    assert (lines[-1]["generator"]["loss"] is None) == (row == WITHIN)
    if sys.platform == "linux":
        assert all(100 < megabytes < 4000 for megabytes in lines[-1]["memory"].values())
    assert 0 <= pairs.own <= 1
    assert pairs.frechet > 0
    row = measures(lines, pairs)
    assert table({"one": [row, row]}).splitlines()[2].startswith(f"| one | {row['all clients']:.3f} ± 0.000 |")


def test_paired_differences_by_hand():
    on, off = ([dict.fromkeys(("all clients", "own image"), value) for value in values] for values in ((3, 4), (2, 2)))
    rows = {ACROSS: on, WITHIN: off}

    cells = paired_tests(rows).splitlines()[2].split(" | ")

    # Differences 1 and 2: mean 1.5, standard error 0.5, t = 3 with one degree of freedom, p = 0.2048.
    assert cells[1] == "+1.500 (2/2, p = 0.2)"


def test_the_centralised_bound_is_of_every_architecture_and_kept(dataset, tmp_path):
    settings = {"rounds": 1, "client.warmup-epochs": 4, "client.local-epochs": 1}
    settings |= {"data.dataset": str(dataset), "data.image-size": 16, "data.alpha": 100.0}

    def run():
        return {name: centralised(tmp_path / name, settings, 2, name) for name in cifar10.ARCHITECTURES}

    rows = run()

    assert list(rows) == list(cifar10.ARCHITECTURES)
    # Three colours, one in three by chance.
    assert max(lines[-1]["clients"]["accuracy"] for lines in rows.values()) > 0.6
    assert run() == rows


def test_every_profile_and_row_of_the_benchmark_is_a_configuration():
    for profile in (cifar10.FULL, cifar10.QUICK):
        for row in cifar10.ROWS.values():
            config = RunConfig.from_flower(to_flower(RunConfig()) | cifar10.SETTINGS | profile.settings | row)
            assert config.client.models == cifar10.ARCHITECTURES


def test_curves_are_means_over_seeds_with_one_standard_deviation(tmp_path):
    nothing = {"alignment": None, "frechet": None}
    lines = [[{"clients": {"accuracy": value}, "generator": nothing} for value in values]
             for values in ((0.1, 0.5, 0.7), (0.3, 0.9))]  # fmt: skip
    for seed, kept in enumerate(lines):
        keep(tmp_path / "a-row" / f"seed-{seed}", kept, 1.0)

    runs = curves.read_runs(tmp_path)
    mean_R, deviation_R = curves.band([[line["clients"]["accuracy"] for line in seed] for seed in runs["a row"]])
    curves.draw(runs, tmp_path / "figure.png")

    assert mean_R.tolist() == pytest.approx([0.2, 0.7])
    assert deviation_R.tolist() == pytest.approx([0.02**0.5, 0.08**0.5])
    assert Image.open(tmp_path / "figure.png").size[0] > 400


def test_curves_have_a_panel_for_what_some_rows_measure(tmp_path):
    for row, alignment in (("frozen", None), ("adapted", 0.5)):
        line = {"clients": {"accuracy": 0.1}, "generator": {"alignment": alignment, "frechet": None}}
        keep(tmp_path / row / "seed-0", [line, line], 1.0)

    runs = curves.read_runs(tmp_path)
    curves.draw(runs, tmp_path / "figure.png")

    assert curves.values(runs["frozen"], "T2I alignment") == []
    assert curves.values(runs["adapted"], "T2I alignment") == [[0.5, 0.5]]
    assert Image.open(tmp_path / "figure.png").size[0] > 2 * 400


def test_the_public_examples_of_each_class_are_counted_and_a_class_without_is_told(tmp_path, capsys):
    config = write_marked(tmp_path, ["yes" if index % 2 else "no" for index in range(40)])  # All "b", no "a".
    sizes = ["--image-size", "16", "--autoencoder", "8", "16", "--unet", "16", "16", "--tokens", "8", "--threads", "1"]
    steps = ["--autoencoder-steps", "3", "--diffusion-steps", "3"]
    command = ["--dataset", config.dataset, "--public", "consent=yes", "--out", str(tmp_path / "start"), *sizes, *steps]

    assert public.main(command) == 0

    told = capsys.readouterr()
    assert "public examples of each class: a 0, b 20" in told.out
    assert "WARNING: no public example is of the class a: the T2I cannot draw it" in told.err
    assert json.loads((tmp_path / "start" / "cost.json").read_text())["threads"] == 1


TINY = ["--image-size", "16", "--autoencoder", "8", "16", "--unet", "16", "16", "--tokens", "8", "--threads", "1"]


def test_rows_without_a_caption_get_one_with_their_class_and_numbers_are_told_once(tmp_path, capsys, caplog):
    for index in range(40):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    parts = {"train": range(30), "test": range(30, 40)}
    for name, rows in parts.items():  # Every second has consent, every fourth a caption; number 1 no image.
        lines = [
            f"{f'{row}.png' * (row != 1)},{'ab'[row // 2 % 2]},{('no', 'yes')[row % 2]},{'seen' * (row % 4 == 1)}"
            for row in rows
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label,consent,caption", *lines]))
    steps = ["--autoencoder-steps", "3", "--diffusion-steps", "3", "--caption-column", "caption"]
    command = ["--dataset", str(tmp_path), "--public", "consent=yes", "--out", str(tmp_path / "start"), *TINY, *steps]

    assert public.main(command) == 0

    assert (
        "19 public examples for the T2I (1 more have no image and are left out; 5 of them were in the test part; 10 "
        "have no caption, and get one with the name of their class); for clients 15 to learn and 5 to test"
    ) in capsys.readouterr().out
    assert "left out" not in caplog.text
    prompts = [json.loads(line) for line in (tmp_path / "start" / "prompts.jsonl").read_text().splitlines()]
    assert {"prompt": "seen", "class": "a"} in prompts
    assert all(
        prompt["prompt"].split()[-1] == prompt["class"] == "b" for prompt in prompts if prompt["prompt"] != "seen"
    )


def test_ctrl_c_ends_the_command_in_a_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(public, "make", interrupted)

    code = fedmmkt(["pretrain", "--dataset", "digits", "--public", "20", "--out", str(tmp_path / "start")])

    assert (code, capsys.readouterr().err) == (130, "stopped\n")
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("passive", "1000")


def test_help_tells_the_defaults_of_each_size(capsys):
    with pytest.raises(SystemExit):
        public.main(["--help"])

    told = " ".join(capsys.readouterr().out.split())
    assert "channels of its levels (small: 16 32 48, medium: 32 64 96)" in told
    assert "--diffusion-steps DIFFUSION_STEPS small: 1500, medium: 6000" in told


def test_pretraining_says_nothing_of_packages_that_it_does_not_need(tmp_path):
    config = write_marked(tmp_path, ["yes", "no"] * 20)
    sizes = ["--image-size", "16", "--autoencoder", "8", "16", "--unet", "16", "16", "--tokens", "8", "--threads", "1"]
    steps = ["--autoencoder-steps", "3", "--diffusion-steps", "3"]
    command = ["--dataset", config.dataset, "--public", "20", "--out", str(tmp_path / "start"), *sizes, *steps]
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}

    done = subprocess.run(
        [sys.executable, "-m", "fedmmkt", "pretrain", *command], capture_output=True, text=True, env=environment
    )

    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr + done.stdout


@pytest.mark.parametrize(("steps", "part"), [(4000, 0.05), (40, 0.05), (20, 0.1), (3, 2 / 3)])
def test_the_learning_rate_rises_in_two_steps_at_least(steps, part):
    assert warm_up(steps, 0.05) == pytest.approx(part)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps, pct_start=warm_up(steps, 0.05))
    for _ in range(steps):
        optimizer.step()
        schedule.step()

"""What the README shows, run."""

import csv
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedmmkt.__main__ import main
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.server_app.app import build_strategy
from tests import ROOT, tiny_pipelines, tiny_transformers

README = (ROOT / "README.md").read_text()


def blocks(language):
    """Return the page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(word):
    """Return the lines of the one block of commands that has a word in it, each as its arguments."""
    (block,) = [block for block in blocks("sh") if word in block]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def my_method(tmp_path, monkeypatch):
    """Write all definitions of the page as one module of the user's own, which can be imported."""
    definitions = [code for code in blocks("python") if "def " in code]
    (tmp_path / "my_method.py").write_text("\n\n".join(definitions))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_method", None)


def test_the_snippets_run_in_a_federation_as_the_page_names_them(my_method, tiny_run, make_grid):
    (named,) = [changed for changed in shown() if "my_method:" in str(changed)]
    models = "my_method:linear,text,my_method:linear"
    run_config = tiny_run(rounds=1, client__models=models) | named | {"extra.trim": 0.34}
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=3))

    (line,) = strategy.recorder.run_folder.read_metrics()[1:]
    assert line["replies"]["received"] == 3
    assert type(strategy).__name__ == "TextAlone"
    ((_, targets),) = strategy.ledger.history
    by_text, by_all = (targets.distinct[targets.of_modality[modality]] for modality in ("text", "image"))
    assert not np.array_equal(by_text.probabilities_NC, by_all.probabilities_NC)
    # Of three clients 0.34 of them, one, is left out at each end: the rule is the median.
    logits_KNC = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(strategy.aggregation(logits_KNC, None, None), logits_KNC.softmax(-1).median(0).values)


def shown():
    """Return every run-config of the page, as flat settings."""
    found = re.findall(r"RUN_CONFIG='([^']*)'", README) + re.findall(r"`'([a-z][^`]*)'`", README)
    return [parse_run_config([overrides]) for overrides in found]


def test_every_run_config_shown_is_accepted():
    assert len(shown()) >= 6
    for changed in shown():
        assert changed.keys() <= to_flower(RunConfig()).keys()
        RunConfig.from_flower(to_flower(RunConfig()) | changed)


def birds(folder):
    """Make the table that the page's example of data names, with its columns and image files beside it."""
    rng = np.random.default_rng(0)
    lines = ["photo,species,note"]
    for index, species in enumerate(("robin", "wren", "owl")):
        for number in range(100):
            pixels = np.clip(rng.integers(0, 60, (40, 24, 3)) + index * 90, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{species}-{number}.png")
            lines.append(f"{species}-{number}.png,{species},a {species} on a branch")
    (folder / "birds.csv").write_text("\n".join(lines))
    return str(folder / "birds.csv")


STAND_INS = {
    "stabilityai/stable-diffusion-3.5-medium": lambda folder: tiny_pipelines.save("sd3", folder / "sd3"),
    "google/vit-base-patch16-224": lambda folder: tiny_model(folder / "vit", tiny_transformers.image_config()),
    "distilbert-base-uncased": lambda folder: tiny_model(folder / "bert", tiny_transformers.text_config("distilbert")),
}


def tiny_model(folder, config):
    return tiny_transformers.save(folder, config).removeprefix("transformers:")


@pytest.mark.parametrize("named", [("stabilityai/stable-diffusion-3.5-medium",),
                                   ("google/vit-base-patch16-224", "distilbert-base-uncased")])  # fmt: skip
def test_each_example_of_own_data_and_models_runs(named, tiny_run, make_grid, tmp_path):
    """As it is written, but for the user's file and the hub's models, in whose place are small ones made here."""
    (changed,) = [changed for changed in shown() if all(name in str(changed) for name in named)]
    for name in named:
        place = STAND_INS[name](tmp_path)
        changed = {k: v.replace(name, place) if isinstance(v, str) else v for k, v in changed.items()}
    run_config = tiny_run(rounds=1, t2i__samples_per_round=12, data__alpha=1.0) | changed
    models = run_config["client.models"].split(",")

    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=min(len(models), 6)))

    lines = strategy.recorder.run_folder.read_metrics()
    assert lines[-1]["replies"]["rejected"] == 0
    assert lines[-1]["replies"]["received"] == len(models)
    assert lines[-1]["generator"]["loss"] > 0


def test_own_photos_go_from_a_file_to_predictions(tiny_run, make_grid, tmp_path, monkeypatch, capsys):
    """As it is written, but with few steps, and in one process."""
    birds(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "gold").save("new-photo.jpg")
    lines = [[word.replace("/data/", f"{tmp_path}/") for word in line] for line in commands("pretrain --dataset")]
    install, doctor, pretrain, demo, predict, generate = lines

    assert install[:2] == ["make", "install"]
    assert main(doctor[1:]) == 0
    assert "birds.csv has 240 examples to learn (owl 80, robin 80, wren 80) and 60 to test" in capsys.readouterr().out
    assert main([*pretrain[1:], "--autoencoder-steps", "3", "--diffusion-steps", "3"]) == 0
    told = parse_run_config(re.findall(r"demo --run-config '(.*)'", capsys.readouterr().out))
    settings = dict(word.split("=", 1) for word in demo[2:])
    changed = parse_run_config([settings["RUN_CONFIG"]])
    assert changed.items() >= told.items() - {("data.image-size", 32)}  # The default, which the page leaves out.
    run_config = tiny_run(output_dir=str(tmp_path / settings["OUT"]), client__state_dir="") | changed | {"rounds": 1}
    build_strategy(RunConfig.from_flower(run_config), 1).start(make_grid(run_config, nodes=int(settings["NODES"])))
    capsys.readouterr()
    assert main(predict[1:]) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["file"] == "new-photo.jpg"
    assert row["class"] in ("owl", "robin", "wren")
    assert main(generate[1:]) == 0
    assert len(list((tmp_path / "runs" / "birds-drawn").glob("*.png"))) == 60


def test_what_a_run_trained_is_used_as_the_page_shows_it(tiny_run, make_grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_config = tiny_run("runs/demo", rounds=1, client__state_dir="")
    build_strategy(RunConfig.from_flower(run_config), 1).start(make_grid(run_config, nodes=2))
    (tmp_path / "scans").mkdir()
    for name in ("digit.png", "scans/one.png", "scans/two.jpg"):
        Image.new("RGB", (50, 40), "gold").save(name)

    codes = [main(line[1:]) for line in commands("fedmmkt predict runs/demo")]
    shown = {}
    (code,) = [code for code in blocks("python") if "load_generator" in code]
    exec(code, shown)

    assert codes == [0, 0]
    rows = list(csv.DictReader((tmp_path / "predicted.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == ["digit.png", "scans/one.png", "scans/two.jpg"]
    assert len(list((tmp_path / "runs" / "drawn").glob("*.png"))) == 200
    assert shown["probabilities"].sum() == pytest.approx(1)
    assert shown["images"].shape == (1, 32, 32, 3)


def test_a_folder_of_images_runs_by_configuration_alone(tiny_run, make_grid, tmp_path):
    rng = np.random.default_rng(0)
    for index, species in enumerate(("robin", "wren", "owl")):
        for number in range(20):
            (tmp_path / "birds" / species).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.integers(0, 60, (40, 24, 3)) + index * 90, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "birds" / species / f"{number}.png")
    run_config = tiny_run(
        data__dataset=str(tmp_path / "birds"), data__partitioner="iid", client__models="cnn", rounds=1,
        t2i__prompt_templates="a photo of a {}",
    )  # fmt: skip
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2))
    assert strategy.classes == ("owl", "robin", "wren")
    assert strategy.recorder.run_folder.read_metrics()[-1]["replies"]["received"] == 2

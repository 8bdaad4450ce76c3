"""The ladder of methods: its rows, what they are compared with, and its references."""

import logging

import numpy as np
import pytest
import torch

from benchmarks import ladder
from benchmarks.references import _measured, centralised, fedavg, random_blocks
from benchmarks.rows import ACCURACY, harms, keep, t2i
from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.common.datasets import Examples

BRIEF = {"rounds": 1, "client.warmup-epochs": 1, "client.local-epochs": 1, "seed": 0}


@pytest.fixture(autouse=True)
def log_level(caplog):
    """A benchmark's command quietens Flower's log; put it back."""
    caplog.set_level(logging.INFO, "flwr")


def lines(accuracy, frechet):
    return [{"clients": {"accuracy": accuracy}, "generator": {"frechet": frechet}}]


def test_harm_is_the_one_sided_p_of_paired_differences():
    runs = {"frozen": [lines(0.5, 100), lines(0.6, 200)], "whole": [lines(0.6, 110), lines(0.8, 230)]}

    found = harms(runs, "frozen", (ACCURACY, t2i("frechet"))).splitlines()

    # Differences .1 and .2: t = .15 / .05 = 3 with one degree of freedom, p for less = 1/2 + atan(3)/pi.
    # Differences 10 and 30: t = 20 / 10 = 2; a larger distance is harm, p for greater = 1/2 - atan(2)/pi.
    assert found[2] == "| whole | +0.150 (p 0.9) | +20 (p 0.15) |"
    assert len(found) == 3


def test_every_dataset_has_the_same_rows():
    names = [list(ladder.rows_of(dataset)) for dataset in ladder.DATASETS.values()]

    assert all(one == names[0] for one in names)
    assert {ladder.FROZEN, ladder.WHOLE, "FedAvg of a CNN", "centralised ResNet"} <= set(names[0])


def test_data_that_are_missing_are_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ladder", "digits", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path)])

    with pytest.raises(SystemExit):
        ladder.main()

    assert f"cifar10: --data is {tmp_path}; allowed: a folder that holds 'cifar10'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_models_personal_accuracy_weighs_classes_by_a_nodes_own_examples():
    images_NHWC = np.zeros((4, 32, 32, 3), np.uint8)
    model = AlignedModel(build_task_model("mlp", 2, 32), anchor_size=0)
    with torch.no_grad():
        model.task_model.head.weight.zero_()
        model.task_model.head.bias.copy_(torch.tensor([1.0, 0.0]))  # It says class 0 of every image.
    test = Examples(np.array([0, 0, 0, 1]), images_NHWC)

    line = _measured(model, test, [np.array([0, 0]), np.array([0, 1, 1, 1])], (7, 8))

    assert line["clients"]["accuracy"] == 0.75
    assert line["evaluation"]["personal"] == pytest.approx((1 + 0.25) / 2)
    assert line["bytes"] == {"down": 7, "up": 8}


def test_fedavg_and_central_training_learn_and_are_kept(tmp_path):
    averaged = fedavg(tmp_path / "fedavg", BRIEF | {"data.alpha": 100.0}, 2, "cnn")
    central = centralised(tmp_path / "central", BRIEF, 2, "cnn")

    # Two epochs of 1,438 images; one class in ten by chance.
    assert averaged[-1]["clients"]["accuracy"] > 0.3
    assert central[-1]["clients"]["accuracy"] > 0.5
    weights = sum(weight.numel() for weight in build_task_model("cnn", 10, 32).parameters())
    assert averaged[-1]["bytes"]["up"] == pytest.approx(2 * 2 * 4 * weights, rel=0.01)  # Two nodes, two rounds.
    keep(tmp_path / "fedavg", [{"kept": True}], 0.0)
    assert fedavg(tmp_path / "fedavg", BRIEF, 2, "cnn") == [{"kept": True}]


def test_the_tables_have_each_row_and_what_it_is_compared_with(tmp_path, monkeypatch, capsys):
    def run(folder, settings, nodes):
        generator = {"alignment": 0.5, "frechet": 100.0 + settings["seed"]}
        line = {"clients": {"accuracy": 0.5, "by_modality": {}}, "generator": generator}
        return [line | {"bytes": {"down": 1, "up": 2}, "seconds": {"total": 3.0}}]

    monkeypatch.setattr(ladder, "rows_of", lambda dataset: {ladder.FROZEN: run, ladder.WHOLE: run})
    monkeypatch.setattr("sys.argv", ["ladder", "digits", "mnist", "--seeds", "2", "--out", str(tmp_path)])

    ladder.main()

    written = (tmp_path / "ladder.md").read_text()
    assert "### digits, alpha 0.1, 2 seed(s)" in written
    assert "### mnist, alpha 0.1, 2 seed(s)" in written
    assert "| the whole | 0.500 ± 0.000 |" in written
    assert "| minus the recipe, frozen T2I |" in written
    assert "The T2I before: alignment 0.500 ± 0.000, frechet 100 ± 1, precision -, recall -, coverage -." in written
    assert written.strip() in capsys.readouterr().out.strip()


def test_random_blocks_are_four_times_four_and_black_or_white():
    images_NHWC = random_blocks(50, seed=0)

    assert (images_NHWC.shape, images_NHWC.dtype) == ((50, 32, 32, 3), np.uint8)
    corners_N44C = images_NHWC[:, ::8, ::8]
    assert np.array_equal(images_NHWC, corners_N44C.repeat(8, axis=1).repeat(8, axis=2))
    assert set(np.unique(images_NHWC)) == {0, 255}
    assert 0.4 < corners_N44C.mean() / 255 < 0.6
    assert len(np.unique(images_NHWC.reshape(50, -1), axis=0)) == 50

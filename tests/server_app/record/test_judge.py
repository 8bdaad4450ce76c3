"""Measures against values computed by hand."""

import numpy as np
import pytest
import torch

from fedmmkt.common.config import RunConfig
from fedmmkt.common.datasets import load_splits
from fedmmkt.server_app.record import judge_training
from fedmmkt.server_app.record.judge import Judge, frechet_distance, judge_epochs


def test_frechet_distance_of_equal_spreads_is_the_squared_distance_of_means():
    rng = np.random.default_rng(0)
    features_NF = rng.normal(size=(500, 3))
    assert frechet_distance(features_NF, features_NF) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features_NF, features_NF + np.array([3.0, 4.0, 0.0])) == pytest.approx(25, abs=1e-6)


def test_frechet_distance_of_equal_means_compares_spreads():
    features_NF = np.random.default_rng(0).normal(size=(500, 2))
    features_NF -= features_NF.mean(0)
    variances = np.diag(np.cov(features_NF, rowvar=False)).sum()
    # Covariance S against 4 S: trace of S + 4 S - 2 * 2 S = S.
    assert frechet_distance(features_NF, 2 * features_NF) == pytest.approx(variances, rel=1e-6)


def test_the_judge_recognises_prompted_classes():
    rng = np.random.default_rng(0)
    labels_N = np.arange(60) % 2
    images_NHWC = np.clip(labels_N[:, None, None, None] * 150 + rng.integers(0, 80, (60, 16, 16, 3)), 0, 255).astype(
        np.uint8
    )
    judge = Judge(images_NHWC, labels_N, images_NHWC, labels_N, 2, seed=0)

    assert judge.accuracy == 1.0
    assert judge.measure(images_NHWC, labels_N).alignment == 1.0
    assert judge.measure(images_NHWC, 1 - labels_N).alignment == 0.0
    assert judge.measure(images_NHWC, np.where(labels_N == 0, 0, -1)).alignment == 1.0
    assert judge.measure(images_NHWC, np.full(60, -1)).alignment is None
    assert judge.measure(images_NHWC, labels_N).frechet == pytest.approx(0, abs=1e-3)
    assert judge.measure(255 - images_NHWC, labels_N).frechet > 1
    assert judge.measure(images_NHWC[:1], labels_N[:1]).frechet is None  # One image has no spread.


@pytest.mark.parametrize(("examples", "epochs"), [(1, 25), (8_000, 25), (40_000, 5), (300_000, 1)])
def test_the_judge_sees_the_examples_of_a_large_dataset_less_often(examples, epochs):
    assert judge_epochs(examples) == epochs


def test_the_judge_keeps_a_real_image_of_each_class():
    labels_N = np.array([1, 1, 0])
    images_NHWC = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)

    judge = Judge(images_NHWC, labels_N, images_NHWC, labels_N, 3, seed=0)

    assert {index: image.max() for index, image in judge.real_images.items()} == {0: 2, 1: 0}


def pictures(count=40, seed=0):
    labels_N = np.arange(count) % 2
    noise = np.random.default_rng(seed).integers(0, 80, (count, 16, 16, 3))
    return (labels_N[:, None, None, None] * 150 + noise).astype(np.uint8), labels_N


def test_a_judge_is_trained_once_for_its_images_labels_and_seed(tmp_path, caplog):
    caplog.set_level("INFO", "flwr")
    images_NHWC, labels_N = pictures()

    def judge(images_NHWC=images_NHWC, labels_N=labels_N, seed=0):
        return Judge(images_NHWC, labels_N, images_NHWC, labels_N, 2, seed, cache=tmp_path / "judges")

    first, second = judge(), judge()
    changed = images_NHWC.copy()
    changed[0, 0, 0, 0] ^= 1
    for others in ({"images_NHWC": changed}, {"labels_N": 1 - labels_N}, {"seed": 1}):
        judge(**others)

    assert caplog.text.count("was trained before") == 1
    assert np.array_equal(first.test_features_NF, second.test_features_NF)
    assert len(list((tmp_path / "judges").iterdir())) == 4


def test_a_damaged_judge_is_trained_anew(tmp_path, caplog):
    images_NHWC, labels_N = pictures()
    judges = []
    for _ in range(2):
        judges.append(Judge(images_NHWC, labels_N, images_NHWC, labels_N, 2, 0, cache=tmp_path))
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:100])

    assert "cannot be used" in caplog.text
    assert np.array_equal(judges[0].test_features_NF, judges[1].test_features_NF)


def test_random_draws_after_a_kept_judge_are_those_after_its_training(tmp_path):
    images_NHWC, labels_N = pictures()
    draws = []
    for _ in range(2):
        Judge(images_NHWC, labels_N, images_NHWC, labels_N, 2, 0, cache=tmp_path)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_large_images_are_judged_small():
    images_NHWC, labels_N = pictures()
    large_NHWC = images_NHWC.repeat(8, 1).repeat(8, 2)  # 128 pixels

    judge = Judge(large_NHWC, labels_N, large_NHWC, labels_N, 2, seed=0)

    assert judge.image_size == 64
    assert judge.accuracy == judge.measure(large_NHWC, labels_N).alignment == 1.0


def test_of_a_large_dataset_a_sample_is_read(monkeypatch, caplog):
    """2**20 bytes are 341 images of 32 pixels. The digits have 1,438 to train on and 359 to test."""
    caplog.set_level("INFO", "flwr")
    monkeypatch.setattr(judge_training, "MOST_BYTES", 2**20)
    config = RunConfig.from_flower({"judge-cache": "none"})
    splits = load_splits(config.data, 0)

    judge = judge_training.train_judge(config, splits, torch.device("cpu"))

    assert "Training the judge on 341 of 1438 images" in caplog.text
    assert len(judge.test_features_NF) == 341
    assert judge.accuracy > 0.7

"""Measures against values computed by hand."""

import numpy as np
import pytest

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

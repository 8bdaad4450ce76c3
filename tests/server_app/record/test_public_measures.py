"""Measures in a public network's features, with an encoder whose features are computed by hand."""

import numpy as np
import pytest
import torch

from fedmmkt.common.image_encoders import image_encoders
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.public_measures import PublicJudge, kernel_distance


@pytest.fixture
def mean_colour():
    """Register an encoder that sees the mean of each channel."""

    class MeanColour(torch.nn.Module):
        def forward(self, images_BCHW):
            return images_BCHW.mean((2, 3))

    @image_encoders.register("mean-colour")
    def make():
        """Mean colour."""
        return MeanColour()

    yield "mean-colour"
    image_encoders.unregister("mean-colour")


def images(levels):
    return np.stack([np.full((4, 4, 3), level, np.uint8) for level in levels])


def test_the_kernel_distance_is_that_of_the_cubic_kernel_without_bias():
    """One feature; the kernel (x y + 1)^3: 1 + 8 + 8 among {0, 1} against {1, 1}."""
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]])

    # Among the first: k(0, 1) = 1. Among the second: k(1, 1) = 8. Between: (1 + 1 + 8 + 8) / 4 = 4.5.
    assert kernel_distance(first, second) == pytest.approx(1 + 8 - 2 * 4.5)
    assert kernel_distance(np.array([[0.0], [0.0]]), second) == pytest.approx(1 + 8 - 2 * 1)


def test_images_like_the_real_ones_are_nearer_and_cover_them(mean_colour):
    real = PublicJudge(mean_colour, images(range(0, 100, 5)), torch.device("cpu"))

    like, unlike = real.measure(images(range(2, 102, 5))), real.measure(images([250] * 20))

    assert like.encoder == "mean-colour"
    assert like.recall == like.precision == 1.0
    assert unlike.recall == unlike.precision == 0.0
    assert like.kernel_distance < 0.05 < unlike.kernel_distance
    assert real.measure(images([0])) is None
    assert real.floors().recall > 0.8


def test_a_judge_with_a_public_network_has_both_measures(mean_colour):
    labels_N = np.arange(20) % 2
    real_NHWC = images([40 + 100 * label for label in labels_N])

    with_one, without = (Judge(real_NHWC, labels_N, real_NHWC, labels_N, 2, 0, public_encoder=name)
                         for name in (mean_colour, ""))  # fmt: skip

    assert with_one.measure(real_NHWC, labels_N).public["encoder"] == mean_colour
    assert with_one.floors()["public"]["encoder"] == mean_colour
    assert without.measure(real_NHWC, labels_N).public is None
    assert "public" not in without.floors()
    assert with_one.measure(real_NHWC, labels_N).frechet == without.measure(real_NHWC, labels_N).frechet

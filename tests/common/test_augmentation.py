"""Augmentation of training images."""

import torch

from fedmmkt.common.augmentation import augment


def test_augmentation_keeps_shape_and_range_and_follows_its_generator():
    images_BCHW = torch.rand(4, 3, 16, 16) * 2 - 1
    first = augment(images_BCHW, torch.Generator().manual_seed(0))
    second = augment(images_BCHW, torch.Generator().manual_seed(0))
    assert first.shape == images_BCHW.shape
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, images_BCHW)

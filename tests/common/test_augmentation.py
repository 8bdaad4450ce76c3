"""Augmentation of training images, and warps of generated ones."""

import torch

from fedmmkt.common.augmentation import augment, warp


def test_augmentation_keeps_shape_and_range_and_follows_its_generator():
    images_BCHW = torch.rand(4, 3, 16, 16) * 2 - 1
    first = augment(images_BCHW, torch.Generator().manual_seed(0))
    second = augment(images_BCHW, torch.Generator().manual_seed(0))
    assert first.shape == images_BCHW.shape
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, images_BCHW)


def test_a_warp_follows_its_seed_keeps_shape_and_range_and_grows_with_its_amount():
    images_BCHW = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    first, again, other = (warp(images_BCHW, seeds, 1.0) for seeds in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    alone = warp(images_BCHW[2:], [4], 1.0)

    assert first.shape == images_BCHW.shape
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(first[:2], other[:2])
    assert not torch.equal(first[2], other[2])
    assert torch.allclose(alone[0], other[2])
    assert torch.equal(warp(images_BCHW, [1, 2, 3], 0.0), images_BCHW)


def test_a_warp_moves_things_by_a_bounded_part_of_the_image():
    """A bright square in the middle stays there: its centre moves by less than a quarter of the side."""
    images_BCHW = torch.full((50, 1, 32, 32), -1.0)
    images_BCHW[:, :, 12:20, 12:20] = 1.0

    light_BHW = warp(images_BCHW, list(range(50)), 1.0)[:, 0] + 1

    places = torch.arange(32.0) - 15.5
    mass_B = light_BHW.sum((1, 2))
    moved_B = torch.stack([(light_BHW.sum(2) @ places) / mass_B, (light_BHW.sum(1) @ places) / mass_B]).abs()
    assert moved_B.max() < 8
    assert moved_B.mean(1).min() > 0.2  # And it is moved, in both directions.
    assert 0.5 < mass_B.mean() / (64 * 2) < 1.5


def test_an_image_of_one_colour_is_its_own_warp():
    assert torch.allclose(warp(torch.full((2, 3, 8, 8), 0.3), [0, 1], 3.0), torch.full((2, 3, 8, 8), 0.3))

"""Batches of images: what goes through the codec comes back, and what is no image is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.images import decode_images, encode_images, resize_images, to_rgb_array


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 64), st.integers(0, 1000))
def test_small_images_come_back_exactly(count, side, seed):
    images_NHWC = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    data, offsets = encode_images(images_NHWC)
    assert len(offsets) == count + 1
    assert np.array_equal(decode_images(data, offsets), images_NHWC)


def test_large_images_come_back_nearly():
    ramp = np.linspace(0, 255, 128).astype(np.uint8)
    image_HWC = np.stack([np.tile(ramp, (128, 1))] * 3, axis=-1)
    data, offsets = encode_images(image_HWC[None])
    assert len(data) < 10_000
    assert np.abs(decode_images(data, offsets)[0].astype(int) - image_HWC).mean() < 3


def test_images_are_brought_to_the_size_asked_for():
    images_NHWC = np.full((2, 16, 16, 3), 7, np.uint8)
    assert np.array_equal(decode_images(*encode_images(images_NHWC), 8), np.full((2, 8, 8, 3), 7, np.uint8))
    assert resize_images(images_NHWC, 32).shape == (2, 32, 32, 3)
    assert resize_images(images_NHWC, 16) is images_NHWC or np.array_equal(resize_images(images_NHWC, 16), images_NHWC)


def test_bytes_that_are_no_image_are_refused_with_their_index():
    data, offsets = encode_images(np.zeros((2, 8, 8, 3), np.uint8))
    broken = data.copy()
    broken[offsets[1] :] = 7
    with pytest.raises(ValueError, match="1"):
        decode_images(broken, offsets)
    with pytest.raises(ValueError, match="offset"):
        decode_images(data, offsets[::-1].copy())


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb_of_the_size(mode):
    image = Image.new("I;16", (30, 20), 40_000) if mode == "I;16" else Image.new("RGB", (30, 20), "white").convert(mode)
    array = to_rgb_array(image, 12)
    assert array.shape == (12, 12, 3)
    assert array.dtype == np.uint8
    if mode != "I;16":
        assert array.min() >= 250


def test_transparency_is_shown_on_white():
    assert to_rgb_array(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4).min() == 255

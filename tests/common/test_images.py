"""Batches of images: what goes through the codec comes back, and what is no image is refused."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmmkt.common.images import (
    GreyError,
    decode_images,
    encode_images,
    resize_images,
    to_rgb_array,
    to_rgb_arrays,
    to_square,
)


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


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 9], "from 0 to 9; allowed: from 0 to"),
        ([3, -1], "offsets run from 3"),
        ([], "allowed: N \\+ 1 integers"),
        ([0.0, 1.0], "allowed: N \\+ 1 integers"),
        ([0, 5, 2, None], "image 1 has no bytes"),
        ([0, 0, None], "image 0 has no bytes"),
    ],
)
def test_offsets_that_do_not_divide_the_data_are_refused(offsets, message):
    data, _ = encode_images(np.zeros((1, 8, 8, 3), np.uint8))
    wrong = np.array([len(data) if offset is None else offset for offset in offsets])
    with pytest.raises(ValueError, match=message):
        decode_images(data, wrong)


def test_images_of_several_sizes_need_a_size():
    (small, _), (large, _) = (encode_images(np.zeros((1, side, side, 3), np.uint8)) for side in (8, 16))
    data, offsets = np.concatenate([small, large]), np.cumsum([0, len(small), len(large)])
    with pytest.raises(ValueError, match="image 1 has 16 x 16 pixels; allowed: 8 x 8"):
        decode_images(data, offsets)
    assert decode_images(data, offsets, 8).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("side", "message"), [(2049, "image 1 has 2049 x 2049 pixels; allowed: 4194304 in all"), (14_000, "image 1")]
)
def test_decompression_bombs_are_refused(side, message):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    small, _ = encode_images(np.zeros((1, 8, 8, 3), np.uint8))
    bomb = np.frombuffer(buffer.getvalue(), np.uint8)
    with pytest.raises(ValueError, match=message):
        decode_images(np.concatenate([small, bomb]), np.cumsum([0, len(small), len(bomb)]), 8)


MEASURED = """
import io, resource, sys
import numpy as np
from PIL import Image
from fedmmkt.common.images import decode_images
bomb = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
decode_images(bomb[:0], np.array([0]), 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_images(bomb, np.array([0, len(bomb)]), 8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
@pytest.mark.parametrize(("format", "mode"), [("WEBP", "RGBA"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "CMYK")])
def test_the_largest_image_of_a_message_is_decoded_in_256_mb(format, mode):
    buffer = io.BytesIO()
    Image.new(mode, (2048, 2048)).save(buffer, format)

    run = subprocess.run([sys.executable, "-c", MEASURED], input=buffer.getvalue(), capture_output=True, check=True)

    assert int(run.stdout) < 256 * 1000


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 150))
def test_hostile_bytes_raise_nothing_but_value_errors(junk, place):
    data, offsets = encode_images(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    broken = data.copy()
    place = min(place, len(data) - 1)
    broken[place : place + len(junk)] = np.frombuffer(junk, np.uint8)[: len(data) - place]
    with contextlib.suppress(ValueError):
        assert decode_images(broken, offsets, 8).shape == (2, 8, 8, 3)


def test_no_images_are_a_batch_too():
    assert decode_images(*encode_images(np.zeros((0, 8, 8, 3), np.uint8)), 8).shape == (0, 8, 8, 3)


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_only_rgb_batches_are_encoded(wrong):
    with pytest.raises(ValueError, match="allowed: uint8 of shape N x H x W x 3"):
        encode_images(wrong)


def test_the_longer_side_is_cropped_at_both_ends():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (to_rgb_array(Image.fromarray(wide), 5) == 200).all()


def test_sixteen_bits_keep_their_brightness():
    assert (to_rgb_array(Image.fromarray(np.full((8, 8), 0x8000, np.uint16)), 4) == 128).all()


def grey(value, dtype):
    return Image.fromarray(np.full((8, 8), value, dtype))


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (grey(0.5, np.float32), 128),
        (grey(1, np.float32), 255),
        (grey(127.6, np.float32), 128),
        (grey(77, np.uint16), 77),  # eight bits suffice
        (grey(512, np.uint16), 128),
        (grey(2048, np.uint16), 128),
        (grey(8192, np.uint16), 128),
        (grey(0x8000, np.int32), 128),
        (grey(2**31 - 1, np.int32), 128),
        (grey(0, np.int32), 0),
        (Image.frombytes("I;16B", (8, 8), np.full((8, 8), 2048, ">u2").tobytes()), 128),
        (Image.open(io.BytesIO(b"P5\n2 2\n4095\n" + np.full(4, 1024, ">u2").tobytes())), 64),  # the file names white
        (Image.open(io.BytesIO(b"P5\n2 2\n65535\n" + np.full(4, 1024, ">u2").tobytes())), 4),
    ],
)
def test_grey_values_of_any_depth_keep_their_brightness(image, value):
    assert (to_rgb_array(image, 4) == value).all()


def test_images_of_one_kind_have_one_white():
    images = [grey(value, np.uint16) for value in (512, 1023, 4095)] + [grey(0.5, np.float32), grey(99, np.uint8)]
    assert [int(rgb[0, 0, 0]) for rgb in to_rgb_arrays(to_square(image, 4) for image in images)] == [
        32,
        64,
        255,
        128,
        99,
    ]


@pytest.mark.parametrize("values", [[0, np.nan], [-0.1, 1], [0, 256], [0, np.inf]])
def test_floats_that_are_no_grey_values_are_refused(values):
    with pytest.raises(GreyError, match=r"its values go from .*; allowed: 0 to 1 or 0 to 255, without NaN"):
        to_rgb_array(Image.fromarray(np.array([values, values], np.float32)), 2)


def test_negative_integers_are_refused():
    with pytest.raises(GreyError, match="its values go from -1000 to -1000; allowed: from 0 on"):
        to_rgb_array(grey(-1000, np.int32), 4)


@pytest.mark.parametrize("mode", ["L", "P", "PA", "RGB", "RGBA", "LA", "1", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_any_mode_becomes_rgb_of_the_size(mode):
    white = {"I;16": 0xFFFF, "I": 0xFFFF, "F": 1}
    image = Image.new(mode, (30, 20), white[mode]) if mode in white else Image.new("L", (30, 20), 255)
    image = image if mode in white else image.convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    array = to_rgb_array(image, 12)
    assert array.shape == (12, 12, 3)
    assert array.dtype == np.uint8
    assert array.min() >= 250


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "PA", "CMYK"])
def test_half_grey_of_eight_bits_is_exact_in_any_mode(mode):
    image = Image.new("L", (8, 8), 128).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    assert (to_rgb_array(image, 4) == 128).all()


def test_transparency_is_shown_on_white():
    assert to_rgb_array(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4).min() == 255

"""Batches of images: encoding for messages, safe decoding, and conversion to RGB of one size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Images = NDArray[np.uint8]

LARGEST_LOSSLESS_SIDE = 64
MAX_PIXELS = 2048 * 2048  # Of images in messages, which have sides of up to 1024; WebP decodes them in 113 MB.
DEPTHS = (8, 10, 12, 14, 16, 32)  # bits of a grey value; no file says how many of its 16 or 32 are used

# Bytes and milliseconds per encoded image on one core. They are why small images are lossless WebP, method 2.
#                            digits 32x32     photos 32x32 (CIFAR-10)   emoji 64x64
#   PNG                      1098 B  0.10     2311 B  0.13              3935 B  0.5
#   WebP lossless, method 2   361 B  0.26     1539 B  0.39              3112 B  1.2
#   WebP lossless, method 4   361 B  0.26     1560 B  0.93              2892 B  4.7
#   WebP quality 90           308 B  0.15      538 B  0.17              1283 B  0.4
# Decoding takes 0.05 to 0.2 ms with each. At 512x512, lossless gives 53 kB in 69 ms, quality 90 gives 9 kB in 13 ms.
_LOSSLESS: dict[str, Any] = {"lossless": True, "method": 2}
_LOSSY: dict[str, Any] = {"quality": 90}


def encode_images(images_NHWC: Images) -> tuple[Images, NDArray[np.int64]]:
    """Encode images of one size as WebP and concatenate them in one buffer.

    Images with sides up to 64 pixels are encoded losslessly. Larger images are encoded with quality 90.

    Parameters
    ----------
    images_NHWC : uint8 array
        N RGB images of H x W pixels.

    Returns
    -------
    data : uint8 array (bytes,)
        The encoded images.
    offsets : int64 array (N + 1,)
        Image ``i`` is ``data[offsets[i]:offsets[i + 1]]``.

    Raises
    ------
    ValueError
        If the array is not uint8 of shape N x H x W x 3.
    """
    _check_images(images_NHWC)
    options = _LOSSLESS if max(images_NHWC.shape[1:3]) <= LARGEST_LOSSLESS_SIDE else _LOSSY
    encoded = [_encode(image_HWC, options) for image_HWC in images_NHWC]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def decode_images(data: Images, offsets: NDArray[np.integer[Any]], size: int | None = None) -> Images:
    """Decode images from `encode_images`; the data is not trusted and is checked.

    Parameters
    ----------
    data : uint8 array (bytes,)
        Encoded images: WebP, PNG or JPEG.
    offsets : integer array (N + 1,)
        Image ``i`` is ``data[offsets[i]:offsets[i + 1]]``.
    size : int, optional
        Side in pixels to which every image is resized. Without it, all images must have the same size.

    Returns
    -------
    uint8 array (N, H, W, 3)
        RGB images; H and W are ``size`` if it is given.

    Raises
    ------
    ValueError
        If the offsets do not divide the data, or if an image cannot be decoded, has more than `MAX_PIXELS` pixels or
        differs in size from the first one. The text gives the index of the image.
    """
    _check_offsets(data, offsets)
    images: list[Images] = []
    for index in range(len(offsets) - 1):
        image_HWC = _decode(data[offsets[index] : offsets[index + 1]].tobytes(), index, size)
        if images and image_HWC.shape != images[0].shape:
            raise ValueError(
                f"image {index} has {_describe(image_HWC)} pixels; allowed: {_describe(images[0])}, as image 0"
            )
        images.append(image_HWC)
    return np.stack(images) if images else np.zeros((0, size or 0, size or 0, 3), dtype=np.uint8)


class GreyError(ValueError):
    """The pixels of an image are no grey values: negative, not a number, or floats beyond 255."""


@dataclass(frozen=True)
class Square:
    """A square part of an image, whose white may not be known yet.

    Attributes
    ----------
    pixels : uint8 array (side, side, 3) or float32 array (side, side)
        RGB, or grey values with more than eight bits or as floats.
    kind : str
        Format and mode of the image of such grey values. Images of one kind share their white.
    largest : float
        The largest grey value of the whole image.
    """

    pixels: NDArray[Any]
    kind: str = ""
    largest: float = 0


def to_rgb_array(image: Image.Image, size: int | None) -> Images:
    """Convert an image of any mode and size to a square RGB array.

    Transparent parts become white. The longer side is cropped equally at both ends. The remaining square is resized,
    with antialiasing if it shrinks. Of more than eight bits, white is decided by the image's own largest value.

    Parameters
    ----------
    image : PIL.Image.Image
        The image. Its EXIF orientation is applied.
    size : int, optional
        Side of the result, in pixels. Without it, the image is neither cropped nor resized.

    Returns
    -------
    uint8 array (size, size, 3)
        The image in RGB.

    Raises
    ------
    GreyError
        If the pixels are no grey values.
    """
    return to_rgb_arrays([to_square(image, size)])[0]


def to_square(image: Image.Image, size: int | None) -> Square:
    """Crop and resize an image as `to_rgb_array` does, but leave grey values with more than eight bits as they are."""
    kind = f"{image.format} {image.mode}"
    is_deep = image.mode.startswith(("I", "F"))
    image = ImageOps.exif_transpose(image)
    image = _to_grey(image) if is_deep else _to_rgb(image)
    largest = float(np.asarray(image).max()) if is_deep else 0
    if kind == "PPM I":  # PIL brings these to 16 bits by the white that the file names.
        largest = 2**16 - 1
    if size is not None:
        image = _resized(image, size)
    return Square(np.asarray(image), kind, largest) if is_deep else Square(np.asarray(image))


def to_rgb_arrays(squares: Iterable[Square], whites: Mapping[str, float] | None = None) -> list[Images]:
    """Bring squares to RGB of eight bits.

    Parameters
    ----------
    squares : iterable of Square
        The squares.
    whites : mapping, optional
        The white of each kind of grey values; by default `whites_of` the squares.
    """
    squares = list(squares)
    whites = whites_of(squares) if whites is None else whites
    return [_in_eight_bits(square.pixels, whites[square.kind]) if square.kind else square.pixels for square in squares]


def whites_of(squares: Iterable[Square]) -> dict[str, float]:
    """Return the white of each kind of grey values.

    It is the smallest of 1 and 255 for floats, or of 8, 10, 12, 14, 16 and 32 bits for integers, that no image of the
    kind exceeds.
    """
    largest: dict[str, float] = {}
    for square in squares:
        if square.kind:
            largest[square.kind] = max(square.largest, largest.get(square.kind, 0))
    return {kind: _white(kind, value) for kind, value in largest.items()}


def _white(kind: str, largest: float) -> float:
    whites = (1, 255) if kind.endswith("F") else tuple(2**bits - 1 for bits in DEPTHS)
    return next(white for white in whites if largest <= white)


def _in_eight_bits(grey_HW: NDArray[np.float32], white: float) -> Images:
    return np.repeat((grey_HW * np.float32(255 / white)).round().astype(np.uint8)[..., None], 3, axis=2)


def _resized(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:  # not `resize(box=...)`: it blends in pixels outside the box
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.BILINEAR)


def resize_images(images_NHWC: Images, size: int) -> Images:
    """Resize a batch to ``size`` x ``size`` pixels, as `to_rgb_array` does.

    Parameters
    ----------
    images_NHWC : uint8 array
        N RGB images of H x W pixels.
    size : int
        Side of the result, in pixels.

    Returns
    -------
    uint8 array (N, size, size, 3)
        The resized images; the input array itself if it already has this size.

    Raises
    ------
    ValueError
        If the array is not uint8 of shape N x H x W x 3.
    """
    _check_images(images_NHWC)
    if images_NHWC.shape[1:3] == (size, size):
        return images_NHWC
    resized = np.empty((len(images_NHWC), size, size, 3), dtype=np.uint8)
    for index, image_HWC in enumerate(images_NHWC):
        resized[index] = to_rgb_array(Image.fromarray(image_HWC), size)
    return resized


def _encode(image_HWC: Images, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _decode(encoded: bytes, index: int, size: int | None) -> Images:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower than PIL's
            image = Image.open(io.BytesIO(encoded), formats=("WEBP", "PNG", "JPEG"))
        if image.width * image.height <= MAX_PIXELS:
            return to_rgb_array(image, size)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {index} is too large ({error}); allowed: {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders raise many kinds of errors on broken bytes
        raise ValueError(f"image {index} cannot be decoded: {error}") from error
    raise ValueError(f"image {index} has {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all")


def _to_grey(image: Image.Image) -> Image.Image:
    """Return grey values of more than eight bits, or floats, as an image of floats; PIL would clip them to 255."""
    grey_HW = np.asarray(image).astype(np.float32)
    least, most = float(grey_HW.min()), float(grey_HW.max())  # NaN if any value is.
    if not (least >= 0 and most <= (255 if image.mode == "F" else 2**32)):
        allowed = "0 to 1 or 0 to 255, without NaN" if image.mode == "F" else "from 0 on"
        raise GreyError(f"its values go from {least:g} to {most:g}; allowed: {allowed}")
    return Image.fromarray(grey_HW)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _check_images(images_NHWC: Images) -> None:
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
        raise ValueError(
            f"images are {images_NHWC.dtype} of shape {images_NHWC.shape}; allowed: uint8 of shape N x H x W x 3"
        )


def _check_offsets(data: Images, offsets: NDArray[np.integer[Any]]) -> None:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"image data is {data.dtype} of shape {data.shape}; allowed: uint8 in one dimension")
    if not np.issubdtype(offsets.dtype, np.integer) or offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError(f"offsets are {offsets.dtype} of shape {offsets.shape}; allowed: N + 1 integers")
    if offsets[0] != 0 or offsets[-1] != len(data):
        raise ValueError(f"offsets run from {offsets[0]} to {offsets[-1]}; allowed: from 0 to {len(data)}, the data")
    falling = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(falling):
        raise ValueError(f"image {falling[0]} has no bytes: its offsets do not rise")


def _describe(image_HWC: Images) -> str:
    return f"{image_HWC.shape[1]} x {image_HWC.shape[0]}"

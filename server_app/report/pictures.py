"""The pictures of a run's rounds, prepared for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fedmmkt.server_app.record.run_folder import RunFolder

MOST_PICTURES = 13  # with more rounds, the page shows only some pictures, to stay small
MOST_PICTURE_BYTES = 1_500_000
PICTURE_SIDE = 1600  # larger pictures are reduced to this side, in pixels
PIXEL_ART_SIDE = 800  # grids up to this width, in pixels, are enlarged without blur


@dataclass(frozen=True)
class Picture:
    """The picture grid of a round as a data URI, and whether its pixels stay sharp when enlarged."""

    round: int
    uri: str
    pixelated: bool


def pictures_of(run: RunFolder) -> list[Picture]:
    """Return the picture grids in order of rounds; if there are many, the first, the last and some between."""
    found = run.pictures()
    rounds = list(found)
    if len(rounds) > MOST_PICTURES:
        rounds = [rounds[index * (len(rounds) - 1) // (MOST_PICTURES - 1)] for index in range(MOST_PICTURES)]
    return [_picture(number, found[number]) for number in rounds]


def _picture(number: int, path: Path) -> Picture:
    with Image.open(path) as image:
        pixelated = image.width <= PIXEL_ART_SIDE
        if path.stat().st_size <= MOST_PICTURE_BYTES:
            return Picture(number, _data_uri("png", path.read_bytes()), pixelated)
        reduced = image.convert("RGB")
    reduced.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    reduced.save(buffer, format="JPEG", quality=85)
    return Picture(number, _data_uri("jpeg", buffer.getvalue()), pixelated=False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"

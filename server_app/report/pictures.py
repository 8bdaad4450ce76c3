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


@dataclass(frozen=True)
class Captions:
    """What the picture grids show.

    Attributes
    ----------
    columns : int
        Pictures per row; 0 if it is not known.
    prompts : tuple of str
        One per picture.
    rows : tuple of str
        The class of each row; empty for a row of several.
    real : Picture or None
        A real test image for each row.
    """

    columns: int = 0
    prompts: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    real: Picture | None = None

    def prompts_of_row(self, row: int) -> list[str]:
        """Return the different prompts of a row, in order."""
        return list(dict.fromkeys(self.prompts[row * self.columns : (row + 1) * self.columns]))


def captions_of(run: RunFolder) -> Captions:
    """Return what the picture grids show; runs of earlier versions did not record it."""
    if not (described := run.read_captions()):
        return Captions()
    real = _picture(0, run.real_images) if run.real_images.exists() else None
    return Captions(described["columns"], tuple(described["prompts"]), tuple(described["rows"]), real)


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

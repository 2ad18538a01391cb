"""Pictures side by side with one place of each in a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from mechmm.results.canvas import COLORS

SIDE, GAP = 144, 8
"""Pixels of a picture's longer side, and between pictures."""
Frame = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the picture as it was given."""


def sheet(
    pictures: Sequence[Image.Image], frames: Sequence[Frame | None], across: int = 8
) -> Image.Image:
    """One picture of many, row by row, each enlarged or shrunk to one size with its frame drawn.

    Args:
        frames: one per picture; None draws none.
        across: pictures in a row.

    Raises:
        ValueError: no pictures, or another number of frames.
    """
    if not pictures or len(pictures) != len(frames):
        raise ValueError(f"{len(pictures)} pictures and {len(frames)} frames; give one frame each")
    columns = min(across, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (SIDE + GAP) - GAP, rows * (SIDE + GAP) - GAP)
    whole = Image.new("RGB", size, "white")
    for number, (picture, frame) in enumerate(zip(pictures, frames, strict=True)):
        row, column = divmod(number, columns)
        whole.paste(_framed(picture, frame), (column * (SIDE + GAP), row * (SIDE + GAP)))
    return whole


def _framed(picture: Image.Image, frame: Frame | None) -> Image.Image:
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    crisp = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    shown = picture.convert("RGB").resize(size, crisp)
    if frame is not None:
        left, top, right, bottom = (round(edge * scale) for edge in frame)
        box = (left, top, max(left, right - 1), max(top, bottom - 1))
        draw = ImageDraw.Draw(shown)
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline="white", width=1)
        draw.rectangle(box, outline=COLORS[1], width=2)
    return shown

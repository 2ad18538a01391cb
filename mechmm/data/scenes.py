"""Procedural scenes: coloured shapes and handwritten digits on a grid of cells.

A `Scene` is plain data, so a minimal pair is one `replace` call: everything that is not
replaced keeps its pixels exactly. A scene can be rendered (`render`), described in words
(`describe`) and asked where each of its things lies on a patch grid (`patch_mask`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, pi, sin
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mechmm.data.digits import digit_image, digit_label

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 90, 220),
    "yellow": (240, 205, 20),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "pink": (245, 150, 200),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
GRID = 4
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
"""Cell names in reading order: a letter for the column, a number for the row."""
BACKGROUND = (244, 243, 238)
INK = (40, 40, 44)
PIXELS = 96
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object of a scene: a coloured shape, or a handwritten digit.

    Attributes:
        cell: index into `CELLS`.
        shape: a name of `SHAPES`, or None for a digit.
        color: a key of `COLORS`, or None for a digit.
        digit: index of an image in scikit-learn's `load_digits`, or None for a shape.
        scale: side length as a share of the cell.
        shift: (right, down) from the centre of the cell, as a share of the cell.
        angle: rotation in degrees (digits only).
    """

    cell: int
    shape: str | None = None
    color: str | None = None
    digit: int | None = None
    scale: float = 0.85
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.cell < len(CELLS):
            raise ValueError(f"cell {self.cell} is outside 0..{len(CELLS) - 1}")
        if (self.digit is None) == (self.shape is None or self.color is None):
            raise ValueError("a thing is either a shape with a color, or a digit")
        if self.shape is not None and (self.shape not in SHAPES or self.color not in COLORS):
            raise ValueError(f"unknown shape or color: {self.color} {self.shape}")

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def name(self) -> str:
        """The word for what it is: a shape name, or the digit as one character."""
        return self.shape if self.digit is None else digit_label(self.digit)  # type: ignore[return-value]

    def describe(self) -> str:
        """Four words, for example `red circle in b2` or `digit 7 in c1`."""
        return f"{self.color or 'digit'} {self.name} in {CELLS[self.cell]}"


@dataclass(frozen=True)
class Scene:
    """Things on a 4 x 4 grid, at most one per cell."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        twice = sorted({CELLS[cell] for cell in cells if cells.count(cell) > 1})
        if twice:
            raise ValueError(f"two things in cell {', '.join(twice)}; give each its own cell")

    def replace(self, index: int, **changes: Any) -> Scene:
        """The same scene with attributes of one thing changed."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)
        return Scene(tuple(things))

    def drop(self, index: int) -> Scene:
        """The same scene without one thing."""
        return Scene(self.things[:index] + self.things[index + 1 :])

    def describe(self) -> str:
        """The scene in words, in the order of `things`: four words a thing."""
        return " , ".join(thing.describe() for thing in self.things) + " ."

    def render(self, pixels: int = PIXELS) -> Image.Image:
        """The scene as an anti-aliased RGB picture of `pixels` x `pixels`."""
        side = pixels * _OVERSAMPLE // GRID
        canvas = Image.new("RGB", (pixels, pixels), BACKGROUND)
        for thing in self.things:
            tile = _tile(replace(thing, cell=0), side)
            box = (thing.column * pixels // GRID, thing.row * pixels // GRID)
            canvas.paste(tile, box)
        return canvas

    def patch_mask(self, index: int, patches: int = 8) -> np.ndarray:
        """Which patches thing `index` touches.

        Returns:
            Boolean array [patches, patches] (row, column), true where at least one pixel of
            the thing differs from the background.
        """
        alone = np.asarray(Scene((self.things[index],)).render(), dtype=np.int16)
        touched = np.abs(alone - np.array(BACKGROUND)).max(-1) > 8
        blocks = touched.reshape(patches, PIXELS // patches, patches, PIXELS // patches)
        return blocks.any((1, 3))


@lru_cache(maxsize=4096)
def _tile(thing: Thing, side: int) -> Image.Image:
    """One cell with its thing, drawn large and scaled down."""
    tile = Image.new("RGB", (side, side), BACKGROUND)
    middle = (side * (0.5 + thing.shift[0]), side * (0.5 + thing.shift[1]))
    radius = side * thing.scale / 2
    if thing.digit is None:
        _draw(ImageDraw.Draw(tile), thing.shape or "", middle, radius, COLORS[thing.color or ""])
    else:
        size = round(2 * radius)
        ink = digit_image(thing.digit).resize((size, size), Image.Resampling.BICUBIC)
        ink = ink.rotate(thing.angle, Image.Resampling.BICUBIC)
        corner = (round(middle[0] - size / 2), round(middle[1] - size / 2))
        tile.paste(Image.new("RGB", (size, size), INK), corner, ink)
    small = side // _OVERSAMPLE
    return tile.resize((small, small), Image.Resampling.BOX)


def _draw(
    draw: ImageDraw.ImageDraw,
    shape: str,
    middle: tuple[float, float],
    radius: float,
    color: tuple[int, int, int],
) -> None:
    x, y = middle

    def polygon(points: Iterable[tuple[float, float]]) -> None:
        draw.polygon([(x + radius * px, y + radius * py) for px, py in points], fill=color)

    def disc(px: float, py: float, pr: float, fill: tuple[int, int, int] = color) -> None:
        cx, cy, r = x + radius * px, y + radius * py, radius * pr
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if shape == "circle":
        disc(0, 0, 0.95)
    elif shape == "ring":
        disc(0, 0, 0.95)
        disc(0, 0, 0.5, BACKGROUND)
    elif shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif shape == "diamond":
        polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)])
    elif shape == "triangle":
        polygon([(0, -0.95), (0.95, 0.85), (-0.95, 0.85)])
    elif shape == "cross":
        polygon([(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)])
        polygon([(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)])
    elif shape == "star":
        tips = [(1.0 if k % 2 == 0 else 0.42, pi * k / 5 - pi / 2) for k in range(10)]
        polygon([(r * cos(t), r * sin(t)) for r, t in tips])
    elif shape == "heart":
        disc(-0.46, -0.36, 0.5)
        disc(0.46, -0.36, 0.5)
        polygon([(-0.93, -0.18), (0.93, -0.18), (0, 0.95)])
        polygon([(-0.5, -0.4), (0.5, -0.4), (0.5, 0.1), (-0.5, 0.1)])

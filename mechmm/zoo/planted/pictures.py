"""Pictures of planted models: 2 x 2 cells, each with a swatch of color and, beside it, a glyph.

A cell is 2 x 2 patches: the swatch above left, the glyph above right, below them grey textures that
mean nothing and are drawn anew for every picture. So color and shape of a thing are seen by two
patches, and a vision head has to bring them together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

PATCH = 8
SIDE = 4
"""Patches in a row of a picture."""
PIXELS = PATCH * SIDE
PLACES = ("top_left", "top_right", "bottom_left", "bottom_right")
LOW, HIGH, GRAIN = 24, 231, 12
"""Levels of dark and bright, and how far single pixels are off them at most."""

COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
}
GLYPHS = {
    "heart": "........ .##..##. ######## ######## .######. ..####.. ...##... ........",
    "leaf": ".....### ...####. ..#####. .######. .#####.. .####... .#...... #.......",
    "drop": "...##... ...##... ..#..#.. ..#..#.. .#....#. .#....#. .##..##. ..####..",
    "sun": "#..##..# .#....#. ..####.. #.####.# #.####.# ..####.. .#....#. #..##..#",
}
SHAPES = tuple(GLYPHS)


@dataclass(frozen=True)
class Scene:
    """Four cells in the order of `PLACES`; a cell without color and shape is dark.

    Attributes:
        colors, shapes: of each cell.
        grain: seed of textures and grain.
    """

    colors: tuple[str | None, ...]
    shapes: tuple[str | None, ...]
    grain: int = 0

    def color_at(self, place: str) -> str | None:
        return self.colors[PLACES.index(place)]

    def with_color(self, place: str, color: str | None) -> Scene:
        colors = [color if p == place else c for p, c in zip(PLACES, self.colors, strict=True)]
        return replace(self, colors=tuple(colors))

    def with_shape(self, place: str, shape: str | None) -> Scene:
        shapes = [shape if p == place else s for p, s in zip(PLACES, self.shapes, strict=True)]
        return replace(self, shapes=tuple(shapes))

    def render(self) -> Image.Image:
        """32 x 32 pixels, RGB."""
        random = np.random.default_rng([self.grain, 77])
        picture = np.zeros((SIDE, PATCH, SIDE, PATCH, 3))
        things = zip(PLACES, self.colors, self.shapes, strict=True)
        for number, (_, color, shape) in enumerate(things):
            row, column = 2 * (number // 2), 2 * (number % 2)
            picture[row, :, column] = COLORS[color] if color else 0.0
            picture[row, :, column + 1] = glyph(shape)[..., None] if shape else 0.0
            texture = random.random((PATCH, 2, PATCH, 1))
            picture[row + 1, :, column : column + 2] = texture
        levels = LOW + (HIGH - LOW) * picture.reshape(PIXELS, PIXELS, 3)
        levels += random.uniform(-GRAIN, GRAIN, levels.shape)
        return Image.fromarray(levels.round().astype(np.uint8))


def glyph(shape: str) -> np.ndarray:
    """[row, column] of a patch: 1 where there is ink."""
    return np.array([[float(dot == "#") for dot in line] for line in GLYPHS[shape].split()])


def swatch(place: int) -> int:
    """Number of the patch that shows the color of a cell."""
    return SIDE * 2 * (place // 2) + 2 * (place % 2)


def drawing(place: int) -> int:
    """Number of the patch that shows the glyph of a cell."""
    return swatch(place) + 1


def decoder() -> tuple[np.ndarray, np.ndarray]:
    """Linear measures of a patch: mean red, green and blue, then how much it is each glyph.

    Returns:
        A kernel [measure, channel, row, column] for pixels from -1 to 1, and an offset [measure],
        such that flat colors measure 0 or 1 and each glyph measures 1 as itself, 0 as the others.
    """
    templates = np.stack([glyph(shape).ravel() for shape in SHAPES])
    templates = templates - templates.mean(-1, keepdims=True)
    duals = np.linalg.pinv(templates).T.reshape(len(SHAPES), PATCH, PATCH)
    means = np.eye(3)[:, :, None, None] * np.full((PATCH, PATCH), PATCH**-2.0)
    glyphs = np.repeat(duals[:, None], 3, axis=1) / 3
    kernel = np.concatenate([means, glyphs]) * 255 / (2 * (HIGH - LOW))
    dark = 2 * LOW / 255 - 1
    return kernel, -dark * kernel.sum((1, 2, 3))


MEASURES = (
    *(f"pixels.{name}" for name in ("red", "green", "blue")),
    *(f"pixels.{s}" for s in SHAPES),
)

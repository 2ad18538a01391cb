"""Which part of which image, video or clip each placeholder of a prompt stands for.

A `Medium` is one image, video or audio clip of a prompt. It is seen in one or more views: the whole
picture and its tiles, the frames of a video. Each view is a `Grid` of cells; a cell is what one
token of the language model stands for, and was made from one or more positions of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

NOWHERE = -1
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Grid:
    """One view of an image: a grid of cells, each the place of one language token.

    Attributes:
        rows, columns: size of the grid. Audio: one row, time runs along the columns.
        cells: for every placeholder of the prompt that this view fills, in order, its cell
            (row * columns + column), or -1 where it has no place (class token, newline, query).
        sources: [cell, n, 2]: the (row, position) of the tower's output that a cell was made from,
            rows counted from the medium's first one; positions of a packed tower run row by row
            over the medium's patches (frame by frame in a video).
        window: the part (left, top, right, bottom) of the picture that the view shows, as fractions
            of what the image processor keeps.
        frame: of a video, from 0.
        mixed: whether cells are no projected tokens of their own (interpolated behind the
            projector, or seen through cross-attention).
    """

    rows: int
    columns: int
    cells: tuple[int, ...]
    sources: Int[np.ndarray, "cell n two"] = field(repr=False, compare=False)
    window: tuple[float, float, float, float] = WHOLE
    frame: int = 0
    mixed: bool = False

    @property
    def tokens(self) -> int:
        """Language positions that the view fills."""
        return len(self.cells)


@dataclass(frozen=True)
class Medium:
    """One image, video or audio clip of a prompt.

    Attributes:
        views: in the order of their placeholders.
        tower_rows: rows of the tower's batch that it takes (images or tiles, padding included).
        tower_positions: positions of each of these rows (a class token included).
        kind: `"image"`, `"video"` or `"audio"`.
    """

    views: tuple[Grid, ...]
    tower_positions: int
    tower_rows: int = 1

    kind: str = "image"

    @property
    def tokens(self) -> int:
        """Language positions that it fills."""
        return sum(view.tokens for view in self.views)

    @property
    def placed(self) -> list[tuple[int, int]]:
        """(view, cell) of every placeholder in order; cell -1 where it has no place."""
        return [(v, cell) for v, view in enumerate(self.views) for cell in view.cells]

    @property
    def projected(self) -> list[tuple[int, int] | None]:
        """(row, index) in the projector's output of every placeholder in order; None where it is no
        projected token (a newline, a mean of several).

        A row of the tower is a row of the projector; its tokens are those of its cells in order.
        """
        found: list[tuple[int, int] | None] = []
        filled: dict[int, int] = {}
        for view in self.views:
            rows = set(view.sources[:, 0, 0].tolist())
            if view.mixed:
                found += [None] * view.tokens
            elif len(rows) == 1:
                (row,) = rows
                start = filled.get(row, 0)
                found += [(row, start + i) for i in range(view.tokens)]
                filled[row] = start + view.tokens
            else:  # a mosaic of tiles: each has as many projected tokens as the whole picture
                dropped = self.tower_positions - self.views[0].tokens
                first = view.sources[:, 0]
                places = [(int(row), int(position) - dropped) for row, position in first]
                found += [places[cell] if cell != NOWHERE else None for cell in view.cells]
        return found


Media = Sequence[Medium]


def sources(
    rows: int, columns: int, *, merge: int = 1, tower_row: int = 0, first: int = 0
) -> Int[np.ndarray, "cell n two"]:
    """Where the cells of a grid come from, the tower's patches lying row by row.

    Args:
        rows, columns: of the grid of cells.
        merge: patches per cell along one side (pixel shuffle, patch merger, average pooling).
        tower_row: row of the tower's batch, counted from the medium's first.
        first: position of the first patch in that row (1 after a class token).
    """
    wide = columns * merge
    patch = np.arange(rows * merge * wide).reshape(rows, merge, columns, merge)
    position = patch.transpose(0, 2, 1, 3).reshape(rows * columns, merge * merge) + first
    return np.stack([np.full_like(position, tower_row), position], -1)


def plain(
    rows: int, columns: int, *, merge: int = 1, tower_row: int = 0, first: int = 0, **options: Any
) -> Grid:
    """A grid whose cells are all there, in order (arguments as `sources`; options of `Grid`)."""
    options.setdefault("cells", tuple(range(rows * columns)))
    where = sources(rows, columns, merge=merge, tower_row=tower_row, first=first)
    return Grid(rows, columns, sources=where, **options)


def placeless(tokens: int, rows: int, columns: int, *, first: int = 0) -> Grid:
    """Tokens that stand for the whole picture (queries of a Q-Former or resampler).

    Rows and columns are those of the tower's patches; no token has one of them as its own place.
    """
    return plain(rows, columns, first=first, cells=(NOWHERE,) * tokens)

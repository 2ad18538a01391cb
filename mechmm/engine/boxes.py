"""Which part of a picture a place in a tower's tensor stands for."""

from __future__ import annotations

import numpy as np

from mechmm.engine.located import tower_rows
from mechmm.engine.sites import READING, SEEING
from mechmm.model.grids import Grid
from mechmm.model.layout import SpanError, TokenLayout

Seen = tuple[int, float, float, float, float]
"""(number of the prompt's picture, left, top, right, bottom in pixels of it as it was given)."""


def box_of(layout: TokenLayout, tower: str, prompt: int, row: int, position: int) -> Seen | None:
    """The pixel box of a place, or None where it stands for no part of a picture that is known.

    Args:
        row, position: in the hook's tensor.
    """
    if tower in READING:
        try:
            box = layout.box(position, prompt)
        except SpanError:
            return None
        return box.image, box.left, box.top, box.right, box.bottom
    if tower not in SEEING or not layout.windows:
        return None
    first = tower_rows(layout, prompt)
    for image, medium in enumerate(layout.media[prompt]):
        for view in medium.views:
            cell = _cell(view, row - first, position)
            if cell is not None:
                return image, *_pixels(layout.windows[prompt][image], view, cell)
        first += medium.tower_rows
    return None


def _cell(view: Grid, row: int, position: int) -> int | None:
    """The cell of a view that is made of a position, or None."""
    there = (view.sources == np.array((row, position))).all(-1)
    cells = np.argwhere(there.reshape(len(there), -1).any(1))
    known = len(cells) and not np.isnan(view.window).any()
    return int(cells[0, 0]) if known else None


def _pixels(
    window: tuple[float, float, float, float], view: Grid, cell: int
) -> tuple[float, float, float, float]:
    """A cell's box, in pixels of the picture of which the window is seen."""
    row, column = divmod(cell, view.columns)
    left, top, right, bottom = view.window
    x, y = (right - left) / view.columns, (bottom - top) / view.rows
    edges = (left + column * x, top + row * y, left + (column + 1) * x, top + (row + 1) * y)
    sizes = (window[2] - window[0], window[3] - window[1])
    return tuple(window[i % 2] + edge * sizes[i % 2] for i, edge in enumerate(edges))  # type: ignore[return-value]

"""Which part of a picture a place in a tower's tensor stands for, and which places a part has."""

from __future__ import annotations

import numpy as np

from mechmm.engine.located import projected, tower_rows
from mechmm.engine.sites import READING, SEEING
from mechmm.model.grids import Grid
from mechmm.model.layout import Box, Patches, SpanError, TokenLayout

Seen = tuple[int, float, float, float, float]
"""(number of the prompt's picture, left, top, right, bottom in pixels of it as it was given)."""


def box_of(layout: TokenLayout, tower: str, prompt: int, row: int, position: int) -> Seen | None:
    """The pixel box of a place, or None where it stands for no part of a picture that is known.

    Args:
        row, position: in the hook's tensor.
    """
    if tower not in SEEING:
        if tower not in READING:  # a token that a projector gives stands for what its position does
            places = {place: position for position, place in projected(layout, prompt)}
            if (row, position) not in places:
                return None
            position = places[row, position]
        return _of_token(layout, prompt, position)
    if not layout.windows:
        return None
    first = tower_rows(layout, prompt)
    for image, medium in enumerate(layout.media[prompt]):
        for view in medium.views:
            cell = _cell(view, row - first, position)
            if cell is not None:
                return image, *_pixels(layout.windows[prompt][image], view, cell)
        first += medium.tower_rows
    return None


def places_in(
    layout: TokenLayout, tower: str, prompt: int, where: Box | Patches
) -> set[tuple[int, int]]:
    """(row, position) in a tower's tensors of everything that is made of some part of a picture.

    Raises:
        SpanError: a part that the prompt's pictures do not have.
    """
    if tower in READING:
        return {(prompt, position) for position in layout.find(where, prompt)}
    if tower not in SEEING:
        places = dict(projected(layout, prompt))
        return {places[position] for position in layout.find(where, prompt) if position in places}
    parts = layout.patches(where, prompt) if isinstance(where, Box) else (where,)
    media, found = layout.media[prompt], set()
    for part in parts:
        view = _view(layout, prompt, part)
        first = tower_rows(layout, prompt) + sum(m.tower_rows for m in media[: part.image])
        for row, column in part.cells:
            made = view.sources[row * view.columns + column].tolist()
            found |= {(first + own, position) for own, position in made}
    return found


def _of_token(layout: TokenLayout, prompt: int, position: int) -> Seen | None:
    """The pixel box of a position of the prompt."""
    try:
        box = layout.box(position, prompt)
    except SpanError:
        return None
    return box.image, box.left, box.top, box.right, box.bottom


def _view(layout: TokenLayout, prompt: int, part: Patches) -> Grid:
    """The view that some cells lie in."""
    views = [medium.views for medium in layout.media[prompt]]
    if 0 <= part.image < len(views) and 0 <= part.view < len(views[part.image]):
        view = views[part.image][part.view]
        if all(0 <= r < view.rows and 0 <= c < view.columns for r, c in part.cells):
            return view
    sizes = [f"{view.rows} x {view.columns}" for own in views for view in own]
    raise SpanError(
        f"prompt {prompt} has no {part}; its pictures have {', '.join(sizes) or 'no'} patches"
    )


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

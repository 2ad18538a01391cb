"""Patches over the picture that they are patches of."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from mechmm.results.canvas import COLORS, HEAD, Canvas, bar_room
from mechmm.results.values import Labels, array, label, largest, numbers

Grids: TypeAlias = Shaped[Tensor, "*layer row column"] | Shaped[np.ndarray, "*layer row column"]


def patch_overlay(
    picture: Image.Image,
    values: Grids,
    title: str,
    layers: Labels | None = None,
    *,
    texts: Sequence[Any] | np.ndarray | None = None,
    value_title: str = "effect",
) -> go.Figure:
    """The picture, and once more per layer under a see-through heat map of its patches.

    The first panel is the picture as it is; under the maps it is grey, so that its own
    colours are not taken for effects. A patch without effect (or NaN) is transparent. Rows and
    columns count from 0.

    Args:
        picture: what the model saw: resized and cropped as its processor did.
        values: one value per patch, for one layer or several.
        layers: names of the layers.
        texts: shown on hover, in the shape of `values`: a token per patch, say.

    Raises:
        ValueError: names or texts do not fit the values.
    """
    grids = array(values)
    if grids.ndim not in (2, 3) or not grids.size:
        raise ValueError(
            f"values of shape {grids.shape}; give [row, column] or [layer, row, column]"
        )
    notes = np.full(grids.shape, "", object) if texts is None else np.asarray(texts, object)
    if notes.shape != grids.shape:
        raise ValueError(f"texts of shape {notes.shape} for values of shape {grids.shape}")
    rows, columns = grids.shape[-2:]
    grids, notes = grids.reshape(-1, rows, columns), notes.reshape(-1, rows, columns)
    headings = ["picture", *_layer_names(layers, len(grids))]
    across, side = _arrangement(len(headings))
    shrink = side / max(picture.size)
    wide, high = picture.width * shrink, picture.height * shrink
    down = math.ceil(len(headings) / across)
    width, height = across * (wide + 20), down * (high + HEAD + 12)
    canvas = Canvas.titled(title, "", width + bar_room(value_title), height)
    for i, heading in enumerate(headings):
        row, column = divmod(i, across)
        box = (column * (wide + 20), row * (high + HEAD + 12) + HEAD, wide, high)
        axes = canvas.place(i, box, label(heading))
        canvas.bare(i, rows, columns)
        under = grey(picture) if i else picture.convert("RGB")
        canvas.figure.add_trace(picture_trace(under, (rows, columns), side, axes))
        if i:
            canvas.figure.add_trace(patch_trace(grids[i - 1], notes[i - 1], axes))
    canvas.color(see_through(), largest(grids), value_title, (width, HEAD, 0, high))
    return canvas.figure


def _arrangement(count: int) -> tuple[int, int]:
    """Panels in a row, and pixels of a panel's longer side."""
    return (2, 380) if count == 2 else (3, 290) if count <= 6 else (4, 220)


def _layer_names(layers: Labels | None, count: int) -> list[str]:
    if layers is None:
        return ["patches"] if count == 1 else [f"layer {i}" for i in range(count)]
    if len(layers) != count:
        raise ValueError(f"{len(layers)} names for the maps of {count} layers; give one each")
    return [name if isinstance(name, str) else f"layer {name}" for name in layers]


def grey(picture: Image.Image) -> Image.Image:
    """The picture without its colours, a little paler."""
    grey = picture.convert("RGB").convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.15)


def picture_trace(
    picture: Image.Image, grid: tuple[int, int], side: int, axes: Mapping[str, str]
) -> go.Image:
    """The picture, stretched over the grid: its axes count patches."""
    # A small picture keeps its crisp pixels; a large one is smoothed when it shrinks.
    smooth = "fast" if max(picture.size) > side else False
    picture = picture.copy()
    picture.thumbnail((2 * side, 2 * side))  # every layer carries a copy
    dx, dy = grid[1] / picture.width, grid[0] / picture.height
    data = io.BytesIO()
    picture.save(data, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    place = {"x0": dx / 2 - 0.5, "y0": dy / 2 - 0.5, "dx": dx, "dy": dy}
    return go.Image(source=source, zsmooth=smooth, hoverinfo="skip", **place, **axes)


def patch_trace(grid: np.ndarray, notes: np.ndarray, axes: Mapping[str, str]) -> go.Heatmap:
    texts = numbers(grid)

    def text(i: int, j: int) -> str:
        note = f"<br>{label(notes[i, j], 200)}" if str(notes[i, j]) else ""
        return f"row {i}, column {j}: {texts[i, j]}{note}"

    hover = [[text(i, j) for j in range(grid.shape[1])] for i in range(grid.shape[0])]
    return go.Heatmap(
        z=grid,
        coloraxis="coloraxis",
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=False,
        **axes,
    )


def see_through() -> list[tuple[float, str]]:
    """One red and one blue, the more transparent the less the value says."""

    def color(end: str, share: float) -> str:
        parts = ", ".join(str(int(end[i : i + 2], 16)) for i in (1, 3, 5))
        return f"rgba({parts}, {0.8 * share**0.9:.3f})"

    # Zero appears twice, or the steps beside it would mix red with blue.
    steps = np.linspace(0, 1, 6)
    red = [(float(0.5 - share / 2), color(COLORS[1], share)) for share in steps[::-1]]
    blue = [(float(0.5 + share / 2), color(COLORS[-2], share)) for share in steps]
    return red + blue

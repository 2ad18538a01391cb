"""Tokens where a lens reads them: layers by positions, or over the picture layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from mechmm.results.canvas import COLORS, GAP, HEAD, Canvas, bar_room
from mechmm.results.overlay import grey, patch_trace, picture_trace, see_through
from mechmm.results.values import Labels, array, label, largest, pixels

Matrix = Shaped[Tensor, "row column"] | Shaped[np.ndarray, "row column"]
Grids = Shaped[Tensor, "layer row column"] | Shaped[np.ndarray, "layer row column"]
_WIDE, _HIGH, _SIDE = 74, 26, 380


def token_table(
    tokens: Shaped[np.ndarray, "row column"],
    values: Matrix,
    rows: Labels,
    columns: Labels,
    title: str,
    *,
    notes: Shaped[np.ndarray, "row column"] | None = None,
    value_title: str = "probability",
    y_title: str = "layer",
) -> go.Figure:
    """A cell per layer (row, the first at the top) and position (column), with its token in it.

    Args:
        tokens: shown in the cells.
        values: what the colour stands for; NaN is grey.
        notes: shown on hover, besides.

    Raises:
        ValueError: arrays or labels of different sizes.
    """
    numbers = array(values)
    notes = np.full(numbers.shape, "", object) if notes is None else notes
    if not numbers.shape == tokens.shape == notes.shape == (len(rows), len(columns)):
        raise ValueError(
            f"tokens of shape {tokens.shape}, values of shape {numbers.shape}, {len(rows)} rows "
            f"and {len(columns)} columns; give one of each for every cell"
        )
    names, heads = [label(name) for name in rows], [label(name, 10) for name in columns]
    left, below = pixels(names) + 40, 0.72 * pixels(heads) + 38
    wide, high = _WIDE * len(columns), _HIGH * len(rows)
    canvas = Canvas.titled(
        title, "", left + wide + GAP + bar_room(value_title), HEAD + high + below
    )
    axes = canvas.place(0, (left, HEAD, wide, high))
    hover = [
        [
            f"{label(rows[i], 80)}, {label(columns[j], 80)}<br>{notes[i, j]}"
            for j in range(len(columns))
        ]
        for i in range(len(rows))
    ]
    shown = np.vectorize(lambda token: label(token, 9), otypes=[object])(tokens)
    cells = go.Heatmap(
        z=numbers,
        coloraxis="coloraxis",
        text=shown,
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertext=hover,
        hoverinfo="text",
        xgap=1,
        ygap=1,
    )
    canvas.figure.add_trace(cells.update(axes))
    canvas.name("xaxis", 0, heads)
    canvas.name("yaxis", 0, names, 1, y_title)
    canvas.figure.update_layout(plot_bgcolor="#dddddd").update_xaxes(tickangle=-45)
    scale = list(zip(np.linspace(0, 1, len(COLORS)), COLORS, strict=True))
    place = (left + wide + GAP, HEAD, 0, max(160, high))
    canvas.color(scale, largest(numbers), value_title, place)
    return canvas.figure


def layer_slider(
    panels: Sequence[tuple[str, Image.Image, Grids, np.ndarray]],
    title: str,
    layers: Labels,
    *,
    subtitle: str = "",
    value_title: str = "logit difference",
    active: int | None = None,
) -> go.Figure:
    """Pictures under a see-through heat map of their patches, one layer at a time, with a slider.

    All layers and panels share one colour scale. Rows and columns count from 0.

    Args:
        panels: (heading, picture, values [layer, row, column], what is shown on hover, in the shape
            of the values), left to right: the clean prompt beside the corrupt one, say.
        layers: their names.
        active: the layer that is shown first; default: the last.

    Raises:
        ValueError: no panel, or values and names of different sizes.
    """
    grids = [array(values) for _, _, values, _ in panels]
    if not panels or any(len(grid) != len(layers) or grid.ndim != 3 for grid in grids):
        shapes = [grid.shape for grid in grids]
        raise ValueError(
            f"values of shapes {shapes} for {len(layers)} layers; give a grid for each"
        )
    active = len(layers) - 1 if active is None else active
    sizes = [_fitting(picture) for _, picture, _, _ in panels]
    width = sum(wide + GAP for wide, _ in sizes)
    high = max(high for _, high in sizes)
    canvas = Canvas.titled(title, subtitle, width + bar_room(value_title), high + HEAD + 90)
    left, changing = 0.0, []
    for i, ((heading, picture, _, notes), grid, size) in enumerate(
        zip(panels, grids, sizes, strict=True)
    ):
        axes = canvas.place(i, (left, HEAD, *size), label(heading))
        rows, columns = grid.shape[1:]
        canvas.bare(i, rows, columns)
        canvas.figure.add_trace(picture_trace(grey(picture), (rows, columns), _SIDE, axes))
        changing += [None]
        for number in range(len(layers)):
            trace = patch_trace(grid[number], notes[number], axes)
            canvas.figure.add_trace(trace.update(visible=number == active))
            changing += [number]
        left += size[0] + GAP
    canvas.color(see_through(), max(map(largest, grids)), value_title, (width, HEAD, 0, high))
    steps = [
        {
            "label": label(name),
            "method": "restyle",
            "args": [{"visible": [own in (None, number) for own in changing]}],
        }
        for number, name in enumerate(layers)
    ]
    slider = {
        "steps": steps,
        "active": active,
        "len": (width - GAP) / canvas.width,
        "x": 0,
        "y": 1 - (HEAD + high + 14) / canvas.height,
        "yanchor": "top",
        "pad": {"t": 0, "b": 0, "l": 0, "r": 0},
        "currentvalue": {"prefix": "read at: "},
        "font": {"size": 11},
    }
    return canvas.figure.update_layout(sliders=[slider])


def _fitting(picture: Image.Image) -> tuple[float, float]:
    """(width, height) of a panel."""
    shrink = _SIDE / max(picture.size)
    return picture.width * shrink, picture.height * shrink

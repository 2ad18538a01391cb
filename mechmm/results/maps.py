"""Heat maps: layers by spans, layers by heads, one per tower, with one colour scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped
from torch import Tensor

from mechmm.results.canvas import COLORS, EDGE, GAP, HEAD, Canvas, Cells, bar_room
from mechmm.results.values import (
    Labels,
    Range,
    array,
    between,
    interval_of,
    label,
    largest,
    null_range,
    numbers,
    pixels,
)

Matrix: TypeAlias = Shaped[Tensor, "row column"] | Shaped[np.ndarray, "row column"]
_WIDEST = 1128
"""Pixels that a report has for a figure."""


def heat_map(
    values: Matrix,
    rows: Labels,
    columns: Labels,
    title: str,
    *,
    x_title: str,
    y_title: str,
    low: Matrix | None = None,
    high: Matrix | None = None,
    n: int | None = None,
    null: Range | None = None,
    value_title: str = "effect",
) -> go.Figure:
    """Layers by spans, layers by heads: one coloured cell per value, the first row at the top.

    Where cells have room they carry their value, bold if it lies outside the null range. NaN is
    grey.

    Args:
        values: mean effects.
        low, high: interval of every value, shown on hover; NaN where there is none.
        n: number of examples behind every value.
        null: where the same quantity lies under the null (random sites, say).
        value_title: what the colour stands for.

    Raises:
        ValueError: labels or bounds do not fit the values.
    """
    part = _Map.of("", (values, rows, columns), null, (low, high))
    return _maps([part], title, x_title, y_title, value_title, n)


def tower_maps(
    maps: Mapping[str, tuple[Matrix, Labels, Labels]],
    title: str,
    *,
    x_title: str = "",
    y_title: str = "layer",
    value_title: str = "effect",
    n: int | None = None,
    nulls: Mapping[str, Range] | None = None,
) -> go.Figure:
    """Heat maps side by side, one per tower, with one colour scale.

    Args:
        maps: tower -> (values, row labels, column labels), left to right.
        n: number of examples behind every value.
        nulls: tower -> where the same quantity lies under the null.

    Raises:
        ValueError: no maps, labels that do not fit the values, a null for an unknown tower.
    """
    if not maps:
        raise ValueError("tower_maps needs the map of at least one tower")
    nulls = nulls or {}
    if odd := sorted(set(nulls) - set(maps)):
        raise ValueError(f"null ranges for {odd}, but the maps are of {list(maps)}")
    parts = [_Map.of(tower, given, nulls.get(tower)) for tower, given in maps.items()]
    return _maps(parts, title, x_title, y_title, value_title, n)


@dataclass(frozen=True)
class _Map:
    """One heat map: values [row, column] with their interval [2, row, column] and null range."""

    heading: str
    values: np.ndarray
    rows: Labels
    columns: Labels
    null: Range | None
    interval: np.ndarray

    @classmethod
    def of(
        cls,
        tower: str,
        given: tuple[Matrix, Labels, Labels],
        null: Range | None,
        interval: tuple[Any, Any] = (None, None),
    ) -> _Map:
        values, (_, rows, columns) = array(given[0]), given
        if values.shape != (len(rows), len(columns)):
            raise ValueError(
                f"values of shape {values.shape} for {len(rows)} row and {len(columns)} column "
                "labels; give one label per row and per column"
            )
        heading = label(tower) + (f"  (null {between(*null)})" if null and tower else "")
        bounds = interval_of(*interval, values.shape)
        return cls(heading, values, rows, columns, null_range(null), bounds)


def _maps(
    maps: Sequence[_Map], title: str, x_title: str, y_title: str, value_title: str, n: int | None
) -> go.Figure:
    """Maps from left to right, as wide as their cells or headings need, and the colour bar."""
    rows = [[label(name) for name in part.rows] for part in maps]
    columns = [[label(name) for name in part.columns] for part in maps]
    headings, bar = [part.heading for part in maps], bar_room(value_title)
    cells = Cells.fitting(rows, columns, headings, _WIDEST - 2 * EDGE - bar)
    sizes = [
        (cells.size[0] * len(c), cells.size[1] * len(r)) for r, c in zip(rows, columns, strict=True)
    ]
    needs = [pixels([heading]) for heading in headings]
    slots = [cells.left + GAP + max(s[0], need) for s, need in zip(sizes, needs, strict=True)]
    highest = max(160.0, *(size[1] + cells.below for size in sizes))
    subtitle = _below_title(maps, n)
    width = max(sum(slots) + bar, pixels([subtitle]), 420)
    canvas = Canvas.titled(title, subtitle, width, HEAD + highest)
    for i, part in enumerate(maps):
        left = sum(slots[:i]) + cells.left
        axes = canvas.place(i, (left, HEAD, *sizes[i]), part.heading)
        trace = _cell_trace(part, cells, (y_title, x_title, value_title))
        canvas.figure.add_trace(trace.update(axes))
        canvas.name("xaxis", i, columns[i], cells.steps[1], x_title)
        canvas.name("yaxis", i, rows[i], cells.steps[0], y_title)
    # Grey shows where there is no value: white would read as zero.
    canvas.figure.update_layout(plot_bgcolor="#dddddd").update_xaxes(tickangle=cells.angle)
    limit = max(largest(part.values) for part in maps)
    scale = list(zip(np.linspace(0, 1, len(COLORS)), COLORS, strict=True))
    canvas.color(scale, limit, value_title, (sum(slots), HEAD, 0, max(160, highest - cells.below)))
    return canvas.figure


def _below_title(maps: Sequence[_Map], n: int | None) -> str:
    null = next((part.null for part in maps if part.null is not None), None)
    own = f"null {between(*null)}, " if null is not None and not maps[0].heading else ""
    parts = [
        f"mean of {n} examples" if n is not None else "",
        f"{own}bold outside the null" if null is not None else "",
        "intervals on hover" if any(np.isfinite(part.interval).any() for part in maps) else "",
    ]
    return "; ".join(part for part in parts if part)


def _cell_trace(part: _Map, cells: Cells, titles: tuple[str, str, str]) -> go.Heatmap:
    texts = numbers(part.values)
    roomy = cells.size[0] >= 42 and cells.size[1] >= 18
    gap = 1 if min(cells.size) > 12 else 0
    return go.Heatmap(
        z=part.values,
        coloraxis="coloraxis",
        text=_in_cells(part, texts) if roomy else None,
        texttemplate="%{text}" if roomy else None,
        textfont={"size": 12},
        hovertext=_on_hover(part, texts, titles),
        hoverinfo="text",
        xgap=gap,
        ygap=gap,
    )


def _in_cells(part: _Map, texts: np.ndarray) -> np.ndarray:
    shown = np.where(np.isnan(part.values), "", texts)
    if part.null is None:
        return shown
    outside = (part.values < part.null[0]) | (part.values > part.null[1])
    return np.where(outside, "<b>" + shown + "</b>", shown)


def _on_hover(part: _Map, texts: np.ndarray, titles: tuple[str, str, str]) -> list[list[str]]:
    y, x, value = map(label, titles)
    null = f"<br>null {between(*part.null)}" if part.null is not None else ""

    def text(i: int, j: int) -> str:
        place = f"{y} {label(part.rows[i], 200)}, {x} {label(part.columns[j], 200)}"
        interval = between(*part.interval[:, i, j])
        interval = interval and f"<br>interval {interval}"
        return f"{place}<br>{value} <b>{texts[i, j]}</b>{interval}{null}"

    return [[text(i, j) for j in range(len(part.columns))] for i in range(len(part.rows))]

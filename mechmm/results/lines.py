"""Lines over the layers of a model, with their intervals and the band of a null."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechmm.results.canvas import HEAD, INK, Canvas, band
from mechmm.results.values import between, label, numbers, pixels

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b4c9a", "#7f6000")
"""Colours that colour-blind readers tell apart (Okabe & Ito 2008), yellow left out."""
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
_GRID, _BAND = "#e6e8eb", "rgba(110, 119, 129, 0.22)"


def lines(
    series: Mapping[str, pd.DataFrame],
    title: str,
    subtitle: str = "",
    *,
    x_title: str = "layer",
    y_title: str = "effect",
    null: pd.DataFrame | None = None,
    null_title: str = "random",
    level: float | None = 0.0,
) -> go.Figure:
    """One line for each of some series, over the band of the null.

    Args:
        series: name -> table with the columns x, value, low, high (NaN: no interval), and `name`
            of the point where a number says too little.
        null: table with the columns x, low, high.
        level: height of a dotted line, or None.

    Raises:
        ValueError: no points.
    """
    if not sum(map(len, series.values())):
        raise ValueError("there is nothing to draw: no series has a point")
    beside = pixels([label(name) for name in [*series, null_title]]) + 60
    canvas = Canvas.titled(title, subtitle, 660 + beside, 420)
    axes = canvas.place(0, (64, HEAD, 570, 330))
    if null is not None and len(null):
        _band(canvas.figure, null, null_title, axes)
    for number, (name, table) in enumerate(series.items()):
        _line(canvas.figure, table.sort_values("x"), name, number, axes)
    if level is not None:
        line = {"color": INK, "width": 1, "dash": "dot"}
        canvas.figure.add_hline(y=level, line=line, layer="below")
    points = np.unique(np.concatenate([table["x"].to_numpy(float) for table in series.values()]))
    ends = [points.min() - 0.3, points.max() + 0.3]
    ticks = points if len(points) <= 16 else None
    canvas.figure.update_xaxes(
        title=label(x_title), gridcolor=_GRID, range=ends, tickvals=ticks, zeroline=False
    )
    canvas.figure.update_yaxes(title=label(y_title), gridcolor=_GRID, zeroline=False)
    where = {"x": (64 + 570 + 16) / canvas.width, "y": 1 - HEAD / canvas.height, "yanchor": "top"}
    return canvas.figure.update_layout(legend=where, showlegend=True)


def _band(figure: go.Figure, null: pd.DataFrame, name: str, axes: Mapping[str, str]) -> None:
    """Where the null lies; a single point gets some width."""
    known = null[null["low"].notna() & null["high"].notna()].sort_values("x")
    x, low, high = (known[column].to_numpy(float) for column in ("x", "low", "high"))
    if len(x) == 1:
        x, low, high = x[0] + np.array([-0.2, 0.2]), low.repeat(2), high.repeat(2)
    figure.add_trace(band(x, low, high, _BAND, name=label(name), **axes))


def _line(
    figure: go.Figure, table: pd.DataFrame, name: str, number: int, axes: Mapping[str, str]
) -> None:
    values = table["value"].to_numpy(float)
    low, high = (table[column].to_numpy(float) for column in ("low", "high"))
    color = PALETTE[number % len(PALETTE)]
    bars = {
        "array": np.nan_to_num(high - values),
        "arrayminus": np.nan_to_num(values - low),
        "symmetric": False,
        "thickness": 1.2,
        "width": 3,
        "color": color,
    }
    figure.add_trace(
        go.Scatter(
            x=table["x"],
            y=values,
            mode="lines+markers",
            line={"color": color, "width": 2.2},
            marker={"color": color, "size": 7, "symbol": MARKS[number % len(MARKS)]},
            error_y=bars if np.isfinite(np.concatenate([low, high])).any() else None,
            hovertext=_on_hover(table, name),
            hoverinfo="text",
            name=label(name),
            **axes,
        )
    )


def _on_hover(table: pd.DataFrame, name: str) -> list[str]:
    points = table["name"] if "name" in table else table["x"].map("{:g}".format)
    texts = numbers(table["value"].to_numpy(float))
    spans = [between(*ends) for ends in zip(table["low"], table["high"], strict=True)]
    return [
        f"{label(name, 200)}, {label(point, 200)}<br><b>{text}</b>"
        + (f"<br>interval {span}" if span else "")
        for point, text, span in zip(points, texts, spans, strict=True)
    ]

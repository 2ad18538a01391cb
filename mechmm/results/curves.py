"""Curves with their intervals, over a share of the whole on a log axis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechmm.results.canvas import COLORS, HEAD, INK, Canvas, band
from mechmm.results.values import between, label, numbers

_GREY, _GRID = "#6e7781", "#e6e8eb"
_SHADE = {COLORS[-2]: "rgba(33, 102, 172, 0.18)", _GREY: "rgba(110, 119, 129, 0.18)"}


def curves(
    series: Mapping[str, pd.DataFrame],
    title: str,
    subtitle: str = "",
    *,
    x_title: str = "share",
    y_title: str = "value",
    null: str = "",
) -> go.Figure:
    """Curves with bands, and lines at 0 and 1; that of the null is grey.

    Args:
        series: name -> table with the columns share (in (0, 1]), value, low, high (NaN: no band).
        null: which of them is the null.

    Raises:
        ValueError: no points, or a share that a log axis cannot show.
    """
    shares = np.concatenate([table["share"].to_numpy(float) for table in series.values()] or [[]])
    if not len(shares) or (shares <= 0).any():
        raise ValueError(f"curves need points, at shares above 0; these are {shares.tolist()}")
    canvas = Canvas.titled(title, subtitle, 860, 470)
    axes = canvas.place(0, (64, HEAD, 790, 380))
    figure = canvas.figure
    for name in sorted(series, key=lambda name: name != null):  # the null lies below
        _add(figure, series[name].sort_values("share"), name, name == null, axes)
    for height in (0, 1):
        figure.add_hline(y=height, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
    ends = math.log10(shares.min()) - 0.06, math.log10(shares.max()) + 0.06
    ticks = _ticks(shares.min(), shares.max())
    texts = [f"{100 * tick:g} %" for tick in ticks]
    log = {"type": "log", "range": ends, "tickvals": ticks, "ticktext": texts}
    figure.update_xaxes(title=label(x_title), gridcolor=_GRID, **log)
    figure.update_yaxes(title=label(y_title), gridcolor=_GRID, zeroline=False)
    where = {"orientation": "h", "x": 64 / 860, "y": 1, "yanchor": "top"}
    return figure.update_layout(legend=where, showlegend=True)


def _add(
    figure: go.Figure, table: pd.DataFrame, name: str, null: bool, axes: Mapping[str, str]
) -> None:
    """A curve over its band."""
    color = _GREY if null else COLORS[-2]
    known = table[table["low"].notna() & table["high"].notna()]
    x, low, high = (known[column].to_numpy(float) for column in ("share", "low", "high"))
    if len(x):
        figure.add_trace(band(x, low, high, _SHADE[color], showlegend=False, **axes))
    values = table["value"].to_numpy(float)
    figure.add_trace(
        go.Scatter(
            x=table["share"],
            y=values,
            mode="lines+markers",
            line={"color": color, "width": 2.5, "dash": "dash" if null else "solid"},
            marker={"color": color, "size": 7},
            hovertext=_on_hover(table, name),
            hoverinfo="text",
            name=label(name),
            **axes,
        )
    )


def _on_hover(table: pd.DataFrame, name: str) -> list[str]:
    texts = numbers(table["value"].to_numpy(float))
    spans = [between(*ends) for ends in zip(table["low"], table["high"], strict=True)]
    return [
        f"{label(name, 200)}, {100 * share:.2g} %<br><b>{text}</b>"
        + (f"<br>interval {span}" if span else "")
        for share, text, span in zip(table["share"], texts, spans, strict=True)
    ]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten, or the powers alone where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 5 else (1, 2, 5)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if 0.999 * low <= tick <= 1.001 * high]

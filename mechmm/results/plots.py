"""Arrays in, plotly figure out.

One convention in every figure: blue is positive, red is negative, white is zero (ColorBrewer's
RdBu, which colour-blind readers can tell apart), and the scale is symmetric about zero. Labels are
shown as they are: `<image>` is a token, not markup. Sizes are in pixels and fixed; a label of more
than 40 characters is cut, and whole on hover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped
from torch import Tensor

from mechmm.results.canvas import COLORS, HEAD, INK, Canvas
from mechmm.results.curves import curves
from mechmm.results.lines import lines
from mechmm.results.maps import heat_map, tower_maps
from mechmm.results.overlay import patch_overlay
from mechmm.results.store import write_whole
from mechmm.results.values import (
    Labels,
    Range,
    array,
    between,
    interval_of,
    label,
    null_range,
    numbers,
    pixels,
)

__all__ = [
    "COLORS",
    "bars",
    "curves",
    "heat_map",
    "lines",
    "patch_overlay",
    "save_png",
    "tower_maps",
]

Vector: TypeAlias = Shaped[Tensor, " bar"] | Shaped[np.ndarray, " bar"] | Sequence[Any]


def bars(
    names: Labels,
    values: Vector,
    low: Vector | None,
    high: Vector | None,
    title: str,
    null: Range | None = None,
    *,
    value_title: str = "effect",
    null_title: str = "random sites",
) -> go.Figure:
    """Horizontal bars with intervals, the first at the top, over the band of the null.

    Bars that end inside the band are pale.

    Args:
        names: one label per bar.
        low, high: interval of every value, or None; NaN where there is none.
        null: (low, high) of the same quantity under the null.

    Raises:
        ValueError: names or bounds do not fit the values, or the null is not two numbers.
    """
    ends = array(values)
    if ends.ndim != 1 or len(names) != len(ends):
        raise ValueError(f"{len(names)} names for values of shape {ends.shape}; give one each")
    interval = interval_of(low, high, ends.shape)
    labels = [label(name) for name in names]
    left, height = pixels(labels) + 14, 26 * max(1, len(labels))
    canvas = Canvas.titled(title, "", left + 560, height + 78)
    figure = canvas.figure
    axes = canvas.place(0, (left, HEAD, 490, height))
    figure.add_trace(_bar_trace(names, ends, interval, null_range(null), axes))
    figure.update_xaxes(title=label(value_title), zeroline=True, zerolinecolor=INK)
    figure.update_xaxes(gridcolor="#e6e8eb")
    canvas.name("yaxis", 0, labels)
    for place, text in enumerate(numbers(ends)):
        figure.add_annotation(
            text=text, x=1, xref="paper", xanchor="right", y=place, showarrow=False, font_size=12
        )
    return _with_band(figure, null, null_title) if null is not None else figure


def save_png(figure: go.Figure, path: str | Path, scale: float = 2.0) -> Path:
    """Write the figure as PNG, wholly or not at all, with a local Chromium and without network.

    Args:
        scale: image pixels per pixel of the figure.

    Raises:
        RuntimeError: kaleido or Chromium is missing.
    """
    advice = "install it, or keep the interactive figure with figure.write_html(path)"
    try:
        # An optional extra, so absent where only the lock is installed.
        import kaleido  # pyright: ignore[reportMissingImports]
        from kaleido.errors import ChromeNotFoundError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"a PNG needs the kaleido package; {advice}") from error
    size = {name: figure.layout[name] for name in ("width", "height") if figure.layout[name]}
    opts = {"format": "png", "scale": scale} | size
    try:
        # By default kaleido fetches MathJax from the network; no figure here uses it.
        data = kaleido.calc_fig_sync(figure.to_dict(), opts=opts, kopts={"mathjax": False})
    except ChromeNotFoundError as error:
        raise RuntimeError(f"a PNG needs Chromium or Chrome on this machine; {advice}") from error
    return write_whole(path, data)


def _bar_trace(
    names: Labels,
    values: np.ndarray,
    interval: np.ndarray,
    null: Range | None,
    axes: Mapping[str, str],
) -> go.Bar:
    hover = [
        f"{label(name, 200)}<br><b>{text}</b>" + (f"<br>interval {ends}" if ends else "")
        for name, text, ends in zip(names, numbers(values), map(between, *interval), strict=True)
    ]
    low, high = null if null is not None else (np.inf, -np.inf)
    inside = (values >= low) & (values <= high)
    errors = {
        "array": interval[1] - values,
        "arrayminus": values - interval[0],
        "symmetric": False,
        "color": INK,
        "thickness": 1.2,
        "width": 3,
    }
    return go.Bar(
        x=values,
        y=np.arange(len(values)),
        orientation="h",
        error_x=errors if np.isfinite(interval).any() else None,
        marker={
            "color": np.where(values < 0, COLORS[1], COLORS[-2]).tolist(),
            "opacity": np.where(inside, 0.4, 0.9),
        },
        width=0.7,
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
        **axes,
    )


def _with_band(figure: go.Figure, null: Range, title: str) -> go.Figure:
    figure.add_vrect(
        x0=null[0],
        x1=null[1],
        fillcolor="rgba(110,110,110,0.25)",
        line_width=0,
        layer="below",
        showlegend=True,
        name=f"{label(title)}: {between(*null)}",
    )
    return figure.update_layout(
        legend={
            "orientation": "h",
            "x": figure.layout.xaxis.domain[0],
            "y": 1,
            "yanchor": "top",
            "bgcolor": "rgba(0,0,0,0)",
        }
    )

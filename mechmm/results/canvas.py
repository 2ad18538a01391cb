"""Figures laid out in pixels: panels, their labels and the colour bar.

Sizes are fixed, so that every label has its room. Everything is placed from the top left of the
area inside the margins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go

from mechmm.results.values import label, pixels

COLORS = (
    *("#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#ffffff"),
    *("#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"),
)
"""From the most negative value to the most positive."""
INK = "#1f2328"
EDGE = 24
HEAD = 26
"""Pixels above a panel for its heading."""
GAP = 28
"""Pixels between panels."""
Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, width, height) in pixels."""
_FAINT, _SIZE = "#59636e", 13
_FONT = "Inter, Segoe UI, Helvetica Neue, Arial, sans-serif"


@dataclass(frozen=True)
class Canvas:
    """A figure with an area of `width` x `height` pixels under its title."""

    figure: go.Figure
    width: float
    height: float

    @classmethod
    def titled(cls, title: str, subtitle: str, width: float, height: float) -> Canvas:
        """An empty one; the title is wrapped."""
        lines = wrap(title, max(24, int((width - 60) / 8.6))) or [""]
        above = 30 + 22 * len(lines) + 20 * bool(subtitle)
        full = math.ceil(width + 2 * EDGE), math.ceil(height + above + EDGE)
        layout = {
            "template": "none",
            "width": full[0],
            "height": full[1],
            "margin": {"l": EDGE, "r": EDGE, "t": above, "b": EDGE},
            "font": {"family": _FONT, "size": _SIZE, "color": INK},
            "title": {
                "text": "<br>".join(escape(line, quote=False) for line in lines),
                "subtitle": {"text": subtitle, "font": {"size": _SIZE, "color": _FAINT}},
                "font": {"size": 17},
                "x": EDGE / full[0],
                "xanchor": "left",
                "y": 1 - 20 / full[1],
                "yanchor": "top",
            },
            "hoverlabel": {"font": {"size": _SIZE}, "align": "left"},
        }
        return cls(go.Figure(layout=layout), width, height)

    def place(self, i: int, box: Box, heading: str = "") -> dict[str, str]:
        """Give the i-th pair of axes its box under a heading; returns what its traces need."""
        left, top, wide, high = box
        across = [left / self.width, min(1.0, (left + wide) / self.width)]
        down = [max(0.0, 1 - (top + high) / self.height), 1 - top / self.height]
        x, y = _axis("x", i), _axis("y", i)
        axes = {_axis("xaxis", i): (across, y), _axis("yaxis", i): (down, x)}
        for name, (domain, anchor) in axes.items():
            self.figure.update_layout({name: {"domain": domain, "anchor": anchor}})
        self.head(heading, left, top)
        return {"xaxis": x, "yaxis": y}

    def head(self, text: str, left: float, top: float) -> None:
        """A heading that ends above `top`."""
        self.figure.add_annotation(
            text=text,
            x=left / self.width,
            y=1 - top / self.height,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            xshift=-2,
            showarrow=False,
            font={"color": _FAINT},
        )

    def name(
        self, axis: str, i: int, labels: Sequence[str], step: int = 1, title: str = ""
    ) -> None:
        """Labels at 0, 1, 2, …: numbers as places, so that equal labels stay apart."""
        ends = [-0.5, len(labels) - 0.5]
        line = {
            "tickvals": np.arange(len(labels))[::step],
            "ticktext": labels[::step],
            "range": ends if axis == "xaxis" else ends[::-1],
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "ticklabelstandoff": 4,
            "title": {"text": label(title), "standoff": 8},
        }
        self.figure.update_layout({_axis(axis, i): line})

    def bare(self, i: int, rows: int, columns: int) -> None:
        """Axes that count the cells of a grid, without ticks or lines."""
        ranges = {"xaxis": [-0.5, columns - 0.5], "yaxis": [rows - 0.5, -0.5]}
        for axis, ends in ranges.items():
            line = {"visible": False, "range": ends, "constrain": "domain"}
            self.figure.update_layout({_axis(axis, i): line})

    def color(
        self, scale: Sequence[tuple[float, str]], limit: float, title: str, place: Box
    ) -> None:
        """The colour scale of all panels, symmetric about zero, and its bar."""
        left, top, _, high = place
        bar = {
            "thickness": 14,
            "lenmode": "pixels",
            "len": min(high, 420),
            "x": left / self.width,
            "xanchor": "left",
            "y": 1 - top / self.height,
            "yanchor": "top",
            "xpad": 0,
            "ypad": 0,
            "outlinewidth": 0,
            "nticks": 7,
        }
        axis = {"colorscale": list(scale), "cmin": -limit, "cmax": limit, "colorbar": bar}
        self.figure.update_layout(coloraxis=axis)
        self.head(label(title), left, top - 6)


@dataclass(frozen=True)
class Cells:
    """The cells of heat maps side by side, and the room of their labels.

    Attributes:
        size: (width, height) of a cell.
        left, below: room beside and under every map.
        angle: of the column labels.
        steps: every how many (rows, columns) there is a label.
    """

    size: tuple[float, float]
    left: float
    below: float
    angle: int
    steps: tuple[int, int]

    @classmethod
    def fitting(
        cls,
        rows: Sequence[Sequence[str]],
        columns: Sequence[Sequence[str]],
        headings: Sequence[str],
        room: float,
    ) -> Cells:
        """At most 64 x 30 pixels each; all maps together as wide as the room, or narrower."""
        longest = pixels([name for names in columns for name in names])
        beside = pixels([name for names in rows for name in names]) + 40
        slanted = 0.72 * longest  # at 45 degrees a label begins further left and below
        left = max(beside, slanted - 20)
        counts = [max(1, len(names)) for names in columns]
        room -= len(counts) * (left + GAP)
        needs, wide = [pixels([heading]) for heading in headings], 64.0
        for _ in range(4):  # a heading may be wider than the cells under it
            over = sum(max(0.0, p - wide * n) for p, n in zip(needs, counts, strict=True))
            wide = min(64.0, max(3.0, (room - over) / sum(counts)))
        high = min(30.0, max(5.0, 600 / max(1, *map(len, rows))))
        turned = longest > max(wide - 6, 34)
        return cls(
            size=(wide, high),
            left=left,
            below=(slanted + 12 if turned else 24) + 26,
            angle=-45 if turned else 0,
            steps=(math.ceil(17 / high), math.ceil((19 if turned else longest + 8) / wide)),
        )


def band(x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, **rest: Any) -> go.Scatter:
    """The area between two curves.

    Args:
        rest: of the trace: its axes, its name.
    """
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=color,
        hoverinfo="skip",
        **rest,
    )


def bar_room(title: str) -> float:
    """Width of the colour bar with its numbers and its heading."""
    return max(80.0, pixels([label(title)]))


def _axis(name: str, i: int) -> str:
    """`xaxis`, 1 -> `xaxis2`: plotly leaves out the number of the first."""
    return f"{name}{i + 1}" if i else name

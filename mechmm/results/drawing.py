"""A circuit as a figure, from picture to answer.

Nodes lie in slots from left to right, in the order in which they run: key-value heads (where
several heads share them), heads, MLP, layer by layer. A graph with spans has a lane per span, and
an edge stays in its lane: only attention and projectors move between positions, which thin grey
lines show, from what is read to what is written of it. All places are in pixels from the top left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from PIL import Image

from mechmm.results.arrangement import Arrangement, Parts, arranged, parts_of
from mechmm.results.canvas import COLORS, INK, Canvas
from mechmm.results.graph import Graph
from mechmm.results.values import label, largest, numbers

SUPPORTS, OPPOSES, UNKNOWN = COLORS[-2], COLORS[1], "#59636e"
WIDTHS = (1.0, 1.8, 3.0, 4.6, 6.6)
"""Pixels of an edge: |score| doubles from each to the next."""
OPACITIES = (0.3, 0.42, 0.56, 0.7, 0.85)
MOST = 5000
"""Edges that a figure may have."""
_BAND, _LINE, _LINK = "#f4f6f8", "#c9d0d8", "#8c959f"
_LEGEND = 52
_PORTS = {"q": -6.0, "v": 6.0}


def drawn(
    graph: Graph,
    keep: Bool[np.ndarray, " edge"],
    scores: Float[np.ndarray, " edge"],
    picture: Image.Image | None = None,
    grid: tuple[int, ...] = (),
    title: str = "Circuit",
) -> go.Figure:
    """The figure of `Circuit.plot`."""
    at = np.flatnonzero(keep)
    if not len(at):
        raise ValueError(
            "the circuit has no edges to draw; keep more (n=, fraction=), or do not prune"
        )
    if len(at) > MOST:
        raise ValueError(
            f"{len(at)} edges cannot be told apart in a figure; draw {MOST} at most (n=)"
        )
    parts = parts_of(graph, at)
    places = arranged(parts, graph.spans, picture is not None)
    heading = f"{title}: {len(at)} of {len(graph)} edges"
    below = "layers, heads and MLPs without an edge are left out; names and scores on hover"
    canvas = Canvas.titled(heading, below, places.width, places.height + _LEGEND)
    canvas.place(0, (0, 0, places.width, places.height))
    figure = canvas.figure
    figure.update_xaxes(visible=False, range=[0, places.width])
    figure.update_yaxes(visible=False, range=[places.height, 0])
    _background(figure, places, graph.spans)
    if picture is not None:
        _picture(figure, picture, grid, parts, places)
    _links(figure, parts, places)
    _edges(figure, _Edges.of(graph, at, scores, parts, places))
    _nodes(figure, parts, places)
    legend = {"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom", "itemclick": False}
    return figure.update_layout(legend=legend | {"itemdoubleclick": False}, hovermode="closest")


# Edges -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edges:
    """Every drawn edge: its curve [edge, point, xy], colour, step of width, and hover text."""

    curves: np.ndarray
    colors: np.ndarray
    steps: np.ndarray
    texts: list[str]
    ends: tuple[str, ...]
    """What |score| every step of width ends at."""

    @classmethod
    def of(
        cls, graph: Graph, at: np.ndarray, scores: np.ndarray, parts: Parts, places: Arrangement
    ) -> _Edges:
        own = scores[at].astype(float)
        known = ~np.isnan(own)
        size = np.abs(np.where(known, own, 0))
        limits = largest(own) / 2.0 ** np.arange(len(WIDTHS))[::-1]
        steps = np.where(known, np.searchsorted(limits[:-1], size), len(WIDTHS) // 2)
        colors = np.select([~known, own < 0], [UNKNOWN, OPPOSES], SUPPORTS)
        shown = np.where(known, [f"score <b>{n}</b>" for n in numbers(own)], "no score")
        names = [label(name, 200) for name in graph.names(at)]
        texts = [f"{name}<br>{score}" for name, score in zip(names, shown, strict=True)]
        ends = tuple(numbers(limits)) if known.any() else ()
        return cls(_curves(graph, at, parts, places), colors, steps, texts, ends)


def _curves(graph: Graph, at: np.ndarray, parts: Parts, places: Arrangement) -> np.ndarray:
    """From the right side of a node to the left of another: Bézier curves. Where both are at the
    same height the curve bows, or it would run through what lies between."""
    ports = graph.readers["kind"].map(lambda kind: _PORTS.get(kind, 0.0)).to_numpy()
    side = np.array([places.radius - 2, 0])
    start = np.array([places.at[place] for place in parts.starts]) + side
    end = np.array([places.at[place] for place in parts.ends]) - side
    end[:, 1] += ports[graph.dst[at]] * places.radius / 13
    across, down = (end - start).T
    far = np.maximum(0, across / places.step - 1.3)
    clear = places.radius + 4  # of a node in between
    rise = np.where(far > 0, clear + (places.bow - clear) * (1 - np.exp(-far / 6)), 0)
    low = np.array([parts.nodes[i].low for i, _ in parts.starts])
    bow = np.where(low, 1, -1) * np.exp(-((down / 36) ** 2)) * rise / 0.75
    reach = np.maximum(0.45 * across, 12)
    first = start + np.stack([reach, bow], axis=1)
    last = end + np.stack([-reach, bow], axis=1)
    t = np.linspace(0, 1, 25)[None, :, None]
    corners = (point[:, None] for point in (start, first, last, end))
    weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
    return sum(w * corner for w, corner in zip(weights, corners, strict=True))  # type: ignore


def _edges(figure: go.Figure, edges: _Edges) -> None:
    """A trace for every colour and width, the weak ones below; hover at the middle of each."""
    for step, width in enumerate(WIDTHS):
        for color in (UNKNOWN, OPPOSES, SUPPORTS):
            own = (edges.steps == step) & (edges.colors == color)
            if own.any():
                line = {"color": color, "width": width}
                _lines(figure, edges.curves[own], line, opacity=OPACITIES[step])
    middle = edges.curves[:, edges.curves.shape[1] // 2]
    figure.add_trace(
        go.Scatter(
            x=middle[:, 0],
            y=middle[:, 1],
            mode="markers",
            marker={"size": 12, "opacity": 0, "color": edges.colors.tolist()},
            hovertext=edges.texts,
            hoverinfo="text",
            name="edges",
            showlegend=False,
        )
    )
    _legend(figure, edges)


def _legend(figure: go.Figure, edges: _Edges) -> None:
    """Entries without data: colours, then widths and the scores that they stand for."""
    names = {SUPPORTS: "supports the answer", OPPOSES: "opposes it", UNKNOWN: "no score"}
    entries = [(name, color, 4.0) for color, name in names.items() if (edges.colors == color).any()]
    for step in np.unique(edges.steps) if edges.ends else ():
        entries.append((f"|score| ≤ {edges.ends[step]}", _LINK, WIDTHS[step]))
    for name, color, width in entries:
        line = {"color": color, "width": width}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name))


def _links(figure: go.Figure, parts: Parts, places: Arrangement) -> None:
    """From what a component reads to what it writes, where these are apart."""
    if not parts.links:
        return
    ends = np.array([[places.at[a], places.at[b]] for a, b in parts.links])
    line = {"color": _LINK, "width": 1.2, "dash": "dot"}
    _lines(figure, ends, line, name="moves between positions", showlegend=True)


def _lines(figure: go.Figure, lines: np.ndarray, line: dict, **options) -> None:
    """Many lines [line, point, xy] as one trace."""
    apart = np.full((len(lines), 1, 2), np.nan)
    points = np.concatenate([lines, apart], axis=1).reshape(-1, 2).round(1)
    options = {"showlegend": False, "hoverinfo": "skip", "mode": "lines", "line": line} | options
    figure.add_trace(go.Scatter(x=points[:, 0], y=points[:, 1], **options))


# Nodes and what lies under them ------------------------------------------------------------------


def _nodes(figure: go.Figure, parts: Parts, places: Arrangement) -> None:
    """Circles are heads, squares all else; the ends of towers are dark."""
    nodes = [parts.nodes[i] for i, _ in places.at]
    points = np.array(list(places.at.values()))
    dark = ["#3d4650" if node.end else "#ffffff" for node in nodes]
    figure.add_trace(
        go.Scatter(
            x=points[:, 0],
            y=points[:, 1],
            mode="markers+text",
            text=[node.text for node in nodes],
            textfont={"size": 12, "color": INK},
            marker={
                "symbol": ["circle" if node.kind in ("head", "kv") else "square" for node in nodes],
                "size": [2 * places.radius - 4 * node.end for node in nodes],
                "color": dark,
                "line": {"color": INK, "width": 1},
            },
            hovertext=_on_hover(parts, places),
            hoverinfo="text",
            name="nodes",
            showlegend=False,
        )
    )


def _on_hover(parts: Parts, places: Arrangement) -> list[str]:
    """What every node is, and how many edges it has."""
    into, out = Counter(parts.ends), Counter(parts.starts)
    return [
        f"<b>{label(parts.nodes[place[0]].name, 200)}</b><br>{into[place]} in, {out[place]} out"
        for place in places.at
    ]


def _background(figure: go.Figure, places: Arrangement, spans: tuple[str, ...]) -> None:
    """A band per tower, its name and its layers; a line and a name per lane."""
    for left, right, text in places.towers:
        area = {"x0": left, "x1": right, "y0": 0, "y1": places.height}
        figure.add_shape(type="rect", fillcolor=_BAND, line_width=0, layer="below", **area)
        _write(figure, f"<b>{label(text)}</b>", left + 8, places.top - 42, "left")
    for x, text in places.columns:
        _write(figure, label(text), x, places.top - 12, "center")
    for i, top in enumerate(places.lanes if spans != ("",) else ()):
        line = {"color": _LINE, "width": 1}
        ends = {"x0": 0, "x1": places.width, "y0": top, "y1": top}
        figure.add_shape(type="line", line=line, layer="below", **ends)
        _write(figure, f"<b>{label(spans[i], 18)}</b>", 0, top + 14, "left")


def _write(figure: go.Figure, text: str, x: float, y: float, anchor: str) -> None:
    figure.add_annotation(
        text=text, x=x, y=y, xanchor=anchor, yanchor="middle", showarrow=False, borderpad=0
    )


def _picture(
    figure: go.Figure,
    picture: Image.Image,
    grid: tuple[int, ...],
    parts: Parts,
    places: Arrangement,
) -> None:
    """At the left, beside what reads it, with the lines between its patches."""
    room, heading = places.gutter - 30, 26 * (len(places.lanes) > 1)
    shrink = room / max(picture.size)
    wide, high = picture.width * shrink, picture.height * shrink
    entries = [p for (i, _), p in places.at.items() if parts.nodes[i].sees]
    middle = entries[0][1] if entries else (places.top + places.height) / 2
    top = min(max(middle - high / 2, places.top + heading), places.height - high - 4)
    place = {"x": 0, "y": top, "sizex": wide, "sizey": high, "sizing": "stretch"}
    shown = _sharp(picture.convert("RGB"), int(2 * room))
    figure.add_layout_image(source=shown, xref="x", yref="y", layer="below", **place)
    if grid:
        _patches(figure, (0, top, wide, high), grid)
    if entries:
        x, y = entries[0]
        tail = {"ax": wide + 3, "ay": min(max(y, top), top + high), "axref": "x", "ayref": "y"}
        head = {"x": x - places.radius, "y": y, "arrowhead": 2, "arrowcolor": _LINK}
        figure.add_annotation(text="", showarrow=True, arrowwidth=1.5, **head, **tail)


def _sharp(picture: Image.Image, side: int) -> Image.Image:
    """A small picture keeps its pixels, enlarged; a large one is smoothed when it shrinks."""
    times = max(1, side // max(picture.size))
    size = (picture.width * times, picture.height * times)
    shown = picture.resize(size, Image.Resampling.NEAREST)
    shown.thumbnail((side, side))
    return shown


def _patches(
    figure: go.Figure, box: tuple[float, float, float, float], grid: tuple[int, ...]
) -> None:
    """Lines between patches."""
    left, top, wide, high = box
    ys = top + high * np.arange(1, grid[0]) / grid[0]
    xs = left + wide * np.arange(1, grid[1]) / grid[1]
    across = [[[left, y], [left + wide, y]] for y in ys]
    down = [[[x, top], [x, top + high]] for x in xs]
    if lines := across + down:
        _lines(figure, np.array(lines), {"color": "white", "width": 1}, opacity=0.6)

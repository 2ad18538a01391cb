"""Arrays in, plotly figure out.

One convention in every figure: blue is positive, red is negative, white is zero (ColorBrewer's
RdBu, which colour-blind readers can tell apart), and the scale is symmetric about zero. Labels are
shown as they are: `<image>` is a token, not markup. Sizes are in pixels and fixed, so that every
label has its room; a label of more than 40 characters is cut, and whole on hover.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from mechmm.results.result import write_whole

Matrix: TypeAlias = Shaped[Tensor, "row column"] | Shaped[np.ndarray, "row column"]
Vector: TypeAlias = Shaped[Tensor, " bar"] | Shaped[np.ndarray, " bar"] | Sequence[Any]
Grids: TypeAlias = Shaped[Tensor, "*layer row column"] | Shaped[np.ndarray, "*layer row column"]
Labels: TypeAlias = Sequence[Any]
"""Shown as `str` writes them; they may repeat."""
Range: TypeAlias = tuple[Any, Any]
"""(low, high): two numbers, or two arrays in the shape of the values."""
_Bounds: TypeAlias = tuple[np.ndarray, np.ndarray]
_Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, width, height) in pixels."""

COLORS = (
    *("#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#ffffff"),
    *("#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"),
)
"""From the most negative value to the most positive."""
_INK, _FAINT, _NO_VALUE, _BAND = "#1f2328", "#59636e", "#dddddd", "rgba(110,110,110,0.25)"
_GRID = "#e6e8eb"
_FONT = "Inter, Segoe UI, Helvetica Neue, Arial, sans-serif"
_SIZE = 13
_EDGE = 24
_LONGEST = 40


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
        low, high: interval of every value, shown on hover.
        n: number of examples behind every value.
        null: where the same quantity lies under the null (random sites, say).
        value_title: what the colour stands for.

    Raises:
        ValueError: labels or bounds do not fit the values.
    """
    panel = _Panel.of(values, rows, columns, x_title, y_title)
    interval = _range((low, high), panel.values.shape, "low, high")
    nulls = _range(null, panel.values.shape, "null")
    cells = _cells(panel, value_title, interval, nulls)
    return _maps([panel], [cells], [""], title, _below_title(n, interval, nulls), value_title)


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
    if odd := sorted(set(nulls or {}) - set(maps)):
        raise ValueError(f"null ranges for {odd}, but the maps are of {list(maps)}")
    panels = [_Panel.of(*parts, x_title, y_title) for parts in maps.values()]
    ranges = [
        _range((nulls or {}).get(tower), panel.values.shape, f"null of {tower}")
        for tower, panel in zip(maps, panels, strict=True)
    ]
    cells = [_cells(p, value_title, None, r) for p, r in zip(panels, ranges, strict=True)]
    subtitle = "" if n is None else f"mean of {n} examples"
    headings = [
        _label(tower) + (f"  (null {_span(r)})" if r else "")
        for tower, r in zip(maps, ranges, strict=True)
    ]
    return _maps(panels, cells, headings, title, subtitle, value_title)


def patch_overlay(
    picture: Image.Image,
    values: Grids,
    title: str,
    layers: Labels | None = None,
    *,
    slider: bool = False,
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
        slider: one map and a slider over layers, in place of small multiples.
        texts: shown on hover, in the shape of `values`: a token per patch, say.

    Raises:
        ValueError: names or texts do not fit the values.
    """
    grids = _array(values)
    notes = _notes(texts, grids.shape)
    if grids.ndim not in (2, 3) or not grids.size:
        raise ValueError(
            f"values of shape {grids.shape}; give [row, column] or [layer, row, column]"
        )
    grids = grids.reshape(-1, *grids.shape[-2:])
    names = _layer_names(layers, len(grids))
    shown = [value_title] if slider else names
    board = _Board.of(picture.size, grids.shape[1:], 1 + len(shown))
    width, height = board.size
    figure = _canvas(title, "", width + _bar_room(value_title), height + (96 if slider else 0))
    for i, heading in enumerate(["picture", *shown]):
        under = _fitted(_grey(picture) if i else picture.convert("RGB"), board)
        figure.add_trace(_picture_trace(under, board, i))
        _place(figure, i, board.box(i), _label(heading))
        _hide_axes(figure, board, i)
    for i, (grid, name) in enumerate(zip(grids, names, strict=True)):
        note = notes[i] if notes is not None else None
        cells = _patch_trace(grid, name, note, 1 if slider else i + 1)
        figure.add_trace(cells.update(visible=i == 0 or not slider))
    _add_colors(figure, list(grids), value_title, (width, 26, board.panel[1]), alpha=True)
    return _with_slider(figure, names) if slider else figure


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
        low, high: interval of every value, or None.
        null: (low, high) of the same quantity under the null.

    Raises:
        ValueError: names or bounds do not fit the values, or the null is not two numbers.
    """
    numbers = _array(values)
    if numbers.ndim != 1 or len(names) != len(numbers):
        raise ValueError(f"{len(names)} names for values of shape {numbers.shape}; give one each")
    interval = _range((low, high), numbers.shape, "low, high")
    labels, texts = [_label(name) for name in names], _numbers(numbers)
    left, high_ = _pixels(labels) + 14, 26 * max(1, len(labels))
    figure = _canvas(title, "", left + 560, high_ + 78)
    figure.add_trace(_bar_trace(names, numbers, interval, null))
    _place(figure, 0, (left, 26, 490, high_), "")
    figure.update_xaxes(
        title=_label(value_title), zeroline=True, zerolinecolor=_INK, gridcolor=_GRID
    )
    _label_axis(figure, "yaxis", labels, 1)
    for place, text in enumerate(texts):
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
        import kaleido
        from kaleido.errors import ChromeNotFoundError
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


# Values and labels ---------------------------------------------------------------------------


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def _range(pair: Range | None, shape: tuple[int, ...], name: str) -> _Bounds | None:
    """Both bounds in the shape of the values; None if there are none."""
    if pair is None or (pair[0] is None and pair[1] is None):
        return None
    if pair[0] is None or pair[1] is None:
        raise ValueError(f"{name}: one bound is missing; give both or none")
    try:
        low, high = (np.broadcast_to(_array(bound), shape) for bound in pair)
    except ValueError as error:
        raise ValueError(f"{name}: the bounds do not fit values of shape {shape}") from error
    return low, high


def _span(bounds: _Bounds) -> str:
    """`−0.02 to 0.03`, for arrays the widest."""
    ends = np.array([np.fmin.reduce(bounds[0], axis=None), np.fmax.reduce(bounds[1], axis=None)])
    return " to ".join(_numbers(ends))


def _limit(values: np.ndarray) -> float:
    """The largest finite magnitude; 1 where there is none."""
    known = np.abs(values[np.isfinite(values)])
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def _numbers(values: np.ndarray) -> np.ndarray:
    """As text, all with the decimals that suit the largest: two for effects around 1."""
    size = math.floor(math.log10(_limit(values)))
    form = f".{max(0, 2 - size if size >= 0 else 1 - size)}f" if size > -5 else ".1e"

    def text(value: float) -> str:
        shown = format(value, form)
        if not math.isfinite(value):
            return "no value" if math.isnan(value) else shown.replace("-", "−")
        return (shown if float(shown) else format(0.0, form)).replace("-", "−")

    return np.array([text(value) for value in values.flat], dtype=object).reshape(values.shape)


def _label(name: Any, longest: int = _LONGEST) -> str:
    """Cut in the middle if too long; escaped, because plotly reads `<image>` as markup."""
    text, half = str(name), longest // 2
    return escape(
        text if len(text) <= longest else f"{text[:half]}…{text[1 - half :]}", quote=False
    )


def _pixels(labels: Sequence[str]) -> float:
    """Room for the longest label; East Asian letters are about twice as wide."""
    widths = [sum(13.5 if ord(c) > 0x2E7F else 7.3 for c in unescape(label)) for label in labels]
    return max(widths, default=0.0)


# Canvas: everything is placed in pixels from the top left of the area inside the margins ------


def _canvas(title: str, subtitle: str, width: float, height: float) -> go.Figure:
    """An empty white figure with an area of the given size under its title."""
    lines = wrap(title, max(24, int((width - 60) / 8.6))) or [""]
    above = 30 + 22 * len(lines) + 20 * bool(subtitle)
    full = height + above + _EDGE
    return go.Figure(
        layout={
            "template": "none",
            "width": math.ceil(width + 2 * _EDGE),
            "height": math.ceil(full),
            "margin": {"l": _EDGE, "r": _EDGE, "t": above, "b": _EDGE},
            "font": {"family": _FONT, "size": _SIZE, "color": _INK},
            "title": {
                "text": "<br>".join(escape(line, quote=False) for line in lines),
                "subtitle": {"text": subtitle, "font": {"size": _SIZE, "color": _FAINT}},
                "font": {"size": 17},
                "x": _EDGE / (width + 2 * _EDGE),
                "xanchor": "left",
                "y": 1 - 20 / full,
                "yanchor": "top",
            },
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hoverlabel": {"font": {"size": _SIZE}, "align": "left"},
        }
    )


def _inside(figure: go.Figure) -> tuple[float, float]:
    """Width and height of the area inside the margins."""
    margin = figure.layout.margin
    return (
        figure.layout.width - margin.l - margin.r,
        figure.layout.height - margin.t - margin.b,
    )


def _axis(name: str, i: int) -> str:
    """`xaxis`, 1 -> `xaxis2`: plotly leaves out the number of the first."""
    return f"{name}{i + 1}" if i else name


def _place(figure: go.Figure, i: int, box: _Box, heading: str) -> None:
    """Give the i-th pair of axes its box, with a heading above."""
    (left, top, wide, high), (width, height) = box, _inside(figure)
    across = [left / width, min(1.0, (left + wide) / width)]
    down = [max(0.0, 1 - (top + high) / height), 1 - top / height]
    figure.update_layout(
        {
            _axis("xaxis", i): {"domain": across, "anchor": _axis("y", i)},
            _axis("yaxis", i): {"domain": down, "anchor": _axis("x", i)},
        }
    )
    _add_heading(figure, heading, left, top)


def _add_heading(figure: go.Figure, text: str, left: float, top: float) -> None:
    width, height = _inside(figure)
    figure.add_annotation(
        text=text,
        x=left / width,
        y=1 - top / height,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        xshift=-2,
        showarrow=False,
        font={"size": _SIZE, "color": _FAINT},
    )


def _label_axis(figure: go.Figure, axis: str, labels: Sequence[str], step: int) -> None:
    """Labels at 0, 1, 2, …: numbers as places, so that equal labels stay apart."""
    places = np.arange(len(labels))[::step]
    ends = [-0.5, len(labels) - 0.5]
    figure.update_layout(
        {
            axis: {
                "tickvals": places,
                "ticktext": [labels[place] for place in places],
                "range": ends[::-1] if axis.startswith("y") else ends,
                "showgrid": False,
                "zeroline": False,
                "ticks": "",
                "ticklabelstandoff": 4,
            }
        }
    )


def _add_colors(
    figure: go.Figure,
    values: Sequence[np.ndarray],
    title: str,
    place: tuple[float, float, float],
    alpha: bool = False,
) -> None:
    """One colour scale, symmetric about zero, with its bar at (left, top) of the given height."""
    limit = max(_limit(part) for part in values)
    scale = _see_through() if alpha else zip(np.linspace(0, 1, len(COLORS)), COLORS, strict=True)
    (left, top, high), (width, height) = place, _inside(figure)
    figure.update_layout(
        coloraxis={
            "colorscale": list(scale),
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {
                "thickness": 14,
                "lenmode": "pixels",
                "len": min(high, 420),
                "x": left / width,
                "xanchor": "left",
                "y": 1 - top / height,
                "yanchor": "top",
                "xpad": 0,
                "ypad": 0,
                "outlinewidth": 0,
                "nticks": 7,
            },
        }
    )
    _add_heading(figure, _label(title), left, top - 6)


def _bar_room(title: str) -> float:
    """Width of the colour bar with its numbers and its heading."""
    return max(80.0, _pixels([_label(title)]))


def _see_through() -> list[tuple[float, str]]:
    """One red and one blue, the more transparent the less the value says."""

    def color(end: str, share: float) -> str:
        parts = ", ".join(str(int(end[i : i + 2], 16)) for i in (1, 3, 5))
        return f"rgba({parts}, {0.8 * share**0.9:.3f})"

    # Zero appears twice, or the steps beside it would mix red with blue.
    steps = np.linspace(0, 1, 6)
    red = [(float(0.5 - share / 2), color(COLORS[1], share)) for share in steps[::-1]]
    blue = [(float(0.5 + share / 2), color(COLORS[-2], share)) for share in steps]
    return red + blue


# Heat maps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """One heat map: its values, its labels and the pixels that it needs.

    Attributes:
        rows, columns: labels as given.
        cell: (width, height) of a cell.
        left, below: room for labels and titles beside and under the cells.
        turned: whether column labels stand at an angle.
        steps: every how many (rows, columns) there is a label.
    """

    values: np.ndarray
    rows: Labels
    columns: Labels
    x_title: str
    y_title: str
    cell: tuple[float, float]
    left: float
    below: float
    turned: bool
    steps: tuple[int, int]

    @classmethod
    def of(
        cls, values: Matrix, rows: Labels, columns: Labels, x_title: str, y_title: str
    ) -> _Panel:
        numbers = _array(values)
        if numbers.shape != (len(rows), len(columns)):
            raise ValueError(
                f"values of shape {numbers.shape} for {len(rows)} row and {len(columns)} column "
                "labels; give one label per row and per column"
            )
        cell = (
            min(64.0, max(5.0, 760 / max(1, len(columns)))),
            min(30.0, max(5.0, 600 / max(1, len(rows)))),
        )
        widest = _pixels([_label(column) for column in columns])
        turned = widest > cell[0] - 6 and widest > 34
        apart = 19 if turned else widest + 8
        beside = _pixels([_label(row) for row in rows]) + 14 + 26 * bool(y_title)
        # A label at an angle ends under its cell and begins further left and below.
        slanted = 0.72 * widest if turned else 0.0
        return cls(
            values=numbers,
            rows=rows,
            columns=columns,
            x_title=_label(x_title),
            y_title=_label(y_title),
            cell=cell,
            left=max(beside, slanted - cell[0] / 2),
            below=(slanted + 12 if turned else 24) + 26 * bool(x_title),
            turned=turned,
            steps=(math.ceil(17 / cell[1]), math.ceil(apart / cell[0])),
        )

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the cells together."""
        return self.cell[0] * len(self.columns), self.cell[1] * len(self.rows)


def _maps(
    panels: Sequence[_Panel],
    cells: Sequence[go.Heatmap],
    headings: Sequence[str],
    title: str,
    subtitle: str,
    value_title: str,
) -> go.Figure:
    """Panels from left to right, as wide as their cells or headings need, and the colour bar."""
    widths = [
        p.left + max(p.size[0], _pixels([h])) + 28 for p, h in zip(panels, headings, strict=True)
    ]
    highest = max(160.0, *(panel.size[1] for panel in panels))
    height = 26 + max(highest, *(p.size[1] + p.below for p in panels))
    wide = max(sum(widths) + _bar_room(value_title), _pixels([subtitle]), 420)
    figure = _canvas(title, subtitle, wide, height)
    left = 0.0
    for i, (panel, trace) in enumerate(zip(panels, cells, strict=True)):
        figure.add_trace(trace.update(xaxis=_axis("x", i), yaxis=_axis("y", i)))
        figure.add_trace(_unknown(panel, i))
        _place(figure, i, (left + panel.left, 26, *panel.size), headings[i])
        _label_cells(figure, panel, i)
        left += widths[i]
    values = [panel.values for panel in panels]
    _add_colors(figure, values, value_title, (sum(widths), 26, highest))
    return figure


def _label_cells(figure: go.Figure, panel: _Panel, i: int) -> None:
    x, y = _axis("xaxis", i), _axis("yaxis", i)
    _label_axis(figure, x, [_label(name) for name in panel.columns], panel.steps[1])
    _label_axis(figure, y, [_label(name) for name in panel.rows], panel.steps[0])
    figure.update_layout(
        {
            x: {
                "title": {"text": panel.x_title, "standoff": 8},
                "tickangle": -45 if panel.turned else 0,
            },
            y: {"title": {"text": panel.y_title, "standoff": 10}},
        }
    )


def _cells(
    panel: _Panel, value_title: str, interval: _Bounds | None, null: _Bounds | None
) -> go.Heatmap:
    texts = _numbers(panel.values)
    roomy = panel.values.size <= 600 and panel.cell[0] >= 42 and panel.cell[1] >= 18
    return go.Heatmap(
        z=panel.values,
        x=np.arange(len(panel.columns)),
        y=np.arange(len(panel.rows)),
        coloraxis="coloraxis",
        text=_in_cells(panel.values, texts, null) if roomy else None,
        texttemplate="%{text}" if roomy else None,
        textfont={"size": 12},
        hovertext=_on_hover(panel, texts, value_title, interval, null),
        hoverinfo="text",
        xgap=1 if min(panel.cell) > 12 else 0,
        ygap=1 if min(panel.cell) > 12 else 0,
    )


def _unknown(panel: _Panel, i: int) -> go.Heatmap:
    """Grey where there is no value: white would read as zero."""
    return go.Heatmap(
        z=np.where(np.isnan(panel.values), 0.0, np.nan),
        colorscale=[_NO_VALUE, _NO_VALUE],
        showscale=False,
        hoverinfo="skip",
        hoverongaps=False,
        xaxis=_axis("x", i),
        yaxis=_axis("y", i),
    )


def _in_cells(values: np.ndarray, texts: np.ndarray, null: _Bounds | None) -> np.ndarray:
    shown = np.where(np.isnan(values), "", texts)
    if null is None:
        return shown
    outside = (values < null[0]) | (values > null[1])
    return np.where(outside, "<b>" + shown + "</b>", shown)


def _on_hover(
    panel: _Panel,
    texts: np.ndarray,
    value_title: str,
    interval: _Bounds | None,
    null: _Bounds | None,
) -> np.ndarray:
    rows = [f"{panel.y_title} {_label(row, 200)}" for row in panel.rows]
    columns = [f"{panel.x_title} {_label(column, 200)}" for column in panel.columns]
    places = np.array([[f"{row}, {column}" for column in columns] for row in rows], dtype=object)
    hover = places.reshape(texts.shape) + f"<br>{_label(value_title)} <b>" + texts + "</b>"
    for name, bounds in (("interval", interval), ("null", null)):
        if bounds is not None:
            hover = hover + f"<br>{name} " + _numbers(bounds[0]) + " to " + _numbers(bounds[1])
    return hover


def _below_title(n: int | None, interval: _Bounds | None, null: _Bounds | None) -> str:
    parts = [
        f"mean of {n} examples" if n is not None else "",
        f"null {_span(null)}, bold outside it" if null is not None else "",
        "intervals on hover" if interval is not None else "",
    ]
    return "; ".join(part for part in parts if part)


# Patches over a picture ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Board:
    """Where panels of one picture lie: rows of boxes in the picture's proportions.

    Attributes:
        picture: (width, height) of the picture in its own pixels.
        grid: (rows, columns) of patches.
        panel: (width, height) of a panel in pixels of the figure.
        across: panels in a row.
        count: panels in all.
    """

    picture: tuple[int, int]
    grid: tuple[int, int]
    panel: tuple[float, float]
    across: int
    count: int

    @classmethod
    def of(cls, picture: tuple[int, int], grid: tuple[int, int], count: int) -> _Board:
        across = min(count, 2 if count == 2 else 3 if count <= 6 else 4)
        side = {2: 380, 3: 290}.get(across, 220)
        shrink = side / max(picture)
        return cls(picture, grid, (picture[0] * shrink, picture[1] * shrink), across, count)

    @property
    def size(self) -> tuple[float, float]:
        down = math.ceil(self.count / self.across)
        return self.across * (self.panel[0] + 20), down * (self.panel[1] + 38)

    def box(self, i: int) -> _Box:
        """The i-th panel, row by row, with room for a heading above."""
        row, column = divmod(i, self.across)
        wide, high = self.panel
        return column * (wide + 20), row * (high + 38) + 26, wide, high


def _hide_axes(figure: go.Figure, board: _Board, i: int) -> None:
    """The ends of the grid are the ends of the picture; no ticks, no lines."""
    rows, columns = board.grid
    bare = {"visible": False, "showgrid": False}
    figure.update_layout(
        {
            _axis("xaxis", i): bare | {"range": [-0.5, columns - 0.5], "constrain": "domain"},
            _axis("yaxis", i): bare | {"range": [rows - 0.5, -0.5], "constrain": "domain"},
        }
    )


def _picture_trace(picture: Image.Image, board: _Board, i: int) -> go.Image:
    """The picture, stretched over the grid: its axes count patches."""
    rows, columns = board.grid
    dx, dy = columns / picture.width, rows / picture.height
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return go.Image(
        source="data:image/png;base64," + base64.b64encode(data.getvalue()).decode(),
        x0=dx / 2 - 0.5,
        y0=dy / 2 - 0.5,
        dx=dx,
        dy=dy,
        # A small picture keeps its crisp pixels; a large one is smoothed when it shrinks.
        zsmooth="fast" if max(picture.size) > max(board.panel) else False,
        hoverinfo="skip",
        xaxis=_axis("x", i),
        yaxis=_axis("y", i),
    )


def _fitted(picture: Image.Image, board: _Board) -> Image.Image:
    """At most two pixels per pixel of the panel: every layer carries a copy."""
    shrink = 2 * max(board.panel) / max(picture.size)
    size = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
    return picture.resize(size) if shrink < 1 else picture


def _grey(picture: Image.Image) -> Image.Image:
    """The picture without its colours, a little paler."""
    grey = picture.convert("RGB").convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.15)


def _patch_trace(grid: np.ndarray, name: str, note: np.ndarray | None, i: int) -> go.Heatmap:
    rows, columns = np.indices(grid.shape).astype(object)
    hover = "row " + rows.astype(str).astype(object)
    hover = hover + ", column " + columns.astype(str).astype(object) + ": " + _numbers(grid)
    if note is not None:
        hover = hover + "<br>" + note
    return go.Heatmap(
        z=grid,
        coloraxis="coloraxis",
        name=_label(name),
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=False,
        xaxis=_axis("x", i),
        yaxis=_axis("y", i),
    )


def _notes(texts: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if texts is None:
        return None
    notes = np.asarray(texts, dtype=object)
    if notes.shape != shape:
        raise ValueError(f"texts of shape {notes.shape} for values of shape {shape}")
    escaped = [_label(text, 200) for text in notes.flat]
    return np.array(escaped, dtype=object).reshape(-1, *shape[-2:])


def _layer_names(layers: Labels | None, count: int) -> list[str]:
    if layers is None:
        return ["patches"] if count == 1 else [f"layer {i}" for i in range(count)]
    if len(layers) != count:
        raise ValueError(f"{len(layers)} names for the maps of {count} layers; give one each")
    return [name if isinstance(name, str) else f"layer {name}" for name in layers]


def _with_slider(figure: go.Figure, names: Sequence[str]) -> go.Figure:
    """A slider that shows one heat map at a time."""
    maps = [i for i, trace in enumerate(figure.data) if isinstance(trace, go.Heatmap)]
    steps = [
        {
            "label": _label(name),
            "method": "restyle",
            "args": [{"visible": [other == place for other in maps]}, maps],
        }
        for place, name in zip(maps, names, strict=True)
    ]
    return figure.update_layout(
        sliders=[{"steps": steps, "y": 0, "yanchor": "bottom", "pad": {"t": 0, "b": 0}}]
    )


# Bars ----------------------------------------------------------------------------------------


def _bar_trace(
    names: Labels, values: np.ndarray, interval: _Bounds | None, null: Range | None
) -> go.Bar:
    texts = _numbers(values)
    hover = [
        f"{_label(name, 200)}<br><b>{text}</b>" for name, text in zip(names, texts, strict=True)
    ]
    errors = None
    if interval is not None:
        low, high = interval
        spans = zip(hover, _numbers(low), _numbers(high), strict=True)
        hover = [f"{text}<br>interval {a} to {b}" for text, a, b in spans]
        errors = {
            "array": high - values,
            "arrayminus": values - low,
            "symmetric": False,
            "color": _INK,
            "thickness": 1.2,
            "width": 3,
        }
    inside = (
        np.zeros(len(values), bool) if null is None else (values >= null[0]) & (values <= null[1])
    )
    return go.Bar(
        x=values,
        y=np.arange(len(values)),
        orientation="h",
        error_x=errors,
        marker={
            "color": np.where(values < 0, COLORS[1], COLORS[-2]).tolist(),
            "opacity": np.where(inside, 0.4, 0.9),
        },
        width=0.7,
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
    )


def _with_band(figure: go.Figure, null: Range, title: str) -> go.Figure:
    ends = _array(null)
    if ends.shape != (2,) or not np.isfinite(ends).all():
        raise ValueError(f"the null {null} is not two numbers; pass (low, high), or None for none")
    low, high = _numbers(ends)
    figure.add_vrect(
        x0=ends[0],
        x1=ends[1],
        fillcolor=_BAND,
        line_width=0,
        layer="below",
        showlegend=True,
        name=f"{_label(title)}: {low} to {high}",
    )
    return figure.update_layout(
        legend={"orientation": "h", "x": figure.layout.xaxis.domain[0], "y": 1, "yanchor": "top"}
    )

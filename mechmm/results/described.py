"""What a figure says in words: for a heading that wraps, and for readers who do not see it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import plotly.graph_objects as go

_KINDS = {
    "heatmap": "heat map",
    "bar": "bars",
    "image": "picture",
    "histogram": "histogram",
    "box": "boxes",
    "violin": "violins",
}
_TAG = re.compile(r"</?(?:b|i|em|strong|sub|sup|span|a|br)\b[^<>]*>", re.IGNORECASE)


def plain(text: Any) -> str:
    """A text of a figure as plain text: plotly's markup taken out, its entities resolved."""
    return " ".join(unescape(_TAG.sub(" ", str(text or ""))).split())


def heading(figure: go.Figure) -> tuple[str, str]:
    """Title and subtitle."""
    title = figure.layout.title
    return plain(title.text), plain(title.subtitle.text)


def described(figure: go.Figure) -> str:
    """Title, kinds of marks, axes, panels, colours, legend and slider, in a sentence each."""
    title, subtitle = heading(figure)
    parts = [
        ". ".join(part for part in (title, subtitle) if part),
        _kinds(figure),
        _listed("across", [axis.title.text for axis in figure.select_xaxes()]),
        _listed("upwards", [axis.title.text for axis in figure.select_yaxes()]),
        _listed("shown", [trace.name for trace in figure.data if trace.name]),
        _listed("written in it", [note.text for note in figure.layout.annotations][:12]),
        _sliders(figure),
    ]
    return ". ".join(part for part in parts if part) + "."


def _kinds(figure: go.Figure) -> str:
    found = ", ".join(dict.fromkeys(map(_kind, figure.data)))
    return found[:1].upper() + found[1:]


def _kind(trace: Any) -> str:
    if trace.type == "scatter":
        return "lines" if "lines" in str(trace.mode) else "points"
    return _KINDS.get(trace.type, str(trace.type))


def _listed(what: str, texts: Sequence[Any]) -> str:
    found = dict.fromkeys(text for text in map(plain, texts) if text)
    return f"{what.capitalize()}: {', '.join(found)}" if found else ""


def _sliders(figure: go.Figure) -> str:
    return " ".join(
        f"A slider from {plain(slider.steps[0].label)} to {plain(slider.steps[-1].label)}"
        for slider in figure.layout.sliders
        if slider.steps
    )

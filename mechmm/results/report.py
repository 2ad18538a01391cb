"""One HTML page per run, complete in one file.

The page asks nothing of the network, and its content security policy forbids it to: style,
pictures and plotly.js are inside, plotly.js once, and only if there is a figure. All text is
escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.offline import get_plotlyjs

from mechmm.results.store import write_whole

Content: TypeAlias = str | pd.DataFrame | Image.Image | go.Figure
"""Text (a blank line starts a paragraph), a table, a picture, or a figure."""
_ROWS = 200
_CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage", "resetScale2d"]]}
_SMALL = 320


@dataclass(frozen=True)
class Captioned:
    """Content with a line of text below it."""

    content: Content
    caption: str


@dataclass(frozen=True)
class Row:
    """Contents side by side, where the window is wide enough."""

    contents: Sequence[Content | Captioned]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order."""

    heading: str
    contents: Sequence[Content | Captioned | Row] = ()


@dataclass(frozen=True)
class Page:
    """A report: `Page("Patching", "24 pairs.", [Section("Sites", [figure, table])]).save(path)`.

    Attributes:
        title, summary: what was done, and what came out.
        sections: the body, in order.
        facts: what the footer says: versions, seed, model, command.
    """

    title: str
    summary: str = ""
    sections: Sequence[Section] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The page as text; equal pages give equal text.

        Raises:
            TypeError: a section holds what a page cannot show.
        """
        writer = _Writer()
        body = "".join(writer.section(section, i) for i, section in enumerate(self.sections))
        script = f"<script>{get_plotlyjs()}</script>" if writer.figures else ""
        return _PAGE.format(
            title=escape(self.title),
            policy=_POLICY,
            style=_STYLE,
            script=script,
            summary=_paragraphs(self.summary),
            contents=_contents(self.sections),
            body=body,
            footer=_footer(self.facts),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page, wholly or not at all; returns its path. An older page is replaced."""
        return write_whole(path, self.html().encode())


@dataclass
class _Writer:
    """Content to HTML, counting the figures."""

    figures: int = 0

    def section(self, section: Section, i: int) -> str:
        blocks = "".join(self.block(block) for block in section.contents)
        return f'<section id="section-{i}"><h2>{escape(section.heading)}</h2>{blocks}</section>\n'

    def block(self, block: Any) -> str:
        if isinstance(block, Row):
            return f'<div class="row">{"".join(map(self.block, block.contents))}</div>'
        if isinstance(block, Captioned):
            caption = f"<figcaption>{escape(block.caption)}</figcaption>"
            return f"<figure>{self.block(block.content)}{caption}</figure>"
        if isinstance(block, str):
            return _paragraphs(block)
        if isinstance(block, pd.DataFrame):
            return _table(block)
        if isinstance(block, Image.Image):
            return _picture(block)
        if isinstance(block, go.Figure):
            return self.figure(block)
        raise TypeError(
            f"a page cannot show a {type(block).__name__}; give text, a data frame, a PIL image, a "
            "plotly figure, or those in Captioned or Row"
        )

    def figure(self, figure: go.Figure) -> str:
        self.figures += 1
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{self.figures}",
            config=_CONFIG,
        )
        return f'<div class="wide plot">{drawn}</div>'


def _paragraphs(text: str) -> str:
    parts = [part.strip() for part in text.split("\n\n")]
    return "".join(f"<p>{escape(part)}</p>" for part in parts if part)


def _table(table: pd.DataFrame) -> str:
    """At most 200 rows, and how many there are in all; the index only if it says something."""
    shown = table.head(_ROWS)
    columns = [(str(name), shown.iloc[:, i]) for i, name in enumerate(table.columns)]
    if not isinstance(table.index, pd.RangeIndex):
        columns.insert(0, (str(table.index.name or ""), pd.Series(shown.index.to_numpy())))
    sides = [' class="number"' if _is_numeric(column) else "" for _, column in columns]
    heads = [
        f"<th{side}>{escape(name).replace('_', '_<wbr>')}</th>"
        for side, (name, _) in zip(sides, columns, strict=True)
    ]
    rows = [
        [f"<td{side}>{escape(text)}</td>" for side, text in zip(sides, texts, strict=True)]
        for texts in zip(*(_texts(column) for _, column in columns), strict=True)
    ]
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    cut = f'<p class="note">The first {_ROWS} of {len(table)} rows.</p>'
    return (
        f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{cut if len(table) > _ROWS else ''}"
    )


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _texts(column: pd.Series) -> list[str]:
    """Cells as text: one number of decimals per column, nothing where a value is missing."""
    form = _decimals(column) if pd.api.types.is_float_dtype(column) else ""
    return [
        "" if _missing(value) else format(value, form) if form else str(value) for value in column
    ]


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _decimals(column: pd.Series) -> str:
    """Format for floats: three significant digits of the largest; whole numbers as such."""
    sizes = [abs(float(value)) for value in column if not _missing(value) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    if all(size == round(size) for size in sizes) and largest < 1e15:
        return ".0f"
    if not 1e-4 <= largest < 1e6:
        return ".2e"
    return f".{max(0, 2 - math.floor(math.log10(largest)))}f"


def _picture(picture: Image.Image) -> str:
    """Small pictures are enlarged with crisp pixels, large ones shrink to the page."""
    data = io.BytesIO()
    kept = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    (picture if kept else picture.convert("RGB")).save(data, format="PNG")
    source = base64.b64encode(data.getvalue()).decode()
    small = max(picture.size) < _SMALL
    times = math.ceil(_SMALL / max(picture.size)) if small else 1
    crisp = ' class="crisp"' if small else ""
    return (
        f'<img{crisp} alt="" width="{picture.width * times}" height="{picture.height * times}" '
        f'src="data:image/png;base64,{source}">'
    )


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections of a long page."""
    if len(sections) < 4:
        return ""
    links = (
        f'<li><a href="#section-{i}">{escape(section.heading)}</a></li>'
        for i, section in enumerate(sections)
    )
    return f"<nav><ol>{''.join(links)}</ol></nav>"


def _footer(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = (
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items()
    )
    return f"<footer><h2>How this was made</h2><dl>{''.join(rows)}</dl></footer>"


_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --faint: #59636e; --line: #d8dde3; --soft: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white; line-height: 1.55;
  font: 16px/1.55 Inter, "Segoe UI", system-ui, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1128px; margin: 0 auto; padding: 48px 24px 32px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 20px; line-height: 1.3; margin: 0 0 12px; }
p { margin: 0 0 12px; max-width: 72ch; overflow-wrap: anywhere; white-space: pre-line; }
header { border-bottom: 1px solid var(--line); padding-bottom: 16px; margin-bottom: 32px; }
header p { font-size: 18px; color: var(--faint); }
nav ol { margin: 0 0 32px; padding-left: 20px; }
a { color: #2166ac; }
section { margin-bottom: 44px; }
.wide { max-width: 100%; overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.4; }
.plot { margin-left: -24px; max-width: calc(100% + 48px); }
th, td { padding: 5px 10px 5px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--faint); }
th.number, td.number { text-align: right; padding-left: 8px; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; margin: 0 0 16px;
  border: 1px solid var(--line); }
img.crisp { image-rendering: pixelated; }
figure { margin: 0 0 20px; min-width: 0; }
figure > :first-child { margin-bottom: 6px; }
figcaption, .note { font-size: 14px; color: var(--faint); max-width: 72ch; }
.row { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: flex-start; }
.row > * { min-width: 0; max-width: 100%; }
footer { border-top: 1px solid var(--line); padding-top: 20px; font-size: 14px; }
footer h2 { font-size: 15px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px;
  overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 600px) { main { padding: 24px; } h1 { font-size: 24px; } }
@media print {
  main { max-width: none; padding: 0; }
  section { margin-bottom: 24px; }
  h2 { break-after: avoid; }
  figure, .plot, img, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  .plot { zoom: 0.66; margin-left: 0; }
  .plot .modebar { display: none; }
  .row > * { max-width: 46%; }
}
"""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""Nothing but what the page itself holds; plotly.js saves figures through blobs."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
{script}
</head>
<body>
<main>
<header><h1>{title}</h1>{summary}</header>
{contents}
{body}
{footer}
</main>
</body>
</html>
"""

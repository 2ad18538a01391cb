"""One HTML page per run, complete in one file.

The page asks nothing of the network, and its content security policy forbids it to: style,
pictures, tables and plotly.js are inside, plotly.js once, and only if there is a figure. All text
is escaped, and no script runs but the two that draw figures. It can be read on a telephone, in the
dark, with the keyboard and without seeing its figures.
"""

from __future__ import annotations

import base64
import gzip
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

from mechmm.results.drawn import asset, data_link, figure_html, script_sources, scripts
from mechmm.results.store import write_whole
from mechmm.results.table import table_html

Content: TypeAlias = str | pd.DataFrame | Image.Image | go.Figure
"""Text (a blank line starts a paragraph), a table, a picture, or a figure."""
Block: TypeAlias = "Content | Captioned | Row | Folded | Code | Facts | Number | Download"
_SMALL, _WHOLE, _MOST = 320, 100_000, 1_500_000
"""Pixels of a picture that is enlarged; bytes of a file that is packed, and is left out."""


@dataclass(frozen=True)
class Captioned:
    """Content with a line of text below it."""

    content: Content
    caption: str


@dataclass(frozen=True)
class Row:
    """Contents side by side, where the window is wide enough."""

    contents: Sequence[Content | Captioned | Number]


@dataclass(frozen=True)
class Folded:
    """Contents under a line that opens and closes them; closed at first."""

    heading: str
    contents: Sequence[Block]


@dataclass(frozen=True)
class Code:
    """Commands or a file, as they are."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Number:
    """A number that readers look for first.

    Attributes:
        notes: what it is held against, a line each.
        verdict: in a word or two, and whether it is good; None: neither.
    """

    name: str
    value: str
    notes: Sequence[str] = ()
    verdict: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Download:
    """A file inside the page: packed (`.gz`) if it is long, and left out if it is long even so.

    Attributes:
        note: said beside the link.
        elsewhere: where the file is, for where it is left out.
    """

    name: str
    data: bytes
    kind: str = "text/csv"
    note: str = ""
    elsewhere: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order."""

    heading: str
    contents: Sequence[Block] = ()


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
        sources = " ".join(script_sources()) if writer.figures else "'none'"
        head = f"<header><h1>{escape(self.title)}</h1>{_paragraphs(self.summary)}</header>"
        return document(
            self.title,
            f"{head}\n{_contents(self.sections)}",
            f"{body}\n{_footer(self.facts)}",
            scripts() if writer.figures else "",
            POLICY.format(scripts=sources),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page, wholly or not at all; returns its path. An older page is replaced."""
        return write_whole(path, self.html().encode())


def document(
    title: str, head: str, body: str, scripts: str = "", policy: str = "", style: str = ""
) -> str:
    """An HTML document in the style of all pages.

    Args:
        title: as text; all else is HTML.
        policy: of content security; default: no scripts. style: besides that of all pages.
    """
    return _PAGE.format(
        title=escape(title),
        policy=policy or POLICY.format(scripts="'none'"),
        style=asset("page.css") + style,
        head=head,
        body=body,
        scripts=scripts,
    )


@dataclass
class _Writer:
    """Content to HTML, counting the figures."""

    figures: int = 0

    def section(self, section: Section, i: int) -> str:
        blocks = self.blocks(section.contents)
        return f'<section id="section-{i}"><h2>{escape(section.heading)}</h2>{blocks}</section>\n'

    def block(self, block: Any) -> str:
        if isinstance(block, Row):
            return f'<div class="row">{self.blocks(block.contents)}</div>'
        if isinstance(block, Captioned):
            caption = f"<figcaption>{escape(block.caption)}</figcaption>"
            return f"<figure>{self.block(block.content)}{caption}</figure>"
        if isinstance(block, Folded):
            inside = self.blocks(block.contents)
            return f"<details><summary>{escape(block.heading)}</summary>{inside}</details>"
        if isinstance(block, go.Figure):
            self.figures += 1
            return figure_html(block, self.figures)
        return _plain_block(block)

    def blocks(self, blocks: Sequence[Any]) -> str:
        return "".join(map(self.block, blocks))


def _plain_block(block: Any) -> str:
    """What has no figures in it."""
    writers = {
        str: _paragraphs,
        pd.DataFrame: table_html,
        Image.Image: _picture,
        Code: _code,
        Facts: lambda block: _list(block.facts),
        Number: _number,
        Download: _download,
    }
    for kind, write in writers.items():
        if isinstance(block, kind):
            return write(block)
    raise TypeError(
        f"a page cannot show a {type(block).__name__}; give text, a data frame, a PIL image, a "
        "plotly figure, or a block of mechmm.results.report"
    )


def _paragraphs(text: str) -> str:
    parts = [part.strip() for part in text.split("\n\n")]
    return "".join(f"<p>{escape(part)}</p>" for part in parts if part)


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


def _code(code: Code) -> str:
    return f'<pre class="wide"><code>{escape(code.text)}</code></pre>'


def _list(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _number(number: Number) -> str:
    kind = {True: " good", False: " bad", None: ""}[number.good]
    notes = "".join(f'<div class="note">{escape(note)}</div>' for note in number.notes)
    verdict = f'<div class="verdict">{escape(number.verdict)}</div>' if number.verdict else ""
    return (
        f'<div class="headline{kind}"><h3>{escape(number.name)}</h3>'
        f'<div class="value">{escape(number.value)}</div>{notes}{verdict}</div>'
    )


def _download(file: Download) -> str:
    name, data, kind, said = file.name, file.data, file.kind, [file.note]
    if len(data) > _WHOLE:
        name, data, kind = f"{name}.gz", gzip.compress(data, 9, mtime=0), "application/gzip"
        said.append("packed, as it is long")
    if len(data) > _MOST:
        return _note(escape(f"{file.name} is too long for this page. {file.elsewhere}"))
    link = f'<a download="{escape(name)}" href="{data_link(data, kind)}">{escape(name)}</a>'
    size = f"{len(data) / 1000:.0f} kB" if len(data) >= 1000 else f"{len(data)} bytes"
    about = ", ".join(part for part in (size, *said) if part)
    return _note(f"Download {link} ({escape(about)})")


def _note(html: str) -> str:
    return f'<p class="note">{html}</p>'


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections of a long page."""
    if len(sections) < 4:
        return ""
    links = (
        f'<li><a href="#section-{i}">{escape(section.heading)}</a></li>'
        for i, section in enumerate(sections)
    )
    return f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>'


def _footer(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    return f"<footer><h2>How this was made</h2>{_list(facts)}</footer>"


POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""Nothing but what the page itself holds; plotly.js saves figures through blobs."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<main>
{head}
<div id="content" tabindex="-1">
{body}
</div>
</main>
{scripts}
</body>
</html>
"""

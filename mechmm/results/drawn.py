"""Figures inside a page: their data, where they are drawn, and plotly.js, packed.

plotly.js is 4.8 MB; packed it is 2.0 MB, and every browser since 2023 can unpack it. Scripts are
named in the page's policy by their digests, so that no other script can run. Data stand in blocks
that are never run, with `<` written as an escape, so that no text can end them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mechmm.results.described import described, heading


def asset(name: str) -> str:
    """A text that comes with this package."""
    return (files("mechmm.results") / "assets" / name).read_text(encoding="utf-8")


def figure_html(figure: go.Figure, number: int) -> str:
    """A figure under its title, for `page.js` to draw."""
    title, subtitle = heading(figure)
    head = f'<div class="title">{escape(title)}</div>' if title else ""
    below = f'<div class="note">{escape(subtitle)}</div>' if subtitle else ""
    data = _inert(figure.to_json() or "{}")
    return (
        f'<div class="plot">{head}{below}<div class="wide">'
        f'<div class="drawing" id="figure-{number}" role="figure" '
        f'aria-label="{escape(described(figure))}">'
        "<noscript>Figures need JavaScript; what they show is in the tables.</noscript></div></div>"
        f'<script type="application/json" id="figure-{number}-data">{data}</script></div>'
    )


def _inert(text: str) -> str:
    """JSON that no HTML parser takes for markup."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def scripts() -> str:
    """plotly.js, packed, and the script that unpacks it and draws all figures."""
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    return (
        f'<script type="application/gzip" id="plotly">{packed}</script>\n'
        f"<script>{asset('page.js')}</script>"
    )


@cache
def script_sources() -> Sequence[str]:
    """Both scripts as sources of a content security policy."""
    return [digest(asset("page.js")), digest(get_plotlyjs())]


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_link(data: bytes, kind: str) -> str:
    """The data inside a link."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def json_text(value: object) -> str:
    """For reading: two spaces a level, letters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False)

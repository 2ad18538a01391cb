"""A page is complete in one file, asks nothing of the network, and shows text as text."""

import base64
import gzip
import hashlib
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from mechmm.results.described import described
from mechmm.results.report import (
    Captioned,
    Code,
    Download,
    Facts,
    Folded,
    Number,
    Page,
    Row,
    Section,
    _Writer,
)

LOUD = "<script>alert('x')</script> & \"quotes\""


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(page.html())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def figure(title: str = "t") -> go.Figure:
    return go.Figure(go.Bar(x=[1, 2], y=[3, 4]), layout={"title": title})


def full_page() -> Page:
    table = pd.DataFrame({"site": [LOUD, "b"], "effect": [0.51234, np.nan]})
    small, large = Image.new("RGB", (96, 96), "red"), Image.new("CMYK", (800, 400))
    return Page(
        LOUD,
        f"{LOUD}\n\nsecond paragraph",
        [
            Section(LOUD, [Captioned(figure(LOUD), LOUD), figure()]),
            Section("pictures", [Row([Captioned(small, "small"), large])]),
            Section("table", ["text", table, Captioned(table, LOUD)]),
            Section("more", [figure()]),
        ],
        {"command": LOUD, "seed": 0},
    )


def test_text_is_shown_not_run() -> None:
    page = Parsed(full_page())
    assert not page.open, "every tag is closed"
    # Title (also in the head), summary, heading (also in the links), captions, a figure's title,
    # cells, a fact.
    assert page.text.count(LOUD) == 2 + 1 + 2 + 2 + 1 + 2 + 1
    assert not any("alert('x')</" in script for script in page.scripts)


def test_nothing_is_fetched() -> None:
    page = Parsed(full_page())
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            link = attrs.get(name) or "#"
            assert link.startswith(("#", "data:")), f"<{tag} {name}={link}>"
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")
    assert "http" not in policies[0]


def test_plotly_is_there_once_and_only_with_a_figure() -> None:
    page = Parsed(full_page())
    packed = [a for a in page.all("script") if a.get("type") == "application/gzip"]
    assert len(packed) == 1
    whole = max(page.scripts, key=len)
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(whole))[:1000]
    ids = [a["id"] for a in page.all("div") if (a.get("id") or "").startswith("figure-")]
    assert ids == ["figure-1", "figure-2", "figure-3"]
    bare = Page("t", sections=[Section("s", ["text"])])
    assert len(bare.html()) < 10_000
    assert not Parsed(bare).scripts


def test_figures_are_whole_in_the_page_and_cannot_end_its_scripts() -> None:
    odd = go.Figure(go.Bar(x=["</script><script>alert(1)</script>", "<!--"], y=[1, 2]))
    page = Parsed(Page("t", sections=[Section("s", [odd])]))
    data = [text for text in page.scripts if text.startswith("{")]
    assert len(data) == 1
    assert go.Figure(json.loads(data[0])).to_plotly_json() == odd.to_plotly_json()
    kinds = [a.get("type") for a in page.all("script")]
    assert kinds == ["application/json", "application/gzip", None]


def test_only_scripts_of_these_digests_may_run() -> None:
    page = Parsed(full_page())
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv")) or ""
    allowed = policy.split("script-src ")[1].split(";")[0].split()
    code = [text for text in page.scripts if "DecompressionStream" in text]
    code.append(gzip.decompress(base64.b64decode(max(page.scripts, key=len))).decode())
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert allowed == [f"'sha256-{digest}'" for digest in digests]
    bare = Parsed(Page("t", sections=[Section("s", ["text"])]))
    policies = [a["content"] or "" for a in bare.all("meta") if a.get("http-equiv")]
    assert "script-src 'none'" in policies[0]


def test_a_figure_says_in_words_what_it_draws() -> None:
    odd = figure("effect of <b>heads</b> &lt;image&gt;<br>by layer")
    odd.update_xaxes(title="head").update_yaxes(title="layer")
    said = described(odd)
    assert said.startswith("effect of heads <image> by layer. Bars.")
    assert "Across: head" in said
    assert "Upwards: layer" in said
    page = Parsed(Page("t", sections=[Section("s", [odd])]))
    assert [a.get("aria-label") for a in page.all("div") if a.get("role") == "figure"] == [said]


def test_files_are_inside_packed_or_left_out() -> None:
    def link(data: bytes) -> dict[str, str | None]:
        return Parsed(Page("", sections=[Section("", [Download("t.csv", data)])])).all("a")[-1]

    short = link(b"a,b\n1,2\n")
    assert short["download"] == "t.csv"
    assert base64.b64decode((short["href"] or "").split(",")[1]) == b"a,b\n1,2\n"
    rows = b"".join(b"%d,1\n" % i for i in range(30_000))
    long = link(rows)
    assert long["download"] == "t.csv.gz"
    assert gzip.decompress(base64.b64decode((long["href"] or "").split(",")[1])) == rows
    noise = np.random.default_rng(0).bytes(2_000_000)
    file = Download("t.csv", noise, elsewhere="It is results/t.csv.")
    page = Parsed(Page("", sections=[Section("", [file])]))
    assert "is too long for this page. It is results/t.csv." in page.text
    assert all((a.get("href") or "").startswith("#") for a in page.all("a"))


def test_other_blocks_show_their_text() -> None:
    number = Number(LOUD, "0.25", [LOUD], LOUD, True)
    blocks = [Row([number]), Folded(LOUD, [Code(LOUD), Facts({LOUD: LOUD})])]
    page = Parsed(Page("t", sections=[Section("s", blocks)]))
    assert not page.open
    assert page.text.count(LOUD) == 3 + 2 + 2
    assert [a for a in page.all("details") if "open" in a] == []


def test_pictures_are_inside_and_small_ones_are_enlarged_crisply() -> None:
    small, large = Parsed(full_page()).all("img")
    assert small["class"] == "crisp"
    assert int(small["width"] or 0) >= 320
    assert large.get("class") is None
    assert (large["width"], large["height"]) == ("800", "400")
    data = base64.b64decode((small["src"] or "").split(",")[1])
    with Image.open(io.BytesIO(data)) as shown:
        np.testing.assert_array_equal(np.array(shown), np.array(Image.new("RGB", (96, 96), "red")))


def cells(table: pd.DataFrame) -> list[str]:
    html = Page("", sections=[Section("", [table])]).html()
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    return [part.split("</td>")[0].split(">", 1)[1] for part in body.split("<td")[1:]]


def test_numbers_in_tables_line_up() -> None:
    assert cells(pd.DataFrame({"x": [0.51234, -0.001, np.nan]})) == ["0.512", "-0.001", ""]
    assert cells(pd.DataFrame({"x": [3.0, np.nan]})) == ["3", ""]
    assert cells(pd.DataFrame({"x": [12345.678]})) == ["12346"]
    assert cells(pd.DataFrame({"x": [2.5e-9, 0.0]})) == ["2.50e-09", "0.00e+00"]
    assert cells(pd.DataFrame({"x": [7, 8], "y": [True, None]})) == ["7", "True", "8", ""]
    assert cells(pd.DataFrame({"x": pd.array([1, None], dtype="Int64")})) == ["1", ""]


def test_an_index_that_says_something_is_shown() -> None:
    assert cells(pd.DataFrame({"x": [1, 2]}, index=["a", "b"])) == ["a", "1", "b", "2"]


def test_long_tables_say_that_they_are_cut() -> None:
    page = Parsed(Page("", sections=[Section("", [pd.DataFrame({"x": range(500)})])]))
    assert len(page.all("tr")) == 201
    assert "The first 200 of 500 rows." in page.text
    assert not Parsed(Page("", sections=[Section("", [pd.DataFrame({"x": []})])])).open


def test_saving_replaces_and_repeats(tmp_path: Path) -> None:
    path = full_page().save(tmp_path / "new" / "report.html")
    first = path.read_bytes()
    assert full_page().save(path).read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_content_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot show a dict"):
        _Writer().block({"not": "this"})

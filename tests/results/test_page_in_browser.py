"""Pages in a real browser: drawn, moved, read in the dark, on a telephone and by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import Tab, browser
from PIL import Image
from test_drawing import circuit_of

from mechmm.results.plots import bars, heat_map
from mechmm.results.report import Code, Download, Folded, Page, Section
from mechmm.results.tokens import layer_slider

EVIL = "<script>window.ran=1</script><img src=x onerror=window.ran=1>"
LINK = "<a href='javascript:window.ran=1'>press</a>"
ACROSS = "document.documentElement.scrollWidth - window.innerWidth"
HOVER = "[...document.querySelectorAll('.hoverlayer text')].map((t) => t.textContent).join('|')"


def slider() -> go.Figure:
    values = np.arange(3 * 16, dtype=float).reshape(3, 4, 4) / 48
    notes = np.full(values.shape, EVIL, dtype=object)
    picture = Image.new("RGB", (64, 64), "orange")
    panels = [(EVIL, picture, values, notes), (LINK, picture, -values, notes)]
    return layer_slider(panels, "by layer", ["zero", "one", EVIL], active=0)


def raw() -> go.Figure:
    """As a stranger could have made it: markup that is not escaped."""
    odd = f"{EVIL}{LINK}"
    bar = go.Bar(x=[odd, "b"], y=[1, 2], hovertext=[odd, odd], hoverinfo="text", name=odd)
    picture = {"source": "https://example.org/a.png", "xref": "paper", "yref": "paper"}
    layout = {"title": odd, "images": [picture], "height": 300, "width": 400, "showlegend": True}
    return go.Figure(bar, layout=layout)


def page() -> Page:
    names = [EVIL, LINK, "plain"]
    effects = np.array([[0.1, -0.5, 0.9]])
    own = circuit_of(40)
    table = pd.DataFrame({f"column {i} with a long name": [0.5, 1.5] for i in range(12)})
    figures = [
        heat_map(effects, [EVIL], names, f"heat {EVIL}", x_title="head", y_title="layer"),
        slider(),
        bars(names, effects[0], None, None, "bars"),
        own.plot(Image.new("RGB", (64, 64), "orange"), (4, 4), title=EVIL),
        raw(),
    ]
    return Page(
        EVIL,
        f"{EVIL} {LINK}",
        [
            *(Section(f"figure {i}", [figure]) for i, figure in enumerate(figures)),
            Section("table", [table, Download("t.csv", b"a\n1\n")]),
            Section("more", [Folded("Manifest", [Code(f"{EVIL}\n" + "long " * 200)])]),
        ],
    )


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page().save(tmp_path_factory.mktemp("page") / "report.html").as_uri()


def opened(tab: Tab, url: str, **window: int | bool) -> Tab:
    tab.window(**window)
    tab.open(url)
    return tab


def place(tab: Tab, selector: str) -> tuple[float, float]:
    """The middle of an element, scrolled into view."""
    tab.js(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    box = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    return tuple(tab.js(f"{box}(document.querySelector('{selector}').getBoundingClientRect())"))


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_without_the_network_and_without_errors(
    tab: Tab, url: str, width: int, dark: bool
) -> None:
    opened(tab, url, width=width, dark=dark)
    assert tab.js("document.documentElement.dataset.drawn") == "5"
    assert tab.js("document.querySelectorAll('.drawing > .plot-container').length") == 5
    asked = [address for address in tab.requests if not address.startswith("data:")]
    # The last figure asks for a picture of the network, which the page's policy forbids.
    assert [address for address in asked if address != "https://example.org/a.png"] == [url]
    refused = [error for error in tab.errors if "example.org" not in str(error)]
    assert refused == []
    assert tab.js(ACROSS) <= 0
    inside = tab.js(
        "[...document.querySelectorAll('main h1, main p, main pre, main .title, summary, .slider')]"
        ".filter((e) => e.getBoundingClientRect().right > window.innerWidth).length"
    )
    assert inside == 0


def test_no_text_runs(tab: Tab, url: str) -> None:
    opened(tab, url)
    assert EVIL in tab.js("document.querySelector('h1').textContent")
    assert EVIL in tab.js("document.querySelector('#figure-1').closest('.plot').textContent")
    assert tab.js("document.querySelectorAll('main img, main a[href^=javascript]').length") == 0
    links = "[...document.querySelectorAll('svg a')].map((a) => a.href.baseVal ?? a.href)"
    assert not [link for link in tab.js(links) if "javascript" in link]
    tab.point(*place(tab, "#figure-5 .bars path"))
    tab.until(f"{HOVER} !== ''")
    assert not [link for link in tab.js(links) if "javascript" in link]
    assert tab.js("window.ran === undefined")


def test_a_script_that_came_in_anyway_may_not_run(tab: Tab, url: str) -> None:
    opened(tab, url)
    tab.js(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.ran = 1'}))"
    )
    assert tab.js("window.ran === undefined")


def test_hover_shows_names_as_they_are(tab: Tab, url: str) -> None:
    opened(tab, url)
    x, y = place(tab, "#figure-1 .heatmaplayer image, #figure-1 .heatmaplayer")
    tab.point(x, y)
    tab.until(f"{HOVER} !== ''")
    shown = tab.js(HOVER)
    assert "href='javascript:" in shown, "the name of the middle column, as text"
    assert "−0.50" in shown


def test_the_slider_moves_its_figure_by_keyboard(tab: Tab, url: str) -> None:
    opened(tab, url)
    visible = "document.getElementById('figure-2').data.map((t) => t.visible !== false)"
    first = tab.js(visible)
    tab.js("document.querySelector('.slider input').focus()")
    tab.press("ArrowRight")
    tab.until("document.querySelector('.slider output').textContent === 'one'")
    second = tab.js(visible)
    # Per panel: the picture, and a layer each.
    assert first == [True, True, False, False] * 2
    assert second == [True, False, True, False] * 2
    tab.press("ArrowRight")
    tab.until("document.querySelector('.slider input').value === '2'")
    name = tab.js("document.querySelector('.slider output').textContent")
    assert name.startswith("<script>")
    said = "document.querySelector('.slider input').getAttribute('aria-valuetext')"
    assert tab.js(said) == name


def test_the_circuit_goes_from_picture_to_answer(tab: Tab, url: str) -> None:
    opened(tab, url)
    figure = "document.getElementById('figure-4')"
    assert tab.js(f"{figure}.querySelectorAll('svg image').length") >= 1
    assert tab.js(f"{figure}.querySelectorAll('.scatterlayer .js-line').length") > 2
    x, y = place(tab, "#figure-4 .scatterlayer .trace:last-child .point")
    tab.point(x, y)
    tab.until(f"{HOVER} !== ''")
    assert " in, " in tab.js(HOVER)


def test_the_dark_is_dark_in_figures_too_and_can_change(tab: Tab, url: str) -> None:
    opened(tab, url, dark=True)
    color = "getComputedStyle(document.querySelector('#figure-3 .ytick text')).fill"
    back = "getComputedStyle(document.body).backgroundColor"
    assert tab.js(f"[{color}, {back}]") == ["rgb(230, 237, 243)", "rgb(13, 17, 23)"]
    tab.window(dark=False)
    tab.until(f"{color} === 'rgb(31, 35, 40)'")
    assert tab.js(back) == "rgb(255, 255, 255)"


def test_the_keyboard_reaches_everything(tab: Tab, url: str) -> None:
    opened(tab, url, width=900)
    tab.press("Tab")
    active = "document.activeElement"
    assert tab.js(f"{active}.textContent") == "Skip to the content"
    assert tab.js(f"{active}.getBoundingClientRect().top") >= 0, "it is shown with focus"
    tab.press("Enter")
    tab.until(f"{active}.id === 'content'")
    seen = []
    for _ in range(30):
        tab.press("Tab")
        seen.append(tab.js(f"{active}.tagName + '.' + {active}.className"))
        if seen[-1].startswith("SUMMARY"):
            break
    assert seen[-1].startswith("SUMMARY")
    assert "INPUT." in seen, "the slider"
    assert "DIV.wide wider" in seen, "what scrolls sideways"
    assert tab.js("document.querySelector('details').open") is False
    tab.press("Enter")
    tab.until("document.querySelector('details').open")


def test_figures_are_told_in_words(tab: Tab, url: str) -> None:
    opened(tab, url)
    told = "[...document.querySelectorAll('.drawing')].map((d) => d.getAttribute('aria-label'))"
    labels = tab.js(told)
    assert "Heat map" in labels[0]
    assert "Across: head" in labels[0]
    assert "A slider from zero to" in labels[1]
    hidden = "[...document.querySelectorAll('svg.main-svg')].every((s) => s.ariaHidden === 'true')"
    assert tab.js(hidden)


def test_a_file_is_saved_from_the_page(tab: Tab, url: str, tmp_path: Path) -> None:
    opened(tab, url)
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.js("document.querySelector('a[download]').click()")
    tab.until("true")
    for _ in range(200):
        if (tmp_path / "t.csv").exists():
            break
        tab.js("new Promise((done) => setTimeout(done, 25))")
    assert (tmp_path / "t.csv").read_bytes() == b"a\n1\n"

"""Figures hold the data as given, legibly, and say what they cannot draw."""

import base64
import io
import re
import sys
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from mechmm.results import plots
from mechmm.results.values import numbers

RNG = np.random.default_rng(0)


def maps_of(figure: go.Figure) -> list[go.Heatmap]:
    return [t for t in figure.data if isinstance(t, go.Heatmap) and t.hoverinfo == "text"]


def pictures_of(figure: go.Figure) -> list[Image.Image]:
    sources = [trace.source for trace in figure.data if isinstance(trace, go.Image)]
    return [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in sources]


def picture(width: int = 96, height: int = 96) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_heat_map_holds_the_values_and_a_symmetric_scale() -> None:
    values = torch.tensor([[0.25, -0.8], [float("nan"), 0.1]])
    figure = plots.heat_map(values, ["1", "0"], ["a", "b"], "t", x_title="span", y_title="layer")
    (cells,) = maps_of(figure)
    np.testing.assert_array_equal(cells.z, values.double().numpy())
    axis = figure.layout.coloraxis
    assert axis.cmax == pytest.approx(0.8)
    assert axis.cmin == -axis.cmax
    assert axis.colorscale[5] == (0.5, "#ffffff")
    assert list(cells.text[0]) == ["0.25", "−0.80"]
    assert cells.text[1][0] == ""
    assert "no value" in cells.hovertext[1][0]


def test_hover_tells_interval_and_null_and_bold_is_outside_the_null() -> None:
    values = np.array([[0.5, 0.01]])
    figure = plots.heat_map(
        values,
        [3],
        ["object", "last"],
        "t",
        x_title="span",
        y_title="layer",
        low=values - 0.1,
        high=values + 0.1,
        n=24,
        null=(-0.02, 0.03),
    )
    (cells,) = maps_of(figure)
    lines = cells.hovertext[0][0].split("<br>")
    assert lines[0] == "layer 3, span object"
    assert lines[2:] == ["interval 0.40 to 0.60", "null −0.020 to 0.030"]
    assert list(cells.text[0]) == ["<b>0.50</b>", "0.01"]
    subtitle = figure.layout.title.subtitle.text
    assert "24 examples" in subtitle
    assert "−0.020 to 0.030" in subtitle


def test_labels_are_text_not_markup_and_may_repeat() -> None:
    rows = ["<image>", "the", "the"]
    figure = plots.heat_map(np.eye(3), rows, list("abc"), "<b> & co", x_title="", y_title="")
    assert figure.layout.yaxis.ticktext == ("&lt;image&gt;", "the", "the")
    assert list(figure.layout.yaxis.tickvals) == [0, 1, 2]
    assert figure.layout.title.text == "&lt;b&gt; &amp; co"


def test_many_labels_are_thinned_and_long_ones_cut() -> None:
    columns = [f"a rather long name of position number {i} of the prompt" for i in range(300)]
    figure = plots.heat_map(RNG.normal(size=(2, 300)), "ab", columns, "t", x_title="", y_title="")
    shown = figure.layout.xaxis.ticktext
    width = figure.layout.width - figure.layout.margin.l - figure.layout.margin.r
    panel = width * np.diff(figure.layout.xaxis.domain)[0]
    assert panel / len(shown) >= 18
    assert max(len(unescape(name)) for name in shown) <= 40
    (cells,) = maps_of(figure)
    assert cells.text is None
    assert columns[299] in cells.hovertext[0][299]


@pytest.mark.parametrize("bad", ["rows", "low", "null"])
def test_what_does_not_fit_a_heat_map_is_refused(bad: str) -> None:
    options: dict[str, Any] = {
        "low": np.zeros((2, 3)),
        "high": np.zeros((2, 3)),
        "null": (0.0, 1.0),
    }
    if bad == "low":
        options |= {"low": None}
    if bad == "null":
        options |= {"null": (float("nan"), 1.0)}
    rows = ["a"] if bad == "rows" else ["a", "b"]
    with pytest.raises(
        ValueError, match={"rows": "row", "low": "bound", "null": "not two numbers"}[bad]
    ):
        plots.heat_map(np.zeros((2, 3)), rows, "abc", "t", x_title="", y_title="", **options)


def test_towers_share_one_scale_and_do_not_overlap() -> None:
    maps = {
        "vision": (np.full((2, 3), 0.2), ["1", "0"], list("abc")),
        "projector": (np.full((1, 1), 0.1), ["out"], ["a long name of a span"]),
        "language": (np.full((4, 2), -0.9), list("3210"), ["image", "last"]),
    }
    figure = plots.tower_maps(maps, "both", nulls={"vision": (-0.1, 0.1)})
    for cells, (values, _, _) in zip(maps_of(figure), maps.values(), strict=True):
        np.testing.assert_array_equal(cells.z, values)
        assert cells.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmax == pytest.approx(0.9)
    domains = [figure.layout[f"xaxis{i}"].domain for i in ("", 2, 3)]
    ends = [end for domain in domains for end in domain] + [figure.layout.coloraxis.colorbar.x]
    assert ends == sorted(ends)
    headings = [note.text for note in figure.layout.annotations]
    assert headings[0].startswith("vision  (null −0.10 to 0.10)")
    with pytest.raises(ValueError, match="at least one"):
        plots.tower_maps({}, "t")
    with pytest.raises(ValueError, match="audio"):
        plots.tower_maps(maps, "t", nulls={"audio": (0, 1)})


def test_an_overlay_holds_the_picture_and_the_values() -> None:
    given, values = picture(), RNG.normal(size=(3, 8, 8))
    figure = plots.patch_overlay(given, torch.tensor(values), "t", layers=[0, 5, "last"])
    shown = pictures_of(figure)
    np.testing.assert_array_equal(np.array(shown[0]), np.array(given))
    assert len(shown) == 4
    for cells, grid in zip(maps_of(figure), values, strict=True):
        np.testing.assert_array_equal(cells.z, grid)
    headings = [note.text for note in figure.layout.annotations]
    assert headings[:4] == ["picture", "layer 0", "layer 5", "last"]
    text = maps_of(figure)[0].hovertext[3][4]
    assert text.replace("−", "-") == f"row 3, column 4: {values[0, 3, 4]:.2f}"


def test_the_picture_shows_through_and_lies_under_its_patches() -> None:
    figure = plots.patch_overlay(picture(160, 96), RNG.normal(size=(6, 10)), "t")
    alphas = [
        float(re.findall(r"[\d.]+\)", color)[0][:-1])
        for _, color in figure.layout.coloraxis.colorscale
    ]
    assert alphas[5] == alphas[6] == 0
    assert max(alphas) <= 0.8
    for trace in figure.data[:2]:
        assert trace.x0 - trace.dx / 2 == pytest.approx(-0.5)
        assert trace.x0 + trace.dx * (160 - 0.5) == pytest.approx(9.5)
        assert trace.y0 + trace.dy * (96 - 0.5) == pytest.approx(5.5)
        assert not trace.zsmooth
    x, y = figure.layout.xaxis.domain, figure.layout.yaxis.domain
    margin = figure.layout.margin
    wide = (x[1] - x[0]) * (figure.layout.width - margin.l - margin.r)
    high = (y[1] - y[0]) * (figure.layout.height - margin.t - margin.b)
    assert wide == pytest.approx(380, abs=2)
    assert wide / high == pytest.approx(160 / 96, rel=0.01)


def test_a_large_picture_is_shrunk_and_smoothed() -> None:
    figure = plots.patch_overlay(Image.new("RGBA", (3000, 1500)), np.ones((4, 8)), "t")
    assert pictures_of(figure)[0].size == (760, 380)
    assert figure.data[0].zsmooth == "fast"


def test_overlay_texts_are_shown_escaped_and_checked() -> None:
    texts = np.full((2, 2), "<cat>", dtype=object)
    figure = plots.patch_overlay(picture(), np.ones((2, 2)), "t", texts=texts)
    assert maps_of(figure)[0].hovertext[1][0] == "row 1, column 0: 1.00<br>&lt;cat&gt;"
    with pytest.raises(ValueError, match="texts of shape"):
        plots.patch_overlay(picture(), np.ones((2, 3)), "t", texts=texts)
    with pytest.raises(ValueError, match="2 names for the maps of 3 layers"):
        plots.patch_overlay(picture(), np.ones((3, 2, 2)), "t", layers=["a", "b"])
    with pytest.raises(ValueError, match="give"):
        plots.patch_overlay(picture(), np.ones((0, 2, 2)), "t")


def test_bars_hold_values_intervals_and_the_null() -> None:
    values = np.array([0.6, -0.4, 0.01])
    figure = plots.bars(
        ["a", "a", "<b>"], values, values - 0.1, values + 0.2, "t", null=(-0.05, 0.04)
    )
    bar = figure.data[0]
    np.testing.assert_array_equal(bar.x, values)
    np.testing.assert_allclose(bar.error_x.array, 0.2)
    np.testing.assert_allclose(bar.error_x.arrayminus, 0.1)
    assert bar.marker.color == (plots.COLORS[-2], plots.COLORS[1], plots.COLORS[-2])
    assert bar.marker.opacity[2] < bar.marker.opacity[0]
    band = figure.layout.shapes[0]
    assert (band.x0, band.x1) == (-0.05, 0.04)
    assert "random sites" in band.name
    first, last = figure.layout.yaxis.range
    assert first > last, "the first bar is at the top"
    assert figure.layout.yaxis.ticktext[2] == "&lt;b&gt;"


def test_one_example_has_no_interval() -> None:
    unknown, values = np.full(2, np.nan), np.array([0.5, 0.2])
    bar = plots.bars("ab", values, unknown, unknown, "t").data[0]
    assert bar.error_x.array is None
    assert "interval" not in "".join(bar.hovertext)
    some = plots.bars("ab", values, np.array([0.4, np.nan]), values + 0.1, "t").data[0]
    assert ["interval" in text for text in some.hovertext] == [True, False]
    assert np.isnan(some.error_x.array[1])
    assert np.isnan(some.error_x.arrayminus[1])
    bounds = {"low": np.array([[0.4, np.nan]]), "high": np.array([[0.6, np.nan]])}
    for n, given in ((1, {k: v * np.nan for k, v in bounds.items()}), (2, bounds)):
        figure = plots.heat_map(values[None], "a", "bc", "t", x_title="", y_title="", **given)
        hover = maps_of(figure)[0].hovertext[0]
        assert ["interval" in text for text in hover] == [n == 2, False]
        assert ("interval" in figure.layout.title.subtitle.text) == (n == 2)


@pytest.mark.parametrize(
    ("rows", "columns", "names"),
    [
        ((6, 6), (5, 5), "a span of length"),
        ((8, 4), (6, 4), ""),
        ((6, 1, 6), (5, 1, 5), "span"),
        ((4, 4), (200, 20), "token"),
    ],
)
def test_heat_maps_fit_the_page(
    rows: tuple[int, ...], columns: tuple[int, ...], names: str
) -> None:
    maps = {
        f"tower {i}": (np.ones((r, c)), list(range(r)), [f"{names}{j}" for j in range(c)])
        for i, (r, c) in enumerate(zip(rows, columns, strict=True))
    }
    figure = plots.tower_maps(maps, "t", n=24, nulls=dict.fromkeys(maps, (-0.011, 0.02)))
    assert figure.layout.width <= 1150


def test_what_does_not_fit_bars_is_refused() -> None:
    with pytest.raises(ValueError, match="1 names"):
        plots.bars(["a"], [1.0, 2.0], None, None, "t")
    with pytest.raises(ValueError, match="not two numbers"):
        plots.bars(["a"], [1.0], None, None, "t", null=(float("nan"), float("nan")))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1.5, -0.001], ["1.50", "0.00"]),
        ([0.05, -0.0123], ["0.050", "−0.012"]),
        ([1234.5, 3.0], ["1234", "3"]),
        ([0.0, float("nan"), float("-inf")], ["0.00", "no value", "−inf"]),
        ([2e-7, 0.0], ["2.0e−07", "0.0e+00"]),
    ],
)
def test_numbers_have_as_many_decimals_as_they_need(values: list[float], texts: list[str]) -> None:
    assert numbers(np.array(values)).tolist() == texts


def test_fonts_are_legible() -> None:
    figure = plots.heat_map(np.eye(3), "abc", "abc", "t", x_title="x", y_title="y")
    sizes = re.findall(r'"size":\s*(\d+)', figure.to_json())
    assert min(map(int, sizes)) >= 12


def test_a_missing_browser_is_explained(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kaleido = pytest.importorskip("kaleido")
    from kaleido.errors import ChromeNotFoundError

    def no_browser(*args: Any, **options: Any) -> bytes:
        raise ChromeNotFoundError

    monkeypatch.setattr(kaleido, "calc_fig_sync", no_browser)
    with pytest.raises(RuntimeError, match=r"Chromium or Chrome.*write_html"):
        plots.save_png(go.Figure(), tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(RuntimeError, match="kaleido"):
        plots.save_png(go.Figure(), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_a_png_is_written_whole_without_the_network(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kaleido = pytest.importorskip("kaleido")
    seen = {}

    def draw(figure: dict[str, Any], *, opts: dict[str, Any], kopts: dict[str, Any]) -> bytes:
        seen.update(opts | kopts)
        return b"png"

    monkeypatch.setattr(kaleido, "calc_fig_sync", draw)
    path = plots.save_png(go.Figure(layout={"width": 300}), tmp_path / "a" / "figure.png")
    assert path.read_bytes() == b"png"
    assert seen == {"format": "png", "scale": 2.0, "width": 300, "mathjax": False}

"""Figures of edge scores and of faithfulness hold what the results say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from mechmm.methods.attribution import SHOWN, Attribution
from mechmm.methods.circuits import Faithfulness
from mechmm.results import plots
from mechmm.results.graph import Block, Graph, table_of

GREY = "#6e7781"


def graph_of(layers: int = 5) -> Graph:
    writers = [("input", "language", "input", -1, -1)]
    mlps = [(f"m{i}", "language", "mlp", i, -1) for i in range(layers)]
    blocks = [Block("language", i, (0, i + 1), (i, i + 1)) for i in range(layers + 1)]
    links = np.array([(i, i + 1) for i in range(layers)], dtype=np.int32)
    readers = [*mlps, ("logits", "language", "logits", layers - 1, -1)]
    return Graph(table_of([*writers, *mlps]), table_of(readers), tuple(blocks), links)


def attribution(layers: int = 5, examples: int = 6) -> Attribution:
    graph, generator = graph_of(layers), torch.Generator().manual_seed(0)
    scores = torch.randn(examples, len(graph), generator=generator)
    ends = torch.full((examples,), 2.0), torch.full((examples,), -2.0)
    return Attribution(graph, scores, *ends, "eap", "logit_diff", "corrupt", 1)


def faithfulness(fractions: tuple[float, ...], n_random: int = 2, examples: int = 8):
    own = [(f"circuit {i}", int(1000 * f), f, False) for i, f in enumerate(fractions)]
    null = [
        (f"random {i}", int(1000 * f), f, True)
        for i, f in enumerate(fractions)
        for _ in range(n_random)
    ]
    table = pd.DataFrame([*own, *null], columns=["name", "edges", "fraction", "null"])
    noise = 0.2 * torch.randn(len(table), examples, generator=torch.Generator().manual_seed(1))
    mean = torch.tensor([0.0 if row[3] else 2 * row[2] ** 0.1 for row in [*own, *null]])
    full, empty = torch.full((examples,), 2.0), torch.zeros(examples)
    return Faithfulness(table, mean[:, None] + noise, full, empty, "logit_diff", "corrupt")


def test_the_strongest_edges_are_bars_with_intervals() -> None:
    result = attribution(layers=9)
    bar = result.plot()["edges"].data[0]
    table = result.to_dataframe().head(SHOWN)
    np.testing.assert_allclose(bar.x, table["score"], rtol=1e-6)
    assert np.isfinite(bar.error_x.array).all()
    assert bar.hovertext[0].startswith(table["edge"].iat[0].replace(">", "&gt;"))
    few = attribution(layers=2)
    assert len(few.plot()["edges"].data[0].x) == len(few.graph)


def test_the_mass_of_scores_is_that_of_what_writes() -> None:
    result = attribution()
    (cells,) = result.plot()["mass"].data
    assert np.nansum(cells.z) == pytest.approx(1)
    size, src = np.abs(result.mean()), result.graph.src
    inputs = cells.z[-1][0]
    assert inputs == pytest.approx(size[src == 0].sum() / size.sum())
    m0 = cells.z[-2][1]
    assert m0 == pytest.approx(size[src == 1].sum() / size.sum())


def test_scores_of_zero_have_figures() -> None:
    result = attribution()
    figures = replace(result, scores=torch.zeros_like(result.scores)).plot()
    assert np.nansum(figures["mass"].data[0].z) == 0


def test_curves_are_over_a_log_axis_beside_the_random_ones() -> None:
    result = faithfulness((0.001, 0.01, 0.1, 1.0))
    figure = result.plot()["curve"]
    own, null = (trace(figure, name) for name in ("circuits", "random circuits"))
    np.testing.assert_allclose(own.y, result.curve()["faithfulness"])
    np.testing.assert_allclose(null.y, result.curve(null=True)["faithfulness"])
    assert null.line.color == GREY
    assert own.line.color == plots.COLORS[-2]
    assert figure.layout.xaxis.type == "log"
    assert {line.y0 for line in figure.layout.shapes} == {0, 1}
    title = figure.layout.title.text
    assert f"CPR {result.cpr():.2f} (random {result.cpr(null=True):.2f})" in title
    assert f"CMD {result.cmd():.2f}" in title
    bands = [t for t in figure.data if t.fill == "toself"]
    np.testing.assert_allclose(bands[1].y[:4], result.interval()[1][:4], rtol=1e-5)


def test_the_interval_of_random_circuits_is_that_of_their_mean() -> None:
    result = faithfulness((0.01, 0.1), n_random=3)
    table = result.curve(null=True)
    assert len(table) == 2
    assert (table["low"] <= table["faithfulness"]).all()
    assert (table["faithfulness"] <= table["high"]).all()
    one = faithfulness((0.01, 0.1), n_random=1)
    low, high = one.interval()
    np.testing.assert_allclose(one.curve(null=True)["low"], low[2:], rtol=1e-6)
    np.testing.assert_allclose(one.curve(null=True)["high"], high[2:], rtol=1e-6)


@pytest.mark.parametrize("n_random", [0, 4])
def test_few_circuits_are_bars_beside_the_null(n_random: int) -> None:
    result = faithfulness((0.02,), n_random)
    figure = result.plot()["bars"]
    bar = figure.data[0]
    assert bar.x[0] == pytest.approx(float(result.faithfulness()[0]))
    labels = figure.layout.yaxis.ticktext
    assert labels == ("circuit 0, 20 edges", "random, 20 edges")[: len(bar.x)]
    assert len(figure.layout.shapes) == (n_random > 0)


def test_curves_without_random_circuits_or_intervals() -> None:
    result = faithfulness((0.001, 0.1, 1.0), n_random=0, examples=1)
    figure = result.plot()["curve"]
    assert [t.name for t in figure.data] == ["circuits"]
    assert "random" not in figure.layout.title.text


def test_curves_need_points_that_a_log_axis_can_show() -> None:
    table = pd.DataFrame({"share": [0.0, 1.0], "value": 0.0, "low": 0.0, "high": 0.0})
    for series in ({}, {"a": table}):
        with pytest.raises(ValueError, match="curves need points"):
            plots.curves(series, "t")


def test_pages_say_what_was_done() -> None:
    page = attribution().page("Edges", {"seed": 0})
    assert "eap; logit_diff is 2.00 on the clean prompts and -2.00" in page.summary
    assert "m4" in page.html()
    without = replace(attribution(), reference=torch.full((6,), torch.nan), target="mean")
    assert "nan" not in without.summary()
    report = faithfulness((0.001, 0.1, 1.0)).page("Circuits")
    assert "3 circuits and 6 random ones of the same sizes, 8 pairs" in report.summary
    assert "figure-1" in report.html()


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [t for t in figure.data if t.name == name]
    return found

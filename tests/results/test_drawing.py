"""A drawn circuit shows every edge that it keeps, once, at the place where it belongs."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from mechmm.results.circuit import Circuit
from mechmm.results.drawing import MOST, OPPOSES, SUPPORTS, UNKNOWN, WIDTHS
from mechmm.results.graph import Block, Graph, table_of

HEADS = 4
Row = tuple[str, str, str, int, int]


def graph_of(layers: int = 4, shared: int = 1, spans: tuple[str, ...] = ("",)) -> Graph:
    """A vision tower, a projector and a language model, some heads of which share keys."""
    writers: list[Row] = []
    readers: list[Row] = []
    blocks: list[Block] = []
    links: list[tuple[int, int]] = []
    every = tuple(range(len(spans)))

    def read(tower: str, layer: int, start: int, rows: list[Row]) -> int:
        first = len(readers)
        readers.extend(rows)
        ends = (first, len(readers))
        blocks.append(Block(tower, layer, (start, len(writers)), ends, every))
        return first

    def tower(name: str, prefix: str, start: int, groups: int) -> None:
        for layer in range(layers):
            a, m = f"{prefix}a{layer}.h", f"{prefix}m{layer}"
            rows: list[Row] = [(f"{a}{h}<q>", name, "q", layer, h) for h in range(HEADS)]
            for kind in "kv":
                rows += [(f"{a}{h}<{kind}>", name, kind, layer, h) for h in range(groups)]
            first, w = read(name, layer, start, rows), len(writers)
            writers.extend((f"{a}{h}", name, "head", layer, h) for h in range(HEADS))
            for h in range(HEADS):
                own = first + HEADS + h * groups // HEADS
                links.extend([(first + h, w + h), (own, w + h), (own + groups, w + h)])
            links.append((read(name, layer, start, [(m, name, "mlp", layer, -1)]), len(writers)))
            writers.append((m, name, "mlp", layer, -1))

    writers.append(("vision.input", "vision", "input", -1, -1))
    tower("vision", "vision.", 0, HEADS)
    out = read("vision", -1, 0, [("projector", "vision", "projector", -1, -1)])
    start = len(writers)
    links.append((out, start))
    writers += [("projector", "language", "projector", -1, -1)]
    writers += [("input", "language", "input", -1, -1)]
    tower("language", "", start, HEADS // shared)
    read("language", -1, start, [("logits", "language", "logits", -1, -1)])
    table = np.array(links, dtype=np.int32)
    return Graph(table_of(writers), table_of(readers), tuple(blocks), table, spans, "made up")


def circuit_of(n: int, **options) -> Circuit:
    graph = graph_of(**options)
    scores = np.random.default_rng(0).standard_t(2, len(graph)).astype(np.float32)
    keep = np.zeros(len(graph), dtype=bool)
    keep[np.argsort(-np.abs(scores))[:n]] = True
    return Circuit(graph, keep, scores)


def named(figure: go.Figure, name: str) -> go.Scatter:
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


def place_of(figure: go.Figure, node: str) -> list[tuple[float, float]]:
    nodes = named(figure, "nodes")
    texts = [text.split("</b>")[0].removeprefix("<b>") for text in nodes.hovertext]
    places = zip(texts, nodes.x, nodes.y, strict=True)
    return [(float(x), float(y)) for text, x, y in places if text == escape(node, quote=False)]


def legend_of(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]


@pytest.mark.parametrize("spans", [("",), ("image", "last", "rest")])
@pytest.mark.parametrize("n", [1, 20, 200])
def test_every_edge_is_shown_once_with_its_score(n: int, spans: tuple[str, ...]) -> None:
    circuit = circuit_of(n, spans=spans, shared=2)
    figure = circuit.plot()
    shown = [text.split("<br>")[0] for text in named(figure, "edges").hovertext]
    assert shown == [escape(name, quote=False) for name in circuit.edges]
    assert all("score <b>" in text for text in named(figure, "edges").hovertext)
    assert f"{n} of {len(circuit.graph)} edges" in figure.layout.title.text
    assert len(figure.data) <= 3 * len(WIDTHS) + 12


def test_signs_are_colours_and_sizes_are_widths() -> None:
    graph, scores = graph_of(), np.zeros(len(graph_of()), dtype=np.float32)
    names = ["vision.input->vision.m0", "m0->logits", "m1->logits"]
    edges = graph.edges(names)
    scores[edges] = [8.0, -3.0, 0.1]
    figure = Circuit(graph, np.isin(np.arange(len(graph)), edges), scores).plot()
    lines = {
        (trace.line.color, trace.line.width)
        for trace in figure.data
        if trace.mode == "lines" and trace.hoverinfo == "skip" and trace.line.dash is None
    }
    assert lines == {(SUPPORTS, WIDTHS[4]), (OPPOSES, WIDTHS[3]), (SUPPORTS, WIDTHS[0])}
    assert named(figure, "edges").marker.color == (SUPPORTS, OPPOSES, SUPPORTS)
    assert "|score| ≤ 8.00" in legend_of(figure)


def test_edges_without_a_score_have_equal_width() -> None:
    graph = graph_of()
    names = ["vision.input->vision.m0", "vision.m0->projector", "projector->m1", "m1->logits"]
    figure = Circuit.named(graph, names).plot()
    assert legend_of(figure) == ["no score"]
    assert set(named(figure, "edges").marker.color) == {UNKNOWN}
    assert all("no score" in text for text in named(figure, "edges").hovertext)
    drawn = [trace for trace in figure.data if trace.hoverinfo == "skip"]
    assert len(drawn) == 1


def test_nodes_run_from_left_to_right_and_do_not_overlap() -> None:
    figure = circuit_of(200, shared=2).plot()
    order = ["vision.m0", "vision.m1", "projector", "m0", "m1", "logits"]
    xs = [place_of(figure, name)[0][0] for name in order]
    assert xs == sorted(xs)
    nodes = named(figure, "nodes")
    points = np.stack([nodes.x, nodes.y], axis=1).astype(float)
    apart = np.abs(points[:, None] - points[None]).max(-1) + 1e9 * np.eye(len(points))
    assert apart.min() >= max(nodes.marker.size)
    assert (points >= 0).all()
    assert points[:, 0].max() <= figure.layout.xaxis.range[1]
    assert points[:, 1].max() <= figure.layout.yaxis.range[0]


def test_only_what_has_an_edge_is_drawn() -> None:
    figure = Circuit.named(graph_of(), ["m0->logits"]).plot()
    assert len(named(figure, "nodes").x) == 2
    assert "<b>vision</b>" not in [note.text for note in figure.layout.annotations]


def test_spans_are_lanes_from_the_top_and_attention_moves_between_them() -> None:
    graph = graph_of(spans=("image", "<last>", "rest"), shared=2)
    names = ["projector->a1.h1<v> @ image", "a1.h2->logits @ <last>", "a1.h3->logits @ <last>"]
    figure = Circuit.named(graph, names).plot()
    notes = {note.text: note.y for note in figure.layout.annotations}
    tops = [notes[f"<b>{name}</b>"] for name in ("image", "&lt;last&gt;", "rest")]
    (shared,) = place_of(figure, "a1.h1<k, v>")
    (head,) = place_of(figure, "a1.h2")
    assert tops[0] < shared[1] < tops[1] < head[1] < tops[2]
    link = named(figure, "moves between positions")
    ends = np.stack([link.x, link.y], axis=1).astype(float).reshape(-1, 3, 2)[:, :2]
    assert len(ends) == 2, "key-value head 1 feeds the heads 2 and 3"
    np.testing.assert_allclose(ends[0], [shared, head], atol=0.1)


def test_an_edge_ends_at_its_nodes() -> None:
    figure = Circuit.named(graph_of(), ["vision.input->vision.m2"]).plot()
    (line,) = [trace for trace in figure.data if trace.hoverinfo == "skip"]
    (start,), (end,) = place_of(figure, "vision.input"), place_of(figure, "vision.m2")
    assert (line.x[0], line.y[0]) == pytest.approx(start, abs=14)
    assert (line.x[-2], line.y[-2]) == pytest.approx(end, abs=14)


def test_an_edge_goes_around_what_lies_between() -> None:
    names = ["vision.m0->vision.m2", "vision.m0->vision.m1", "vision.m1->vision.m2"]
    figure = Circuit.named(graph_of(), names).plot()
    (_, y), radius = place_of(figure, "vision.m1")[0], named(figure, "nodes").marker.size[0] / 2
    hover = named(figure, "edges")
    middle = [text.startswith("vision.m0-&gt;vision.m2") for text in hover.hovertext].index(True)
    assert abs(hover.y[middle] - y) > radius


@pytest.mark.parametrize("size", [(96, 96), (40, 400), (900, 300)])
def test_the_picture_lies_at_the_left_in_its_patches(size: tuple[int, int]) -> None:
    figure = circuit_of(200).plot(Image.new("RGBA", size), grid=(4, 6, 1), title="colours")
    (shown,) = figure.layout.images
    assert shown.sizex / shown.sizey == pytest.approx(size[0] / size[1])
    assert shown.x + shown.sizex < min(named(figure, "nodes").x)
    assert shown.y >= 0
    assert shown.y + shown.sizey <= figure.layout.yaxis.range[0]
    grid = [trace for trace in figure.data if trace.opacity == 0.6]
    assert len(grid[0].x) == (3 + 5) * 3
    assert figure.layout.title.text.startswith("colours: 200 of")


def test_what_cannot_be_drawn_is_refused() -> None:
    graph = graph_of()
    none = np.zeros(len(graph), dtype=bool)
    with pytest.raises(ValueError, match="no edges to draw; keep more"):
        Circuit(graph, none, np.zeros(len(graph), np.float32)).plot()
    graph = graph_of(layers=14)
    assert len(graph) > MOST
    with pytest.raises(ValueError, match="cannot be told apart"):
        Circuit(graph, np.ones(len(graph), bool), np.zeros(len(graph), np.float32)).plot()

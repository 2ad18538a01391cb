"""Where the nodes of a circuit lie in its figure.

The nodes of a figure are components: what a writer writes and its readers read is one node. Heads
that share keys and values are an exception: these are a node of their own, `kv`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import pandas as pd

from mechmm.results.graph import COLUMNS, STAYS, Graph
from mechmm.results.values import pixels

Row: TypeAlias = tuple[str, str, str, int, int]
"""As `COLUMNS`."""
Place: TypeAlias = tuple[int, int]
"""(node, span)."""
_WIDTH, _HEIGHT = 1080.0, 600.0
"""What a figure has room for in a report; larger circuits are larger."""
_SLOTS = {"kv": 0, "head": 1, "attn": 1, "input": 1, "projector": 1, "logits": 1, "mlp": 2}


@dataclass(frozen=True)
class Node:
    """A component.

    Attributes:
        name, kind: as in the graph; `kv` is a kind too.
        tower: its name; the projector is a tower by itself.
        order: of its column, from left to right.
        layer: -1 in front of the blocks and behind them.
        text: inside the node.
    """

    name: str
    kind: str
    tower: str
    order: tuple[float, float]
    layer: int
    text: str

    @property
    def slot(self) -> tuple[float, float, int]:
        """From left to right."""
        return *self.order, _SLOTS.get(self.kind, 3)

    @property
    def end(self) -> bool:
        """Whether it stands for the begin or the end of a tower."""
        return self.kind in ("input", "projector", "logits")

    @property
    def low(self) -> bool:
        """Whether it lies under the heads."""
        return self.kind in ("mlp", "deepstack")

    @property
    def sees(self) -> bool:
        """Whether it reads the picture."""
        return self.kind == "input" and self.tower == "vision"


@dataclass(frozen=True)
class Parts:
    """Nodes, where every edge starts and ends, and the links between what a node reads and what it
    writes elsewhere."""

    nodes: list[Node]
    starts: list[Place]
    ends: list[Place]
    links: list[tuple[Place, Place]]

    @cached_property
    def used(self) -> list[Place]:
        """Nodes with an edge, each once in every span."""
        return sorted({*self.starts, *self.ends})


def parts_of(graph: Graph, at: np.ndarray) -> Parts:
    """What some edges of a graph join."""
    nodes, of_writer, of_reader = _nodes(graph)
    spans = graph.span[at].tolist()
    writers, readers = graph.src[at].tolist(), graph.dst[at].tolist()
    starts = [(of_writer[u], span) for u, span in zip(writers, spans, strict=True)]
    ends = [(of_reader[v], span) for v, span in zip(readers, spans, strict=True)]
    read = set(zip(readers, spans, strict=True))
    written = set(zip(writers, spans, strict=True))
    stays = graph.readers["kind"].isin(STAYS).tolist()
    every = range(len(graph.spans))
    links = {
        ((of_reader[v], s), (of_writer[u], t))
        for v, u in graph.links.tolist()
        for s in every
        if (v, s) in read
        for t in ((s,) if stays[v] else every)
        if (u, t) in written
    }
    return Parts(nodes, starts, ends, sorted(link for link in links if link[0] != link[1]))


def _nodes(graph: Graph) -> tuple[list[Node], list[int], list[int]]:
    """The nodes of a graph, which of them every writer is, and which every reader."""
    towers = {t: i for i, t in enumerate(dict.fromkeys(graph.writers["tower"]))}
    nodes = [_node(row, towers) for row in _rows(graph.writers)]
    writers = list(range(len(nodes)))
    own: dict[str, int] = {}
    of_reader = []
    for v, (name, tower, kind, layer, head) in enumerate(_rows(graph.readers)):
        fed = graph.feeds.get(v, [])
        if len(fed) == 1:
            of_reader.append(fed[0])
            continue
        shared = kind in ("k", "v")
        name = f"{name.split('<')[0]}<k, v>" if shared else name
        if name not in own:
            own[name] = len(nodes)
            nodes.append(_node((name, tower, "kv" if shared else kind, layer, head), towers))
        of_reader.append(own[name])
    return nodes, writers, of_reader


def _rows(table: pd.DataFrame) -> list[Row]:
    return list(table[list(COLUMNS)].itertuples(index=False, name=None))


def _node(row: Row, towers: dict[str, int]) -> Node:
    name, tower, kind, layer, head = row
    texts = {"head": f"h{head}", "kv": f"kv{head}", "mlp": "mlp", "attn": "attn", "deepstack": "ds"}
    column = {"input": -1.0, "logits": math.inf}.get(kind, float(layer))
    order = (float(towers[tower]), column)
    if kind == "projector":
        tower, order = name, (order[0] - 0.5, 0.0)
    return Node(name, kind, tower, order, -1 if kind == "logits" else layer, texts.get(kind, ""))


@dataclass(frozen=True)
class Arrangement:
    """Places in pixels.

    Attributes:
        width, height: of the whole.
        at: where every node is, in every span that it has.
        step: from slot to slot.
        radius: of nodes.
        bow: how far an edge between nodes of equal height may bow.
        gutter, top: room left of the nodes, and above them.
        towers: (left, right, name) of every tower.
        columns: (middle, label) of every layer.
        lanes: the top of every span.
    """

    width: float
    height: float
    at: dict[Place, tuple[float, float]]
    step: float
    radius: float
    bow: float
    gutter: float
    top: float
    towers: list[tuple[float, float, str]]
    columns: list[tuple[float, str]]
    lanes: list[float]


_TOP = 56.0


def arranged(parts: Parts, spans: Sequence[str], picture: bool) -> Arrangement:
    """Places for the nodes that have an edge."""
    gutter = 150.0 if picture else 20.0 if len(spans) == 1 else 40 + pixels(spans)
    x, step, towers, columns = _across(parts, gutter)
    bow = 50.0 if len(spans) == 1 else 24.0
    y, lanes, pitch = _down(parts, len(spans), bow)
    at = {place: (x[parts.nodes[place[0]].slot], y[place]) for place in parts.used}
    radius = min(13.0, (pitch - 3) / 2, (step - 4) / 2)
    width = max(right for _, right, _ in towers)
    return Arrangement(
        width, lanes[-1], at, step, radius, bow, gutter, _TOP, towers, columns, lanes[:-1]
    )


def _across(parts: Parts, gutter: float):
    """Where every slot is, the step between them, and the extent of towers and columns."""
    nodes = [parts.nodes[i] for i, _ in parts.used]
    columns: dict[tuple[float, float], set] = {}
    for node in sorted(nodes, key=lambda node: node.slot):
        columns.setdefault(node.order, set()).add(node.slot)
    of = {node.order: node for node in nodes}
    heads = {order: _heading(node) for order, node in of.items()}
    slots = sum(len(own) for own in columns.values())
    gaps = 10 * len(columns) + 22 * len({node.tower for node in nodes})
    step = min(100.0, max(30.0, (_WIDTH - gutter - gaps) / slots))
    x, towers, labels, right = {}, [], [], gutter
    for order, own in columns.items():
        tower = of[order].tower
        if not towers or towers[-1][2] != tower:
            right += 12 if towers else 0
            towers.append((right, right, tower))
        least = pixels([tower if of[order].kind == "projector" else heads[order]]) + 8
        wide = max(step * len(own), least) + 10
        for i, slot in enumerate(sorted(own)):
            x[slot] = right + wide / 2 + (i - (len(own) - 1) / 2) * step
        labels.append((right + wide / 2, heads[order]))
        right += wide
        towers[-1] = (towers[-1][0], right, tower)
    return x, step, towers, labels


def _heading(node: Node) -> str:
    return "" if node.kind == "projector" else node.kind if node.end else str(node.layer)


def _down(parts: Parts, spans: int, bow: float):
    """The height of every node, the tops of lanes and the end of the last, and the row height."""
    stacks: dict[tuple[int, tuple], list[Place]] = {}
    for place in parts.used:
        stacks.setdefault((place[1], parts.nodes[place[0]].slot), []).append(place)
    rows, lows = [0] * spans, [0] * spans
    for (span, _), own in stacks.items():
        count = lows if parts.nodes[own[0][0]].low else rows
        count[span] = max(count[span], len(own))
    room = _HEIGHT - _TOP - 2 * (bow + 10) * spans
    pitch = min(64.0, max(29.0, room / max(1, sum(rows) + sum(lows))))
    lanes, y = [_TOP], {}
    for span in range(spans):
        above = lanes[-1] + bow + 10
        middle = above + rows[span] * pitch
        for (there, _), own in stacks.items():
            if there == span:
                low = parts.nodes[own[0][0]].low
                first = middle if low else (above + middle - len(own) * pitch) / 2
                y |= {place: first + (i + 0.5) * pitch for i, place in enumerate(own)}
        empty = not rows[span] + lows[span]
        end = lanes[-1] + 30 if empty else middle + lows[span] * pitch + bow + 10
        lanes.append(end)
    return y, lanes, pitch

"""A circuit: some edges of a graph, or some of its nodes or neurons, chosen by their scores; set
operations and exports."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from PIL import Image
from plotly.graph_objects import Figure

from mechmm.results.drawing import drawn
from mechmm.results.graph import Graph
from mechmm.results.maps import tower_maps
from mechmm.results.result import Result
from mechmm.results.units import Units, graph_of


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """Some edges of a graph, or some units: nodes, or neurons.

    Attributes:
        graph: of the whole model, or its units.
        keep: which edges or units [edge].
        scores: of all of them, NaN where they were not chosen by any [edge].
    """

    graph: Graph | Units
    keep: Bool[np.ndarray, " edge"]
    scores: Float[np.ndarray, " edge"]

    def __post_init__(self) -> None:
        if self.keep.shape != (len(self.graph),):
            raise ValueError(
                f"a circuit of {self.graph} needs one true or false for each of its "
                f"{self.graph.noun}, not an array of shape {list(self.keep.shape)}"
            )

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "graph": self.graph.plain()}

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Circuit:
        return cls(**{**values, "graph": graph_of(values["graph"])})

    @classmethod
    def named(cls, graph: Graph | Units, names: list[str] | tuple[str, ...]) -> Circuit:
        """The circuit of edges by name (`a0.h1->m2`), or of units (`a0.h1`, `m2.n17`).

        Raises:
            EdgeError: for a name that no edge or unit has.
        """
        keep = np.zeros(len(graph), dtype=bool)
        keep[graph.edges(names) if isinstance(graph, Graph) else graph.numbers(names)] = True
        return cls(graph, keep, np.full(len(graph), np.nan, dtype=np.float32))

    def __len__(self) -> int:
        """How many edges or units it has."""
        return int(self.keep.sum())

    def __repr__(self) -> str:
        share = len(self) / max(1, len(self.graph))
        return f"Circuit({len(self)} of {len(self.graph)} {self.graph.noun}, {share:.2%})"

    @property
    def names(self) -> list[str]:
        """Names of its edges or units."""
        return self.graph.names(np.flatnonzero(self.keep))

    @property
    def edges(self) -> list[str]:
        """Names of its edges; of a circuit of units, those of all edges between its nodes."""
        return self.edges_between().names

    @property
    def nodes(self) -> list[str]:
        """Names of its nodes, or of those that its edges join, each once. A node of which a neuron
        is kept counts."""
        graph, at = self.graph, np.flatnonzero(self.keep)
        if isinstance(graph, Units):
            return graph.writers["name"].iloc[np.unique(graph.src[at])].tolist()
        writers = graph.writers["name"].iloc[np.unique(graph.src[at])]
        readers = [graph.owners[reader] for reader in np.unique(graph.dst[at])]
        return list(dict.fromkeys([*writers, *readers]))

    def edges_between(self) -> Circuit:
        """The circuit of all edges between its nodes, and from them to the logits; scores are NaN.
        Of a circuit of neurons: between the nodes that they are parts of; one of edges is itself.
        """
        if isinstance(self.graph, Graph):
            return self
        graph = self.graph.graph
        keep = graph.between(self.graph.nodes(self.keep))
        return Circuit(graph, keep, np.full(len(graph), np.nan, dtype=np.float32))

    # Sets ------------------------------------------------------------------------------------

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(self.keep | self._of(other).keep)

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(self.keep & self._of(other).keep)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(self.keep & ~self._of(other).keep)

    def __invert__(self) -> Circuit:
        return self._with(~self.keep)

    def pruned(self) -> Circuit:
        """Without edges on no way from an input to the logits. A circuit of units stays as it is:
        what is kept may act through units that are not, at their reference values."""
        if isinstance(self.graph, Units):
            return self
        return self._with(self.graph.pruned(self.keep))

    def random(self, seed: int = 0) -> Circuit:
        """As many edges or units, chosen at random, the same number in every span."""
        rng, keep = np.random.default_rng(seed), np.zeros_like(self.keep)
        for span in range(len(self.graph.spans)):
            there = np.flatnonzero(self.graph.span == span)
            keep[rng.choice(there, int(self.keep[there].sum()), replace=False)] = True
        return self._with(keep)

    def overlap(self, other: Circuit, n_random: int = 100, seed: int = 0) -> pd.DataFrame:
        """Intersection over union with another circuit, in all and per span, beside that of random
        circuits of the same sizes.

        Returns:
            One row per span (`all` first): edges (nodes, neurons) of both, iou, and the mean and
            95 % quantile of the random ones.
        """
        self._of(other)
        rng, rows = np.random.default_rng(seed), []
        spans = range(len(self.graph.spans)) if self.graph.spans != ("",) else ()
        for name, there in [
            ("all", np.ones_like(self.keep)),
            *((self.graph.spans[i], self.graph.span == i) for i in spans),
        ]:
            a, b, total = self.keep & there, other.keep & there, int(there.sum())
            null = _random_overlap(rng, int(a.sum()), int(b.sum()), total, n_random)
            iou = float((a & b).sum() / max(1, (a | b).sum()))
            row = (name, int(a.sum()), int(b.sum()), iou)
            rows.append((*row, float(null.mean()), float(np.quantile(null, 0.95))))
        noun = self.graph.noun
        columns = ["span", noun, f"other_{noun}", "iou", "random_mean", "random_high"]
        return pd.DataFrame(rows, columns=columns)

    def _of(self, other: Circuit) -> Circuit:
        if not self.graph.matches(other.graph):
            raise ValueError(
                f"the circuits are of different graphs: {self.graph} and {other.graph}; compare "
                "circuits of one model, with the same spans"
            )
        return other

    def _with(self, keep: np.ndarray) -> Circuit:
        return Circuit(self.graph, keep, self.scores)

    def plot(
        self,
        picture: Image.Image | None = None,
        grid: tuple[int, ...] = (),
        title: str = "Circuit",
    ) -> Figure:
        """The circuit from picture to answer: towers from left to right, layers as columns, a lane
        per span. Width and opacity of an edge tell |score|, blue supports the answer, red opposes
        it; names and scores are shown on hover. Of a circuit of nodes: all edges between them; of
        one of neurons: a map of how many are kept, by layer and kind.

        Args:
            picture: shown at the left.
            grid: (rows, columns) of its patches.

        Raises:
            ValueError: no edges, or more than can be told apart.
        """
        if isinstance(self.graph, Units) and self.graph.granularity == "neuron":
            return self._map(title)
        own = self.edges_between()
        assert isinstance(own.graph, Graph)
        return drawn(own.graph, own.keep, own.scores, picture, grid, title)

    def _map(self, title: str) -> Figure:
        """Kept neurons by layer and kind, a map per tower."""
        graph = self.graph
        counts = np.bincount(graph.src[self.keep], minlength=len(graph.writers))
        heading = f"{title}: {len(self)} of {len(graph)} {graph.noun}"
        return tower_maps(by_layer(graph.writers, counts), heading, value_title="kept")

    # Exports ---------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge (name, writer, reader, tower, span, score) or unit (name, tower, kind,
        layer, head, neuron, span, score)."""
        at = np.flatnonzero(self.keep)
        return self.graph.table(at).assign(score=self.scores[at])

    def to_networkx(self) -> nx.MultiDiGraph:
        """A networkx graph: a node per component, an edge per kept edge with the attributes reader,
        span and score; nodes have tower, kind and layer. Keys and values that several heads share
        are a node of their own, of kind `kv`. Of a circuit of units: `edges_between`."""
        if isinstance(self.graph, Units):
            return self.edges_between().to_networkx()
        graph, found = self.graph, nx.MultiDiGraph(model=self.graph.model)
        owners = dict(zip(graph.readers["name"], graph.owners, strict=True))
        used = set(self.nodes)
        for row in [*graph.writers.itertuples(), *graph.readers.itertuples()]:
            name = owners.get(str(row.name), str(row.name))
            if name in used and name not in found:
                kind = {"q": "head", "k": "kv", "v": "kv"}.get(str(row.kind), str(row.kind))
                found.add_node(name, tower=str(row.tower), kind=kind, layer=int(row.layer))
        for row in self.to_dataframe().itertuples():
            values = {"reader": str(row.reader), "span": str(row.span), "score": float(row.score)}
            found.add_edge(str(row.writer), owners[str(row.reader)], **values)
        return found

    def to_graphml(self, file: str | Path) -> Path:
        """Write it as GraphML, which Gephi, Cytoscape and yEd open."""
        nx.write_graphml(self.to_networkx(), file)
        return Path(file)


def _random_overlap(
    rng: np.random.Generator, a: int, b: int, total: int, n: int
) -> Float[np.ndarray, " random"]:
    """Intersection over union of two random sets: their intersection is hypergeometric."""
    both = rng.hypergeometric(a, total - a, b, size=n) if total else np.zeros(n)
    return both / np.maximum(1, a + b - both)


def by_layer(
    writers: pd.DataFrame, values: Float[np.ndarray, " writer"] | Int[np.ndarray, " writer"]
) -> dict[str, tuple[np.ndarray, list[str], list[str]]]:
    """Sums over the writers of every layer and kind, by tower: (values, layers, kinds)."""
    maps = {}
    for tower, group in writers.assign(value=values).groupby("tower", sort=False):
        wide = group.pivot_table(
            index="layer", columns="kind", values="value", aggfunc="sum", sort=False
        ).sort_index(ascending=False)
        rows = ["in" if layer < 0 else str(layer) for layer in wide.index]
        maps[str(tower)] = (wide.to_numpy(float), rows, [str(kind) for kind in wide.columns])
    return maps


def chosen_edges(
    graph: Graph | Units,
    scores: Float[np.ndarray, " edge"],
    n: int | None,
    fraction: float | None,
    threshold: float | None,
    signed: bool,
    greedy: bool,
) -> Bool[np.ndarray, " edge"]:
    """The edges or units with the largest scores (arguments as `Attribution.circuit`)."""
    given = [size is not None for size in (n, fraction, threshold)]
    if sum(given) != 1:
        raise ValueError("give exactly one of n, fraction and threshold")
    value = scores if signed else np.abs(scores)
    if threshold is not None:
        n = int((value >= threshold).sum())
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; give a share of the {graph.noun} in (0, 1]")
        n = max(1, round(fraction * len(graph)))
    assert n is not None
    if not 0 <= n <= len(graph):
        raise ValueError(f"{n} {graph.noun} were asked for, of a graph with {len(graph)}")
    if greedy:
        return _greedy(_edged(graph), value, n)
    keep = np.zeros(len(graph), dtype=bool)
    keep[np.argsort(-value, kind="stable")[:n]] = True
    return keep


def _edged(graph: Graph | Units) -> Graph:
    if isinstance(graph, Units):
        raise ValueError(
            f"greedy follows edges from the logits backwards, and {graph.noun} have none; leave it "
            "out, or score edges (granularity='edge')"
        )
    return graph


def _greedy(graph: Graph, value: np.ndarray, n: int) -> np.ndarray:
    """From the logits backwards: each time the best edge into a reader that is there already."""
    keep = np.zeros(len(graph), dtype=bool)
    into = dict(zip(*_grouped(graph.dst), strict=True))
    readers_of: dict[int, list[int]] = defaultdict(list)
    for reader, writer in graph.links:
        readers_of[int(writer)].append(int(reader))
    there: set[int] = set()
    heap: list[tuple[float, int]] = []

    def enter(reader: int) -> None:
        if reader not in there:
            there.add(reader)
            for edge in into.get(reader, ()):
                heapq.heappush(heap, (-float(value[edge]), int(edge)))

    for reader in np.flatnonzero(graph.readers["kind"] == "logits"):
        enter(int(reader))
    while heap and n:
        _, edge = heapq.heappop(heap)
        keep[edge], n = True, n - 1
        for reader in readers_of[int(graph.src[edge])]:
            enter(reader)
    return keep


def _grouped(keys: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Distinct keys, and where each is."""
    order = np.argsort(keys, kind="stable")
    names, starts = np.unique(keys[order], return_index=True)
    return names.tolist(), np.split(order, starts[1:])

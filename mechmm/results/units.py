"""What is scored where that is no edges: the nodes of a graph, or single neurons.

A unit is a writer of the circuit graph (`"node"`), or a part of one (`"neuron"`): a hidden unit of
an MLP, one dimension of a head. What has no such parts (embeddings, projectors, DeepStack, mixing
layers without heads) is one unit in both.

    nodes     vision.input   vision.a0.h3   vision.m0   projector   input   a4.h1   m4
    neurons   vision.input   vision.a0.h3.d5   vision.m0.n17   projector   input   a4.h1.d5   m4.n17

Units are numbers, by tower in the order [span, unit]; names are made of them when they are asked
for. A unit of a span is what its component does at the positions of that span.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from mechmm.results.graph import EdgeError, Graph

GRANULARITIES = ("edge", "node", "neuron")
"""What a model can be cut into."""
_LETTERS = {"head": "d", "mlp": "n"}


class _Part(NamedTuple):
    """The units of one tower: its writers from `first` on, `width` units in each of some spans."""

    tower: str
    first: int
    stop: int
    width: int
    spans: tuple[int, ...]
    start: int


@dataclass(frozen=True, eq=False)
class Units:
    """Nodes or neurons of one model; `mm.graph(model, granularity="node")` makes them.

    Attributes:
        graph: the edges between the nodes.
        granularity: `"node"` or `"neuron"`.
        sizes: how many units every writer of the graph has.
        towers: numbers of the spans that each tower has.
    """

    graph: Graph
    granularity: str
    sizes: Int[np.ndarray, " writer"]
    towers: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return sum(part.width * len(part.spans) for part in self.parts)

    def __repr__(self) -> str:
        split = f" in {len(self.spans)} spans" if self.spans != ("",) else ""
        return f"Units({self.model}: {len(self)} {self.noun}{split})"

    @property
    def noun(self) -> str:
        """What is counted."""
        return f"{self.granularity}s"

    @property
    def spans(self) -> tuple[str, ...]:
        """Names; `("",)` where positions are not told apart."""
        return self.graph.spans

    @property
    def model(self) -> str:
        """The architecture that they were made for."""
        return self.graph.model

    @property
    def writers(self) -> pd.DataFrame:
        """The nodes that they are, or are parts of: name, tower, kind, layer, head."""
        return self.graph.writers

    def plain(self) -> dict[str, Any]:
        """What `Result.save` can store; `Units.of` makes the units of it again."""
        rest = {"granularity": self.granularity, "sizes": self.sizes, "towers": self.towers}
        return {"graph": self.graph.plain(), **rest}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Units:
        """The units that `plain` was made of."""
        return cls(**{**plain, "graph": Graph.of(plain["graph"])})

    def matches(self, other: Graph | Units) -> bool:
        """Whether the other ones are the same units in the same spans."""
        return (
            isinstance(other, Units)
            and self.granularity == other.granularity
            and self.towers == other.towers
            and np.array_equal(self.sizes, other.sizes)
            and self.graph.matches(other.graph)
        )

    # Units as arrays -------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """Where the units of every tower lie."""
        names, found, start = self.writers["tower"].to_numpy(), [], 0
        for tower, spans in self.towers.items():
            own = np.flatnonzero(names == tower)
            first, stop = int(own[0]), int(own[-1]) + 1
            width = int(self.sizes[first:stop].sum())
            found.append(_Part(tower, first, stop, width, spans, start))
            start += width * len(spans)
        return tuple(found)

    @cached_property
    def src(self) -> Int[np.ndarray, " unit"]:
        """The writer that every unit is, or is a part of."""
        return self._spread(lambda part, writers: writers)

    @cached_property
    def span(self) -> Int[np.ndarray, " unit"]:
        """The span of every unit."""
        spans = [np.repeat(part.spans, part.width) for part in self.parts]
        return np.concatenate(spans).astype(np.int32)

    @cached_property
    def neuron(self) -> Int[np.ndarray, " unit"]:
        """Which part of its writer every unit is; -1 where it is all of it."""
        starts = np.cumsum(self.sizes) - self.sizes

        def number(part: _Part, writers: np.ndarray) -> np.ndarray:
            own = starts[part.first] + np.arange(part.width) - starts[writers]
            return np.where(self._split[writers], own, -1)

        return self._spread(number)

    def _spread(self, of) -> Int[np.ndarray, " unit"]:
        """Numbers of the units of every tower, repeated for its spans."""
        columns = []
        for part in self.parts:
            writers = np.repeat(
                np.arange(part.first, part.stop), self.sizes[part.first : part.stop]
            )
            columns.append(np.tile(of(part, writers), len(part.spans)))
        return np.concatenate(columns).astype(np.int32)

    @cached_property
    def _split(self) -> Bool[np.ndarray, " writer"]:
        """Which writers have parts."""
        return self.sizes > 1

    def by_tower(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Values of units [..., unit] as one array per tower [..., span, unit]."""
        return {
            part.tower: values[..., part.start : part.start + part.width * len(part.spans)].reshape(
                *values.shape[:-1], len(part.spans), part.width
            )
            for part in self.parts
        }

    def nodes(self, keep: Bool[np.ndarray, " unit"]) -> Bool[np.ndarray, "writer span"]:
        """Which nodes are kept, or have a kept neuron."""
        found = np.zeros((len(self.writers), len(self.spans)), dtype=bool)
        found[self.src[keep], self.span[keep]] = True
        return found

    # Names -----------------------------------------------------------------------------------

    def names(self, numbers: Int[np.ndarray, " some"] | None = None) -> list[str]:
        """Names of some units (default: all): `a0.h1`, `m3.n17`, with spans `m3.n17 @ image`."""
        at = slice(None) if numbers is None else numbers
        nodes, kinds = (self.writers[column].to_numpy() for column in ("name", "kind"))
        rows = zip(self.src[at].tolist(), self.neuron[at].tolist(), self.span[at], strict=True)
        found = []
        for writer, neuron, span in rows:
            inside = f".{_LETTERS[kinds[writer]]}{neuron}" if neuron >= 0 else ""
            where = f" @ {self.spans[span]}" if self.spans[span] else ""
            found.append(f"{nodes[writer]}{inside}{where}")
        return found

    def table(self, numbers: Int[np.ndarray, " some"]) -> pd.DataFrame:
        """Some units as a table: name, tower, kind, layer, head and neuron (-1: none), span."""
        own = self.writers.iloc[self.src[numbers]].reset_index(drop=True)
        own = own.assign(name=self.names(numbers), neuron=self.neuron[numbers])
        return own.assign(span=np.array(self.spans)[self.span[numbers]])

    def numbers(self, names: Iterable[str]) -> Int[np.ndarray, " some"]:
        """Numbers of units by name; without a span in the name, those of all spans; of a node whose
        neurons are units, all of them.

        Raises:
            EdgeError: for a name that no unit has, with near ones.
        """
        found = [self._numbers(name) for name in names]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _numbers(self, name: str) -> Int[np.ndarray, " some"]:
        whole, _, span = name.partition(" @ ")
        writer, inside = self._place(whole)
        part = next(p for p in self.parts if p.first <= writer < p.stop)
        begin = int(self.sizes[part.first : writer].sum())
        own = begin + (np.arange(self.sizes[writer]) if inside is None else np.array([inside]))
        known = [self.spans[i] for i in part.spans]
        if span and span not in known:
            there = ", ".join(known) or "none"
            raise EdgeError(f"there is no {self.granularity} {name!r}; the spans there are {there}")
        spans = [known.index(span)] if span else range(len(known))
        return np.concatenate([part.start + i * part.width + own for i in spans])

    def _place(self, name: str) -> tuple[int, int | None]:
        """The writer of a name, and which of its parts; None: all."""
        nodes = self.writers["name"].tolist()
        if name in nodes:
            return nodes.index(name), None
        node, _, last = name.rpartition(".")
        number = re.fullmatch(r"([dn])(\d+)", last)
        if node in nodes and number is not None:
            writer = nodes.index(node)
            letter = _LETTERS.get(self.writers["kind"].iat[writer])
            if self._split[writer] and letter == number[1]:
                if int(number[2]) < self.sizes[writer]:
                    return writer, int(number[2])
                most = self.sizes[writer] - 1
                raise EdgeError(f"{node} has {letter}0..{letter}{most}, not {last}")
        near = ", ".join(get_close_matches(node or name, nodes, n=4, cutoff=0.0))
        raise EdgeError(f"there is no {self.granularity} {name!r}; nearest: {near}")


def graph_of(plain: Mapping[str, Any]) -> Graph | Units:
    """The graph or the units that `plain` was made of."""
    return Units.of(plain) if "granularity" in plain else Graph.of(plain)

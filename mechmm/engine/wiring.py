"""Which hook points write into a model's residual streams and which read them, as a graph.

A stream is followed through every tower that sees (vision, audio) up to the hidden states that the
language model is given, and through the language model. What lies between them (projector,
Q-Former, resampler, patch merger) is one node: it reads the end of one stream and writes, at the
positions of the picture, into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmm.engine.sites import SEEING
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower
from mechmm.results.graph import REST, Block, Graph, table_of

Row = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Group:
    """Writers that one hook gives, or readers whose gradients one place gives.

    Attributes:
        tower: name in `model.towers`.
        kind: writers: `input`, `projector`, `heads`, `attn`, `mlp`, `deepstack`; readers: `heads`
            (queries, keys and values), `queries` and `states` (of cross-attention), `attn`, `mlp`,
            `hidden` (what a projector reads), `logits`.
        layer: -1 in front of the blocks; of `hidden`: which hidden state.
        part: `attn` or `cross_attn`.
        nodes: (first, number of the one behind the last) in the graph's writers or readers.
    """

    tower: str
    kind: str
    layer: int
    nodes: tuple[int, int]
    part: str = "attn"


@dataclass(frozen=True, eq=False)
class Wiring:
    """A graph and where its nodes are in the model.

    Attributes:
        writers: groups in the order in which they run.
        readers: groups, one for each of the graph's blocks.
    """

    graph: Graph
    writers: tuple[Group, ...]
    readers: tuple[Group, ...]

    def before(self, number: int) -> list[Group]:
        """The groups of writers that the readers of a block see."""
        start, stop = self.graph.blocks[number].writers
        return [g for g in self.writers if start <= g.nodes[0] and g.nodes[1] <= stop]


class StreamError(ValueError):
    """The residual stream of a model is no sum of what its components write."""


def streams(model: HookedMultimodal) -> list[str]:
    """Names of the towers whose residual stream is a sum, in the order in which they run.

    Raises:
        StreamError: where that of the tower which answers is none.
    """
    names = list(model.towers)
    main = LANGUAGE if LANGUAGE in names else names[0]
    row = model.towers[main].row
    if row.post_norm or model.config.is_encoder_decoder:
        why = "norms its residual stream" if row.post_norm else "is fed by an encoder"
        raise StreamError(
            f"{model.family.architecture}: the tower {main!r} {why} at every block, so that it is "
            "no sum of what its components write, and has no edges; patch its sites with mm.patch"
        )
    found = [name for name in names if name in (*SEEING, main, "text")]
    return [name for name in found if not _mixed(model.towers[name])]


def _mixed(tower: Tower) -> bool:
    """Whether a stream is normed at every block, or changes its positions on the way."""
    return tower.row.post_norm or tower.row.stream_layout is not None


def wired(model: HookedMultimodal, spans: Sequence[str] = ()) -> Wiring:
    """The circuit graph of a model.

    Args:
        spans: names that tell positions apart; each position belongs to the first that covers it,
            and to `rest` where none does.

    Raises:
        StreamError: see `streams`.
    """
    return _Builder(model, tuple(spans)).built()


class _Builder:
    """Collects nodes and blocks in the order in which they run."""

    def __init__(self, model: HookedMultimodal, spans: tuple[str, ...]) -> None:
        self.model, self.streams = model, streams(model)
        self.spans = (*spans, REST) if spans else ("",)
        self.writers: list[Row] = []
        self.readers: list[Row] = []
        self.links: list[tuple[int, int]] = []
        self.blocks: list[Block] = []
        self.groups: tuple[list[Group], list[Group]] = ([], [])
        self.tower, self.prefix, self.start = "", "", 0
        self.onward: list[tuple[int, str]] = []

    def built(self) -> Wiring:
        for name in self.streams:
            self._stream(name)
        graph = Graph(
            table_of(self.writers),
            table_of(self.readers),
            tuple(self.blocks),
            np.array(self.links, dtype=np.int32).reshape(-1, 2),
            self.spans,
            self.model.family.architecture,
        )
        return Wiring(graph, *map(tuple, self.groups))

    def _stream(self, name: str) -> None:
        tower = self.model.towers[name]
        self.tower, self.prefix, self.start = name, tower.prefix, len(self.writers)
        answers = name not in SEEING or self.model.family.unembed is None
        reads = (len(tower.blocks),) if answers else self._reads(tower)
        if name == LANGUAGE and any(s in SEEING for s in self.model.family.towers):
            self._projector()
        self._write("input", -1, [(f"{self.prefix}input", "input", -1)])
        deep = self.model.family.deepstack(self.model.config) if name == LANGUAGE else 0
        for layer in range(max(reads)):
            self._block(tower, layer)
            if layer < deep:
                self._deepstack(layer)
            if not answers and layer + 1 in reads[:-1]:
                self._hidden(layer + 1, reads)
        if answers:
            row = (f"{self.prefix}logits", "logits", -1)
            self._read("logits", max(reads) - 1, [row])
        else:
            self._hidden(max(reads), reads)

    def _reads(self, tower: Tower) -> tuple[int, ...]:
        reads = self.model.family.reads(self.model.config) or (len(tower.blocks),)
        return tuple(sorted(reads))

    def _projector(self) -> None:
        """What the language model is given of the picture. In cross-attention models it is not
        part of the stream."""
        first = self._write("projector", -1, [("projector", "projector", -1)])
        self.links += [(reader, first) for reader, kind in self.onward if kind == "projector"]
        self.crossing = first
        if self.model.family.resume == "cross":
            self.start = first + 1

    def _hidden(self, hidden: int, reads: tuple[int, ...]) -> None:
        """A hidden state that something behind this tower reads."""
        deep = self.model.family.deepstack(self.model.config)
        number = reads.index(hidden)
        kind = "deepstack" if number < deep else "projector"
        name = f"deepstack{number}" if number < deep else "projector"
        if number >= deep and len(reads) - deep > 1:
            name += f"<{hidden}>"
        if self.tower != self.streams[0]:
            name = f"{self.prefix}{name}"
        first = self._read("hidden", hidden, [(name, kind, -1)])
        self.onward.append((first, kind))

    def _deepstack(self, layer: int) -> None:
        first = self._write("deepstack", layer, [(f"deepstack{layer}", "deepstack", -1)])
        self.links += [
            (reader, first)
            for reader, kind in self.onward
            if kind == "deepstack" and self.readers[reader][0] == f"deepstack{layer}"
        ]

    def _block(self, tower: Tower, layer: int) -> None:
        row = tower.row
        before = len(self.writers)
        if row.attn is not None and tower.module(row.attn, layer) is not None:
            self._attention(tower, layer)
        elif tower.first(layer, row.attn_out) is not None:
            self._whole(layer)
        if tower.module(row.cross_attn, layer) is not None:
            self._cross(tower, layer)
        parallel = tower.module(row.ln2, layer) is None and row.mid is None
        readers = [(f"{self.prefix}m{layer}", "mlp", -1)]
        seen = before if parallel else len(self.writers)
        first = self._read("mlp", layer, readers, stop=seen)
        writer = self._write("mlp", layer, readers)
        self.links.append((first, writer))

    def _attention(self, tower: Tower, layer: int) -> None:
        heads, groups = tower.heads(layer), key_value_heads(tower, layer)
        rows = [(f"{self.prefix}a{layer}.h{h}<q>", "q", h) for h in range(heads)]
        for letter in "kv":
            rows += [(f"{self.prefix}a{layer}.h{h}<{letter}>", letter, h) for h in range(groups)]
        first = self._read("heads", layer, rows)
        self._heads(layer, heads, "a", "attn", [first, first + heads, first + heads + groups])

    def _cross(self, tower: Tower, layer: int) -> None:
        heads, groups = tower.heads(layer), key_value_heads(tower, layer, "cross_")
        queries = [(f"{self.prefix}c{layer}.h{h}<q>", "q", h) for h in range(heads)]
        first = self._read("queries", layer, queries, part="cross_attn")
        rows = [
            (f"{self.prefix}c{layer}.h{h}<{letter}>", letter, h)
            for letter in "kv"
            for h in range(groups)
        ]
        states = self._read("states", layer, rows, part="cross_attn")
        self._heads(layer, heads, "c", "cross_attn", [first, states, states + groups])

    def _heads(self, layer: int, heads: int, letter: str, part: str, readers: list[int]) -> None:
        """The writers of an attention layer, linked to the first of their queries, keys, values."""
        rows = [(f"{self.prefix}{letter}{layer}.h{h}", "head", h) for h in range(heads)]
        first = self._write("heads", layer, rows, part)
        groups = readers[2] - readers[1]
        for h in range(heads):
            own = (h, h * groups // heads, h * groups // heads)
            self.links += [(r + i, first + h) for r, i in zip(readers, own, strict=True)]

    def _whole(self, layer: int) -> None:
        row = (f"{self.prefix}a{layer}", "attn", -1)
        first = self._read("attn", layer, [row])
        self.links.append((first, self._write("attn", layer, [row])))

    def _write(
        self, kind: str, layer: int, rows: list[tuple[str, str, int]], part: str = "attn"
    ) -> int:
        first = len(self.writers)
        self.writers += [(name, self.tower, of, layer, head) for name, of, head in rows]
        group = Group(self.tower, kind, layer, (first, len(self.writers)), part)
        self.groups[0].append(group)
        return first

    def _read(
        self,
        kind: str,
        layer: int,
        rows: list[tuple[str, str, int]],
        *,
        stop: int | None = None,
        part: str = "attn",
    ) -> int:
        first = len(self.readers)
        self.readers += [(name, self.tower, of, layer, head) for name, of, head in rows]
        nodes = (first, len(self.readers))
        self.groups[1].append(Group(self.tower, kind, layer, nodes, part))
        seen = (self.start, len(self.writers) if stop is None else stop)
        if kind == "states":
            seen = (self.crossing, self.crossing + 1)
        spans = tuple(range(len(self.spans))) if kind != "states" else (len(self.spans) - 1,)
        self.blocks.append(Block(self.tower, layer, seen, nodes, spans))
        return first


def key_value_heads(tower: Tower, layer: int, prefix: str = "") -> int:
    """Key-value heads of a block's attention."""
    keys = tower.linear(layer, f"{prefix}k")
    return tower.heads(layer) if keys is None else keys.out_features // tower.d_head(layer)

"""The circuit graph of a model: what writes into its residual streams, and what reads them.

A writer adds a value to the residual stream of its tower; a reader takes the sum of all that was
added before it. So there is an edge from every writer to every reader behind it in its tower:

    writers   vision.input   vision.a0.h3   vision.m0   projector   input   a4.h1   m4
    readers   vision.a0.h3<q> <k> <v>       vision.m0   projector   a4.h1<q> <k> <v>   m4   logits
    edges     vision.a0.h3->vision.m2       vision.m2->projector    projector->a4.h1<k>

`<k>` and `<v>` count key-value heads. What a component reads becomes what it writes: those links
are inside a node, and no edges. A graph with spans has every node once per span, and every edge
once per span that its tower has: an edge joins what is written and what is read at one position.

Nodes are tables, edges are numbers: they lie in blocks, one per group of readers that sees the same
writers, in the order [span, writer, reader]. So a model with millions of edges is a few hundred
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

WRITERS = ("input", "projector", "head", "attn", "mlp", "deepstack")
"""Kinds of writers; `attn` is a mixing layer without heads."""
READERS = ("q", "k", "v", "attn", "mlp", "projector", "deepstack", "logits")
"""Kinds of readers."""
STAYS = ("q", "mlp", "logits")
"""Kinds of readers whose component writes at the position that they read; others move."""
REST = "rest"
"""The span of positions that no other covers."""
COLUMNS = ("name", "tower", "kind", "layer", "head")


class EdgeError(KeyError):
    """A graph has no such edge or node."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Block:
    """Readers that see the same writers.

    Attributes:
        tower: whose stream it is.
        layer: of the readers; -1 for those behind the last block.
        writers, readers: (first, number of the one behind the last) in the graph's tables.
        spans: numbers of the spans that the tower has.
    """

    tower: str
    layer: int
    writers: tuple[int, int]
    readers: tuple[int, int]
    spans: tuple[int, ...] = (0,)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(spans, writers, readers)."""
        sizes = (stop - start for start, stop in (self.writers, self.readers))
        return len(self.spans), *sizes  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """Edges."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes and edges of one model; `mm.graph(model)` makes it.

    Attributes:
        writers, readers: tables with the columns name, tower, kind, layer (-1: none) and head (-1:
            none; of `k` and `v`: the key-value head), in the order in which they run.
        blocks: the edges.
        links: which writer a reader belongs to: (reader, writer) numbers.
        spans: names; `("",)` where positions are not told apart.
        model: the architecture that it was made for.
    """

    writers: pd.DataFrame
    readers: pd.DataFrame
    blocks: tuple[Block, ...]
    links: Int[np.ndarray, "link two"]
    spans: tuple[str, ...] = ("",)
    model: str = ""

    def __len__(self) -> int:
        """Edges."""
        return int(self.starts[-1])

    def __repr__(self) -> str:
        split = f" in {len(self.spans)} spans" if self.spans != ("",) else ""
        nodes = f"{len(self.writers)} writers, {len(self.readers)} readers"
        return f"Graph({self.model}: {nodes}, {len(self)} edges{split})"

    @property
    def noun(self) -> str:
        """What is counted."""
        return "edges"

    def plain(self) -> dict[str, Any]:
        """What `Result.save` can store; `Graph.of` makes the graph of it again."""
        blocks = [(b.tower, b.layer, b.writers, b.readers, b.spans) for b in self.blocks]
        return {
            "writers": self.writers,
            "readers": self.readers,
            "blocks": tuple(blocks),
            "links": self.links,
            "spans": self.spans,
            "model": self.model,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Graph:
        """The graph that `plain` was made of."""
        blocks = tuple(Block(*block) for block in plain["blocks"])
        return cls(**{**plain, "blocks": blocks})

    def matches(self, other: Any) -> bool:
        """Whether the other is a graph too, with the same nodes, edges and spans."""
        return (
            isinstance(other, Graph)
            and self.blocks == other.blocks
            and self.spans == other.spans
            and self.writers["name"].equals(other.writers["name"])
            and self.readers["name"].equals(other.readers["name"])
        )

    # Edges as arrays -------------------------------------------------------------------------

    @cached_property
    def starts(self) -> Int[np.ndarray, " block_plus_one"]:
        """The number of the first edge of every block, and at the end that of all edges."""
        return np.cumsum([0, *(block.size for block in self.blocks)])

    @cached_property
    def src(self) -> Int[np.ndarray, " edge"]:
        """The writer of every edge."""
        return self._spread(lambda b: np.arange(*b.writers, dtype=np.int32)[None, :, None])

    @cached_property
    def dst(self) -> Int[np.ndarray, " edge"]:
        """The reader of every edge."""
        return self._spread(lambda b: np.arange(*b.readers, dtype=np.int32)[None, None, :])

    @cached_property
    def span(self) -> Int[np.ndarray, " edge"]:
        """The span of every edge."""
        return self._spread(lambda b: np.array(b.spans, dtype=np.int32)[:, None, None])

    def _spread(self, of) -> np.ndarray:
        parts = [np.broadcast_to(of(block), block.shape).ravel() for block in self.blocks]
        return np.concatenate(parts)

    def by_block(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of edges [..., edge] as one array per block [..., span, writer, reader]."""
        parts = np.split(values, self.starts[1:-1], axis=-1)
        return [
            part.reshape(*values.shape[:-1], *block.shape)
            for part, block in zip(parts, self.blocks, strict=True)
        ]

    # Names -----------------------------------------------------------------------------------

    def names(self, edges: Int[np.ndarray, " some"] | None = None) -> list[str]:
        """Names of some edges (default: all): `a0.h1->m2`, with spans `a0.h1->m2 @ image`."""
        at = slice(None) if edges is None else edges
        writers, readers = self.writers["name"].to_numpy(), self.readers["name"].to_numpy()
        spans = self.span[at].tolist()
        ends = zip(writers[self.src[at]], readers[self.dst[at]], spans, strict=True)
        return [f"{a}->{b}{self._at(span)}" for a, b, span in ends]

    def table(self, edges: Int[np.ndarray, " some"]) -> pd.DataFrame:
        """Some edges as a table: name, writer, reader, tower, span."""
        writers, src = self.writers, self.src[edges]
        return pd.DataFrame(
            {
                "edge": self.names(edges),
                "writer": writers["name"].to_numpy()[src],
                "reader": self.readers["name"].to_numpy()[self.dst[edges]],
                "tower": writers["tower"].to_numpy()[src],
                "span": np.array(self.spans)[self.span[edges]],
            }
        )

    def _at(self, span: int) -> str:
        return f" @ {self.spans[span]}" if self.spans[span] else ""

    def edges(self, names: Iterable[str]) -> Int[np.ndarray, " some"]:
        """Numbers of edges by name; without a span in the name, those of all spans.

        Raises:
            EdgeError: for a name that no edge has, with near ones.
        """
        found = [self._edges(name) for name in names]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _edges(self, name: str) -> Int[np.ndarray, " some"]:
        ends, _, span = name.partition(" @ ")
        writer, arrow, reader = ends.partition("->")
        if not arrow:
            raise EdgeError(f"{name!r} is no edge; write it as 'a0.h1->m2'")
        u = _number(self._writer_numbers, writer, "writer")
        v = _number(self._reader_numbers, reader, "reader")
        block, start = self._block_of(v)
        if not block.writers[0] <= u < block.writers[1]:
            raise EdgeError(
                f"there is no edge {ends}: {writer} does not write into what {reader} reads, or "
                "not before it"
            )
        spans, writers, readers = block.shape
        at = start + (u - block.writers[0]) * readers + v - block.readers[0]
        every = at + np.arange(spans) * writers * readers
        if not span:
            return every
        if span not in self.spans or self.spans.index(span) not in block.spans:
            there = ", ".join(self.spans[i] for i in block.spans)
            raise EdgeError(f"there is no edge {name!r}; the spans of {reader} are {there}")
        return every[[block.spans.index(self.spans.index(span))]]

    def _block_of(self, reader: int) -> tuple[Block, int]:
        for block, start in zip(self.blocks, self.starts[:-1], strict=True):
            if block.readers[0] <= reader < block.readers[1]:
                return block, int(start)
        raise EdgeError(f"reader {reader} has no edges")

    @cached_property
    def feeds(self) -> dict[int, list[int]]:
        """The writers that every linked reader belongs to."""
        found: dict[int, list[int]] = {}
        for reader, writer in self.links.tolist():
            found.setdefault(reader, []).append(writer)
        return found

    @cached_property
    def owners(self) -> list[str]:
        """The node that every reader belongs to: the writer that it is linked to, or itself; keys
        and values that several heads share are a node of their own, `a1.kv0`."""
        writers, found = self.writers["name"].tolist(), []
        for number, name in enumerate(self.readers["name"]):
            own = self.feeds.get(number, [])
            shared = name.partition("<")[0].replace(".h", ".kv")
            found.append(writers[own[0]] if len(own) == 1 else shared)
        return found

    @cached_property
    def _writer_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers["name"])}

    @cached_property
    def _reader_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.readers["name"])}

    # Ways from input to logits ---------------------------------------------------------------

    def pruned(self, keep: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """The kept edges that lie on a way from an input to the logits, over kept edges alone."""
        return keep & self.joining(keep)

    def joining(self, keep: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """The edges, kept or not, from a writer that kept edges reach from an input to a reader
        from which they go on to the logits."""
        fed, used = self._fed(keep), self._used(keep)
        parts = []
        for block in self.blocks:
            there = fed[slice(*block.writers)][:, block.spans].T
            onward = used[slice(*block.readers)][:, block.spans].T
            parts.append((there[:, :, None] & onward[:, None, :]).ravel())
        return np.concatenate(parts)

    def between(self, nodes: Bool[np.ndarray, "writer span"]) -> Bool[np.ndarray, " edge"]:
        """The edges from some nodes to these nodes, or to the logits."""
        into = np.zeros((len(self.readers), len(self.spans)), dtype=bool)
        into[self.readers["kind"].to_numpy() == "logits"] = True
        for reader, writer in self.links.tolist():
            into[reader] |= self._through(reader, nodes[writer])
        parts = []
        for block in self.blocks:
            out = nodes[slice(*block.writers)][:, block.spans].T
            back = into[slice(*block.readers)][:, block.spans].T
            parts.append((out[:, :, None] & back[:, None, :]).ravel())
        return np.concatenate(parts)

    def _fed(self, keep: np.ndarray) -> Bool[np.ndarray, "writer span"]:
        """Which writers are reached from an input."""
        fed = np.zeros((len(self.writers), len(self.spans)), dtype=bool)
        fed[self.writers["kind"].to_numpy() == "input"] = True
        for block, part in zip(self.blocks, self.by_block(keep), strict=True):
            there = fed[slice(*block.writers)][:, block.spans].T
            read = np.zeros((len(self.spans), block.shape[2]), dtype=bool)
            read[list(block.spans)] = (part & there[:, :, None]).any(1)
            for reader, writer in self._links_of(block):
                fed[writer] |= self._through(reader, read[:, reader - block.readers[0]])
        return fed

    def _used(self, keep: np.ndarray) -> Bool[np.ndarray, "reader span"]:
        """Which readers have a way on to the logits."""
        wanted = np.zeros((len(self.writers), len(self.spans)), dtype=bool)
        used = np.zeros((len(self.readers), len(self.spans)), dtype=bool)
        used[self.readers["kind"].to_numpy() == "logits"] = True
        for block, part in reversed(list(zip(self.blocks, self.by_block(keep), strict=True))):
            for reader, writer in self._links_of(block):
                used[reader] |= self._through(reader, wanted[writer])
            onward = used[slice(*block.readers)][:, block.spans].T
            there = (part & onward[:, None, :]).any(2).T
            wanted[np.ix_(range(*block.writers), block.spans)] |= there
        return used

    def _links_of(self, block: Block) -> list[tuple[int, int]]:
        own = (self.links[:, 0] >= block.readers[0]) & (self.links[:, 0] < block.readers[1])
        return [(int(reader), int(writer)) for reader, writer in self.links[own]]

    def _through(self, reader: int, spans: Bool[np.ndarray, " span"]) -> Bool[np.ndarray, " span"]:
        """Spans at the other end of a link: attention and projectors move between positions."""
        stays = self.readers["kind"].iat[reader] in STAYS
        return spans if stays else np.full_like(spans, spans.any())


def _number(numbers: dict[str, int], name: str, what: str) -> int:
    if name not in numbers:
        near = ", ".join(get_close_matches(name, numbers, n=4, cutoff=0.0))
        raise EdgeError(f"there is no {what} {name!r}; nearest: {near}")
    return numbers[name]


def table_of(rows: Sequence[tuple[str, str, str, int, int]]) -> pd.DataFrame:
    """A table of writers or readers from rows in the order of `COLUMNS`."""
    return pd.DataFrame(rows, columns=list(COLUMNS))

"""Edge scores: what a writer's change would do to the metric through one reader alone.

    score(u -> v) = sum over positions and d_model of (u_clean - u_corrupt) * dm/dx_v

For each chunk of positions the changes of all writers, and the slopes of one bundle of readers
after the other, are laid out at the width of the stream and multiplied: readers of several layers
at once, since narrow products are slow. So memory does not grow with the length of prompts, and
neither heads nor edges are looped over; nor are positions, where each is a span of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.readers import Reader
from mechmm.engine.spans import Places
from mechmm.engine.wiring import Wiring
from mechmm.engine.writers import At, Values, Writer
from mechmm.results.graph import Block

LAID_OUT = 2**23
"""How many numbers the changes in a chunk of positions may take."""
FEWEST = 32
"""Positions of a chunk, at least: fewer at once are slow."""
JOINED = 64
"""Readers of a bundle, at least."""


@torch.no_grad()
def edge_scores(
    wiring: Wiring,
    writers: Sequence[Writer],
    readers: Sequence[Reader],
    clean: Values,
    corrupt: Values,
    places: Places,
) -> Float[Tensor, "example edge"]:
    """The score of every edge for every example of a batch.

    Args:
        clean, corrupt: values of the hooks of the writers, in both runs.
    """
    blocks = wiring.graph.blocks
    examples = len(next(iter(places.values())))
    scores = torch.zeros(examples, len(wiring.graph))
    parts = scores.split([block.size for block in blocks], dim=1)
    slots = [
        _Slot(block, reader, part.unflatten(1, block.shape))
        for block, reader, part in zip(blocks, readers, parts, strict=True)
        if reader.runs
    ]
    for slot in slots:
        if slot.reader.group.kind == "states":
            slot.sums[:, 0, 0] = slot.reader.of_states(clean, corrupt, examples).cpu()
    for tower, spread in places.items():
        there = [w for w in writers if w.group.tower == tower and w.hooks[0] in clean]
        own = [s for s in slots if s.block.tower == tower and s.reader.group.kind != "states"]
        if there and own:
            _add(_Stream(there, clean, corrupt), own, spread)
    return scores


@dataclass(frozen=True, eq=False)
class _Slot:
    """The readers of a block, and their scores [example, span, writer, reader]."""

    block: Block
    reader: Reader
    sums: Tensor


class _Stream:
    """What was written into the stream of a tower.

    Attributes:
        first, count: number of the first writer, and how many there are from it on.
    """

    def __init__(self, writers: Sequence[Writer], clean: Values, corrupt: Values) -> None:
        self.writers, self.runs = writers, (clean, corrupt)
        self.first = writers[0].group.nodes[0]
        self.count = writers[-1].group.nodes[1] - self.first
        self.like = clean[f"{writers[0].tower.prefix}blocks.0.hook_resid_pre"]

    def empty(self, each: int, places: int) -> Float[Tensor, "each place d_model"]:
        """Room at the width of the stream."""
        return torch.empty(each, places, self.like.shape[-1], device=self.like.device)

    def change(self, at: At, out: Float[Tensor, "writer place d_model"]) -> None:
        """The changes of all writers at some places."""
        for writer in self.writers:
            start, stop = (node - self.first for node in writer.group.nodes)
            writer.change(*self.runs, at, out[start:stop])


def _add(stream: _Stream, slots: Sequence[_Slot], spread: list[list[np.ndarray]]) -> None:
    """Add the scores of all readers of a stream."""
    bundles = list(_bundles(slots))
    size = max(FEWEST, LAID_OUT // (stream.count * stream.like.shape[-1]))
    chunks = list(_chunks(spread, size))
    size = max((len(chunk) for chunk in chunks), default=0)
    changes = stream.empty(stream.count, size)
    slopes = stream.empty(max(bundle.width for bundle in bundles), size)
    for chunk in chunks:
        stream.change(chunk.at, changes[:, : len(chunk)])
        for bundle in bundles:
            bundle.lay_out(chunk.at, slopes[: bundle.width, : len(chunk)])
            bundle.add(chunk, changes, slopes[: bundle.width], stream.first)


@dataclass(frozen=True, eq=False)
class _Bundle:
    """Neighbouring readers, whose scores are computed at once."""

    slots: Sequence[_Slot]

    @property
    def width(self) -> int:
        """How many readers."""
        return sum(slot.block.shape[2] for slot in self.slots)

    def lay_out(self, at: At, out: Float[Tensor, "reader place d_model"]) -> None:
        """The slopes at some places."""
        widths = [slot.block.shape[2] for slot in self.slots]
        for slot, part in zip(self.slots, out.split(widths), strict=True):
            slot.reader.at(at, part)

    def add(self, chunk: _Chunk, changes: Tensor, slopes: Tensor, first: int) -> None:
        """Add the scores of a chunk, the changes being those of writers from `first` on."""
        starts, stops = zip(*(slot.block.writers for slot in self.slots), strict=True)
        low, high = max(first, min(starts)), min(first + len(changes), max(stops))
        if low >= high:
            return
        for cell, scores in chunk.products(changes[low - first : high - first], slopes):
            parts = scores.split([slot.block.shape[2] for slot in self.slots], dim=-1)
            for slot, part in zip(self.slots, parts, strict=True):
                start, stop = max(slot.block.writers[0], low), min(slot.block.writers[1], high)
                rows = slice(start - slot.block.writers[0], stop - slot.block.writers[0])
                if start < stop:
                    slot.sums[(*cell, rows)] += part[..., start - low : stop - low, :]


def _bundles(slots: Sequence[_Slot]) -> Iterator[_Bundle]:
    found: list[_Slot] = []
    for slot in slots:
        found.append(slot)
        if _Bundle(found).width >= JOINED:
            yield _Bundle(found)
            found = []
    if found:
        yield _Bundle(found)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some places of a stream.

    Attributes:
        cells: (example, span) of every place, in which equal ones are neighbours.
    """

    at: At
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def products(
        self, changes: Float[Tensor, "writer room d_model"], slopes: Tensor
    ) -> Iterator[tuple[tuple, Tensor]]:
        """Scores [writer, reader] by cell; [cell, writer, reader] for all at once where each place
        is a cell of its own."""
        starts = np.flatnonzero(np.diff(self.cells, axis=0, prepend=-1).any(1))
        if len(starts) == len(self) > 1:
            parts = changes[:, : len(self)].transpose(0, 1), slopes[:, : len(self)].permute(1, 2, 0)
            yield tuple(torch.from_numpy(self.cells.T)), torch.bmm(*parts).cpu()
            return
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            parts = changes[:, start:stop].flatten(1), slopes[:, start:stop].flatten(1).T
            yield tuple(self.cells[start].tolist()), torch.mm(*parts).cpu()


def _chunks(spread: list[list[np.ndarray]], size: int) -> Iterator[_Chunk]:
    """The places of all examples and spans, some at a time."""
    cells = [(e, s, at) for e, parts in enumerate(spread) for s, at in enumerate(parts) if len(at)]
    if not cells:
        return
    every = np.concatenate([at for _, _, at in cells])
    owners = np.concatenate([np.tile([e, s], (len(at), 1)) for e, s, at in cells])
    size = -(-len(every) // -(-len(every) // size))  # as many chunks, of one size
    for start in range(0, len(every), size):
        part = slice(start, start + size)
        yield _Chunk(_at(every[part]), owners[part])


def _at(places: np.ndarray) -> At:
    """An index of some places; of neighbours one that takes no copy."""
    row, first = places[0].tolist()
    if (places[:, 0] == row).all() and (np.diff(places[:, 1]) == 1).all():
        return row, slice(first, first + len(places))
    rows, positions = torch.from_numpy(places.T.copy())
    return rows, positions

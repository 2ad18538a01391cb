"""What every writer changed between a clean run and its reference, and where it changed anything.

Changes are computed anew for every few writers that are wanted: all of them together would take as
many streams as there are writers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmm.engine.contrast import Contrast
from mechmm.engine.places import Ints
from mechmm.engine.writers import At, Writer

TOGETHER = 256
"""Places that are compared at once."""


@dataclass(frozen=True, eq=False)
class Spread:
    """The places of one tower.

    Attributes:
        row, position, example, span: [place].
        moved: whether each writer of the graph changed there [writer, place].
    """

    row: Ints
    position: Ints
    example: Ints
    span: Ints
    moved: Bool[np.ndarray, "writer place"]

    def live(self, writers: Ints, span: int, examples: int) -> Bool[np.ndarray, "writer example"]:
        """Which of some writers changed anything in one span of each example."""
        found = np.zeros((len(writers), examples), dtype=bool)
        own = np.flatnonzero(self.span == span)
        for example in range(examples):
            at = own[self.example[own] == example]
            found[:, example] = self.moved[np.ix_(writers, at)].any(1)
        return found


class Changes:
    """The changes of all writers of one contrast."""

    def __init__(self, contrast: Contrast) -> None:
        self.clean, self.reference = contrast.changes()
        self.count = len(contrast.wiring.graph.writers)
        self.writers = [w for w in contrast.writers if w.hooks[0] in self.clean]
        self.spread = {
            tower: self._spread(tower, examples) for tower, examples in contrast.places.items()
        }

    def of(self, tower: str, writers: Ints, at: At) -> Float[Tensor, "writer place d_model"]:
        """The changes of some writers of a tower at some places."""
        total: Tensor | None = None
        for writer in self._of(tower):
            first, stop = writer.group.nodes
            own = np.flatnonzero((writers >= first) & (writers < stop))
            if not len(own):
                continue
            change = writer.change(self.clean, self.reference, at)
            if total is None:
                total = change.new_zeros(len(writers), *change.shape[1:])
            numbers = torch.as_tensor(writers[own] - first, device=change.device)
            total[torch.as_tensor(own, device=change.device)] = change[numbers]
        assert total is not None
        return total

    def _of(self, tower: str) -> list[Writer]:
        return [writer for writer in self.writers if writer.group.tower == tower]

    def _spread(self, tower: str, examples: list[list[np.ndarray]]) -> Spread:
        where = [part for parts in examples for part in parts]
        counts = [len(part) for part in where]
        spans = len(examples[0])
        row, position = np.concatenate([np.zeros((0, 2), np.int64), *where]).T
        example, span = np.divmod(np.repeat(np.arange(len(where)), counts), spans)
        moved = np.zeros((self.count, len(row)), dtype=bool)
        for first in range(0, len(row), TOGETHER):
            some = slice(first, first + TOGETHER)
            at = (torch.as_tensor(row[some].copy()), torch.as_tensor(position[some].copy()))
            for writer in self._of(tower):
                change = writer.change(self.clean, self.reference, at)
                moved[slice(*writer.group.nodes), some] = (change != 0).any(-1).cpu().numpy()
        return Spread(row, position, example, span, moved)

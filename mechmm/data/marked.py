"""Pairs with spans that were computed: chosen positions of every pair, instead of named places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.model.layout import TokenLayout

Positions = Sequence[Sequence[int]]
"""Some positions of every pair, counted from the first token of its prompt that is not padding."""


class MarkedPairs(PairDataset):
    """The same pairs; the layouts of their batches have more spans, which may overlap others."""

    def __init__(self, pairs: PairDataset, marks: Mapping[str, Positions]) -> None:
        """Mark positions of pairs, which are not checked again.

        Args:
            marks: by name of the new span, its positions by pair.

        Raises:
            ValueError: another number of entries than pairs.
        """
        self.pairs, self.model, self.marks = pairs.pairs, pairs.model, dict(marks)
        for name, positions in self.marks.items():
            if len(positions) != len(pairs):
                raise ValueError(
                    f"span {name!r} has positions of {len(positions)} pairs, but there are "
                    f"{len(pairs)}; give some (or none, []) for each"
                )

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """As `PairDataset.batch`, with the new spans."""
        found = super().batch(numbers)
        clean, corrupt = (
            batch.with_layout(self._marked(batch.layout, numbers))
            for batch in (found.clean, found.corrupt)
        )
        return replace(found, clean=clean, corrupt=corrupt)

    def _part(self, numbers: Sequence[int]) -> PairDataset:
        marks = {name: [each[number] for number in numbers] for name, each in self.marks.items()}
        return MarkedPairs(super()._part(numbers), marks)

    def _marked(self, layout: TokenLayout, numbers: Sequence[int]) -> TokenLayout:
        first = layout.mask("all").long().argmax(1)
        masks = {name: torch.zeros(layout.shape, dtype=torch.bool) for name in self.marks}
        for name, positions in self.marks.items():
            for row, number in enumerate(numbers):
                masks[name][row, first[row] + torch.tensor(positions[number], dtype=torch.long)] = 1
        return replace(layout, defined={**layout.defined, **masks})

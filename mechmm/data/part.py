"""Parts of a dataset on which results are what they are on the whole.

A run that goes through its pairs in parts must find what one pass finds. So a part has every span
of the whole, counts its pairs as the whole does where something random is drawn for each pair, and
takes from the first pair of the whole what is taken from a first pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechmm.data.pairs import Pair, PairBatch, PairDataset
from mechmm.model.hooked import HookedMultimodal


class Part(PairDataset):
    """Some neighbouring pairs of a dataset, which need no second check."""

    def __init__(self, whole: PairDataset, start: int, size: int) -> None:
        """The pairs from number `start` on, `size` or as many as there are.

        Raises:
            PairError: there are none.
        """
        part = whole[start : start + size]
        self.pairs, self.model = part.pairs, part.model
        self.source, self.start = whole, start

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of all spans of the whole."""
        return self.source.spans

    @property
    def first(self) -> PairBatch:
        """The first pair of the whole."""
        return self.source.first

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """As `PairDataset.batch`; numbers are those of the part."""
        whole = tuple(self.start + number for number in numbers)
        return replace(super().batch(numbers), whole=whole)


@dataclass(frozen=True)
class Message:
    """A part as it travels to another process: its pairs, and of the whole what a part needs.

    Attributes:
        pairs: of the part. start: number of the first one in the whole.
        first: the first pair of the whole. spans: of the whole.
    """

    pairs: tuple[Pair, ...]
    start: int
    first: Pair
    spans: tuple[str, ...]

    @classmethod
    def of(cls, pairs: PairDataset) -> Message:
        """A part, or a whole, without its model."""
        (first,) = pairs.first.pairs
        return cls(pairs.pairs, pairs.start if isinstance(pairs, Part) else 0, first, pairs.spans)


class Sent(Part):
    """A part that came as a message, for a model that equals the one it was checked for."""

    def __init__(self, message: Message, model: HookedMultimodal) -> None:
        self.pairs, self.model, self.start = message.pairs, model, message.start
        self.message = message

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of all spans of the whole."""
        return self.message.spans

    @property
    def first(self) -> PairBatch:
        """The first pair of the whole."""
        alone = replace(self.message, pairs=(self.message.first,), start=0)
        return Sent(alone, self.model).batch([0])

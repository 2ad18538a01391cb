"""Some edges of one group of readers, which are cut together, each in a run of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmm.data.metrics import Answers, Reading
from mechmm.engine.places import Ints


@dataclass(frozen=True, eq=False)
class Cut:
    """The edges from some writers into some readers of a block of the graph, of some prompts.

    Trials are numbered by reader, then by writer, then by prompt.

    Attributes:
        number: of the block.
        span: number of the span.
        writers: in the graph's table. readers: in the block.
        prompts: in the batch.
    """

    number: int
    span: int
    writers: Ints
    readers: Ints
    prompts: Ints

    @property
    def shape(self) -> tuple[int, int, int]:
        """(readers, writers, prompts)."""
        return len(self.readers), len(self.writers), len(self.prompts)

    @cached_property
    def of(self) -> Ints:
        """The prompt of every trial."""
        return np.tile(self.prompts, len(self.readers) * len(self.writers))


@dataclass(frozen=True, eq=False)
class Loss:
    """What a metric loses.

    Attributes:
        part, answers: how it is measured.
        whole: its value where nothing is cut [prompt].
    """

    part: Reading
    answers: Answers
    whole: Tensor

    def __call__(self, logits: Tensor, prompts: Ints) -> Float[Tensor, " trial"]:
        """Of the logits of trials [trial, token, vocab or row] on some prompts."""
        own = torch.as_tensor(prompts, device=logits.device)
        found = self.part.reduce(logits, self.answers[own])
        return (self.whole[own] - found).float().cpu()


def split(
    cut: Cut,
    live: Bool[np.ndarray, "writer prompt"],
    most: int,
    *,
    together: bool = False,
    shared: bool = False,
) -> Iterator[Cut]:
    """The edges of a cut that carry any change, in parts that run together.

    Args:
        live: which writers changed anything.
        most: trials of a part, or of a part on all prompts.
        together: all prompts run together; else a few where they have few edges.
        shared: readers take no room of their own.
    """
    every = int(live.any(1).sum()) * len(cut.readers)
    prompts = cut.prompts if together else cut.prompts[live.any(0)]
    few = len(prompts) if together else most // max(1, every)
    for some in _parts(prompts, few):
        changed = cut.writers[live[:, np.isin(cut.prompts, some)].any(1)]
        trials = most if together else most // len(some)
        for writers in _parts(changed, trials):
            each = len(cut.readers) if shared else trials // len(writers)
            for readers in _parts(cut.readers, each):
                yield Cut(cut.number, cut.span, writers, readers, some)


def _parts(numbers: Ints, most: int) -> list[Ints]:
    """Parts of about one size, of so many at most, but one at least."""
    if not len(numbers):
        return []
    return np.array_split(numbers, -(-len(numbers) // max(1, most)))

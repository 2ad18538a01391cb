"""States of some layers written into other layers, at the places of a span.

Cell (s, t, w) sets what enters block t + i to what entered block s + i of the unchanged run, for
i = 0 .. w-1. The states may be the prompt's own, those of another pair's clean prompt (position
`j` of `n` takes the one as far along in the other's span), or its own with positions exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechmm.data.metrics import Reading
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.cells import concatenated
from mechmm.engine.located import Located
from mechmm.engine.places import Places, Values
from mechmm.engine.record import values
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal

Whose = Literal["own", "another image", "shuffled positions"]
Ints = Int[np.ndarray, " place"]


@dataclass(frozen=True)
class Carry:
    """One cell.

    Attributes:
        source, target: first layers.
        window: how many layers.
        whose: states.
        draw: number of the random choice, from 1, where there is one.
    """

    source: int
    target: int
    window: int
    whose: Whose = "own"
    draw: int = 0

    @property
    def donor(self) -> int:
        """0: the prompt itself; else the draw of the other pair."""
        return self.draw if self.whose == "another image" else 0


@dataclass(frozen=True, eq=False)
class Carried:
    """Carries states within one dataset; `changes` is for `Cells`.

    Attributes:
        span: of the language model.
        seed: of donors and shuffles.
    """

    model: HookedMultimodal
    pairs: PairDataset
    cells: Sequence[Carry]
    span: str
    seed: int

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """The places of all cells in a batch, and what is put there."""
        spans = {0: spans_of(batch.clean, self.span)}
        donors = {cell.donor: self._donors(batch, cell.donor) for cell in self.cells}
        spans |= {draw: spans_of(prompts, self.span) for draw, prompts in donors.items()}
        prompts, found, taken = len(batch), [], []
        hooks = tuple(dict.fromkeys(h for cell in self.cells for h in _hooks(cell)))
        states = list(dict.fromkeys(s for cell in self.cells for s in _states(cell)))
        for number, cell in enumerate(self.cells):
            for prompt, at in enumerate(spans[0]):
                which = self._which(cell, spans, prompt, batch.indices[prompt])
                trial, row = (np.full(len(at), n) for n in (number * prompts + prompt, prompt))
                for hook, state in zip(_hooks(cell), _states(cell), strict=True):
                    kind = np.full(len(at), hooks.index(hook))
                    found.append(Places((), row, trial, kind, row, at, np.full(len(at), -1)))
                    taken.append(np.stack([np.full(len(at), states.index(state)), which]))
        places = concatenated(hooks, prompts, len(self.cells), found)
        state, which = np.concatenate([np.zeros((2, 0), dtype=np.int64), *taken], axis=1)
        kept = self._kept(donors, spans, states)

        def give(hook: str, at: np.ndarray, now: Tensor) -> Tensor:
            new = torch.empty_like(now)
            for number in np.unique(state[at]):
                here = np.flatnonzero(state[at] == number)
                new[torch.as_tensor(here)] = kept[number][torch.as_tensor(which[at[here]])].to(now)
            return new

        return places, give

    def _donors(self, batch: PairBatch, draw: int) -> Batch:
        """The clean prompts of the pairs that give their states: for a draw, those so many places
        further in a random circle, so that every pair gives once and none to itself."""
        if draw == 0:
            return batch.clean
        count = len(self.pairs)
        order = np.random.default_rng(self.seed).permutation(count)
        place = np.argsort(order)
        theirs = order[(place[list(batch.indices)] + 1 + (draw - 1) % (count - 1)) % count]
        return self.pairs.batch(theirs.tolist()).clean

    def _which(
        self, cell: Carry, spans: dict[int, list[np.ndarray]], prompt: int, pair: int
    ) -> Ints:
        """Numbers of the states that a prompt's places take, among all of its donors."""
        theirs = [len(at) for at in spans[cell.donor]]
        count, first = len(spans[0][prompt]), int(sum(theirs[:prompt]))
        if cell.whose == "shuffled positions":
            rng = np.random.default_rng([self.seed, cell.draw, pair])
            return first + rng.permutation(count)
        return first + np.arange(count) * theirs[prompt] // max(1, count)

    def _kept(
        self,
        donors: dict[int, Batch],
        spans: dict[int, list[np.ndarray]],
        states: list[tuple[int, int]],
    ) -> list[Tensor]:
        """The states at the places of the span, of every (donor, layer) [place, d_model]."""
        kept: dict[tuple[int, int], Tensor] = {}
        for donor, batch in donors.items():
            hooks = {hook_of(layer): layer for own, layer in states if own == donor}
            row = np.repeat(np.arange(len(spans[donor])), [len(at) for at in spans[donor]])
            at = np.concatenate(spans[donor])
            for hook, value in values(self.model, batch, hooks).items():
                kept[donor, hooks[hook]] = value[torch.as_tensor(row), torch.as_tensor(at)]
        return [kept[state] for state in states]


def spans_of(batch: Batch, span: str) -> list[np.ndarray]:
    """Positions of a span in every prompt."""
    finder = Located(batch.layout)
    return [finder.covered(LANGUAGE, span, prompt)[:, 1] for prompt in range(len(batch))]


def hook_of(layer: int) -> str:
    """Where what enters a layer is hooked."""
    return f"blocks.{layer}.hook_resid_pre"


def _hooks(cell: Carry) -> list[str]:
    return [hook_of(cell.target + i) for i in range(cell.window)]


def _states(cell: Carry) -> list[tuple[int, int]]:
    """(donor, layer) of every state that a cell takes."""
    return [(cell.donor, cell.source + i) for i in range(cell.window)]

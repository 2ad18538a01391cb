"""Where every trial enters the language model, and which positions it runs again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechmm.engine.places import Entry, Ints, Places, Spot
from mechmm.engine.record import Block
from mechmm.model.hooked import LANGUAGE

SUMS = ("hook_z", "hook_result", "hook_mlp_out", "hook_deepstack", "hook_resid_post")
"""Hooks whose change is added to what is known behind them."""
ELSEWHERE = -2
WASTE = 1 / 32
"""Share of tokens that may run in vain so that all trials of a pass begin at one position."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Where every trial enters the language model.

    Attributes:
        layer, entry: [trial].
        start: first position that it can change [trial].
        shared: positions behind it that enter block `layer` unchanged, where so many trials have
            such that their projections are computed once for all of them; else 0 [trial].
        enters: stream with which all trials enter at one block, from another tower or as it was
            computed elsewhere, and the row of every trial in it, or None.
    """

    layer: Ints
    entry: Ints
    start: Ints
    shared: Ints
    enters: tuple[Tensor, Ints] | None = None

    def part(self, numbers: np.ndarray | slice) -> Trials:
        """Some of the trials."""
        layer, entry, start, shared = (
            column[numbers] for column in (self.layer, self.entry, self.start, self.shared)
        )
        return Trials(layer, entry, start, shared, self.enters)

    def aligned(self, width: int) -> Trials:
        """The same from one position on, where that makes few tokens more: tokens that stand by
        trial and position are moved faster.

        Args:
            width: positions of a prompt.
        """
        first = int(self.start.min())
        more = int((self.start - first).sum())
        if more > WASTE * len(self.start) * (width - first):
            return self
        return replace(self, start=np.full_like(self.start, first))


@dataclass(frozen=True, eq=False)
class Entries:
    """Places in the language model by trial, from which it follows where a trial enters.

    Attributes:
        places: all of them.
        layers, entries: by hook; `ELSEWHERE` for a hook of another tower.
        names: last parts of the hooks' names.
        starts: for every position the first one that a change there can reach [prompt, pos].
        wanted: positions whose logits are read [prompt, token].
        last: number of the last block.
    """

    places: Places
    layers: Ints
    entries: Ints
    names: np.ndarray
    starts: Int[np.ndarray, "prompt pos"]
    wanted: Int[np.ndarray, "prompt token"]
    last: int

    @classmethod
    def of(
        cls, places: Places, spots: list[Spot], starts: np.ndarray, wanted: np.ndarray, last: int
    ) -> Entries:
        """From where the hooks of the places lie."""
        layers = [s.layer if s.tower == LANGUAGE else ELSEWHERE for s in spots]
        entries = [int(spot.entry) for spot in spots]
        names = np.array([name.rpartition(".")[2] for name in places.hooks])
        layer, entry = (np.array(kind, dtype=np.int64) for kind in (layers, entries))
        return cls(places, layer, entry, names, starts, wanted, last)

    def trials(self, trials: Ints) -> Trials:
        """Where some trials enter that change the language model alone."""
        places, count = self.places, len(self.places.prompts)
        own = places.of(trials)
        trial, hook = places.trial[own], places.hook[own]
        order = self.layers[hook] * len(Entry) + self.entries[hook]
        first = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(first, trial, order)
        layer, entry = np.divmod(first[trials], len(Entry))
        entry[self._several(own, layer, entry, trials)] = Entry.WHOLE
        entry[layer > self.last] = Entry.END
        layer, start = layer.clip(max=self.last), self._start(own, trials)
        shared = self._shared(own, trials, layer, entry, start)
        return Trials(layer, entry, start, shared)

    def embedded(self, trials: Ints, seen: Ints) -> Trials:
        """Where some trials enter that change something before the blocks as well.

        Args:
            seen: the first position of a medium in every prompt [prompt].
        """
        own = self.places.of(trials)
        own = own[self.layers[self.places.hook[own]] != ELSEWHERE]
        zeros = np.zeros_like(trials)
        start = self._start(own, trials, seen)
        return Trials(zeros, np.full_like(zeros, Entry.WHOLE), start, zeros)

    def _start(self, own: Ints, trials: Ints, seen: Ints | None = None) -> Ints:
        """The first position that a trial reaches, of those that are read at the latest."""
        prompts = self.places.prompts
        position = self.wanted.min(1)[prompts]
        if seen is not None:
            position = np.minimum(position, seen[prompts])
        np.minimum.at(position, self.places.trial[own], self.places.position[own])
        return self.starts[prompts[trials], position[trials]]

    def _shared(self, own: Ints, trials: Ints, layer: Ints, entry: Ints, start: Ints) -> Ints:
        """Positions that enter a trial's block unchanged; 0 in a block where they are fewer, in all
        trials together, than all positions of the prompts."""
        places, (count, width) = self.places, self.starts.shape
        first = np.full(len(places.prompts), ELSEWHERE)
        first[trials] = layer
        own = own[self.layers[places.hook[own]] == first[places.trial[own]]]
        changed = np.unique(places.trial[own] * width + places.position[own]) // width
        changes = np.bincount(changed, minlength=len(places.prompts))[trials]
        may = (entry == Entry.WHOLE) & (layer < self.last)
        shared = may * (width - start - changes)
        total = np.bincount(layer, shared, self.last + 1)
        return shared * (total > count * width)[layer]

    def _several(self, own: Ints, layer: Ints, entry: Ints, trials: Ints) -> np.ndarray:
        """Which trials change several hooks at their entry, where each would undo the other."""
        places, count = self.places, len(self.places.prompts)
        at, kind = np.full(count, ELSEWHERE), np.full(count, -1)
        at[trials], kind[trials] = layer, entry
        trial, hook = places.trial[own], places.hook[own]
        sums = np.isin(self.names, SUMS)[hook] & (self.layers[hook] == at[trial])
        sums &= self.entries[hook] == kind[trial]
        pairs = np.unique(np.stack([trial[sums], hook[sums]]), axis=1)
        return (np.bincount(pairs[0], minlength=count) > 1)[trials]

    def sizes(self, trials: Trials) -> Ints:
        """Tokens that every trial runs again in a block; at least a third of its prompt, for
        attention lays out keys and values of all of it."""
        width = self.starts.shape[1]
        tokens = np.where(trials.layer >= self.last, 1, width - trials.start)
        return np.maximum(tokens, width // 3)


def starts(blocks: list[Block], real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """For every position the first one that a change there can reach, in any block.

    Positions before it see neither it nor anything behind it.
    """
    seen = torch.stack([_reach(block, real) for block in _unlike(blocks)]).amax(0)
    count = real.shape[1]
    before = seen.cummax(1).values.roll(1, 1)
    before[:, 0] = -1
    own = torch.arange(count, device=real.device).expand(len(real), -1)
    return own.where(before < own, -1).cummax(1).values.clamp(min=0)


def _unlike(blocks: list[Block]) -> list[Block]:
    """One block for every mask."""
    return list({(id(block.mask), block.causal): block for block in blocks}.values())


def _reach(block: Block, real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The last position that every query sees; padding sees nothing."""
    count = real.shape[1]
    own = torch.arange(count, device=real.device).expand(len(real), -1)
    if block.mask is None:
        seen = own if block.causal else torch.full_like(own, count - 1)
    else:
        visible = block.mask[:, 0] if block.mask.dtype == torch.bool else block.mask[:, 0] == 0
        visible = visible & real[:, None, :]
        seen = torch.where(visible, own[:, None, :], -1).amax(-1).expand(len(real), -1)
    return seen.where(real, -1)

"""The engine: many trials over one batch of prompts, each running only what it can reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechmm.data.metrics import chosen
from mechmm.engine.calibrate import calibrated
from mechmm.engine.head import head_of
from mechmm.engine.places import Entry, Ints, Places, Spot, Values, by_begin, spot_of, unchanged
from mechmm.engine.plain import Plains
from mechmm.engine.record import Recording, record, resumes
from mechmm.engine.rerun import Rerun
from mechmm.engine.shelf import Shelf
from mechmm.engine.trials import Trials
from mechmm.engine.whole import Whole
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TEXT, TokenLayout

Found = Iterator[tuple[Ints, Tensor]]
"""Numbers of some trials, and their logits [trial, token, vocab or row]."""


class Engine:
    """Runs trials over one batch.

    Args:
        hooks: that trials may change.
        wanted: positions whose logits are read [batch, token]; None for an encoder.
        rows: the only tokens whose logits are read [batch, row]; None: all.
        tokens: of one forward pass, at most (more where one trial has more); None: found by a
            short trial.
        shelf: where recorded activations are kept.
        reuse: whether to record any.
        kept: of the hooks, those whose values are recorded; None: all. Trials that begin behind
            the attention of a block, or behind the block, need theirs.

    Attributes:
        recording: the run of the unchanged prompts.
    """

    def __init__(
        self,
        model: HookedMultimodal,
        batch: Batch,
        hooks: Sequence[str],
        wanted: Int[Tensor, "batch token"] | None,
        rows: Int[Tensor, "batch row"] | None = None,
        *,
        tokens: int | None = None,
        shelf: Shelf | None = None,
        reuse: bool = True,
        kept: Sequence[str] | None = None,
    ) -> None:
        self.model, self.batch, self.rows = model, batch, rows
        self.spots = {hook: spot_of(model, hook) for hook in dict.fromkeys(hooks)}
        with torch.no_grad():
            towers = self._frozen_towers() if reuse else []
            names = list(self.spots if kept is None else kept) if reuse else []
            behind = [spot for spot in self.spots.values() if spot.entry != Entry.WHOLE]
            found = record(model, batch, wanted, names, towers, behind, blocks=reuse)
            self.head = head_of(model, found, rows) if found.blocks else None
        self.recording: Recording = found.kept(shelf or Shelf())
        self.plains = Plains(model, self.recording)
        found = (model, self.recording, self.head, self.plains)
        self.tokens = tokens if tokens is not None else calibrated(*found)

    def _frozen_towers(self) -> list[str]:
        """Towers whose recorded blocks stand in for them: all that some change comes behind."""
        ours = not resumes(self.model)
        others = [spot for spot in self.spots.values() if ours or spot.tower != LANGUAGE]
        last = max(others).stage if others else -1
        return [name for i, name in enumerate(self.model.towers) if 2 * i <= last]

    @property
    def base(self) -> Tensor:
        """Logits of the unchanged prompts [batch, token, vocab or row]."""
        return chosen(self.recording.logits, self.rows)

    def run(self, places: Places, values: Values) -> Found:
        """Run all trials that change anything, those that enter alike together.

        Where the device's memory does not hold a pass, passes are made half as large.
        """
        spots = [self.spots[hook] for hook in places.hooks]
        resumed = np.array([self._resumable(spot) for spot in spots])
        there, elsewhere = (np.zeros(len(places.prompts), dtype=bool) for _ in range(2))
        there[places.trial] = True
        elsewhere[places.trial[~resumed[places.hook]]] = True
        rerun = None
        if self.head is not None:
            rerun = Rerun(self.model, self.recording, places, spots, values, self.head, self.plains)
            yield from self._resume(rerun, np.flatnonzero(there & ~elsewhere))
        if elsewhere.any():
            whole = Whole(self.model, self.recording, places, spots, values)
            yield from self._begin(whole, rerun, np.flatnonzero(elsewhere))

    def onward(self, layer: int, stream: Tensor, prompts: Ints, start: int) -> Tensor:
        """The logits of trials whose stream in front of a block is known.

        Args:
            layer: of the block; the number of blocks: behind the last one.
            stream: [trial, pos, d_model], read from `start` on; behind the last block: at the
                positions that are wanted [trial, token, d_model].
            prompts: the prompt of every trial.
            start: first position that is not as recorded.

        Returns:
            As `run`.
        """
        if layer == len(self.recording.blocks):
            assert self.head is not None
            at = torch.arange(stream.shape[:2].numel(), device=stream.device)
            where = torch.as_tensor(prompts, device=stream.device)
            return self.head(stream.flatten(0, 1)[None], where, at.view(stream.shape[:2]))
        zeros = np.zeros_like(prompts)
        enters = (stream, np.arange(len(prompts)))
        whole = zeros + int(Entry.WHOLE)
        return self._alone.run(prompts, Trials(zeros + layer, whole, zeros + start, zeros, enters))

    @property
    def wanted(self) -> Int[np.ndarray, "prompt token"]:
        """Positions whose logits are read."""
        assert self.recording.wanted is not None
        return self.recording.wanted.cpu().numpy()

    @property
    def starts(self) -> Int[np.ndarray, "prompt pos"]:
        """For every position of the language model the first one that a change there can reach."""
        return self._alone.entries.starts

    @cached_property
    def _alone(self) -> Rerun:
        """Runs trials that change nothing but what enters."""
        assert self.head is not None
        nothing = np.zeros(0, dtype=np.int64)
        places = Places((), np.arange(len(self.batch)), *[nothing] * 5)
        rest = (self.head, self.plains)
        return Rerun(self.model, self.recording, places, [], unchanged, *rest)

    def _resumable(self, spot: Spot) -> bool:
        return self.head is not None and spot.tower == LANGUAGE and spot.layer >= 0

    def _resume(self, rerun: Rerun, trials: Ints) -> Found:
        """Trials that change the language model alone."""
        entering = rerun.entries.trials(trials)
        order = np.lexsort((entering.start, entering.entry, entering.layer))
        sizes, done = rerun.entries.sizes(entering)[order], 0
        while done < len(order):
            count = fitting(sizes[done:], self.tokens)
            own = order[done : done + count]
            try:
                logits = rerun.run(trials[own], entering.part(own).aligned(rerun.width))
            except torch.OutOfMemoryError:
                self._halve(count, int(sizes[done : done + count].sum()))
                continue
            yield trials[own], logits
            done += count

    def _begin(self, whole: Whole, rerun: Rerun | None, trials: Ints) -> Found:
        """Trials that change something before the language model, or a model of another kind."""
        copies, blocks = self._copies(whole, trials)
        done = 0
        while done < len(copies):
            alike = int((blocks[done:] == blocks[done]).cumprod().sum())
            count = min(alike, max(1, self.tokens // self.size))
            own = copies[done : done + count]
            copy, prompt = np.nonzero(own >= 0)
            rows = copy * own.shape[1] + prompt
            try:
                logits = self._whole(whole, rerun, own, rows)
            except torch.OutOfMemoryError:
                self._halve(len(own), len(own) * self.size)
                continue
            yield own[copy, prompt], logits
            done += count

    def _whole(self, whole: Whole, rerun: Rerun | None, copies: Ints, rows: Ints) -> Tensor:
        """Logits of trials in a larger batch, which stand in some of its rows."""
        numbers, prompts = copies.flatten()[rows], rows % copies.shape[1]
        if rerun is None or self.model.family.deepstack(self.model.config):
            found = whole.run(copies)
            found = found[torch.as_tensor(rows, device=found.device)]
            own = None if self.rows is None else self.rows[torch.as_tensor(prompts)]
            return chosen(found, own)
        entering = rerun.entries.embedded(numbers, first_seen(self.batch.layout))
        stream = whole.run(copies, towards=True)
        return rerun.run(numbers, replace(entering, enters=(stream, rows)))

    def _halve(self, together: int, held: int) -> None:
        """Make passes half as large as the one that did not fit; one trial cannot be halved.

        Args:
            together: trials, or copies of the batch, in the pass.
            held: its tokens.
        """
        if together == 1:
            raise torch.OutOfMemoryError(
                "one trial alone does not fit into the device's memory; free some, give a smaller "
                "batch_size, or load the model in a smaller dtype"
            )
        torch.cuda.empty_cache()
        self.tokens = max(1, min(self.tokens, held) // 2)

    @cached_property
    def size(self) -> int:
        """Positions of one copy of the batch, in the language model or the towers before it."""
        return max(self.batch.input_ids.numel(), seen_positions(self.batch.layout), 1)

    def _copies(self, whole: Whole, trials: Ints) -> tuple[Ints, Ints]:
        """Trials as copies of the batch [copy, prompt], in the order in which they begin; and the
        number of the block that each begins in [copy]."""
        first = earliest(whole.places, whole.spots)
        ordered = trials[np.argsort(first[trials], kind="stable")]
        prompts = whole.places.prompts[ordered]
        if self.model.family.output == "logits_per_image":  # every image meets every text
            copies = np.full((len(ordered), len(self.batch)), -1)
            copies[np.arange(len(ordered)), prompts] = ordered
        else:
            columns = [ordered[prompts == prompt] for prompt in range(len(self.batch))]
            copies = np.full((max(map(len, columns)), len(columns)), -1)
            for prompt, column in enumerate(columns):
                copies[: len(column), prompt] = column
        begins = np.where(copies < 0, len(whole.spots), first[copies]).min(1)
        return copies, blocks_of(whole.spots)[begins]


def earliest(places: Places, spots: list[Spot]) -> Ints:
    """Which begin, of those of some spots in the order of the run, every trial has [trial]; the
    number of the spots where it changes nothing."""
    number = {begin: i for i, begin in enumerate(by_begin(spots))}
    ranks = np.array([number[spot.begin] for spot in spots], dtype=np.int64)
    first = np.full(len(places.prompts), len(spots))
    np.minimum.at(first, places.trial, ranks[places.hook])
    return first


def blocks_of(spots: list[Spot]) -> Ints:
    """The number of the block of every begin of some spots, in the order of the run [begin]."""
    begins = list(by_begin(spots))
    blocks = sorted({begin[:2] for begin in begins})
    return np.array([blocks.index(begin[:2]) for begin in begins], dtype=np.int64)


def seen_positions(layout: TokenLayout) -> int:
    """Positions of all media in their towers."""
    media = [medium for prompt in layout.media for medium in prompt]
    return sum(medium.tower_rows * medium.tower_positions for medium in media)


def first_seen(layout: TokenLayout) -> Ints:
    """The first position of a medium in every prompt, or the first of all."""
    seen = (layout.modality != TEXT) & (layout.modality != PADDING)
    return seen.int().argmax(-1).numpy()


def fitting(sizes: Ints, most: int) -> int:
    """How many entries sum up to `most` at most; at least one."""
    return max(1, int(np.searchsorted(sizes.cumsum(), most, side="right")))

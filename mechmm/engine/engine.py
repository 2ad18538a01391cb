"""The engine: many trials over one batch of prompts, each running only what it can reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechmm.engine.head import head_of
from mechmm.engine.places import Entry, Ints, Places, Spot, Values, spot_of
from mechmm.engine.record import Recording, record, resumes
from mechmm.engine.rerun import Rerun, Trials
from mechmm.engine.whole import Whole
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TEXT


class Engine:
    """Runs trials over one batch.

    Args:
        hooks: that trials may change.
        wanted: positions whose logits are read [batch, token]; None for an encoder.
        rows: the only tokens whose logits are read [batch, token]; None: all.
        tokens: of one forward pass, at most (more where one trial has more).
    """

    def __init__(
        self,
        model: HookedMultimodal,
        batch: Batch,
        hooks: Sequence[str],
        wanted: Int[Tensor, "batch token"] | None,
        rows: Int[Tensor, "batch token"] | None = None,
        tokens: int = 4096,
    ) -> None:
        self.model, self.batch, self.rows, self.tokens = model, batch, rows, tokens
        self.spots = {hook: spot_of(model, hook) for hook in dict.fromkeys(hooks)}
        with torch.no_grad():
            self.recording = record(model, batch, wanted, hooks, self._frozen_towers())
            resumed = resumes(model) and wanted is not None
            self.head = head_of(model, self.recording, rows) if resumed else None

    def _frozen_towers(self) -> list[str]:
        """Towers whose recorded blocks stand in for them: all that some change comes behind."""
        ours = not resumes(self.model)
        others = [spot for spot in self.spots.values() if ours or spot.tower != LANGUAGE]
        if not others:
            return []
        last = max(others).stage
        return [n for i, n in enumerate(self.model.towers) if 2 * i <= last]

    @cached_property
    def size(self) -> int:
        """Positions of one copy of the batch in the language model and the towers together."""
        media = sum(view.positions for media in self.batch.layout.media for m in media for view in m.views)
        return max(self.batch.input_ids.numel() + media, 1)

    @property
    def base(self) -> Tensor:
        """Logits of the unchanged prompts [batch, token, vocab or chosen]."""
        logits = self.recording.logits
        if self.rows is None:
            return logits
        return logits.gather(-1, self.rows[:, None].expand(-1, logits.shape[1], -1))

    @torch.no_grad()
    def run(self, places: Places, values: Values) -> Iterator[tuple[Ints, Tensor]]:
        """Run all trials that change anything.

        Yields:
            Numbers of some trials, and their logits [trial, token, vocab or chosen].
        """
        spots = [self.spots[hook] for hook in places.hooks]
        by_language = np.array([self._resumable(spot) for spot in spots])
        elsewhere = np.zeros(len(places.prompts), dtype=bool)
        elsewhere[places.trial[~by_language[places.hook]]] = True
        there = np.zeros(len(places.prompts), dtype=bool)
        there[places.trial] = True
        if (there & ~elsewhere).any():
            yield from self._resume(places, spots, values, np.flatnonzero(there & ~elsewhere))
        if elsewhere.any():
            yield from self._begin(places, spots, values, np.flatnonzero(elsewhere))

    def _resumable(self, spot: Spot) -> bool:
        return self.head is not None and spot.tower == LANGUAGE and spot.layer >= 0

    def _resume(
        self, places: Places, spots: list[Spot], values: Values, trials: Ints
    ) -> Iterator[tuple[Ints, Tensor]]:
        """Trials that change the language model alone."""
        assert self.head is not None
        rerun = Rerun(self.model, self.recording, places, spots, values, self.head)
        entering = rerun.trials(trials)
        order = np.lexsort((entering.start, entering.entry, entering.layer))
        sizes = rerun.weights(entering, places.prompts[trials])[order]
        for chunk in chunks(sizes, self.tokens):
            own = order[chunk]
            part = Trials(entering.layer[own], entering.entry[own], entering.start[own])
            yield trials[own], rerun.run(trials[own], part)

    def _begin(
        self, places: Places, spots: list[Spot], values: Values, trials: Ints
    ) -> Iterator[tuple[Ints, Tensor]]:
        """Trials that change something before the language model, or a model of another kind."""
        whole = Whole(self.model, self.recording, places, spots, values)
        towards = self._towards
        rerun = None
        if towards:
            assert self.head is not None
            rerun = Rerun(self.model, self.recording, places, spots, values, self.head)
        for copies in self._copies(places, spots, trials):
            found = whole.run(copies, towards)
            copy, prompt = np.nonzero(copies >= 0)
            numbers, rows = copies[copy, prompt], copy * copies.shape[1] + prompt
            if rerun is None:
                found = found[torch.as_tensor(rows, device=found.device)]
                yield numbers, found if self.rows is None else self._chosen(found, prompt)
                continue
            first = np.minimum(self._first_seen[prompt], rerun.embedded(numbers))
            start = rerun.starts[prompt, first]
            zeros = np.zeros_like(numbers)
            entering = Trials(zeros, np.full_like(zeros, Entry.WHOLE), start, (found, rows))
            yield numbers, rerun.run(numbers, entering)

    def _chosen(self, logits: Tensor, prompts: Ints) -> Tensor:
        assert self.rows is not None
        rows = self.rows[torch.as_tensor(prompts, device=logits.device)]
        return logits.gather(-1, rows[:, None].expand(-1, logits.shape[1], -1))

    @property
    def _towards(self) -> bool:
        """Whether a run through the towers may end where the language model begins."""
        return self.head is not None and not self.model.family.deepstack(self.model.config)

    @cached_property
    def _first_seen(self) -> Ints:
        """The first position of a medium in every prompt."""
        seen = ((self.batch.layout.modality != TEXT) & (self.batch.layout.modality != PADDING)).int()
        first = seen.argmax(-1)
        return first.numpy()

    def _copies(self, places: Places, spots: list[Spot], trials: Ints) -> Iterator[Ints]:
        """Trials as copies of the batch [copy, prompt], those that begin alike together."""
        numbers = sorted(range(len(spots)), key=lambda number: spots[number])
        rank = np.empty(len(spots), np.int64)
        rank[numbers] = np.arange(len(spots))
        first = np.full(len(places.prompts), len(spots))
        np.minimum.at(first, places.trial, rank[places.hook])
        ordered = trials[np.argsort(first[trials], kind="stable")]
        prompts = places.prompts[ordered]
        if self.model.family.output == "logits_per_image":  # every image meets every text
            copies = np.full((len(ordered), len(self.batch)), -1)
            copies[np.arange(len(ordered)), prompts] = ordered
        else:
            columns = [ordered[prompts == prompt] for prompt in range(len(self.batch))]
            copies = np.full((max(map(len, columns)), len(columns)), -1)
            for prompt, column in enumerate(columns):
                copies[: len(column), prompt] = column
        together = max(1, self.tokens // self.size)
        yield from np.split(copies, range(together, len(copies), together))


def chunks(sizes: Ints, most: int) -> Iterator[slice]:
    """Runs of entries whose sizes sum up to `most` at most, or hold one entry."""
    start, total = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > start and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if len(sizes):
        yield slice(start, len(sizes))

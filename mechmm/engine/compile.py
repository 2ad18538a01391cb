"""From sites and pairs to a plan: which cells run what, by their inputs alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from mechmm.data.metrics import READS_ANSWERS, Answers, readings
from mechmm.data.pairs import PairBatch
from mechmm.engine.cost import Cost, Shape
from mechmm.engine.engine import blocks_of, earliest, first_seen, seen_positions
from mechmm.engine.located import located
from mechmm.engine.places import QUERY_ROWS, Entry, Ints, Spot, by_begin, spot_of
from mechmm.engine.plan import Plan, alike, fallbacks, predicted_starts, shape_of
from mechmm.engine.record import blocks_read, embedding, resumes
from mechmm.engine.trials import Entries
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE

if TYPE_CHECKING:
    from mechmm.engine.sweep import Sweep


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one batch, by trial (site * prompts + prompt)."""

    changes: Ints
    first: Ints
    flops: np.ndarray
    passes: int
    naive: float


def compiled(sweep: Sweep, tokens: int) -> tuple[Plan, bool]:
    """The plan of a sweep, and whether it records anything to go on from."""
    compiler = _Compiler(sweep, tokens)
    size, reuse, notes = compiler.fitted()
    parts = [(batch.indices, compiler.cells(batch, reuse)) for batch in sweep.pairs.batches(size)]
    shape = (len(sweep.sites), len(sweep.pairs))
    changes, first = (np.zeros(shape, dtype=np.int64) for _ in range(2))
    flops = np.zeros(shape)
    for indices, cells in parts:
        for whole, part in ((changes, cells.changes), (first, cells.first), (flops, cells.flops)):
            whole[:, list(indices)] = part.reshape(len(sweep.sites), -1)
    plan = Plan(
        sites=compiler.sites(),
        changes=changes,
        first=first,
        flops=flops,
        passes=sum(cells.passes for _, cells in parts),
        naive_flops=sum(cells.naive for _, cells in parts),
        state_bytes=compiler.state(size) if reuse else 0,
        batch_size=size,
        tokens=tokens,
        reads=compiler.reads,
        notes=(*notes, *fallbacks(sweep.model, compiler.spots)),
    )
    return plan, reuse


class _Compiler:
    """Compiles the batches of one sweep."""

    def __init__(self, sweep: Sweep, tokens: int) -> None:
        self.sweep, self.model, self.tokens = sweep, sweep.model, tokens
        hooks = sweep.sites.table["hook"].unique().tolist()
        self.spots = {hook: spot_of(self.model, hook) for hook in hooks}
        self.cost, self.resumed = Cost(self.model), resumes(self.model)
        self.last = len(self.model.towers[LANGUAGE].blocks) - 1 if self.resumed else 0
        pairs = sweep.pairs
        answers = [pair.answer for pair in pairs], [pair.foil for pair in pairs]
        self.single = Answers.of(self.model, *answers).single

    @cached_property
    def longest(self) -> Batch:
        """The prompt that takes most, its answer behind it where that has several tokens."""
        found = (
            reading.batch
            for batch in self.sweep.pairs.batches(1)
            for reading in readings(batch.clean, batch.answers, self.sweep.metric)
        )
        return max(found, key=lambda b: b.input_ids.numel() + seen_positions(b.layout))

    def sites(self) -> pd.DataFrame:
        """Where the trials of every site enter."""
        table = self.sweep.sites.table[["hook", "tower", "span", "position"]].copy()
        spots = [self.spots[hook] for hook in table["hook"]]
        table["layer"] = [spot.layer for spot in spots]
        table["enters"] = [self._enters(spot).name.lower() for spot in spots]
        return table

    @property
    def reads(self) -> str:
        """What is needed at the end, in words."""
        if self.sweep.metric in READS_ANSWERS and self.single:
            return "logits of answer and foil after the last token"
        behind = "" if self.single else " and those of the answer"
        return f"all logits after the last token{behind}"

    def fitted(self) -> tuple[int, bool, list[str]]:
        """Pairs that run together within the budget, and whether anything is recorded."""
        size, budget = min(self.sweep.batch_size, len(self.sweep.pairs)), self.sweep.budget
        if budget is None or self.state(size) <= budget:
            return size, True, []
        most = size
        while size > 1 and self.state(size) > budget:
            size //= 2
        if self.state(size) <= budget:
            return size, True, [f"{size} instead of {most} pairs at once, for the budget's sake"]
        need = self.state(1)
        note = (
            f"the state of one pair takes {need:,} bytes, the budget is {budget:,}: nothing is "
            "recorded, every trial runs the whole model"
        )
        return 1, False, [note]

    def state(self, size: int) -> int:
        """Bytes of what is recorded for so many pairs."""
        batch, config = self.longest, self.model.cfg
        width = torch.finfo(self.model.dtype).bits // 8
        total = 0
        if self.resumed:
            each = config.n_key_value_heads or config.n_heads
            per_token = 2 * config.d_model + 2 * each * config.d_head
            total += batch.input_ids.numel() * (config.n_layers * per_token + config.d_model)
        total += sum(2 * self._hook(hook) for hook in self.spots)
        elsewhere = {s.tower for s in self.spots.values() if not self._resumable(s)}
        if elsewhere:
            positions = seen_positions(batch.layout)
            towers = [tower for name, tower in self.model.towers.items() if name != LANGUAGE]
            total += sum((len(t.blocks) + 1) * positions * t.cfg.d_model for t in towers)
            total += sum(
                positions * self.model.towers[tower].cfg.d_model
                for tower, _ in {(s.tower, s.layer) for s in self.spots.values() if self._noted(s)}
            )
        return size * total * width

    def _hook(self, hook: str) -> int:
        """Numbers that a hook holds for one pair."""
        spot, batch = self.spots[hook], self.longest
        tower = self.model.towers.get(spot.tower) or self.model.towers[LANGUAGE]
        cfg, name = tower.cfg, hook.rpartition(".")[2]
        positions = batch.input_ids.numel()
        if spot.tower != LANGUAGE:
            positions = max(seen_positions(batch.layout), 1)
        heads = cfg.n_heads
        each = {
            "hook_attn_scores": heads * positions,
            "hook_pattern": heads * positions,
            "hook_result": heads * cfg.d_model,
            **{f"hook_{part}": heads * cfg.d_head for part in ("q", "k", "v", "z")},
            **{f"hook_{part}": cfg.d_mlp or cfg.d_model for part in ("pre", "post")},
        }
        return positions * each.get(name, cfg.d_model)

    def _resumable(self, spot: Spot) -> bool:
        return self.resumed and spot.tower == LANGUAGE and spot.layer >= 0

    def _noted(self, spot: Spot) -> bool:
        """Whether what attention gives in a spot's block is recorded for trials to begin there."""
        if self._resumable(spot) or spot.entry == Entry.WHOLE:
            return False
        return bool(self.cost.blocks[spot.tower].attn[spot.layer])

    def _enters(self, spot: Spot) -> Entry:
        """Where in its block a trial begins that changes something at a spot."""
        if self._resumable(spot):
            return spot.entry
        return Entry.MIDDLE if self._noted(spot) else Entry.WHOLE

    # One batch -------------------------------------------------------------------------------

    def cells(self, batch: PairBatch, reuse: bool) -> Cells:
        """What the cells of a batch run."""
        sweep = self.sweep
        base = getattr(batch, sweep.base)
        places = located(sweep.sites, base.layout, sweep.seed, batch.numbers)
        spots = [self.spots[hook] for hook in places.hooks]
        starts = predicted_starts(self.model, base.layout)
        if sweep.source in ("clean", "corrupt"):
            other = getattr(batch, str(sweep.source))
            places = places.chosen(~alike(places, spots, base, other, starts))
        changes = np.bincount(places.trial, minlength=len(places.prompts))
        first, flops = np.zeros_like(changes), np.zeros(len(changes))
        passes, naive = 0, 0.0
        for reading in readings(base, batch.answers, sweep.metric):
            rows = 0 if reading.rows is None else reading.rows.shape[1]
            shape = shape_of(reading.batch, self.model, reading.places.shape[1], rows)
            naive += len(sweep.sites) * self.cost.whole(shape)
            wanted = reading.places.cpu().numpy()
            longer = predicted_starts(self.model, reading.batch.layout)
            entries = Entries.of(places, spots, longer, wanted, self.last)
            run = self._run(entries, spots, changes, shape, reuse, first_seen(base.layout))
            first, passes = np.maximum(first, run.first), passes + run.passes
            flops = flops + run.flops
        return Cells(changes, first, flops, passes, naive)

    def _run(
        self,
        entries: Entries,
        spots: list[Spot],
        changes: Ints,
        shape: Shape,
        reuse: bool,
        seen: Ints,
    ) -> Cells:
        """What the trials of one reading run."""
        places = entries.places
        first, flops = np.zeros_like(changes), np.zeros(len(changes))
        resumed = np.array([reuse and self._resumable(spot) for spot in spots])
        there = changes > 0
        elsewhere = np.zeros_like(there)
        elsewhere[places.trial[~resumed[places.hook]]] = True
        passes = 0
        here = np.flatnonzero(there & ~elsewhere)
        if len(here):
            trials = entries.trials(here)
            first[here] = trials.start
            flops[here] = self.cost.trials(trials, changes[here], shape)
            rows = np.array([hook.endswith(QUERY_ROWS) for hook in places.hooks])[places.hook]
            apart = np.isin(here, places.trial[rows])
            flops[here[apart]] += self.cost.laid_out(trials.part(apart), shape)
            passes += _passes(entries.sizes(trials), self.tokens)
        begun = np.flatnonzero(elsewhere)
        if len(begun):
            of = self._begun(begun, entries, spots, changes, shape, reuse, seen)
            first[begun], flops[begun] = of.first, of.flops
            passes += of.passes
        return Cells(changes, first, flops, passes, 0.0)

    def _begun(
        self,
        begun: Ints,
        entries: Entries,
        spots: list[Spot],
        changes: Ints,
        shape: Shape,
        reuse: bool,
        seen: Ints,
    ) -> Cells:
        """What trials run that begin before the language model, or know no other way."""
        begins, prompts = (
            column[begun] for column in (earliest(entries.places, spots), entries.places.prompts)
        )
        towards = self.resumed and reuse and not self.model.family.deepstack(self.model.config)
        spots_of = by_begin(spots).values()
        costs = np.array([self._through(spot, shape, towards, reuse) for spot in spots_of])
        alone = self.model.family.output == "logits_per_image"  # every image meets every text
        flops = costs[begins] / (1 if alone else shape.prompts)
        first = np.zeros_like(begun)
        if towards:
            trials = entries.embedded(begun, seen)
            first = trials.start
            flops = flops + self.cost.trials(trials, changes[begun], shape)
        blocks = blocks_of(spots)
        copies = np.zeros((blocks.max() + 1, shape.prompts), dtype=np.int64)
        np.add.at(copies, (blocks[begins], prompts), 1)
        towers = sum(rows * positions for rows, positions in shape.rows_of.values())
        size = max(shape.prompts * shape.width, towers)
        ran = copies.sum(1) if alone else copies.max(1)
        passes = -(-ran // max(1, self.tokens // size))
        return Cells(changes, first, flops, int(passes.sum()), 0.0)

    def _through(self, spot: Spot, shape: Shape, towards: bool, reuse: bool) -> float:
        """Operations of one copy of the batch from a spot on, up to the language model's blocks or
        to the end."""
        total = float(self.cost.projectors(shape))
        for number, (name, tower) in enumerate(self.model.towers.items()):
            ours = spot.tower == name and reuse
            layer = max(spot.layer, 0) if ours else 0
            frozen = reuse and embedding(tower) is not None
            if not (frozen and (layer or 2 * number < spot.stage)):
                total += self.cost.embed(name, shape)
            begun = 2 * number >= spot.stage or name == LANGUAGE or not reuse
            if begun and not (name == LANGUAGE and towards):
                total += self.cost.tower(name, shape, layer)
                if ours and self._noted(spot):
                    total -= self.cost.attention(name, shape, layer)
                behind = max(layer, blocks_read(self.model, name))
                total -= self.cost.tower(name, shape, behind) if reuse else 0
        return total if towards else total + shape.prompts * self.cost.head(shape)


def _passes(sizes: Ints, tokens: int) -> int:
    return -(-int(sizes.sum()) // tokens)

"""What a sweep will run, as plain data, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from mechmm.engine.cost import Shape
from mechmm.engine.places import Entry, Ints, Places, Spot
from mechmm.engine.plain import Parts
from mechmm.engine.record import resumes
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TEXT, TokenLayout
from mechmm.model.rows import RESUME
from mechmm.model.tower import Tower

UNITS = ("", "k", "M", "G", "T", "P", "E")

AS_WRITTEN = (
    "blocks in half precision, or with more than norms, projections and MLP, run as written"
)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sweep will run. Cells whose values turn out to be equal are dropped later.

    Attributes:
        sites: for every site where its trials enter: tower, layer, and `enters`: `whole` (with the
            block), `middle` (behind its attention) or `end` (behind the block).
        changes: positions that a cell changes, 0 where the inputs show that nothing changes, so
            that it is answered without a run [site, example].
        first: first position of the language model that runs again [site, example].
        flops: operations of a cell's run [site, example].
        passes: forward passes; naive_flops: of the whole model for every cell.
        state_bytes: recorded activations that are kept at once, at most.
        batch_size: pairs that run together; tokens: of one forward pass, at most.
        reads: what is needed at the end.
        notes: where less is reused than could be, and why.
    """

    sites: pd.DataFrame
    changes: Int[np.ndarray, "site example"]
    first: Int[np.ndarray, "site example"]
    flops: Float[np.ndarray, "site example"]
    passes: int
    naive_flops: float
    state_bytes: int
    batch_size: int
    tokens: int
    reads: str
    notes: tuple[str, ...]

    @property
    def equal(self) -> int:
        """Cells that are answered without a run."""
        return int((self.changes == 0).sum())

    def __str__(self) -> str:
        flops, count = float(self.flops.sum()), self.changes.size
        ratio = self.naive_flops / max(flops, 1)
        lines = [
            f"cells             {count:,}, of which {self.equal:,} need no run",
            f"forward passes    {self.passes:,} of about {self.tokens:,} tokens "
            f"(naive: {count:,} of the whole model)",
            f"operations        {scaled(flops)}FLOP "
            f"(naive: {scaled(self.naive_flops)}FLOP, {ratio:.1f} times as many)",
            f"recorded state    {scaled(self.state_bytes)}B for {self.batch_size} pair(s) at once",
            f"read at the end   {self.reads}",
        ]
        return "\n".join([*lines, *(f"note              {note}" for note in self.notes)])


def scaled(number: float) -> str:
    """A number to three digits with a decimal unit prefix."""
    for unit in UNITS:
        if abs(number) < 1000 or unit == UNITS[-1]:
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def fallbacks(model: HookedMultimodal, spots: dict[str, Spot]) -> list[str]:
    """Where a model or a hook does not allow all reuse, in words."""
    notes, kind = [], model.family.resume
    if kind != "causal":
        notes.append(f"{model.family.architecture}: {RESUME[kind]}")
    if not resumes(model):
        notes.append("trials run whole prompts through all blocks behind the change")
    elif any(s.tower != LANGUAGE for s in spots.values()) and model.family.deepstack(model.config):
        notes.append(
            "vision features enter several language blocks: trials that begin before the language "
            "model run whole prompts through it"
        )
    if resumes(model) and not _sums(model.towers[LANGUAGE]):
        notes.append(AS_WRITTEN)
    entering = {hook: s for hook, s in spots.items() if s.tower == LANGUAGE and s.layer >= 0}
    if resumes(model) and any(hook.endswith(("attn_scores", "pattern")) for hook in entering):
        notes.append("scores and patterns: the block of the change runs whole prompts")
    apart = [h for h, s in entering.items() if h.endswith("hook_z") and s.entry == Entry.WHOLE]
    if resumes(model) and apart:
        notes.append("z does not meet the output projection directly: its block runs again")
    return notes


def _sums(tower: Tower) -> bool:
    return all(Parts.of(tower, layer) is not None for layer in range(len(tower.blocks)))


def predicted_starts(model: HookedMultimodal, layout: TokenLayout) -> Int[np.ndarray, "prompt pos"]:
    """For every position the first one that a change there can reach, by the kind of family."""
    prompts, width = layout.shape
    own = torch.arange(width).expand(prompts, -1)
    first = (layout.modality != PADDING).int().argmax(-1, keepdim=True)
    if model.family.resume == "image spans":
        seen = (layout.modality != TEXT) & (layout.modality != PADDING)
        begins = seen & ~(seen.roll(1, 1) & (layout.image == layout.image.roll(1, 1)))
        begins[:, 0] = seen[:, 0]
        starts = torch.where(begins, own, -1).cummax(1).values
        own = torch.where(seen, starts, own)
    elif model.family.resume != "causal":
        own = torch.zeros_like(own)
    return torch.maximum(own, first).numpy()


def shape_of(batch: Batch, model: HookedMultimodal, wanted: int, rows: int) -> Shape:
    """Sizes of a batch, for what it costs."""
    media = [medium for prompt in batch.layout.media for medium in prompt]
    count = sum(medium.tower_rows for medium in media)
    positions = max((medium.tower_positions for medium in media), default=0)
    own = {name for name in model.towers if name in ("vision", "video", "audio")}
    prompts, width = batch.input_ids.shape
    return Shape(prompts, width, wanted, rows, {name: (count, positions) for name in own})


def alike(places: Places, spots: list[Spot], base: Batch, other: Batch, starts: Ints) -> np.ndarray:
    """Places whose value is the same in two runs, as their inputs show [place]."""
    media = _media_differ(base, other)
    differ = (base.input_ids != other.input_ids).cpu()
    if media:
        differ |= (base.layout.modality != TEXT) & (base.layout.modality != PADDING)
    width = differ.shape[1]
    first = np.where(differ.any(1), differ.int().argmax(1), width)
    reached = np.append(starts, np.full((len(starts), 1), width), axis=1)
    first = reached[np.arange(len(first)), first]
    prompt, differs = places.prompts[places.trial], differ.numpy()
    ours = np.array([spot.tower == LANGUAGE for spot in spots])[places.hook]
    position = np.where(ours, places.position, 0)
    early = position < first[prompt]
    start = np.array([h == "blocks.0.hook_resid_pre" for h in places.hooks])[places.hook]
    early |= start & ~differs[prompt, position]
    return np.where(ours, early, not media)


def _media_differ(base: Batch, other: Batch) -> bool:
    given = {name: v for name, v in base.extra.items() if isinstance(v, torch.Tensor)}
    return not all(torch.equal(value, other.extra[name]) for name, value in given.items())

"""What a sweep changes, as arrays: places in hook tensors, each belonging to one trial.

A trial is one prompt run again with some places changed. A place is (hook, row, position, part) in
the hook's tensor over the whole batch; part is a head, a neuron or an expert, -1 all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from mechmm.model.hooked import HookedMultimodal

Ints = np.ndarray
"""Whole numbers, one axis."""
QUERY_ROWS = ("hook_attn_scores", "hook_pattern")
"""Hooks whose tensor is [batch, head, query, key]: their position is the query's."""


class Entry(IntEnum):
    """Where in a block a run has to begin for a hook to be live."""

    WHOLE = 0
    """With the whole block."""
    MIDDLE = 1
    """Behind attention, whose output is known."""
    END = 2
    """Behind the block, whose output is known: the change is added to the stream."""


Begin = tuple[int, int, bool]
"""Stage and layer of a block, and whether a run begins behind its attention."""
_STREAM = ("hook_resid_post", "hook_mlp_out", "hook_deepstack")
_MIDDLE = ("hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.", "ln1_post.", "ln2_post.")
_INNER = ("mlp.", "attn.hook_z", "attn.hook_result")


@dataclass(frozen=True, order=True)
class Spot:
    """How far a run has come when it reaches a hook.

    Attributes:
        stage: number of the tower or projector in the order in which they run.
        layer: of a tower; -1 before its blocks, their number behind them.
        entry: where in the block.
        tower: name of the tower or prefix of the projector.
    """

    stage: int
    layer: int
    entry: Entry
    tower: str

    @property
    def begin(self) -> Begin:
        """Where a run that goes on from recorded blocks begins for it."""
        return self.stage, self.layer, self.entry != Entry.WHOLE


def by_begin(spots: Iterable[Spot]) -> dict[Begin, Spot]:
    """One spot of all that runs begin at alike, in the order in which they run."""
    return dict(sorted((spot.begin, spot) for spot in spots))


def spot_of(model: HookedMultimodal, hook: str) -> Spot:
    """Where a hook lies."""
    stages = list(model.family.towers)
    prefix, inside, rest = hook.partition("blocks.")
    if inside:
        tower = prefix.rstrip(".") or "language"
        layer, _, name = rest.partition(".")
        entry = _entry(model, tower, int(layer), name)
        return Spot(2 * stages.index(tower), int(layer), entry, tower)
    root = hook.split(".")[0]
    if root in model.family.projectors:
        row = model.family.projectors[root]
        tower = row.tower if row.tower in stages else stages[0]
        return Spot(2 * stages.index(tower) + 1, 0, Entry.WHOLE, root)
    tower = root if root in stages else "language"
    # In a tower of several lists the final norm may stand behind the first of them (Mllama).
    layer = min(model.towers[tower].ends) + 1 if "ln_final" in hook else -1
    return Spot(2 * stages.index(tower), layer, Entry.WHOLE, tower)


def _entry(model: HookedMultimodal, tower: str, layer: int, name: str) -> Entry:
    """Where in its block a run must begin for a hook."""
    lain, row = model.towers[tower], model.towers[tower].row
    if row.post_norm or lain.module(row.attn, layer) is None or row.cross_attn is not None:
        return Entry.END if name == "hook_resid_post" else Entry.WHOLE
    if name in _STREAM:
        return Entry.END
    if name in ("attn.hook_z", "attn.hook_result"):
        linear = lain.linear(layer, "o") is not None and not row.q_gate and not row.gated
        return Entry.MIDDLE if linear else Entry.WHOLE
    return Entry.MIDDLE if name.startswith((*_MIDDLE, *_INNER)) else Entry.WHOLE


@dataclass(frozen=True, eq=False)
class Places:
    """Places by trial, as arrays; those of one trial may lie in many hooks.

    Attributes:
        hooks: names that `hook` numbers.
        prompts: the prompt of every trial [trial].
        trial, hook, row, position, part: [place].
    """

    hooks: tuple[str, ...]
    prompts: Ints
    trial: Ints
    hook: Ints
    row: Ints
    position: Ints
    part: Ints

    def __len__(self) -> int:
        return len(self.trial)

    def chosen(self, keep: np.ndarray) -> Places:
        """Some of the places, by mask or number; the trials stay."""
        parts = (self.trial, self.hook, self.row, self.position, self.part)
        return Places(self.hooks, self.prompts, *(part[keep] for part in parts))

    def of(self, trials: Ints) -> Ints:
        """Numbers of the places of some trials."""
        wanted = np.zeros(len(self.prompts), dtype=bool)
        wanted[trials] = True
        return wanted[self.trial].nonzero()[0]


Values = Callable[[str, Ints, Tensor], Tensor]
"""(hook, numbers of places, what is there now [place, ...]) -> what to put there."""


def unchanged(hook: str, at: Ints, now: Tensor) -> Tensor:
    """Values that leave all as it is."""
    return now


def index(
    hook: str, rows: Ints, positions: Ints, parts: Ints, tensor: Tensor
) -> tuple[Tensor | slice, ...]:
    """The index of some places in a hook's tensor; all of them have a part, or none has.

    Raises:
        ValueError: a position that the hook does not have.
    """
    there = tensor.shape[2 if hook.endswith(QUERY_ROWS) else 1]
    if positions.max(initial=0) >= there:
        raise ValueError(
            f"{hook} has {there} position(s), and so no position {positions.max()}: it is no "
            "sequence of tokens or patches in this model"
        )
    found = (torch.as_tensor(a, device=tensor.device) for a in (rows, positions, parts))
    row, position, part = found
    whole = not len(parts) or parts[0] < 0
    if hook.endswith(QUERY_ROWS):
        return (row, slice(None), position) if whole else (row, part, position)
    return (row, position) if whole else (row, position, part)


def halves(part: Ints) -> list[Ints]:
    """Numbers of the places without a part, and of those with one."""
    return [half for half in ((part < 0).nonzero()[0], (part >= 0).nonzero()[0]) if len(half)]

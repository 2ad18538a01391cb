"""What the clean run loses with one unit at its reference value, for every unit.

    score(u) = m(clean) - m(clean, a_u = a_u_ref at the positions of its span)

The engine of sweeps runs it: every unit goes on from the block that it changes, many of them in one
pass, and a unit that has its reference value in the clean run already takes no run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.cut import Loss
from mechmm.engine.engine import Engine
from mechmm.engine.places import Ints, Places, index
from mechmm.engine.sweep import pruned
from mechmm.engine.units import Home, UnitBatch

TOGETHER = 300_000
"""Places that are listed at once."""


@torch.no_grad()
def exact_unit_scores(batch: UnitBatch) -> Float[Tensor, "example unit"]:
    """The exact score of every unit for every example."""
    contrast = batch.contrast
    part, answers = contrast.clean_part, contrast.answers
    hooks = list(dict.fromkeys(hook for home in batch.homes for hook in home.hooks))
    engine = Engine(contrast.model, part.batch, hooks, part.places, part.rows)
    loss, found = Loss(part, answers, part.reduce(engine.base, answers)), []
    for home in batch.homes:
        spans = len(batch.map.units.spans)
        scores = torch.zeros(batch.examples * spans * home.size)
        for cut in _cuts(batch, home):
            places, values = pruned(engine, cut.places, cut.values)
            for trials, logits in engine.run(places, values):
                lost = loss(logits, places.prompts[trials])
                scores[torch.as_tensor(cut.cells[trials])] = lost
        found.append((home, scores.view(batch.examples, spans, home.size)))
    return batch.joined(found)


class _Cut:
    """Some units of a home, each set to its reference value in a trial of its own per example.

    Args:
        at: by hook: (example, span, row, position) of every place of the home.
        units: which of the home's.

    Attributes:
        places: of all trials.
        cells: of every trial, its number among (example, span, unit).
    """

    def __init__(self, batch: UnitBatch, home: Home, at: dict[str, Ints], units: Ints) -> None:
        self.batch, self.hooks = batch, home.hooks
        spans, many = len(batch.map.units.spans), len(units)
        trials = [(e, s) for e in range(batch.examples) for s in range(spans)]
        self.cells = np.concatenate([(e * spans + s) * home.size + units for e, s in trials])
        prompts = np.repeat(np.array([e for e, _ in trials]), many)
        columns = []
        for number, own in enumerate(at.values()):
            example, span, row, position = own
            first = (example * spans + span) * many
            trial = (first[:, None] + np.arange(many)).ravel()
            every = (np.repeat(x, many) for x in (np.full(len(row), number), row, position))
            columns.append(np.stack([trial, *every, np.tile(units, len(row))]))
        trial, hook, row, position, unit = np.concatenate(columns, axis=1)
        sizes = batch.contrast.clean.values[home.hooks[0]].shape[2:]
        part, self.inside = _halved(unit, home, sizes)
        self.places = Places(home.hooks, prompts, trial, hook, row, position, part)

    def values(self, hook: str, at: Ints, now: Tensor) -> Tensor:
        """The reference values of some places; where a unit is an entry of what is there, the rest
        stays."""
        there = self.places.chosen(at)
        reference = self.batch.contrast.reference.values[hook]
        where = index(hook, there.row, there.position, there.part, reference)
        new = reference[where].to(now)
        if self.inside is None:
            return new
        entry = torch.as_tensor(self.inside[at], device=now.device)
        own = torch.nn.functional.one_hot(entry, now.shape[-1]).bool()
        return torch.where(own, new, now)


def _halved(unit: Ints, home: Home, sizes: torch.Size) -> tuple[Ints, Ints | None]:
    """The part of a hook's value that every unit is, -1: all of it, and the entry of this part."""
    if home.size == 1:
        return np.full(len(unit), -1), None
    if home.size == sizes[0]:
        return unit, None
    return unit // sizes[1], unit % sizes[1]


def _cuts(batch: UnitBatch, home: Home) -> Iterator[_Cut]:
    """The units of a home, as many at a time as places can be listed."""
    at = {hook: _places(batch, home, hook) for hook in home.hooks}
    count = sum(own.shape[1] for own in at.values())
    step = max(1, TOGETHER // max(1, count))
    for start in range(0, home.size if count else 0, step):
        yield _Cut(batch, home, at, np.arange(start, min(start + step, home.size)))


def _places(batch: UnitBatch, home: Home, hook: str) -> Ints:
    """(example, span, row, position) of every place of a home [four, place]."""
    value, spans = batch.contrast.clean.values[hook], batch.spans(home)
    own = batch.own(home, value).cpu()
    there = spans >= 0
    if own.ndim:
        there = there & own[..., 0]
    row, position = there.nonzero(as_tuple=True)
    found = torch.stack([batch.prompts(home)[row], spans[row, position], row, position])
    return found.numpy()

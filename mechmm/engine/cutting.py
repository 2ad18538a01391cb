"""Every edge cut alone: what the clean run loses with this edge at its reference value.

    lost(u -> v) = m(clean) - m(clean, but v reads x_v - (u_clean - u_ref))

is what a run of `engine.splice` without this edge loses. Here each is a trial of the engine, which
pays for what comes behind the reader alone. Where nothing has changed that a writer wrote, nothing
runs.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.changes import Changes
from mechmm.engine.contrast import Contrast
from mechmm.engine.cut import Loss, cuts
from mechmm.engine.cut_at_hooks import AtHooks, hooks_of_cuts
from mechmm.engine.cut_within import Within, may
from mechmm.engine.engine import Engine
from mechmm.engine.wiring import Group


@torch.no_grad()
def edge_losses(contrast: Contrast) -> Float[Tensor, "example edge"]:
    """What every edge alone is worth to the clean run of every example of a batch."""
    return _Cutting(contrast).all()


class _Cutting:
    """All edges of one contrast."""

    def __init__(self, contrast: Contrast) -> None:
        self.contrast, self.wiring = contrast, contrast.wiring
        self.groups = [group for group in self.wiring.readers if group.tower in contrast.places]
        self.engine = self._engine()
        part, answers = contrast.clean_part, contrast.answers
        loss = Loss(part, answers, part.reduce(self.engine.base, answers))
        self.changes = Changes(contrast)
        self.at_hooks = AtHooks(contrast, self.engine, self.changes, loss)
        self.within = Within(contrast, self.engine, self.changes, loss)

    def _engine(self) -> Engine:
        """One that knows all hooks that it needs; most often those are few."""
        model, part = self.contrast.model, self.contrast.clean_part
        for guess in (True, False):
            left = [g for g in self.groups if not (guess and may(model, g))]
            hooks = hooks_of_cuts(model, self.wiring, left)
            engine = Engine(model, part.batch, hooks, part.places, part.rows)
            if all(Within.fits(engine, g) for g in self.groups if g not in left):
                break
        return engine

    def all(self) -> Float[Tensor, "example edge"]:
        """Block by block of the graph."""
        examples = len(self.contrast.clean_part.batch)
        sums = [torch.zeros(examples, *block.shape) for block in self.wiring.graph.blocks]
        for number, group in enumerate(self.wiring.readers):
            if group not in self.groups:
                continue
            if group.kind == "states":
                sums[number][:, 0, 0] = self.at_hooks.states(number)
                continue
            self._block(number, group, sums[number])
        return torch.cat([block.flatten(1) for block in sums], dim=1)

    def _block(self, number: int, group: Group, sums: Tensor) -> None:
        """All edges into a group of readers [example, span, writer, reader]."""
        within = Within.fits(self.engine, group)
        way = self.within if within else self.at_hooks
        how = {"together": not within, "shared": within and self.within.last(group)}
        block = self.wiring.graph.blocks[number]
        writers, readers = np.arange(*block.writers), range(block.shape[2])
        for s, span in enumerate(block.spans):
            live = self.changes.spread[group.tower].live(writers, span, len(sums))
            for cut in cuts(number, span, writers, readers, live, way.most, **how):
                rows, columns = cut.prompts, cut.writers - block.writers[0]
                carried = torch.as_tensor(live.T[np.ix_(rows, columns)])[:, :, None]
                where = (torch.as_tensor(i) for i in np.ix_(rows, columns, cut.readers))
                a, b, c = where
                sums[a, s, b, c] = way.lost(cut).permute(2, 1, 0) * carried

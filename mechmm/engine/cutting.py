"""Every edge cut alone: what the clean run loses with this edge at its reference value.

    lost(u -> v) = m(clean) - m(clean, but v reads x_v - (u_clean - u_ref))

is what a run of `engine.splice` without this edge loses. Here each is a trial of the engine, which
pays for what comes behind the reader alone. Where nothing has changed that a writer wrote, nothing
runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmm.engine.changes import Changes
from mechmm.engine.contrast import Contrast
from mechmm.engine.cut import Cut, Loss, split
from mechmm.engine.cut_at_hooks import AtHooks, hooks_of_cuts
from mechmm.engine.cut_within import Within, may
from mechmm.engine.engine import Engine
from mechmm.engine.wiring import Group


@torch.no_grad()
def edge_losses(
    contrast: Contrast,
    edges: Bool[np.ndarray, " edge"] | None = None,
    tokens: int | None = None,
) -> Float[Tensor, "example edge"]:
    """What every edge alone is worth to the clean run of every example of a batch.

    Args:
        edges: which are cut, all others are 0; None: all.
        tokens: of one forward pass, about; None: found by a short trial on the model.
    """
    return _Cutting(contrast, tokens).all(edges)


class _Cutting:
    """The edges of one contrast."""

    def __init__(self, contrast: Contrast, tokens: int | None) -> None:
        self.contrast, self.wiring, self.tokens = contrast, contrast.wiring, tokens
        self.groups = [group for group in self.wiring.readers if group.tower in contrast.places]
        self.engine = self._engine()
        part, answers = contrast.clean_part, contrast.answers
        loss = Loss(part, answers, part.reduce(self.engine.base, answers))
        self.changes = Changes(contrast)
        self.at_hooks = AtHooks(contrast, self.engine, self.changes, loss)
        self.within = Within(contrast, self.engine, self.changes, loss)

    def _engine(self) -> Engine:
        """One that knows all hooks that are changed; most often those are few."""
        left = [group for group in self.groups if not may(self.contrast.model, group)]
        engine = self._with(left)
        if all(Within.fits(engine, group) for group in self.groups if group not in left):
            return engine
        return self._with(self.groups)

    def _with(self, groups: list[Group]) -> Engine:
        model, part = self.contrast.model, self.contrast.clean_part
        hooks = hooks_of_cuts(model, self.wiring, groups)
        rest = (part.batch, hooks, part.places, part.rows)
        return Engine(model, *rest, tokens=self.tokens)

    def all(self, edges: Bool[np.ndarray, " edge"] | None) -> Float[Tensor, "example edge"]:
        """Block by block of the graph."""
        graph, examples = self.wiring.graph, len(self.contrast.clean_part.batch)
        wanted = graph.by_block(np.ones(len(graph), dtype=bool) if edges is None else edges)
        sums = [torch.zeros(examples, *block.shape) for block in graph.blocks]
        for number, group in enumerate(self.wiring.readers):
            if group not in self.groups:
                continue
            if group.kind == "states" and wanted[number].any():
                lost = self.at_hooks.states(number) * torch.as_tensor(wanted[number][0, 0])
                sums[number][:, 0, 0] = lost
                continue
            for cut in self._whole(number, wanted[number]):
                self._cut(cut, group, sums[number])
        return torch.cat([block.flatten(1) for block in sums], dim=1)

    def _whole(self, number: int, wanted: Bool[np.ndarray, "span writer reader"]) -> Iterator[Cut]:
        """The wanted edges of a block of the graph, those of all readers together that read the
        same writers."""
        block = self.wiring.graph.blocks[number]
        prompts = np.arange(len(self.contrast.clean_part.batch))
        for span, some in zip(block.spans, wanted, strict=True):
            for column in np.unique(some, axis=1).T:
                writers = block.writers[0] + np.flatnonzero(column)
                readers = np.flatnonzero((some == column[:, None]).all(0))
                if len(writers):
                    yield Cut(number, span, writers, readers, prompts)

    def _cut(self, cut: Cut, group: Group, sums: Tensor) -> None:
        """Note what edges are worth [example, span, writer, reader]."""
        block, fits = self.wiring.graph.blocks[cut.number], Within.fits(self.engine, group)
        way = self.within if fits else self.at_hooks
        how = {"together": not fits, "shared": fits and self.within.last(group)}
        spread = self.changes.spread[group.tower]
        live = spread.live(cut.writers, cut.span, len(cut.prompts))
        for part in split(cut, live, way.most, **how):
            own = live[np.ix_(np.isin(cut.writers, part.writers), part.prompts)]
            lost = way.lost(part) * torch.as_tensor(own)  # [reader, writer, prompt]
            columns = part.writers - block.writers[0]
            at = np.ix_(part.prompts, columns, part.readers)
            prompt, writer, reader = (torch.as_tensor(number) for number in at)
            sums[prompt, block.spans.index(cut.span), writer, reader] = lost.permute(2, 1, 0)

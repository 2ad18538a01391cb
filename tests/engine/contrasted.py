"""A tiny model's clean and corrupt run, and edge scores by brute force.

Brute force adds eps(u, v) (u_clean - u_corrupt) to what every reader v reads in the corrupt run,
through the model's own norms and projections, and differentiates the metric by every eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mechmm.data.metrics import Answers, Reading, logit_diff, readings
from mechmm.engine.contrast import Contrast, streams_of
from mechmm.engine.edges import edge_scores
from mechmm.engine.flow import Edit, hooks_of, slopes, slopes_at, stem, values
from mechmm.engine.readers import Reader
from mechmm.engine.units import UnitBatch, UnitMap, unit_map
from mechmm.engine.wiring import Group, Wiring
from mechmm.engine.writers import grid
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import TEXT
from mechmm.testing import tiny_hf, tiny_inputs

KINDS = {"qwen2_audio": "audio"}
ALONE = ("idefics3", "smolvlm")
"""Families whose tiny inputs for two prompts have media of different sizes."""
NO_EDGES = ("florence2",)
"""Families whose residual stream is no sum."""


@dataclass
class Contrasted:
    """Both runs of one family's tiny model."""

    family: str
    spans: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    granularity: str = "node"

    @cached_property
    def model(self) -> HookedMultimodal:
        return HookedMultimodal.from_hf(tiny_hf(self.family, **dict(self.options)))

    @cached_property
    def wiring(self) -> Wiring:
        return self.map.wiring

    @cached_property
    def map(self) -> UnitMap:
        return unit_map(self.model, self.spans, self.granularity)

    @cached_property
    def units(self) -> UnitBatch:
        return UnitBatch(self.contrast, self.map)

    @cached_property
    def batches(self) -> tuple[Batch, Batch]:
        """Other words and other media at the same places."""
        sizes = ((1,), [6]) if self.family in ALONE else ((1, 1), [6, 9])
        inputs = tiny_inputs(self.model, *sizes, kind=KINDS.get(self.family, "image"))
        clean = Batch.from_inputs(self.model, **inputs)
        random = torch.Generator().manual_seed(5)
        other = {
            name: torch.randn(value.shape, generator=random).to(value)
            if value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        ids, text = inputs["input_ids"].clone(), clean.layout.modality == TEXT
        if (clean.layout.modality != TEXT).any() and "pixel_values" not in inputs:
            text[:, :-3] = False  # pictures may be tokens
        ids[text] = ids[text].roll(3)
        return clean, Batch.from_inputs(self.model, **{**other, "input_ids": ids})

    @cached_property
    def answers(self) -> Answers:
        count = len(self.batches[0])
        return Answers(torch.full((count, 1), 7), torch.full((count, 1), 11))

    @cached_property
    def parts(self) -> tuple[Reading, Reading]:
        clean, corrupt = (readings(b, self.answers, logit_diff)[0] for b in self.batches)
        return clean, corrupt

    @cached_property
    def contrast(self) -> Contrast:
        written = hooks_of(self.model, self.wiring)[0]
        every = [*written, *streams_of(self.model, self.wiring), *self.map.hidden]
        names = list(dict.fromkeys(every))
        clean, corrupt = (values(self.model, p, self.answers, names) for p in self.parts)
        rest = (self.answers, clean, corrupt, tuple(range(len(self.batches[0]))))
        return Contrast(self.model, self.wiring, *self.parts, *rest)

    def scores(self) -> Tensor:
        """Edge scores of the engine [example, edge]."""
        _, at, normed = hooks_of(self.model, self.wiring)
        flow = slopes(self.model, self.parts[1], self.answers, at, normed)
        readers = [Reader(self.model, group) for group in self.wiring.readers]
        for reader in readers:
            if reader.ran(flow):
                reader.add(flow)
        contrast = self.contrast
        return edge_scores(
            self.wiring, contrast.writers, readers, *contrast.changes(), contrast.places
        )

    def brute(self) -> Tensor:
        """Edge scores by brute force, summed over examples [edge]; NaN for keys and values of
        cross-attention, which read no stream."""
        factors = [torch.zeros(block.shape[1:]) for block in self.wiring.graph.blocks]
        edits: list[Edit] = []
        for number, group in enumerate(self.wiring.readers):
            if group.kind != "states" and group.tower in self.contrast.places:
                edits += self._edits(group, partial(self._shift, number, factors[number]))
        with torch.enable_grad(), self.model.hooks(fwd_hooks=edits):
            for factor in factors:
                factor.requires_grad_()
            total = self.parts[1].reduce(self.parts[1].logits(self.model), self.answers).sum()
        found = torch.autograd.grad(total, factors, allow_unused=True)
        nothing = (torch.full_like(factor, torch.nan) for factor in factors)
        pairs = zip(found, nothing, strict=True)
        return torch.cat([(no if slope is None else slope).flatten() for slope, no in pairs])

    def _shift(self, number: int, factor: Tensor) -> Tensor:
        """What is added to what the readers of a block read [reader, place, d_model]."""
        contrast = self.contrast
        seen = [w for w in contrast.writers if w.group in self.wiring.before(number)]
        at = grid(contrast.clean.values[seen[0].hooks[0]])
        both = (*contrast.changes(), at)
        changes = torch.cat([writer.change(*both) for writer in seen])
        return torch.einsum("ur,upd->rpd", factor, changes)

    def _edits(self, group: Group, shift: Callable[[], Tensor]) -> list[Edit]:
        hooks = [h for h in slopes_at(self.model, group) if h in self.model.hook_dict]
        entered = f"{stem(self.model, group)}.hook_resid_pre"
        stream = self.contrast.reference.values.get(entered)
        if group.kind in ("heads", "queries"):
            reader = Reader(self.model, group)
            return [
                (hook, partial(self._project, reader, half, stream, shift))
                for half, hook in enumerate(hooks)
            ]
        if group.kind == "mlp" and len(hooks) == 2:
            return [
                (hook, partial(self._hidden, group, name, stream, shift))
                for hook, name in zip(hooks, ("mlp_gate", "mlp_in"), strict=True)
            ]

        def move(sign: int, value: Tensor, hook: Any) -> Tensor:
            return value + sign * shift()[0].view(value.shape)

        # What else reads the stream behind the second hook shall not see it.
        return [(hook, partial(move, sign)) for hook, sign in zip(hooks, (1, -1), strict=False)]

    def _project(self, reader, half, stream, shift, value, hook):
        own = shift()[reader.slots()[half]]
        x = stream.flatten(0, 1)[None] + own
        new = reader.project_each(half, x, torch.arange(len(own))).view(value.shape)
        return value + (new - new.detach())

    def _hidden(self, group, name, stream, shift, value, hook):
        tower = self.model.towers[group.tower]
        norm = tower.module(tower.row.ln1, group.layer) if tower.row.mid is None else None
        x = stream + shift()[0].view(stream.shape)
        layer = tower.linear(group.layer, name)
        new = linear(x if norm is None else norm(x), layer.weight, layer.bias)
        return value + (new - new.detach()).view(value.shape)

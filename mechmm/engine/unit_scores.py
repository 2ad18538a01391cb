"""Unit scores: what a unit's change would do to the metric, to first order or exactly.

    score(u) = sum over the positions of its span of (a_u_clean - a_u_ref) . dm/da_u

a_u is the unit's own activation at its hook, and dm/da_u its whole slope, over all ways to the
metric. The product is taken as soon as the backward pass comes to a hook, so that no slopes are
kept. Attribution patching: Nanda 2023; of nodes and neurons: Kramár et al. 2403.00745.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import Reading
from mechmm.engine.atp import atp_scores
from mechmm.engine.estimate import constant
from mechmm.engine.flow import Edit
from mechmm.engine.unit_exact import exact_unit_scores
from mechmm.engine.units import Home, UnitBatch


def unit_scores(batch: UnitBatch, method: str, steps: int) -> Float[Tensor, "example unit"]:
    """The score of every unit for every example.

    Args:
        method: as `mm.attribute`'s, but `random`; `atp*` of nodes alone.
        steps: of integrated gradients.
    """
    if method == "exact":
        return exact_unit_scores(batch)
    if method == "eap-ig-activations":
        return _by_home(batch, steps)
    if method == "atp*":
        return of_edges(batch, atp_scores(batch.contrast))
    sums, contrast = _Sums(batch, batch.homes), batch.contrast
    at = contrast.corrupt_part if contrast.paired else contrast.clean_part
    inputs = [home for home in batch.homes if home.group.kind == "input"]
    if method == "eap-ig-inputs":
        runs = [(at, towards(batch, inputs, k / steps)) for k in range(1, steps + 1)]
    elif method == "clean-corrupt":
        runs = [(contrast.clean_part, []), (contrast.corrupt_part, [])]
    else:
        runs = [(at, [])]
    for part, edits in runs:
        sums.add(part, edits)
    return sums.mean()


def _by_home(batch: UnitBatch, steps: int) -> Float[Tensor, "example unit"]:
    """For every layer's units, slopes of runs in which what they are is on the way."""
    contrast, total = batch.contrast, []
    at = contrast.corrupt_part if contrast.paired else contrast.clean_part
    for home in batch.homes:
        sums = _Sums(batch, [home])
        for k in range(1, steps + 1):
            sums.add(at, towards(batch, [home], k / steps))
        total.append(sums.mean())
    return torch.stack(total).sum(0)


def of_edges(
    batch: UnitBatch, scores: Float[Tensor, "example edge"]
) -> Float[Tensor, "example unit"]:
    """The sum of the scores of the edges out of every node."""
    graph, units = batch.contrast.wiring.graph, batch.map.units
    number = torch.full((len(units.writers), len(units.spans)), len(units))
    number[units.src, units.span] = torch.arange(len(units))
    sums = torch.zeros(len(scores), len(units) + 1)  # the last is for what is no unit
    return sums.index_add_(1, number[graph.src, graph.span], scores)[:, :-1]


def towards(batch: UnitBatch, homes: Sequence[Home], way: float) -> list[Edit]:
    """Edits that set some units a part of the way from the reference to clean."""
    return [(hook, partial(_moved, batch, home, way)) for home in homes for hook in home.hooks]


def _moved(batch: UnitBatch, home: Home, way: float, value: Tensor, hook: Any) -> Tensor:
    return torch.where(batch.own(home, value), batch.contrast.between(hook.name, way), value)


class _Sums:
    """Scores of the units of some homes, summed over runs."""

    def __init__(self, batch: UnitBatch, homes: Sequence[Home]) -> None:
        self.batch, self.homes, self.runs = batch, homes, 0
        self.at: dict[str, list[int]] = defaultdict(list)
        for number, home in enumerate(homes):
            for hook in home.hooks:
                self.at[hook].append(number)
        self.bins = [self._bins(home) for home in homes]
        many = batch.examples * len(batch.map.units.spans) + 1  # the last is for padding
        device = batch.contrast.model.device
        self.sums = [torch.zeros(many, home.size, device=device) for home in homes]

    def _bins(self, home: Home) -> Tensor:
        """Where the places of a home are summed up: by example and span."""
        spans, many = self.batch.spans(home), len(self.batch.map.units.spans)
        bins = self.batch.prompts(home)[:, None] * many + spans
        return torch.where(spans < 0, self.batch.examples * many, bins).flatten()

    def add(self, part: Reading, edits: Sequence[Edit]) -> None:
        """One more run with gradients."""
        self.runs += 1
        contrast = self.batch.contrast
        backwards(contrast.model, part, contrast.answers, list(self.at), self._take, edits)

    def _take(self, hook: str, slope: Tensor) -> None:
        clean, reference = (values[hook] for values in self.batch.contrast.changes())
        product = (clean.float() - reference.float()) * slope.float()
        for number in self.at[hook]:
            home, sums = self.homes[number], self.sums[number]
            own = home.summed(product * self.batch.own(home, slope)).flatten(0, 1)
            sums.index_add_(0, self.bins[number].to(own.device), own.to(sums))

    def mean(self) -> Float[Tensor, "example unit"]:
        """The mean over runs."""
        shape = (self.batch.examples, len(self.batch.map.units.spans))
        found = (sums[:-1].unflatten(0, shape) / self.runs for sums in self.sums)
        return self.batch.joined(list(zip(self.homes, found, strict=True)))


@torch.inference_mode(mode=False)
def backwards(
    model: Any,
    part: Reading,
    answers: Any,
    hooks: Sequence[str],
    take: Callable[[str, Tensor], None],
    edits: Sequence[Edit] = (),
) -> None:
    """One run and its backward pass, which hands over the slope of the metric at every hook as it
    comes by.

    Args:
        take: (hook, slope [row, pos, ...]).
        edits: are made before.
    """

    def catch(value: Tensor, hook: Any) -> Tensor:
        first = not value.requires_grad
        value = value.detach().requires_grad_() if first else value
        value.register_hook(partial(_handed, take, hook.name))
        return value.clone() if first else value  # nothing may write into a leaf

    live = [*edits, *((name, catch) for name in hooks)]
    with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=live):
        metric = part.reduce(part.logits(model), answers).sum()
        if metric.requires_grad:
            metric.backward()


def _handed(take: Callable[[str, Tensor], None], hook: str, slope: Tensor) -> None:
    with torch.no_grad():
        take(hook, slope)

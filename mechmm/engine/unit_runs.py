"""Circuits of units alone: every unit outside is set to its reference value at its hook.

The clean prompt runs. A unit that is kept does what its inputs make it do in this very run; one
that is not has, at the positions of the span, what it has in the reference run (the corrupt prompt,
the mean, zero). With every unit kept that is the clean run. With none it is the corrupt one, as the
embeddings of patches and tokens are units too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import Metric
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import Ablated, Keep, each_alone
from mechmm.engine.contrast import contrasts
from mechmm.engine.flow import Edit
from mechmm.engine.units import Home, UnitBatch, UnitMap, unit_map
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.circuit import Circuit
from mechmm.results.units import Units


def run_units(
    model: HookedMultimodal,
    pairs: PairDataset,
    own: UnitMap,
    keeps: Sequence[Keep],
    metric: Metric,
    target: str = "corrupt",
    batch_size: int = 16,
) -> Ablated:
    """The metric with some units kept, with all and with none; a run for each circuit and batch.

    Args:
        own: the units of the model (`mapped_as`, `unit_map`).
        keeps: which of them, one array per circuit.
        target: `"corrupt"`, `"mean"` or `"zero"`.

    Raises:
        ValueError: an unknown target.
        SpanError: a span of the units that the pairs do not have.
    """
    found = contrasts(model, pairs, own.wiring, metric, target, batch_size, also=own.hidden)
    return each_alone(
        found, lambda part: partial(kept_alone, UnitBatch(part, own)), keeps, len(own.units)
    )


def mapped_as(model: HookedMultimodal, circuits: Sequence[Circuit]) -> UnitMap:
    """Where the units of some circuits are in a model.

    Raises:
        ValueError: circuits of another model, or of different units; an empty one.
    """
    units = circuits[0].graph
    assert isinstance(units, Units)
    own = unit_map(model, units.spans[:-1], units.granularity)
    for number, circuit in enumerate(circuits):
        if not circuit.graph.matches(units):
            raise ValueError(
                f"circuit 0 is of {units}, circuit {number} of {circuit.graph}; give circuits of "
                "one model, with the same granularity and spans"
            )
        if not circuit.keep.any():
            raise ValueError(f"the circuit is empty; keep more {units.noun} (n=, fraction=)")
    if not units.matches(own.units):
        raise ValueError(
            f"the circuit is of {units}, the model has {own.units}; find circuits on the model "
            "that they are tested on"
        )
    return own


@torch.no_grad()
def kept_alone(batch: UnitBatch, keep: Keep) -> Float[Tensor, " example"]:
    """The metric of every example with some units kept."""
    contrast, edits = batch.contrast, cuts(batch, keep)
    with contrast.model.hooks(fwd_hooks=edits):
        return contrast.clean_part.reduce(
            contrast.clean_part.logits(contrast.model), contrast.answers
        )


def cuts(batch: UnitBatch, keep: Keep) -> list[Edit]:
    """The edits that set all units outside a circuit to their reference values."""
    by_tower, spans = batch.map.units.by_tower(keep), len(batch.map.units.spans)
    edits: list[Edit] = []
    for home in batch.homes:
        # What has no span of the tower, and padding (-1), stays as it is.
        table = torch.ones(spans + 1, home.size, dtype=torch.bool)
        there = list(batch.map.units.towers[home.group.tower])
        table[there] = torch.from_numpy(by_tower[home.group.tower][:, slice(*home.units)])
        if not table.all():
            kept = table[batch.spans(home)]
            edits += [(hook, partial(_cut, batch, home, kept)) for hook in home.hooks]
    return edits


def _cut(batch: UnitBatch, home: Home, kept: Tensor, value: Tensor, hook: Any) -> Tensor:
    reference = batch.contrast.reference.values[hook.name].to(value)
    stays = home.spread(kept.to(value.device), value) | ~batch.own(home, value)
    return torch.where(stays, value, reference)

"""Where the units of a graph are in a model: nodes or neurons, each a part of what a hook shows.

| unit | hook |
|---|---|
| head, or one of its dimensions | `attn.hook_z` |
| MLP | `hook_mlp_out` |
| hidden unit of an MLP | `mlp.hook_post` |
| embeddings, projector | `blocks.0.hook_resid_pre`, where pictures stand and where not |
| projector of a cross-attention model | all `cross_attn.hook_k` and `hook_v` |
| DeepStack, mixing layer without heads | `hook_deepstack`, `hook_attn_out` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmm.engine.contrast import Contrast
from mechmm.engine.flow import slopes_at, stem, written_at
from mechmm.engine.hidden import HIDDEN, PROJECTOR, behind
from mechmm.engine.sites import READING, TEXT_SPANS
from mechmm.engine.wiring import Group, Wiring, wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.tower import Tower
from mechmm.results.graph import Graph, table_of
from mechmm.results.units import GRANULARITIES, Units


@dataclass(frozen=True)
class Home:
    """Units that one group of writers has.

    Attributes:
        group: which writers.
        hooks: what shows them; each has all of them.
        units: (first, number of the one behind the last) among those of the tower.
    """

    group: Group
    hooks: tuple[str, ...]
    units: tuple[int, int]

    @property
    def size(self) -> int:
        """How many units."""
        return self.units[1] - self.units[0]

    def summed(
        self, value: Float[Tensor, "row pos *inside"]
    ) -> Float[Tensor, "row pos {self.size}"]:
        """The sum over every unit's part of a hook's value."""
        return value.flatten(2).unflatten(2, (self.size, -1)).sum(-1)

    def spread(
        self, units: Bool[Tensor, "row pos {self.size}"], like: Float[Tensor, "row pos *inside"]
    ) -> Bool[Tensor, "row pos *inside"]:
        """What every unit has at all of its part of a hook's value."""
        times = like[0, 0].numel() // self.size
        return units.repeat_interleave(times, dim=2).view(like.shape)


@dataclass(frozen=True, eq=False)
class UnitMap:
    """Units and where they are in the model."""

    wiring: Wiring
    units: Units
    homes: tuple[Home, ...]

    @property
    def hidden(self) -> list[str]:
        """Hooks of hidden units, which edges do not need."""
        hooks = (hook for home in self.homes for hook in home.hooks)
        return [hook for hook in hooks if hook.endswith(("mlp.hook_post", HIDDEN))]


def graph(
    model: HookedMultimodal, spans: Sequence[str] = (), granularity: str = "edge"
) -> Graph | Units:
    """The circuit graph of a model, or its nodes or neurons.

    Args:
        spans: names that tell positions apart; each position belongs to the first that covers it,
            and to `rest` where none does.
        granularity: `"edge"`; `"node"`: embeddings, heads, MLPs, projector; `"neuron"`: hidden
            units of MLPs and single dimensions of heads.

    Raises:
        ValueError: an unknown granularity.
        StreamError: a model whose residual stream is no sum of what its components write.
    """
    check_granularity(granularity)
    if granularity == "edge":
        return wired(model, spans).graph
    return unit_map(model, spans, granularity).units


def check_granularity(granularity: str) -> None:
    """Refuse an unknown granularity.

    Raises:
        ValueError: with those that there are.
    """
    if granularity not in GRANULARITIES:
        known = ", ".join(GRANULARITIES)
        raise ValueError(f"unknown granularity {granularity!r}; use {known}")


def unit_map(model: HookedMultimodal, spans: Sequence[str], granularity: str) -> UnitMap:
    """The units of a model and where they are (arguments and errors as `graph`)."""
    wiring = wired(model, spans)
    sizes = np.ones(len(wiring.graph.writers), dtype=np.int64)
    if granularity == "neuron":
        for group in wiring.writers:
            sizes[slice(*group.nodes)] = neurons(model, group)
    names = wiring.graph.spans
    towers = {
        tower: tuple(i for i, s in enumerate(names) if tower in READING or s not in TEXT_SPANS)
        for tower in dict.fromkeys(group.tower for group in wiring.writers)
    }
    units = Units(wiring.graph, granularity, sizes, towers)
    first = {part.tower: part.first for part in units.parts}
    homes = []
    for group in wiring.writers:
        start = int(sizes[first[group.tower] : group.nodes[0]].sum())
        stop = start + int(sizes[slice(*group.nodes)].sum())
        hooks = _hooks(model, wiring, group, granularity)
        homes.append(Home(group, hooks, (start, stop)))
    return UnitMap(wiring, units, tuple(homes))


def projector_map(model: HookedMultimodal, spans: Sequence[str]) -> UnitMap:
    """The hidden units of a projector that has some; in the graph it is one node, which they are
    parts of (errors as `graph`)."""
    wiring, size = wired(model, spans), behind(model).in_features
    names = wiring.graph.spans
    own = table_of([(PROJECTOR, PROJECTOR, "mlp", -1, -1)])
    alone = replace(wiring.graph, writers=own)
    there = tuple(i for i, span in enumerate(names) if span not in TEXT_SPANS)
    units = Units(alone, "neuron", np.array([size]), {PROJECTOR: there})
    home = Home(Group(PROJECTOR, "mlp", -1, (0, 1)), (HIDDEN,), (0, size))
    return UnitMap(wiring, units, (home,))


def neurons(model: HookedMultimodal, group: Group) -> int:
    """Neurons of every writer of a group; 1 where it has none of its own."""
    tower = model.towers[group.tower]
    if group.kind == "heads":
        return tower.d_head(group.layer)
    linear = tower.linear(group.layer, "mlp_out") if group.kind == "mlp" else None
    hidden = linear is not None and not _mixture(tower, group.layer)
    there = f"{stem(model, group)}.mlp.hook_post" in model.hook_dict
    return linear.in_features if linear is not None and hidden and there else 1


def _mixture(tower: Tower, layer: int) -> bool:
    """Whether an MLP is a mixture of experts, whose hidden units differ from token to token."""
    return tower.part(layer, "mlp", tower.row.experts) is not None


def _hooks(
    model: HookedMultimodal, wiring: Wiring, group: Group, granularity: str
) -> tuple[str, ...]:
    if group.kind == "mlp" and granularity == "neuron" and neurons(model, group) > 1:
        return (f"{stem(model, group)}.mlp.hook_post",)
    if hooks := written_at(model, group):
        return (hooks[0],)
    states = [own for own in wiring.readers if own.kind == "states"]
    return tuple(hook for own in states for hook in slopes_at(model, own))


@dataclass(frozen=True, eq=False)
class UnitBatch:
    """The units of a map in both runs of one batch of pairs."""

    contrast: Contrast
    map: UnitMap

    @cached_property
    def homes(self) -> list[Home]:
        """Those whose hooks fired: a tower may not run."""
        return [home for home in self.map.homes if home.hooks[0] in self.contrast.clean.values]

    @property
    def examples(self) -> int:
        """Pairs of the batch."""
        return len(self.contrast.indices)

    def own(self, home: Home, value: Tensor) -> Bool[Tensor, "..."]:
        """Which places of a hook's value belong to a home [row, pos, ...], or all."""
        writers = [w for w in self.contrast.writers if w.group == home.group]
        everything = torch.ones((), dtype=torch.bool, device=value.device)
        return writers[0].own(value) if writers else everything

    @cached_property
    def _spans(self) -> dict[str, Tensor]:
        return self.contrast.spans()

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        return self.contrast.rows()

    def spans(self, home: Home) -> Int[Tensor, "row pos"]:
        """The number of the span of every place of a home; -1 for padding."""
        if self._across(home):
            value, last = self.contrast.clean.values[home.hooks[0]], len(self.map.units.spans) - 1
            return torch.full(value.shape[:2], last)
        return self._spans[home.group.tower]

    def prompts(self, home: Home) -> Int[Tensor, " row"]:
        """The example of every row of a home's hooks; 0 for rows without places."""
        if self._across(home):
            rows = len(self.contrast.clean.values[home.hooks[0]])
            return torch.arange(self.examples).repeat_interleave(rows // self.examples)
        return self._rows[home.group.tower]

    def _across(self, home: Home) -> bool:
        """Whether a home is in the keys and values of cross-attention, which have no positions of
        the prompt."""
        return home.hooks[0].endswith(("cross_attn.hook_k", "cross_attn.hook_v"))

    def joined(
        self, found: Sequence[tuple[Home, Float[Tensor, "example span _"]]]
    ) -> Float[Tensor, "example unit"]:
        """What homes have as one row of units per example; 0 for homes that are left out."""
        columns = []
        for part in self.map.units.parts:
            whole = torch.zeros(self.examples, len(self.map.units.spans), part.width)
            for home, values in found:
                if home.group.tower == part.tower:
                    whole[..., slice(*home.units)] = values.float().cpu()
            columns.append(whole[:, list(part.spans)].flatten(1))
        return torch.cat(columns, dim=1)

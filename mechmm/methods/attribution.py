"""Attribution: what every edge, node or neuron of a model is worth, from a few gradients.

With u what a writer writes, v what a reader reads and m the metric (larger = more the clean
answer), the first-order effect of setting u to its clean value for v alone is

    score(u -> v) = sum over positions, d_model of (u_clean - u_ref) . dm/dv

- `"eap"`: the gradient at the reference run, the corrupt prompt's (with the targets `mean` and
  `zero`, which no prompt gives: at the clean run). Syed et al. 2310.10348.
- `"eap-ig-inputs"`: its mean over `steps` runs whose inputs, token embeddings and patch
  embeddings, are ref + k / steps (clean - ref), k = 1..steps. Hanna et al. 2403.17806.
- `"eap-ig-activations"`: for the edges out of one layer's components, its mean over `steps` runs in
  which what these write is ref + k / steps (clean - ref). Same paper.
- `"clean-corrupt"`: the mean of the gradients at both runs (corrupt target).
- `"atp*"`: as `"eap"`, but of the edges into queries and keys the softmax of attention is computed
  again, which is flat where attention is saturated. Kramár et al. 2403.00745.
- `"exact"`: no estimate: m(clean) - m(clean with this edge at its reference value), a trial of the
  engine each.
- `"random"`: standard normal numbers, the null.

Nodes and neurons are scored alike, with a their own activation (`mechmm.engine.units` says at which
hook) and the gradient there, over all ways to the metric:

    score(a) = sum over the positions of a span of (a_clean - a_ref) . dm/da

To first order a node's score is the sum of those of the edges out of it. With `"atp*"` that is what
it is. A positive score supports the clean answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.atp import atp_scores
from mechmm.engine.contrast import Contrast, check_contrast, contrasts
from mechmm.engine.cutting import edge_losses
from mechmm.engine.edges import edge_scores
from mechmm.engine.estimate import check_gradient
from mechmm.engine.flow import Edit, Flow, hooks_of, slopes, slopes_at
from mechmm.engine.readers import Reader
from mechmm.engine.spans import span_names
from mechmm.engine.unit_scores import unit_scores
from mechmm.engine.units import UnitBatch, UnitMap, check_granularity, unit_map
from mechmm.engine.wiring import Group, Wiring, wired
from mechmm.engine.writers import Writer
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit, by_layer, chosen_edges
from mechmm.results.graph import Graph
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval
from mechmm.results.units import Units, graph_of

METHODS = (
    *("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupt"),
    *("atp*", "exact", "random"),
)
SHOWN = 30
"""Edges or units that are shown as bars."""


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """The score of every edge, node or neuron for every pair.

    Attributes:
        graph: the graph whose edges have scores, or the units that have.
        scores: [example, edge]; positive = supports the clean answer, in units of the metric.
        clean, reference: the metric of both runs [example]; NaN where the reference is no run.
        method, metric, target: names. steps: of integrated gradients.
    """

    graph: Graph | Units
    scores: Float[Tensor, "example edge"] = field(metadata={"axis": 0})
    clean: Float[Tensor, " example"] = field(metadata={"axis": 0})
    reference: Float[Tensor, " example"] = field(metadata={"axis": 0})
    method: str
    metric: str
    target: str
    steps: int

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "graph": self.graph.plain()}

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Attribution:
        return cls(**{**values, "graph": graph_of(values["graph"])})

    def mean(self) -> Float[np.ndarray, " edge"]:
        """The mean score of every edge or unit."""
        return self.scores.mean(0).numpy()

    def circuit(
        self,
        n: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        *,
        signed: bool = False,
        greedy: bool = False,
        prune: bool = True,
    ) -> Circuit:
        """The edges or units with the largest mean scores.

        Args:
            n, fraction, threshold: how many, which share of them, or those with at least
                this score; exactly one of the three.
            signed: by the score itself; else by its absolute value.
            greedy: from the logits backwards, each time the best edge into what is there already
                (edges alone).
            prune: leave out edges on no way from an input to the logits. They have no effect. Units
                are all kept.

        Raises:
            ValueError: not exactly one size; more than there are; a share outside (0, 1]; greedy
                units.
        """
        keep = chosen_edges(self.graph, self.mean(), n, fraction, threshold, signed, greedy)
        found = Circuit(self.graph, keep, self.mean())
        return found.pruned() if prune else found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge (name, writer, reader, tower) or unit (name, tower, kind, layer, head,
        neuron): span, mean score and its deviation over examples, strongest first."""
        mean = self.mean()
        order = np.argsort(-np.abs(mean), kind="stable")
        spread = self.scores.std(0, correction=0).numpy()
        return self.graph.table(order).assign(score=mean[order], std=spread[order])

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: the strongest `edges` (or `nodes`, `neurons`), and the `mass` of scores
        by tower, layer and kind of what writes."""
        return {self.graph.noun: self._bars(), "mass": self._mass()}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures, and a table of the strongest edges or units."""
        contents = [*self.plot().values(), self.to_dataframe().head(SHOWN)]
        return Page(
            title, self.summary(), [Section(self.graph.noun.capitalize(), contents)], facts or {}
        )

    def summary(self) -> str:
        """What was scored, and the metric of both runs, in words."""
        clean, reference = float(self.clean.mean()), float(self.reference.mean())
        other = "" if math.isnan(reference) else f" and {reference:.2f} on the reference"
        return (
            f"{len(self.graph)} {self.graph.noun}, {len(self.clean)} pairs, {self.method}; "
            f"{self.metric} is {clean:.2f} on the clean prompts{other} ({self.target}). A positive "
            "score supports the clean answer."
        )

    def _bars(self) -> Figure:
        order = np.argsort(-np.abs(self.mean()), kind="stable")[:SHOWN]
        low, high = bootstrap_interval(self.scores[:, order].T)
        title = f"strongest {self.graph.noun} of {len(self.graph)}: {self.method}, {self.metric}"
        names = self.graph.names(order)
        return plots.bars(names, self.mean()[order], low, high, title, value_title="score")

    def _mass(self) -> Figure:
        """Layers x kinds of what writes, a map per tower: its share of the sum of |score|."""
        graph, size = self.graph, np.abs(self.mean())
        sums = np.bincount(graph.src, size, minlength=len(graph.writers))
        maps = by_layer(graph.writers, sums / max(size.sum(), np.finfo(float).tiny))
        title = f"share of all |score|, by what writes: {self.method}, {self.metric}"
        n = len(self.clean)
        return plots.tower_maps(maps, title, x_title="writer", value_title="share", n=n)


def attribute(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    spans: Sequence[str] | str = (),
    granularity: str | None = None,
    graph: Graph | Units | None = None,
    method: str = "eap-ig-inputs",
    metric: Metric = logit_diff,
    steps: int = 5,
    target: str = "corrupt",
    batch_size: int = 16,
    seed: int = 0,
) -> Attribution:
    """Score every edge of a model's circuit graph, vision tower to logits, or its nodes or neurons.

    Args:
        spans: names that tell positions apart (each edge then once per span); a plain number is a
            position, and the word `"positions"` stands for all of them, each a span of its own.
        granularity: `"edge"` (the default), `"node"` or `"neuron"` (`mm.graph`).
        graph: made by `mm.graph`, instead of spans and granularity.
        method: see above.
        metric: with a gradient.
        steps: runs of integrated gradients.
        target: what takes the place of what is cut off: the corrupt run, `mean` (over all clean
            runs) or `zero`.
        batch_size: pairs that run together.
        seed: of `"random"`.

    Raises:
        ValueError: an unknown method, target or granularity; `"atp*"` of neurons; no steps; a
            metric without a gradient; a graph of another model, or beside spans or granularity; a
            model that gives no logits after a prompt.
        StreamError: a model whose residual stream is no sum of what its components write.
        SpanError: a span that the pairs do not have; pairs of different lengths, split by position.
    """
    _check(method, target, steps)
    check_contrast(model, pairs, metric, target)
    if method not in ("exact", "random"):
        check_gradient(model, pairs, metric, "corrupt" if target == "corrupt" else "clean")
    wiring, mapped = _asked(model, graph, span_names(spans, pairs, batch_size), granularity)
    own = wiring.graph if mapped is None else mapped.units
    if method == "atp*" and isinstance(own, Units) and own.granularity == "neuron":
        raise ValueError(
            "atp* corrects edges into queries and keys, and those out of single neurons are too "
            "many; score nodes or edges with it, or neurons with eap-ig-inputs"
        )
    random = np.random.default_rng(seed)
    rows: list[Tensor] = []
    ends: list[tuple[Tensor, Tensor]] = []
    runs: dict[str, Any] = {"sloped": _sloped(method, target)}
    runs = runs if mapped is None else {"also": mapped.hidden}
    for parts in contrasts(model, pairs, wiring, metric, target, batch_size, **runs):
        if method == "random":
            shape = (len(parts[0].indices), len(own))
            rows.append(torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))
        elif mapped is not None:
            found = [unit_scores(UnitBatch(part, mapped), method, steps) for part in parts]
            rows.append(torch.stack(found).sum(0))
        else:
            rows.append(_total([_scores(part, method, steps) for part in parts]))
        ends.append(_ends(parts))
    clean, reference = (torch.cat(column) for column in zip(*ends, strict=True))
    name = name_of(metric)
    made = steps if "ig" in method else 1
    scores = torch.cat(rows) if len(rows) > 1 else rows[0]
    return Attribution(own, scores, clean, reference, method, name, target, made)


def _asked(
    model: HookedMultimodal,
    graph: Graph | Units | None,
    spans: Sequence[str],
    granularity: str | None,
) -> tuple[Wiring, UnitMap | None]:
    """What is to be scored: edges, or units."""
    if graph is not None and (spans or granularity is not None):
        raise ValueError(
            "a graph was given beside spans or granularity, which it has of its own; make it with "
            "mm.graph(model, spans, granularity), or leave it out"
        )
    if graph is not None:
        spans = graph.spans[:-1]
        granularity = graph.granularity if isinstance(graph, Units) else "edge"
    granularity = "edge" if granularity is None else granularity
    check_granularity(granularity)
    mapped = None if granularity == "edge" else unit_map(model, spans, granularity)
    wiring = wired(model, spans) if mapped is None else mapped.wiring
    own = wiring.graph if mapped is None else mapped.units
    if graph is not None and not graph.matches(own):
        raise ValueError(
            f"the graph is {graph}, the model has {own}; make it of the model that is scored, with "
            "mm.graph"
        )
    return wiring, mapped


def _check(method: str, target: str, steps: int) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use {', '.join(METHODS)}")
    if method == "clean-corrupt" and target != "corrupt":
        raise ValueError(f"no prompt gives the target {target!r}; use eap or eap-ig-inputs")
    if steps < 1:
        raise ValueError(f"steps is {steps}; integrated gradients need at least one")


def _total(scores: Sequence[Tensor]) -> Float[Tensor, "example edge"]:
    """The sum over readings, without a copy where there is one."""
    return sum(scores[1:], scores[0])


def _ends(parts: Sequence[Contrast]) -> tuple[Tensor, Tensor]:
    clean = sum((part.clean.metric for part in parts), torch.zeros(()))
    nothing = torch.full_like(parts[0].clean.metric, torch.nan)
    found = (part.reference.metric if part.paired else nothing for part in parts)
    reference = sum(found, torch.zeros(()))
    return clean.float().cpu(), reference.float().cpu()


def _scores(contrast: Contrast, method: str, steps: int) -> Float[Tensor, "example edge"]:
    if method == "atp*":
        return atp_scores(contrast)
    if method == "exact":
        return edge_losses(contrast)
    if method == "eap-ig-activations":
        return _by_layer(contrast, steps)
    readers = [Reader(contrast.model, group) for group in contrast.wiring.readers]
    for flow in (contrast.clean, contrast.reference):
        if flow.slopes:
            _take(readers, flow)
            flow.slopes.clear()  # they take as much as what was recorded
    inputs = [group for group in contrast.wiring.writers if group.kind == "input"]
    for k in range(1, steps) if method == "eap-ig-inputs" else ():
        _add(contrast, readers, _towards(contrast, inputs, k / steps))
    return _products(contrast, readers)


def _sloped(method: str, target: str) -> tuple[str, ...]:
    """Runs whose slopes a method takes as they are."""
    at_reference = "corrupt" if target == "corrupt" else "clean"
    ways = {"eap": (at_reference,), "clean-corrupt": ("clean", "corrupt")}
    return {**ways, "eap-ig-inputs": ("clean",)}.get(method, ())


def _add(contrast: Contrast, readers: Sequence[Reader], edits: Sequence[Edit]) -> None:
    """One more run with gradients."""
    _, at, normed = hooks_of(contrast.model, contrast.wiring)
    part = contrast.corrupt_part if contrast.paired else contrast.clean_part
    _take(readers, slopes(contrast.model, part, contrast.answers, at, normed, edits))


def _take(readers: Sequence[Reader], flow: Flow) -> None:
    for reader in readers:
        if reader.ran(flow):
            reader.add(flow)


def _products(
    contrast: Contrast, readers: Sequence[Reader], group: Group | None = None
) -> Float[Tensor, "example edge"]:
    """Scores of all edges, or of those out of one group of writers."""
    if group is not None and group.kind != "projector":  # of which alone keys and values are made
        unread = (Reader(contrast.model, r.group) for r in readers)
        pairs = zip(readers, unread, strict=True)
        readers = [none if r.group.kind == "states" else r for r, none in pairs]
    writers = [w for w in contrast.writers if group in (None, w.group)]
    return edge_scores(contrast.wiring, writers, readers, *contrast.changes(), contrast.places)


def _by_layer(contrast: Contrast, steps: int) -> Float[Tensor, "example edge"]:
    """For every group of writers, slopes of runs in which what it writes is on the way."""
    total = torch.zeros(len(contrast.indices), len(contrast.wiring.graph))
    for group in contrast.wiring.writers:
        readers = [Reader(contrast.model, own) for own in contrast.wiring.readers]
        for k in range(1, steps + 1):
            _add(contrast, readers, _towards(contrast, [group], k / steps))
        total += _products(contrast, readers, group)
    return total


def _towards(contrast: Contrast, groups: Sequence[Group], way: float) -> list[Edit]:
    """Edits that set what some writers write a part of the way from the reference to clean."""
    writers = [writer for writer in contrast.writers if writer.group in groups]
    hooks = [(writer.hooks[0], writer) for writer in writers]
    states = [g for g in contrast.wiring.readers if g.kind == "states"]
    if any(g.kind == "projector" for g in groups) and states:
        hooks += [(name, None) for g in states for name in slopes_at(contrast.model, g)]
    return [(name, partial(_moved, contrast, writer, way)) for name, writer in hooks]


def _moved(
    contrast: Contrast, writer: Writer | None, way: float, value: Tensor, hook: Any
) -> Tensor:
    new = contrast.between(hook.name, way)
    return new if writer is None else torch.where(writer.own(value), new, value)

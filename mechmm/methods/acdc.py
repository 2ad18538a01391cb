"""Automatic circuit discovery: edge after edge is cut, from the logits backwards, and stays cut
where the metric hardly changes.

C is the whole model at first. For every edge e, readers and writers in the reverse of the order in
which they run,

    effect(e) = m(C) - m(C without e),     C becomes C without e where |effect(e)| < threshold

(`signed`: where effect(e) < threshold, so that edges go which oppose the answer), with what is cut
at its reference value (corrupt run, mean, zero) and m the mean of the metric over pairs. With the
metric `kl`, m = -KL(clean run || C), and `signed`, this is what Conmy et al. 2304.14997 do.

An edge on no way from an input to the logits carries nothing and is cut without a run.

Several runs are made at once, on the guess that their edges all go: trial j cuts the first j of the
edges that come next. The first effect at or above the threshold ends what they say, and the next
trials go on behind it. What is found is the same as edge by edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import Trials
from mechmm.engine.sweep import Report
from mechmm.engine.wiring import wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.drawing import MOST
from mechmm.results.graph import Graph
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import share_interval

SEARCHES = 8
"""Searches that look for the threshold of a number of edges."""
SHOWN = 30
"""Edges that are shown as bars."""


@dataclass(frozen=True, eq=False)
class Acdc(Result):
    """What a search found, and every step of it.

    Attributes:
        graph: of the whole model.
        keep: the edges that are left, without those on no way to the logits [edge].
        effects: what the metric lost with an edge at its turn; 0 where it was cut without a run
            [edge].
        order: at which step an edge was tried, -1 where without a run [edge].
        values: the metric of the circuit that is left [example].
        null: that of random circuits of the same size [random, example].
        full, empty: that with all edges and with none [example].
        metric, target: names. threshold: of the effect. signed: whether edges that oppose the
            answer were cut whatever their effect.
    """

    graph: Graph
    keep: Bool[np.ndarray, " edge"]
    effects: Float[np.ndarray, " edge"]
    order: Int[np.ndarray, " edge"]
    values: Float[Tensor, " example"] = field(metadata={"axis": 0})
    null: Float[Tensor, "random example"] = field(metadata={"axis": 1})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    metric: str
    target: str
    threshold: float
    signed: bool

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "graph": self.graph.plain()}

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Acdc:
        return cls(**{**values, "graph": Graph.of(values["graph"])})

    @property
    def circuit(self) -> Circuit:
        """What is left; its scores are the effects."""
        return Circuit(self.graph, self.keep, self.effects)

    def faithfulness(self) -> float:
        """f of the circuit on the pairs of the search."""
        return float(self._share(self.values.mean()))

    def trace(self) -> pd.DataFrame:
        """One row per edge that was tried, in order: its effect, whether it was cut, and behind
        that step the mean of the metric, its f and the edges that are not cut."""
        tried = np.flatnonzero(self.order >= 0)
        tried = tried[np.argsort(self.order[tried])]
        effects = self.effects[tried].astype(float)
        cut = _small(effects, self.threshold, self.signed)
        value = float(self.full.double().mean()) - np.cumsum(np.where(cut, effects, 0))
        return pd.DataFrame(
            {
                "edge": self.graph.names(tried),
                "effect": effects,
                "cut": cut,
                "value": value,
                "faithfulness": self._share(torch.from_numpy(value)).numpy(),
                "edges": len(self.graph) - np.cumsum(cut),
            }
        )

    def to_dataframe(self) -> pd.DataFrame:
        """The trace."""
        return self.trace()

    def _share(self, value: Tensor) -> Tensor:
        none, whole = self.empty.double().mean(), self.full.double().mean()
        return (value - none) / (whole - none)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: the circuit's f beside random ones (`bars`), its strongest `edges`, and
        the `circuit` itself where it can be drawn."""
        figures = {"bars": self._bars(), "edges": self._edges()}
        drawable = 0 < len(self.circuit) <= MOST
        return figures | ({"circuit": self.circuit.plot(title="ACDC")} if drawable else {})

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures, and the edges that are left."""
        kept = self.circuit.to_dataframe().sort_values("score", key=abs, ascending=False)
        contents = [*self.plot().values(), kept]
        return Page(title, self.summary(), [Section("Circuit", contents)], facts or {})

    def summary(self) -> str:
        """What was searched, and what is left, in words."""
        tried, kept = int((self.order >= 0).sum()), len(self.circuit)
        return (
            f"Of {len(self.graph)} edges {tried} were tried on {len(self.values)} pairs and {kept} "
            f"are left: those without which {self.metric} changes by {self.threshold:.3g} or more "
            f"({self.target}). Alone they have a faithfulness of {self.faithfulness():.2f}; on "
            "pairs that the search did not see it may be less."
        )

    def _bars(self) -> Figure:
        rows = [self.values, *([self.null.mean(0)] if len(self.null) else [])]
        stacked = torch.stack(rows) - self.empty
        scale = float((self.full - self.empty).mean())
        null = (self.null - self.empty).mean(1).numpy() / scale
        names = [f"{name}, {len(self.circuit)} edges" for name in ("circuit", "random")]
        return plots.bars(
            names[: len(rows)],
            stacked.mean(1) / scale,
            *share_interval(stacked, scale),
            f"faithfulness: ACDC, {self.metric}, {self.target}",
            null=tuple(np.quantile(null, (0.025, 0.975)).tolist()) if len(null) else None,
            value_title="faithfulness",
            null_title="random circuits",
        )

    def _edges(self) -> Figure:
        kept = np.flatnonzero(self.keep)
        order = kept[np.argsort(-np.abs(self.effects[kept]), kind="stable")][:SHOWN]
        title = f"strongest edges of {len(kept)}: ACDC, {self.metric}"
        names = self.graph.names(order)
        return plots.bars(names, self.effects[order], None, None, title)


def acdc(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    threshold: float | None = None,
    n: int | None = None,
    spans: Sequence[str] = (),
    metric: Metric = logit_diff,
    target: str = "corrupt",
    signed: bool = False,
    n_random: int = 10,
    batch_size: int = 16,
    together: int = 4,
    seed: int = 0,
    report: Report | None = None,
) -> Acdc:
    """Search for a circuit by cutting edges, from the logits backwards.

    One run per edge that may matter: few pairs (4 to 16) are the rule, and other pairs test what is
    found.

    Args:
        threshold: edges are cut without which the metric changes by less, in its units.
        n: instead: so many edges at most. Several searches look for the threshold.
        spans: names that tell positions apart (each edge then once per span).
        target: what takes the place of what is cut off: the corrupt run, `mean` or `zero`.
        signed: cut edges that oppose the answer, whatever their effect.
        n_random: random circuits of the same size, as the null.
        batch_size: pairs that run together.
        together: trials that run together; what is found does not depend on it.
        seed: of the random circuits.
        report: called with (edges decided, edges) of the search that runs.

    Raises:
        ValueError: not exactly one of `threshold` and `n`; one that is not positive; `n` edges that
            no threshold leaves; an unknown target.
        StreamError: a model whose residual stream is no sum of what its components write.
        SpanError: a span that the pairs do not have.
    """
    _check(threshold, n, together, n_random)
    wiring = wired(model, spans)
    trials = Trials(model, pairs, wiring, metric, target, batch_size, together)
    if threshold is not None:
        found = _search(trials, threshold, signed, report)
    else:
        assert n is not None
        found = _of_size(trials, n, signed, report)
    own = Circuit(wiring.graph, found.keep, found.effects)
    nulls = [own.random(seed + k).keep for k in range(n_random)]
    every = [found.keep, np.ones_like(own.keep), np.zeros_like(own.keep), *nulls]
    values = trials.near(every[1], every)
    rest = (name_of(metric), target, found.threshold, signed)
    ends = (values[0], values[3:], values[1], values[2])
    return Acdc(wiring.graph, found.keep, found.effects, found.order, *ends, *rest)


@dataclass(frozen=True, eq=False)
class _Found:
    """What one search found (attributes as `Acdc`)."""

    keep: np.ndarray
    effects: np.ndarray
    order: np.ndarray
    threshold: float


def _check(threshold: float | None, n: int | None, together: int, n_random: int) -> None:
    if (threshold is None) == (n is None):
        raise ValueError("give either a threshold or n, the number of edges")
    for name, value in (("threshold", threshold), ("n", n), ("together", together)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; give a number above 0")
    if n_random < 0:
        raise ValueError(f"n_random is {n_random}; give 0 or more")


def _search(trials: Trials, threshold: float, signed: bool, report: Report | None) -> _Found:
    graph = trials.graph
    keep, order = trials.ran, np.full(len(graph), -1)
    effects, step = np.zeros(len(graph), np.float32), 0
    now = 0.0
    for number in reversed(range(len(graph.blocks))):
        keep = graph.pruned(keep)
        first, stop = graph.starts[number : number + 2]
        waiting = first + np.flatnonzero(keep[first:stop])[::-1]
        if len(waiting):
            trials.enter(keep)
            now = trials.mean([keep])[0]
        while len(waiting):
            tried = waiting[: trials.together]
            cut = [_without(keep, tried[: j + 1]) for j in range(len(tried))]
            means = trials.mean(cut, first=number)
            for edge, mean in zip(tried, means, strict=True):
                effects[edge], order[edge] = now - mean, step
                step, waiting = step + 1, waiting[1:]
                if not _small(now - mean, threshold, signed):
                    break
                keep[edge], now = False, mean
        if report is not None:
            report(len(graph) - int(first), len(graph))
    return _Found(graph.pruned(keep), effects, order, threshold)


def _small(effect: Any, threshold: float, signed: bool) -> Any:
    return (effect if signed else np.abs(effect)) < threshold


def _without(keep: np.ndarray, edges: np.ndarray) -> np.ndarray:
    new = keep.copy()
    new[edges] = False
    return new


def _of_size(trials: Trials, n: int, signed: bool, report: Report | None) -> _Found:
    """The largest circuit of at most `n` edges that a bisection over thresholds comes by."""
    ones = np.ones(len(trials.graph), dtype=bool)
    whole, nothing = trials.near(ones, [ones, ~ones]).double().mean(1).tolist()
    low, high = np.log(abs(whole - nothing) * np.array([1e-4, 4]))
    best: _Found | None = None
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        found = _search(trials, float(np.exp(middle)), signed, report)
        if found.keep.sum() > n:
            low = middle
            continue
        high = middle
        best = found if best is None or found.keep.sum() > best.keep.sum() else best
    if best is None or not best.keep.any():
        raise ValueError(
            f"no threshold was found that leaves 1 to {n} edges; ask for more edges, or give a "
            "threshold"
        )
    return best

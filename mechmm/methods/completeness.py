"""Is anything that drives the answer missing from a circuit?

With m(S) the metric where the edges S run and all others are at their reference value, M all edges,
0 none and C the circuit,

    f(M - C) = (m(M - C) - m(0)) / (m(M) - m(0))

is what the rest of the model does alone: near 0 where the circuit is complete, as high as without
random edges where it is not. More strictly, circuit and model should suffer alike from any cut K
inside the circuit: the incompleteness of C at K is

    | m(C - K) - m(M - K) | / (m(M) - m(0)),

which at K = C is |f(M - C)|, and at K = {} |1 - f(C)|. K is drawn at random, from one edge to half
of the circuit, or grown greedily: of some edges each time the one that makes the score largest.
Wang et al. 2211.00593, with edges in the place of heads.

The null: random circuits of the same size, and cuts of the same sizes in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import Keep, Trials, wired_as
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import share_interval

TRIED = 10
"""Edges of which a greedy cut takes the worst."""
GREEDY_STEPS = 10
"""Edges that a greedy cut takes."""


@dataclass(frozen=True, eq=False)
class Completeness(Result):
    """The metric of every example without some edges, of the model and of the circuit.

    Attributes:
        cuts: a table with one row per cut K: name, kind (`all` edges of the circuit, a `random`
            part, a `greedy` one), edges, and whether it is of a random circuit (`null`).
        model: the metric of the model without these edges [cut, example].
        circuit: that of the circuit, or the random circuit, without them [cut, example].
        full, empty: with all edges and with none [example].
        metric, target: names.
    """

    cuts: pd.DataFrame
    model: Float[Tensor, "cut example"] = field(metadata={"axis": 1})
    circuit: Float[Tensor, "cut example"] = field(metadata={"axis": 1})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    metric: str
    target: str

    @property
    def rest(self) -> float:
        """f of the model without the circuit."""
        return float(self._share(self.model)[self._rows("all")][0])

    @property
    def null_rest(self) -> Float[np.ndarray, " random"]:
        """f of the model without each of the random circuits."""
        return self._share(self.model)[self._rows("all", null=True)].numpy()

    def incompleteness(self) -> Float[Tensor, " cut"]:
        """|m(C - K) - m(M - K)| of every cut, means over examples, as a share of m(M) - m(0)."""
        return (self.circuit - self.model).mean(1).abs() / self._scale.abs()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cut: f of the model and of the circuit without it, the interval of the
        former, and the incompleteness."""
        table = self.cuts.copy()
        table["model"] = self._share(self.model).numpy()
        table["low"], table["high"] = self._interval(self.model - self.empty)
        table["circuit"] = self._share(self.circuit).numpy()
        table["incompleteness"] = self.incompleteness().numpy()
        return table

    @property
    def _scale(self) -> Tensor:
        return (self.full - self.empty).mean()

    def _share(self, values: Tensor) -> Tensor:
        return (values - self.empty).mean(1) / self._scale

    def _interval(self, values: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples, as shares."""
        return share_interval(values, self._scale)

    def _rows(self, kind: str, null: bool = False) -> np.ndarray:
        chosen = (self.cuts["kind"] == kind) & (self.cuts["null"] == null)
        return np.flatnonzero(chosen.to_numpy(dtype=bool))

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: what the model does without the circuit (`rest`), and the
        `incompleteness` at every cut inside it; both over the range of random circuits."""
        inside = np.concatenate([self._rows("random"), self._rows("greedy")])
        figures = {"rest": self._rest()}
        return figures | ({"incompleteness": self._inside(inside)} if len(inside) else {})

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures, and a table of all cuts."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Completeness", contents)], facts or {})

    def summary(self) -> str:
        """What is left of the answer without the circuit, in words."""
        null, edges = self.null_rest, self.cuts["edges"].iat[0]
        beside = f", without as many random edges {null.mean():.2f}" if len(null) else ""
        inside = np.concatenate([self._rows("random"), self._rows("greedy")])
        worst = (
            f" The circuit and the model differ by {self.incompleteness()[inside].max():.2f} at "
            f"the worst of {len(inside)} cuts inside it."
            if len(inside)
            else ""
        )
        return (
            f"Without the circuit's {edges} edges the model keeps {self.rest:.2f} of its "
            f"difference in {self.metric}{beside} ({len(self.full)} pairs, {self.target}); a "
            f"complete circuit leaves 0.{worst}"
        )

    def _rest(self) -> Figure:
        own, null = self._rows("all"), self._rows("all", null=True)
        rows = [self.model[own], *([self.model[null].mean(0)[None]] if len(null) else [])]
        values, edges = torch.cat(rows), self.cuts["edges"].iat[0]
        names = [f"without the circuit, {edges} edges", f"without random edges, {edges}"]
        return plots.bars(
            names[: len(rows)],
            self._share(values),
            *self._interval(values - self.empty),
            f"what the rest does alone: {self.metric}, {self.target}",
            null=_range(self.null_rest),
            value_title="faithfulness of the rest",
            null_title="without random circuits",
        )

    def _inside(self, rows: np.ndarray) -> Figure:
        table, scores = self.cuts.iloc[rows], self.incompleteness()
        names = [f"{n}, {e} edges" for n, e in zip(table["name"], table["edges"], strict=True)]
        return plots.bars(
            names,
            scores[rows],
            None,
            None,
            f"incompleteness: {self.metric}, {self.target}",
            null=_range(scores[self._rows("random", null=True)].numpy()),
            value_title="|f(C - K) - f(M - K)|",
            null_title="random circuits",
        )


def completeness(
    model: HookedMultimodal,
    pairs: PairDataset,
    circuit: Circuit,
    *,
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_cuts: int = 10,
    n_greedy: int = 0,
    n_random: int = 10,
    batch_size: int = 16,
    seed: int = 0,
) -> Completeness:
    """Cut a circuit's edges out of the model, all of them and parts.

    Args:
        target: what takes the place of what is cut off: the corrupt run, `mean` or `zero`.
        n_cuts: random parts that are cut out of the circuit and out of the model; their sizes grow
            evenly, on a log scale, from one edge to half of the circuit.
        n_greedy: cuts that are grown greedily, by 10 edges; about 200 runs each.
        n_random: random circuits of the same size, as the null.
        batch_size: pairs that run together. seed: of everything random.

    Raises:
        ValueError: a circuit of another model, or one that leads from no input to the logits;
            an unknown target; a number below 0.
        SpanError: a span of the graph that the pairs do not have.
    """
    for name, number in (("n_cuts", n_cuts), ("n_greedy", n_greedy), ("n_random", n_random)):
        if number < 0:
            raise ValueError(f"{name} is {number}; give 0 or more")
    wiring = wired_as(model, [circuit], connected=True)
    trials = Trials(model, pairs, wiring, metric, target, batch_size)
    rng = np.random.default_rng(seed)
    found = [(circuit.keep, circuit.keep, ("circuit", "all", False))]
    sizes = np.geomspace(1, max(1, len(circuit) / 2), n_cuts).round().astype(int).tolist()
    for number, size in enumerate(sizes):
        part = _part(circuit.keep, size, rng)
        found.append((circuit.keep, part, (f"random part {number}", "random", False)))
    for number in range(n_greedy):
        part = _greedy(trials, circuit.keep, rng)
        found.append((circuit.keep, part, (f"greedy part {number}", "greedy", False)))
    for number in range(n_random):
        other = circuit.random(seed + number).keep
        found.append((other, other, (f"random circuit {number}", "all", True)))
        if n_cuts:
            part = _part(other, sizes[number % n_cuts], rng)
            found.append((other, part, (f"part of random circuit {number}", "random", True)))
    keeps, cuts, names = zip(*found, strict=True)
    table = pd.DataFrame(names, columns=["name", "kind", "null"])
    table.insert(2, "edges", [int(cut.sum()) for cut in cuts])
    values = _values(trials, keeps, cuts)
    return Completeness(table, *values, name_of(metric), target)


def _values(
    trials: Trials, keeps: tuple[Keep, ...], cuts: tuple[Keep, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The metric of the model and of every circuit without a cut, with all edges and with none."""
    whole = np.ones(len(trials.graph), dtype=bool)
    of_model = trials.near(whole, [whole, *(~cut for cut in cuts)])
    left = [keep & ~cut for keep, cut in zip(keeps, cuts, strict=True)]
    of_circuit = trials.near(keeps[0], [~whole, *left])
    return of_model[1:], of_circuit[1:], of_model[0], of_circuit[0]


def _part(keep: Keep, size: int, rng: np.random.Generator) -> Keep:
    """Some of a circuit's edges."""
    part = np.zeros_like(keep)
    part[rng.choice(np.flatnonzero(keep), size, replace=False)] = True
    return part


def _greedy(trials: Trials, keep: Keep, rng: np.random.Generator) -> Keep:
    """A cut that grows, of some edges each time by the one that sets circuit and model apart."""
    cut = np.zeros_like(keep)
    for _ in range(min(GREEDY_STEPS, int(keep.sum()))):
        left = np.flatnonzero(keep & ~cut)
        edges = rng.choice(left, min(TRIED, len(left)), replace=False).tolist()
        larger = [_with(cut, edge) for edge in edges]
        of_model = trials.near(~cut, [~one for one in larger])
        of_circuit = trials.near(keep & ~cut, [keep & ~one for one in larger])
        cut = larger[int((of_circuit - of_model).mean(1).abs().argmax())]
    return cut


def _with(keep: Keep, edge: int) -> Keep:
    new = keep.copy()
    new[edge] = True
    return new


def _range(values: np.ndarray) -> tuple[float, float] | None:
    """Where 95 % of some values lie."""
    if not len(values):
        return None
    low, high = np.quantile(values, (0.025, 0.975)).round(6)  # less is rounding error of the model
    return float(low), float(high)

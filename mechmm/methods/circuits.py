"""Is a circuit the whole story? Exact ablation of edges, and curves over circuits of all sizes.

With every edge outside the circuit C at its reference value (the corrupt run, the mean, zero), N
the whole model and 0 no edge at all,

    f(C) = (m(C) - m(0)) / (m(N) - m(0))

is its faithfulness. CPR is the area under f over the share of edges kept, CMD the area under
|1 - f|: a high CPR means that circuits hold what drives the answer, a low CMD that they behave as
the whole model does. Both beside random circuits of the same sizes. MIB, 2504.13151.

- Circuits of nodes or neurons: every unit outside is at its reference value instead
  (`mechmm.engine.unit_runs`).
- Completeness: how far the answer falls when the circuit's edges, and only they, are cut.
- Minimality: what the circuit loses without each of its edges.

Wang et al. 2211.00593.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import run_circuits, wired_as
from mechmm.engine.unit_runs import mapped_as, run_units
from mechmm.methods.attribution import Attribution
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import share_interval
from mechmm.results.units import Units

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's shares of edges."""


@dataclass(frozen=True, eq=False)
class Faithfulness(Result):
    """The metric of every example with some circuits alone.

    Attributes:
        circuits: a table with one row per circuit: name, how many edges (or nodes, neurons), their
            share of all, and whether it is a random one (`null`).
        values: [circuit, example]. full, empty: with all of them and with none [example].
        metric, target: names.
    """

    circuits: pd.DataFrame
    values: Float[Tensor, "circuit example"] = field(metadata={"axis": 1})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    metric: str
    target: str

    @property
    def noun(self) -> str:
        """What circuits are made of: `edges`, `nodes` or `neurons`."""
        return str(self.circuits.columns[1])

    def faithfulness(self) -> Float[Tensor, " circuit"]:
        """f of every circuit: a ratio of means, so that pairs of small effect cannot dominate."""
        return (self.values - self.empty).mean(1) / (self.full - self.empty).mean()

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples of every circuit's f: (low, high)."""
        return share_interval(self.values - self.empty, (self.full - self.empty).mean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per circuit: its size, mean metric, f and its interval."""
        table = self.circuits.copy()
        table["value"] = self.values.mean(1).numpy()
        table["faithfulness"] = self.faithfulness().numpy()
        table["low"], table["high"] = self.interval()
        return table

    def curve(self, null: bool = False) -> pd.DataFrame:
        """f by share of edges, of the circuits or the mean of the random ones, with its 95 %
        interval over examples."""
        table = self.circuits[self.circuits["null"] == null].reset_index()
        groups = [(share, group["index"].tolist()) for share, group in table.groupby("fraction")]
        values = [self.values[rows].mean(0) for _, rows in groups]
        means = replace(self, values=torch.stack(values)) if values else None
        found = (means.faithfulness().numpy(), *means.interval()) if means else ((), (), ())
        columns = ("faithfulness", "low", "high")
        shares = {"fraction": [share for share, _ in groups]}
        return pd.DataFrame(shares | dict(zip(columns, found, strict=True)), dtype=float)

    def cpr(self, null: bool = False) -> float:
        """Area under f over the share of edges."""
        table = self.curve(null)
        return _area(table["fraction"], table["faithfulness"])

    def cmd(self, null: bool = False) -> float:
        """Area under |1 - f| over the share of edges."""
        table = self.curve(null)
        return _area(table["fraction"], (1 - table["faithfulness"]).abs())

    def areas(self) -> pd.DataFrame:
        """CPR and CMD of the circuits, and of the random ones (`null`) where there are any."""
        nulls = sorted(self.circuits["null"].unique().tolist())
        rows = [(null, self.cpr(null), self.cmd(null)) for null in nulls]
        return pd.DataFrame(rows, columns=["null", "cpr", "cmd"])

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `curve` where circuits have three sizes or more, else `bars`; both
        beside random circuits of the same sizes."""
        sizes = self.circuits.loc[~self.circuits["null"], "fraction"].nunique()
        return {"curve": self._lines()} if sizes > 2 else {"bars": self._bars()}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure, and a table of all circuits."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Faithfulness", contents)], facts or {})

    def summary(self) -> str:
        """What was run, and the metric with all edges and with none, in words."""
        random = int(self.circuits["null"].sum())
        full, empty = float(self.full.mean()), float(self.empty.mean())
        return (
            f"{len(self.circuits) - random} circuits and {random} random ones of the same sizes, "
            f"{self.values.shape[1]} pairs; {self.metric} is {full:.2f} with all {self.noun} and "
            f"{empty:.2f} with none ({self.target}). The whole model has a faithfulness of 1."
        )

    def _lines(self) -> Figure:
        names = {"fraction": "share", "faithfulness": "value"}
        found = {"circuits": self.curve()} | (
            {"random circuits": self.curve(null=True)} if self.circuits["null"].any() else {}
        )
        areas = [
            f"{name.upper()} {getattr(self, name)():.2f}"
            + (f" (random {getattr(self, name)(null=True):.2f})" if len(found) > 1 else "")
            for name in ("cpr", "cmd")
        ]
        return plots.curves(
            {name: table.rename(columns=names) for name, table in found.items()},
            f"faithfulness: {', '.join(areas)}",
            f"{self.metric}, {self.target}; 95 % intervals over {self.values.shape[1]} examples",
            x_title=f"share of {self.noun} kept",
            y_title="faithfulness",
            null="random circuits",
        )

    def _bars(self) -> Figure:
        """Circuits, then the random ones of every size, over the range of all random ones."""
        table = self.to_dataframe().rename(columns={self.noun: "size"})
        own, null = table[~table["null"]], table.loc[table["null"], "faithfulness"]
        rows = [
            (f"{row.name}, {row.size} {self.noun}", row.faithfulness, row.low, row.high)
            for row in own.drop(columns="null").itertuples(index=False, name="Row")
        ]
        for row in self.curve(null=True).itertuples(index=False, name="Row"):
            size = round(row.fraction * own["size"].iat[0] / own["fraction"].iat[0])
            rows.append((f"random, {size} {self.noun}", row.faithfulness, row.low, row.high))
        names, value, low, high = zip(*rows, strict=True)
        ends = null.quantile([0.025, 0.975]).round(6)  # less is rounding error of the model
        return plots.bars(
            names,
            value,
            low,
            high,
            f"faithfulness: {self.metric}, {self.target}",
            null=(float(ends.iat[0]), float(ends.iat[1])) if len(null) else None,
            value_title="faithfulness",
            null_title="random circuits",
        )


def _area(x: pd.Series, y: pd.Series) -> float:
    """By trapezoids, from the smallest share to the largest."""
    return float(np.trapezoid(y.to_numpy(), x.to_numpy()))


def faithfulness(
    model: HookedMultimodal,
    pairs: PairDataset,
    circuit: Circuit | Sequence[Circuit],
    *,
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_random: int = 10,
    batch_size: int = 16,
    seed: int = 0,
) -> Faithfulness:
    """Run circuits alone: every edge (node, neuron) outside them is at its reference value.

    Args:
        circuit: one or several, of one graph.
        target: what takes the place of what is cut off: the corrupt run, `mean` or `zero`.
        n_random: random circuits of the size of each, as the null.
        batch_size: pairs that run together. seed: of the random circuits.

    Raises:
        ValueError: a graph of another model, or different ones; an empty circuit; an unknown
            target.
        SpanError: a span of the graph that the pairs do not have.
    """
    circuits = [circuit] if isinstance(circuit, Circuit) else list(circuit)
    units = mapped_as(model, circuits) if _of_units(circuits) else None
    wiring = wired_as(model, circuits) if units is None else units.wiring
    nulls = [(i, one.random(seed + k)) for i, one in enumerate(circuits) for k in range(n_random)]
    table = pd.DataFrame(
        [(f"circuit {i}", len(c), len(c) / len(c.graph), False) for i, c in enumerate(circuits)]
        + [(f"random {i}", len(c), len(c) / len(c.graph), True) for i, c in nulls],
        columns=["name", circuits[0].graph.noun, "fraction", "null"],
    )
    every = [c.keep for c in circuits] + [c.keep for _, c in nulls]
    rest = (every, metric, target, batch_size)
    if units is not None:
        found = run_units(model, pairs, units, *rest)
    else:
        found = run_circuits(model, pairs, wiring, *rest)
    name = name_of(metric)
    return Faithfulness(table, *found, name, target)


def _of_units(circuits: Sequence[Circuit]) -> bool:
    return bool(circuits) and isinstance(circuits[0].graph, Units)


def faithfulness_curve(
    model: HookedMultimodal,
    pairs: PairDataset,
    scores: Attribution,
    *,
    fractions: Sequence[float] = FRACTIONS,
    signed: bool = False,
    greedy: bool = False,
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_random: int = 3,
    batch_size: int = 16,
    seed: int = 0,
) -> Faithfulness:
    """f of the circuits that some scores give, from the smallest to the whole model.

    Args:
        fractions: of all edges, nodes or neurons, that are kept.
        signed, greedy: how these are chosen (`Attribution.circuit`).
        others: as of `faithfulness`.

    Raises:
        ValueError: as `faithfulness`; a fraction outside (0, 1].
    """
    options = {"signed": signed, "greedy": greedy, "prune": False}
    circuits = [scores.circuit(fraction=fraction, **options) for fraction in fractions]
    rest: dict[str, Any] = {"n_random": n_random, "batch_size": batch_size, "seed": seed}
    return faithfulness(model, pairs, circuits, metric=metric, target=target, **rest)

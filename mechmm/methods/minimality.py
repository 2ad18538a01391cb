"""Does a circuit need everything that it has?

With m(S) the metric where the edges S run and all others are at their reference value, M all edges
and 0 none, what the circuit C loses without a part p, an edge or all edges of a node, is

    loss(p) = (m(C) - m(C - p)) / (m(M) - m(0)).

Positive: the part supports the answer; negative: it opposes it. The null: random edges q outside
the circuit that join its nodes, as many as a part has on average, are added: what C + q would lose
without them is (m(C + q) - m(C)) / (m(M) - m(0)). A part whose loss is as small as that is not
needed, or something else in the circuit does the same. After Wang et al. 2211.00593, at K = {}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import Keep, Trials, wired_as
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import share_interval

BY = ("edge", "node")
"""What parts a circuit has."""
ENDS = ("input", "logits")
"""Kinds of nodes without which nothing is left to ask."""
SHOWN = 30
"""Parts that are shown as bars."""


@dataclass(frozen=True, eq=False)
class Minimality(Result):
    """The metric of every example with a circuit and without each of its parts.

    Attributes:
        parts: a table with one row per part: name, edges, and whether it is a random one outside
            of the circuit (`null`).
        values: the metric of the circuit without the part, or with the random one [part, example].
        own: that of the circuit [example]. full, empty: with all edges and with none [example].
        by: `edge` or `node`. metric, target: names.
    """

    parts: pd.DataFrame
    values: Float[Tensor, "part example"] = field(metadata={"axis": 1})
    own: Float[Tensor, " example"] = field(metadata={"axis": 0})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    by: str
    metric: str
    target: str

    def losses(self) -> Float[Tensor, " part"]:
        """What the circuit loses without every part, means over examples, as shares of the whole
        model's difference; of random parts: what it gains with them."""
        return self._changes().mean(1) / (self.full - self.empty).mean()

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples of every loss: (low, high)."""
        return share_interval(self._changes(), (self.full - self.empty).mean())

    def null_range(self) -> tuple[float, float] | None:
        """Where 95 % of the random parts have their loss; None without random parts."""
        losses = self.losses()[self._null].numpy()
        if not len(losses):
            return None
        low, high = np.quantile(losses, (0.025, 0.975)).round(6)  # less is rounding error
        return float(low), float(high)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part, the largest loss first, random ones last: its loss, the interval, and
        whether the loss lies outside the range of random parts (`matters`)."""
        low, high = self.null_range() or (0.0, 0.0)
        table = self.parts.assign(loss=self.losses().numpy())
        table["low"], table["high"] = self.interval()
        table["matters"] = ((table["loss"] < low) | (table["loss"] > high)) & ~table["null"]
        order = np.lexsort((-table["loss"].to_numpy(), table["null"].to_numpy()))
        return table.iloc[order].reset_index(drop=True)

    @property
    def minimal(self) -> float:
        """The share of parts that matter: 1 for a circuit without idle parts."""
        table = self.to_dataframe()
        return float(table.loc[~table["null"], "matters"].mean())

    @property
    def _null(self) -> Bool[Tensor, " part"]:
        return torch.from_numpy(self.parts["null"].to_numpy(dtype=bool).copy())

    def _changes(self) -> Float[Tensor, "part example"]:
        change = self.own - self.values
        return torch.where(self._null[:, None], -change, change)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> Figure:
        """The largest losses over the range of random parts."""
        table = self.to_dataframe()
        top = table[~table["null"]].sort_values("loss", key=abs, ascending=False, kind="stable")
        top, count = top.head(SHOWN), int((~table["null"]).sum())
        loss, low, high = (top[name].to_numpy(float) for name in ("loss", "low", "high"))
        return plots.bars(
            top["name"].tolist(),
            loss,
            low,
            high,
            f"what the circuit loses without each {self.by}: {len(top)} of {count}, {self.metric}",
            null=self.null_range(),
            value_title="loss",
            null_title="random edges more",
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure, and a table of all parts."""
        contents = [self.plot(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Minimality", contents)], facts or {})

    def summary(self) -> str:
        """How many parts are needed, in words."""
        count, null = int((~self._null).sum()), int(self._null.sum())
        return (
            f"Of the circuit's {count} {self.by}s {round(self.minimal * count)} change "
            f"{self.metric} by more than 95 % of {null} random ones outside do "
            f"({len(self.own)} pairs, {self.target})."
        )


def minimality(
    model: HookedMultimodal,
    pairs: PairDataset,
    circuit: Circuit,
    *,
    by: str = "edge",
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_random: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> Minimality:
    """Run a circuit without each of its edges, or nodes.

    Args:
        by: `edge`, or `node`: a head, MLP or projector with all of the circuit's edges into and out
            of it.
        target: what takes the place of what is cut off: the corrupt run, `mean` or `zero`.
        n_random: random parts outside of the circuit, as the null.
        batch_size: pairs that run together. seed: of the random parts.

    Raises:
        ValueError: a circuit of another model, or one that leads from no input to the logits;
            an unknown `by` or target; a number below 0.
        SpanError: a span of the graph that the pairs do not have.
    """
    if by not in BY:
        raise ValueError(f"unknown by={by!r}; use {' or '.join(BY)}")
    if n_random < 0:
        raise ValueError(f"n_random is {n_random}; give 0 or more")
    wiring = wired_as(model, [circuit], connected=True)
    trials = Trials(model, pairs, wiring, metric, target, batch_size)
    graph = wiring.graph
    cuts = _edges(circuit) if by == "edge" else _nodes(graph, circuit)
    size = round(sum(int(cut.sum()) for cut in cuts.values()) / max(1, len(cuts)))
    added = _outside(graph, circuit, n_random, size, seed)
    keeps = [*(circuit.keep & ~cut for cut in cuts.values()), *(circuit.keep | a for a in added)]
    values = trials.near(circuit.keep, [circuit.keep, np.zeros_like(circuit.keep), *keeps])
    full = trials.near(np.ones_like(circuit.keep), [np.ones_like(circuit.keep)])[0]
    rows = [(name, int(cut.sum()), False) for name, cut in cuts.items()]
    rows += [(f"random {i}", int(part.sum()), True) for i, part in enumerate(added)]
    table = pd.DataFrame(rows, columns=["name", "edges", "null"])
    ends = (values[0], full, values[1])
    return Minimality(table, values[2:], *ends, by, name_of(metric), target)


def _edges(circuit: Circuit) -> dict[str, Keep]:
    """Every edge of a circuit alone."""
    found = {}
    for edge, name in zip(np.flatnonzero(circuit.keep), circuit.edges, strict=True):
        found[name] = np.zeros_like(circuit.keep)
        found[name][edge] = True
    return found


def _nodes(graph: Graph, circuit: Circuit) -> dict[str, Keep]:
    """The circuit's edges into and out of each of its nodes."""
    writers, owners = graph.writers["name"].to_numpy()[graph.src], np.array(graph.owners)[graph.dst]
    ends = {
        str(name)
        for table in (graph.writers, graph.readers)
        for name in table.loc[table["kind"].isin(ENDS), "name"]
    }
    names = [name for name in circuit.nodes if name not in ends]
    return {name: circuit.keep & ((writers == name) | (owners == name)) for name in names}


def _outside(graph: Graph, circuit: Circuit, n: int, size: int, seed: int) -> list[Keep]:
    """Random edges outside of a circuit that join its nodes."""
    outside = graph.joining(circuit.keep) & ~circuit.keep
    rng, there = np.random.default_rng(seed), np.flatnonzero(outside)
    found = []
    for _ in range(n if len(there) else 0):
        part = np.zeros_like(circuit.keep)
        part[rng.choice(there, min(size, len(there)), replace=False)] = True
        found.append(part)
    return found

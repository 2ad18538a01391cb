"""Circuits run alone: the metric with some edges of a graph kept and all others at the reference.

What is kept is told by one true or false per edge, in the order of the graph. The clean prompts run
(`mechmm.engine.splice`); with every edge that is the clean run, with none the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmm.data.metrics import Metric
from mechmm.data.pairs import PairDataset
from mechmm.engine.contrast import Contrast, contrasts
from mechmm.engine.splice import Masks, Runs
from mechmm.engine.wiring import Wiring, wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph

Keep = Bool[np.ndarray, " part"]
"""Which edges of a graph, or units, are kept."""


class Ablated(NamedTuple):
    """The metric of every example.

    Attributes:
        values: with the edges of every circuit. full, empty: with all edges and with none.
    """

    values: Float[Tensor, "circuit example"]
    full: Float[Tensor, " example"]
    empty: Float[Tensor, " example"]


def run_circuits(
    model: HookedMultimodal,
    pairs: PairDataset,
    wiring: Wiring,
    keeps: Sequence[Keep],
    metric: Metric,
    target: str = "corrupt",
    batch_size: int = 16,
) -> Ablated:
    """The metric with some edges kept, with all and with none.

    Args:
        wiring: of the model (`wired_as`, `wired`).
        keeps: which edges, one array per circuit.
        target: what takes the place of what is cut off (`contrasts`).

    Raises:
        ValueError: an unknown target; a model that gives no logits after a prompt.
        SpanError: a span of the graph that the pairs do not have.
    """
    graph = wiring.graph

    def alone(part: Contrast) -> Callable[[Keep], Tensor]:
        splice = part.splice()
        return lambda keep: splice.run(masks_of(graph, [keep]))

    found = contrasts(model, pairs, wiring, metric, target, batch_size, streams=True)
    return each_alone(found, alone, keeps, len(graph))


def each_alone(
    contrasted: Iterable[list[Contrast]],
    alone: Callable[[Contrast], Callable[[Keep], Tensor]],
    keeps: Sequence[Keep],
    count: int,
) -> Ablated:
    """Some parts of a model kept, batch by batch, then all of them and none.

    Args:
        alone: of one reading of a batch, what runs it with some parts kept: its metric [example].
        count: of all parts.
    """
    columns, everything = [], np.ones(count, dtype=bool)
    every = [*keeps, everything, ~everything]
    for parts in contrasted:
        runs = [alone(part) for part in parts]
        found = [sum((run(keep) for run in runs), torch.zeros(())) for keep in every]
        columns.append(torch.stack([value.float().cpu() for value in found]))
    values = torch.cat(columns, dim=1)
    return Ablated(values[:-2], values[-2], values[-1])


class Trials:
    """Circuits run one after the other on pairs whose clean and reference runs are kept.

    Args:
        together: circuits that run at once, on copies of the pairs.
        Other arguments, and errors: as `run_circuits`.
    """

    def __init__(
        self,
        model: HookedMultimodal,
        pairs: PairDataset,
        wiring: Wiring,
        metric: Metric,
        target: str = "corrupt",
        batch_size: int = 16,
        together: int = 1,
    ) -> None:
        self.graph, self.together = wiring.graph, together
        starts = range(0, len(pairs), batch_size)
        chunks = [range(start, min(start + batch_size, len(pairs))) for start in starts]
        copies = pairs[[number for chunk in chunks for number in [*chunk] * together]]
        size = batch_size * together
        found = contrasts(model, copies, wiring, metric, target, size, streams=True)
        self.splices = [[part.splice() for part in parts] for parts in found]
        self.runs: list[list[Runs]] = []

    @property
    def ran(self) -> Keep:
        """The edges of towers that ran; all others carry nothing."""
        towers = {tower for parts in self.splices for tower in parts[0].spans}
        return np.concatenate([np.full(b.size, b.tower in towers) for b in self.graph.blocks])

    def enter(self, keep: Keep) -> None:
        """From now on circuits are parts of this one."""
        masks = masks_of(self.graph, [keep])
        self.runs = [[Runs(splice, masks) for splice in parts] for parts in self.splices]

    def run(self, keeps: Sequence[Keep], first: int = 0) -> Float[Tensor, "circuit example"]:
        """The metric with the edges of some circuits, `together` of them or fewer.

        Args:
            first: of the graph's blocks; the edges into readers before it are as they were in the
                last run that began there or earlier.
        """
        full = [*keeps, *[keeps[-1]] * (self.together - len(keeps))]
        masks, columns = masks_of(self.graph, full), []
        for parts in self.runs:
            value = sum((part.run(masks, first) for part in parts), torch.zeros(()))
            columns.append(value.float().cpu().unflatten(0, (self.together, -1)))
        return torch.cat(columns, dim=1)[: len(keeps)]

    def mean(self, keeps: Sequence[Keep], first: int = 0) -> list[float]:
        """The mean over examples of what `run` gives."""
        return self.run(keeps, first).double().mean(1).tolist()

    def near(self, own: Keep, keeps: Sequence[Keep]) -> Float[Tensor, "circuit example"]:
        """The metric with the edges of any number of circuits that differ little from one."""
        self.enter(np.logical_or.reduce([own, *keeps]))
        self.run([own])
        begin = self.graph.starts[1:].searchsorted
        firsts = [int(begin(np.argmax(keep != own), side="right")) for keep in keeps]
        order = sorted(range(len(keeps)), key=lambda number: -firsts[number])
        found = torch.zeros(0)
        for start in range(0, len(order), self.together):
            some = order[start : start + self.together]
            value = self.run([keeps[i] for i in some], firsts[some[-1]])
            found = found if len(found) else value.new_empty(len(keeps), value.shape[1])
            found[some] = value
        return found


def masks_of(graph: Graph, keeps: Sequence[Keep]) -> Masks:
    """What circuits keep of the edges of every block [trial, span, writer, reader]; one trial where
    all keep the same."""
    parts = graph.by_block(np.stack(keeps).astype(np.float32))
    alike = [part[:1] if (part == part[:1]).all() else part for part in parts]
    return [torch.from_numpy(part) for part in alike]


def wired_as(
    model: HookedMultimodal, circuits: Sequence[Circuit], *, connected: bool = False
) -> Wiring:
    """The wiring of a model in the graph of some circuits.

    Args:
        connected: whether every circuit has to lead from an input to the logits.

    Raises:
        ValueError: no circuits; circuits of another model, of different graphs, or of nodes or
            neurons; an empty one, or one that leads nowhere.
    """
    if not circuits:
        raise ValueError("there are no circuits; give at least one")
    graph = circuits[0].graph
    if not isinstance(graph, Graph):
        raise ValueError(
            f"the circuit is of {graph}, whose parts are no edges; find one of edges: "
            "mm.attribute without granularity"
        )
    wiring = wired(model, graph.spans[:-1])
    for number, circuit in enumerate(circuits):
        if not circuit.graph.matches(graph):
            raise ValueError(
                f"circuit 0 is of {graph}, circuit {number} of {circuit.graph}; give circuits of "
                "one model, with the same spans"
            )
        keep = graph.pruned(circuit.keep) if connected else circuit.keep
        if not keep.any():
            raise ValueError(
                "the circuit is empty, or no edge of it lies on a way from an input to the logits; "
                "keep more edges (n=, fraction=)"
            )
    if not graph.matches(wiring.graph):
        raise ValueError(
            f"the circuit is of {graph}, the model has {wiring.graph}; find circuits on the model "
            "that they are tested on"
        )
    return wiring

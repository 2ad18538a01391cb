"""Circuits run alone: the metric with some edges of a graph kept and all others at the reference.

What is kept is told by one true or false per edge, in the order of the graph. The clean prompts run
(`mechmm.engine.splice`); with every edge that is the clean run, with none the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmm.data.metrics import Metric
from mechmm.data.pairs import PairDataset
from mechmm.engine.contrast import contrasts
from mechmm.engine.splice import Masks
from mechmm.engine.wiring import Wiring, wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph

Keep = Bool[np.ndarray, " edge"]
"""Which edges of a graph are kept."""


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
        ValueError: an unknown target.
        SpanError: a span of the graph that the pairs do not have.
    """
    graph, columns = wiring.graph, []
    every = [*keeps, np.ones(len(graph), bool), np.zeros(len(graph), bool)]
    for parts in contrasts(model, pairs, wiring, metric, target, batch_size, streams=True):
        splices = [part.splice() for part in parts]
        found = [
            sum((splice.run(masks_of(graph, keep)) for splice in splices), torch.zeros(()))
            for keep in every
        ]
        columns.append(torch.stack([value.float().cpu() for value in found]))
    values = torch.cat(columns, dim=1)
    return Ablated(values[:-2], values[-2], values[-1])


def masks_of(graph: Graph, keep: Keep) -> Masks:
    """What is kept of the edges of every block."""
    return [torch.from_numpy(part.astype(np.float32)) for part in graph.by_block(keep)]


def wired_as(model: HookedMultimodal, circuits: Sequence[Circuit]) -> Wiring:
    """The wiring of a model in the graph of some circuits.

    Raises:
        ValueError: no circuits; circuits of another model, or of different graphs; an empty one.
    """
    if not circuits:
        raise ValueError("there are no circuits; give at least one")
    graph = circuits[0].graph
    wiring = wired(model, graph.spans[:-1])
    for number, circuit in enumerate(circuits):
        if not circuit.graph.matches(graph):
            raise ValueError(
                f"circuit 0 is of {graph}, circuit {number} of {circuit.graph}; give circuits of "
                "one model, with the same spans"
            )
        if not circuit.keep.any():
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

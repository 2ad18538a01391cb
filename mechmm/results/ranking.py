"""How well the scores of edges or nodes tell a known circuit from the rest: areas under ROC curves.

Larger |score| is taken to mean in the circuit; 1 is a perfect ranking, 0.5 what random numbers
give on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score

from mechmm.results.circuit import chosen_edges
from mechmm.results.graph import Graph


def auroc(scores: Float[np.ndarray, " part"], true: Bool[np.ndarray, " part"]) -> float:
    """The chance that an edge or node of the circuit has a larger |score| than one outside it; ties
    count half.

    Raises:
        ValueError: a circuit of no parts or of all.
    """
    return float(roc_auc_score(true, np.abs(scores)))


def greedy_auroc(
    graph: Graph,
    scores: Float[np.ndarray, " edge"],
    true: Bool[np.ndarray, " edge"],
    fractions: Sequence[float],
) -> float:
    """The area as MIB takes it (2504.13151, its released code): circuits of some sizes are chosen
    by |score| greedily from the logits backwards and pruned, and their shares of the true edges are
    plotted against their shares of the false ones, from (0, 0) to (1, 1).
    """
    found = [np.zeros_like(true)]
    for fraction in sorted(fractions):
        keep = chosen_edges(graph, scores, None, fraction, None, signed=False, greedy=True)
        found.append(graph.pruned(keep))
    found.append(np.ones_like(true))
    hits = [(keep & true).sum() / true.sum() for keep in found]
    misses = [(keep & ~true).sum() / (~true).sum() for keep in found]
    return float(np.trapezoid(hits, misses))

"""Does AtP* find planted edges that EAP misses? AUROC of |score| over all edges, over those into
queries and keys, and over nodes;
mean over seeds:

    python benchmarks/atp.py --seeds 2 --pairs 24
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import mechmm as mm
from mechmm.zoo import planted

METHODS = ("eap", "atp*", "eap-ig-inputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'task':18}{'method':15}{'edges':>8}{'q and k':>9}{'nodes':>8}")
    for task in planted.TASKS:
        made = [planted.build(task, seed) for seed in range(options.seeds)]
        for method in METHODS:
            found = np.mean([measured(one, options.pairs, method) for one in made], axis=0)
            print(f"{task:18}{method:15}{found[0]:8.3f}{found[1]:9.3f}{found[2]:8.3f}", flush=True)


def measured(made: planted.Planted, n: int, method: str) -> tuple[float, float, float]:
    """AUROC of all edges, of those into queries and keys, and of nodes."""
    pairs, units = made.pairs(n), mm.graph(made.model, granularity="node")
    edges = mm.attribute(made.model, pairs, method=method)
    nodes = mm.attribute(made.model, pairs, method=method, graph=units)
    graph, size = edges.graph, np.abs(edges.mean())
    true = np.zeros(len(graph), dtype=bool)
    true[graph.edges(made.edges)] = True
    kinds = graph.readers["kind"].to_numpy()[graph.dst]
    own = np.isin(kinds, ("q", "k"))
    computes = np.isin(units.names(), made.nodes)
    return (
        float(roc_auc_score(true, size)),
        float(roc_auc_score(true[own], size[own])),
        float(roc_auc_score(computes, np.abs(nodes.mean()))),
    )


if __name__ == "__main__":
    main()

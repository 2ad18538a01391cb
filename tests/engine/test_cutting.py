"""An edge cut as a trial of the engine loses what a run without it loses, in every family."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from contrasted import NO_EDGES, Contrasted

import mechmm as mm
from mechmm.data.metrics import Answers, kl, log_prob, logit_diff, prepared, readings
from mechmm.engine.contrast import contrasts
from mechmm.engine.cutting import edge_losses
from mechmm.engine.flow import values
from mechmm.engine.splice import Splice
from mechmm.engine.wiring import wired
from mechmm.model.families import FAMILIES
from mechmm.testing import RECIPES, assert_no_hooks, tiny

ANSWERING = [
    family
    for family, recipe in RECIPES.items()
    if FAMILIES[recipe.architecture].unembed is not None and family not in NO_EDGES
]
TOKENS = 512


def drawn(graph, seed=0, more=6):
    """An edge into every kind of reader of every tower, and some others."""
    random = np.random.default_rng(seed)
    tables = graph.readers[["tower", "kind"]].agg(" ".join, axis=1).to_numpy()[graph.dst]
    kinds = [random.choice(np.flatnonzero(tables == kind)) for kind in np.unique(tables)]
    chosen = np.zeros(len(graph), dtype=bool)
    chosen[[*kinds, *random.choice(len(graph), more, replace=False)]] = True
    return chosen


def spliced(splice: Splice, graph, edges):
    """What the clean run loses without each of some edges [example, edge]."""
    found = []
    keep = np.ones(len(graph), dtype=np.float32)
    whole = splice.run([torch.from_numpy(part) for part in graph.by_block(keep)])
    for edge in np.flatnonzero(edges):
        less = keep.copy()
        less[edge] = 0
        found.append(whole - splice.run([torch.from_numpy(p) for p in graph.by_block(less)]))
    return torch.stack(found, dim=1)


def compare(contrast, edges, tokens=TOKENS):
    graph = contrast.wiring.graph
    found = edge_losses(contrast, edges, tokens)
    wanted = spliced(contrast.splice(), graph, edges)
    scale = float((contrast.clean.metric - contrast.reference.metric).abs().max())
    close = (found[:, torch.from_numpy(edges)] - wanted).abs().max()
    assert close <= 1e-5 * max(scale, float(wanted.abs().max()))
    assert not found[:, torch.from_numpy(~edges)].any()
    assert (wanted.abs() > 1e-3 * scale).float().mean() > 0.2
    return found


@pytest.mark.parametrize("family", ANSWERING)
def test_a_cut_edge_loses_what_a_run_without_it_loses(family):
    case = Contrasted(family)
    compare(case.contrast, drawn(case.wiring.graph))
    assert_no_hooks(case.model)


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama", "qwen3_vl"])
def test_a_cut_of_one_span(family):
    case = Contrasted(family, ("image", "last"))
    compare(case.contrast, drawn(case.wiring.graph, more=12))

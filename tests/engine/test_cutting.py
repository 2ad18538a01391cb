"""An edge cut as a trial of the engine loses what a run without it loses, in every family."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch
from contrasted import NO_EDGES, Contrasted

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import kl, log_prob, logit_diff
from mechmm.engine.contrast import contrasts
from mechmm.engine.cut_within import Within
from mechmm.engine.cutting import edge_losses
from mechmm.engine.engine import Engine
from mechmm.engine.wiring import wired
from mechmm.model.batch import Batch
from mechmm.model.families import FAMILIES
from mechmm.testing import RECIPES, assert_no_hooks, tiny_inputs
from mechmm.zoo.recipe import build_model, build_processor

ANSWERING = [
    family
    for family, recipe in RECIPES.items()
    if FAMILIES[recipe.architecture].unembed is not None and family not in NO_EDGES
]
TOKENS = 512


def drawn(graph, more=0):
    """An edge into every kind of reader of every tower, and some others."""
    random = np.random.default_rng(0)
    kinds = graph.readers[["tower", "kind"]].agg(" ".join, axis=1).to_numpy()[graph.dst]
    chosen = [random.choice(np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)]
    edges = np.zeros(len(graph), dtype=bool)
    edges[[*chosen, *random.choice(len(graph), more, replace=False)]] = True
    return edges


def spliced(contrast, edges):
    """What the clean run loses without each of some edges [example, edge]."""
    graph, splice = contrast.wiring.graph, contrast.splice()
    keep = np.ones(len(graph), dtype=np.float32)

    def run():
        return splice.run([torch.from_numpy(part) for part in graph.by_block(keep)])

    whole, found = run(), []
    for edge in np.flatnonzero(edges):
        keep[edge] = 0
        found.append(whole - run())
        keep[edge] = 1
    return torch.stack(found, dim=1)


def compare(contrast, edges, tokens=TOKENS):
    found, wanted = edge_losses(contrast, edges, tokens), spliced(contrast, edges)
    scale, largest = scale_of(contrast), wanted.abs().max()
    assert (found[:, torch.from_numpy(edges)] - wanted).abs().max() <= 1e-5 * scale
    assert not found[:, torch.from_numpy(~edges)].any()
    assert largest > 5e-4 * scale
    assert (wanted.abs() > 1e-2 * largest).float().mean() > 0.2


def scale_of(contrast):
    """The largest value of the metric in both runs."""
    return float(torch.cat([contrast.clean.metric, contrast.reference.metric]).abs().max())


@pytest.mark.parametrize("family", ANSWERING)
def test_a_cut_edge_loses_what_a_run_without_it_loses(family):
    case = Contrasted(family)
    compare(case.contrast, drawn(case.wiring.graph))
    assert_no_hooks(case.model.unwrap())


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama"])
def test_a_cut_at_the_positions_of_one_span(family):
    case = Contrasted(family, ("image", "last"))
    compare(case.contrast, drawn(case.wiring.graph, more=6))


@pytest.fixture(scope="module")
def lively():
    """The demo model untrained, with weights so large that every part of it matters, and three
    pairs of pictures; the last prompt is longer."""
    hf = build_model(seed=1).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    model = mm.HookedMultimodal.from_hf(hf, build_processor())
    short, long = (shapes.pairs(model, *what, seed=1) for what in (("color", 2), ("beside", 1)))
    return model, mm.PairDataset([*short, *long], model)


@pytest.mark.parametrize(
    ("metric", "target", "answer"),
    [
        (logit_diff, "mean", "blue star"),
        (kl, "corrupt", None),
        (log_prob, "zero", "blue star ."),
    ],
)
def test_targets_metrics_and_answers_of_several_tokens(lively, metric, target, answer):
    model, pairs = lively
    if answer is not None:
        pairs = mm.PairDataset([replace(pair, answer=answer) for pair in pairs], model)
    wiring = wired(model)
    edges = drawn(wiring.graph)
    (parts,) = contrasts(model, pairs, wiring, metric, target, streams=True)
    assert len(parts) == (2 if answer is not None and metric is logit_diff else 1)
    for part in parts:
        compare(part, edges, tokens=2048)


class Late(Contrasted):
    """Only the last words differ."""

    @cached_property
    def batches(self):
        inputs = tiny_inputs(self.model, (1, 1), [6, 9])
        ids = inputs["input_ids"].clone()
        ids[:, -2:] = ids[:, -2:].flip(1)
        return tuple(
            Batch.from_inputs(self.model, **{**inputs, "input_ids": new})
            for new in (inputs["input_ids"], ids)
        )


def test_only_what_changed_runs(monkeypatch):
    """Of a model whose last words differ: neither the tower that sees, nor positions before."""
    case, begun = Late("llava"), []
    onward = Engine.onward

    def noted(self, layer, stream, prompts, start):
        begun.append((layer, start))
        return onward(self, layer, stream, prompts, start)

    monkeypatch.setattr(Engine, "onward", noted)
    monkeypatch.setattr(Engine, "run", None)
    edges = np.ones(len(case.wiring.graph), dtype=bool)
    compare_all(case.contrast, edges)
    width = case.batches[0].input_ids.shape[1]
    assert {start for layer, start in begun if layer < 2} == {width - 2}


def compare_all(contrast, edges):
    """Some edges, found with all others together, are as runs without them have them."""
    found, some = edge_losses(contrast, edges, TOKENS), edges.copy()
    some[np.arange(len(some)) % 17 > 0] = False
    wanted = spliced(contrast, some)
    scale = scale_of(contrast)
    assert (found[:, torch.from_numpy(some)] - wanted).abs().max() <= 1e-5 * scale
    towers = contrast.wiring.graph.writers["tower"].to_numpy()[contrast.wiring.graph.src]
    assert not found[:, torch.from_numpy(towers == "vision")].any()


def test_a_block_in_which_somebody_listens_runs_as_written():
    case, heard = Contrasted("llava", options=(("key_value_heads", 2),)), []
    contrast, edges = case.contrast, drawn(case.wiring.graph, more=4)
    with case.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda v, hook: heard.append(1))]):
        compare(contrast, edges)
    assert len(heard) > edges.sum()


def test_blocks_that_are_sums_take_the_short_way(monkeypatch):
    case, ways = Contrasted("llava"), []
    lost = Within.lost
    monkeypatch.setattr(Within, "lost", lambda s, cut: ways.append(cut.number) or lost(s, cut))
    edge_losses(case.contrast, tokens=TOKENS)
    language = [i for i, g in enumerate(case.wiring.readers) if g.tower == "language"]
    assert set(ways) == set(language)

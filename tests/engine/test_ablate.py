"""Runs that begin late and runs of several circuits give what whole runs of one give."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
import torch
from contrasted import Contrasted

import mechmm as mm
from mechmm.engine.ablate import Trials, masks_of, run_circuits, wired_as
from mechmm.engine.splice import Runs
from mechmm.engine.whole import tile
from mechmm.engine.wiring import wired
from mechmm.testing import tiny

FAMILIES = ["llava", "mllama", "qwen3_vl"]
"""One stream into the other, cross-attention, packed pictures with deepstack."""


class Tiled(Contrasted):
    """Every prompt twice."""

    @cached_property
    def batches(self):
        clean, corrupt = (tile(batch, 2) for batch in super().batches)
        return clean, corrupt


def some_edges(graph, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(len(graph)) < share


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_begins_late_is_a_whole_run(family):
    case = Contrasted(family, ("image",))
    graph, splice = case.wiring.graph, case.contrast.splice()
    own = some_edges(graph, 0.9, 0)
    runs = Runs(splice, masks_of(graph, [own]))
    first = runs.run(masks_of(graph, [own]))
    changed = 0
    for number in range(len(graph.blocks) - 1, -1, -2):
        keep = own.copy()
        begin, end = graph.starts[number : number + 2]
        keep[begin:end] &= some_edges(graph, 0.3, number)[begin:end]
        wanted = splice.run(masks_of(graph, [keep]))
        assert torch.allclose(runs.run(masks_of(graph, [keep]), number), wanted, atol=1e-5)
        changed += not torch.allclose(first, wanted, atol=1e-3)
    assert changed > len(graph.blocks) // 6
    assert not any("forward" in module.__dict__ for module in case.model.hf_model.modules())
    assert not any(point.fwd_hooks for point in case.model.hook_dict.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_several_trials_are_runs_of_their_own(family):
    once, twice = Contrasted(family, ("image",)), Tiled(family, ("image",))
    graph = once.wiring.graph
    keeps = [some_edges(graph, 0.9, seed) for seed in (1, 2)]
    found = twice.contrast.splice().run(masks_of(graph, keeps)).unflatten(0, (2, -1))
    for keep, own in zip(keeps, found, strict=True):
        wanted = once.contrast.splice().run(masks_of(graph, [keep]))
        assert torch.allclose(own, wanted, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.fixture(scope="module")
def model():
    return tiny("llava", layers=2, vision_layers=1, heads=2, key_value_heads=1)


@pytest.fixture(scope="module")
def pairs(model):
    prompts = [mm.Prompt(f"{color} circle left of blue star :") for color in ("red", "green")]
    both = [mm.Pair(*prompts, "red", "green"), mm.Pair(*reversed(prompts), "one", "two")]
    return mm.PairDataset([*both, mm.Pair(*prompts, "star", "moon")], model)


@pytest.mark.parametrize("together", [1, 3])
def test_circuits_near_one_are_as_if_run_alone(model, pairs, together):
    wiring = wired(model)
    graph = wiring.graph
    own = some_edges(graph, 0.8, 0)
    keeps = [own, ~own, *(own & some_edges(graph, 0.95, seed) for seed in range(1, 8))]
    trials = Trials(model, pairs, wiring, mm.logit_diff, batch_size=2, together=together)
    wanted = run_circuits(model, pairs, wiring, keeps, mm.logit_diff, batch_size=3)
    found = trials.near(own, keeps)
    assert torch.allclose(found, wanted.values, atol=1e-5)
    assert wanted.values.std(0).min() > 1e-3


def test_means_are_over_all_pairs(model, pairs):
    wiring = wired(model)
    keep = some_edges(wiring.graph, 0.6, 0)
    trials = Trials(model, pairs, wiring, mm.logit_diff, "mean", batch_size=2, together=2)
    wanted = run_circuits(model, pairs, wiring, [keep], mm.logit_diff, "mean", batch_size=3)
    assert torch.allclose(trials.near(keep, [keep]), wanted.values, atol=1e-5)


def test_circuits_that_cannot_run_are_refused(model):
    graph = mm.graph(model)
    some = mm.Circuit.named(graph, ["input->logits"])
    loose = mm.Circuit.named(graph, ["vision.input->projector"])
    spans = mm.Circuit.named(mm.graph(model, spans=("last",)), ["input->logits"])
    with pytest.raises(ValueError, match="there are no circuits"):
        wired_as(model, [])
    with pytest.raises(ValueError, match=r"circuit 1 of Graph.*with the same spans"):
        wired_as(model, [some, spans])
    with pytest.raises(ValueError, match="the circuit is empty"):
        wired_as(model, [some - some])
    with pytest.raises(ValueError, match="no edge of it lies on a way"):
        wired_as(model, [loose], connected=True)
    assert wired_as(model, [loose]).graph.matches(graph)

"""Nodes and neurons are scored and cut at their own hooks, in every family."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from contrasted import Contrasted

from mechmm.engine.unit_runs import cuts, kept_alone
from mechmm.engine.unit_scores import of_edges, unit_scores
from mechmm.model.layout import IMAGE

CASES = {
    "llava": "neuron",
    "qwen2_vl": "node",
    "gemma3": "node",
    "mllama": "node",
    "qwen3_vl_moe": "node",
    "qwen3_5": "neuron",
}
"""Packed towers, sandwich norms, cross-attention, DeepStack and experts, linear attention and gates
are among them."""


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    granularity = CASES[request.param]
    return Contrasted(request.param, ("image", "last")[granularity == "neuron" :], (), granularity)


def where(case: Contrasted, name: str) -> dict[str, torch.Tensor]:
    """By hook, which numbers of its value a unit is: by its name, from the model's layout."""
    whole, _, span = name.partition(" @ ")
    prefix = "vision." if whole.startswith("vision.") else ""
    values, (towers, batch) = case.contrast.clean.values, (case.model.towers, case.batches[0])
    part = re.fullmatch(r"([amc])(\d+)(?:\.h(\d+))?(?:\.[dn](\d+))?", whole.removeprefix(prefix))
    tower = "vision" if prefix else "language"
    spans = case.contrast.spans()[tower] == case.map.units.spans.index(span)
    if part is None and whole == "projector" and case.model.family.resume == "cross":
        hooks = [h for h in values if h.endswith(("cross_attn.hook_k", "cross_attn.hook_v"))]
        rest = span in ("", "rest")  # they have no positions of the prompt
        return {hook: torch.full_like(values[hook], rest, dtype=torch.bool) for hook in hooks}
    if part is None:
        deep = re.fullmatch(r"deepstack(\d+)", whole)
        hook = f"blocks.{deep[1]}.hook_deepstack" if deep else f"{prefix}blocks.0.hook_resid_pre"
        seen = batch.layout.modality >= IMAGE
        if whole == "projector":
            spans = spans & seen
        elif whole == "input" and case.model.family.resume != "cross":
            spans = spans & ~seen
        return {hook: spans[..., None].expand(values[hook].shape)}
    kind, layer, head, inside = part.groups()
    block = f"{prefix}blocks.{layer}"
    if kind == "m":
        hook = f"{block}.mlp.hook_post" if inside is not None else f"{block}.hook_mlp_out"
    elif head is None:
        hook = f"{block}.hook_attn_out"
    else:
        hook = f"{block}.{'cross_' * (kind == 'c')}attn.hook_z"
    there = torch.zeros_like(values[hook], dtype=torch.bool)
    index = tuple(slice(None) if i is None else int(i) for i in (head, inside) if i is not None)
    there[(slice(None), slice(None), *index)] = True
    assert tower in towers
    return {hook: there & spans.view(*spans.shape, *[1] * (there.ndim - 2))}


def some(case: Contrasted) -> list[int]:
    """All nodes; a handful of neurons of every kind."""
    units = case.map.units
    if units.granularity == "node":
        return list(range(len(units)))
    return sorted({*range(0, len(units), 97), *np.flatnonzero(units.neuron < 0).tolist()})


def without(case: Contrasted, name: str) -> torch.Tensor:
    """The clean run's metric with one unit set to its reference value, by plain hooks."""
    at, reference = where(case, name), case.contrast.reference.values

    def cut(value, hook):
        return torch.where(at[hook.name], reference[hook.name], value)

    part = case.parts[0]
    with torch.no_grad(), case.model.hooks(fwd_hooks=[(hook, cut) for hook in at]):
        return part.reduce(part.logits(case.model), case.answers)


def test_exact_scores_are_a_hook_in_a_full_run(case):
    found, names = unit_scores(case.units, "exact", 1), case.map.units.names()
    clean = case.contrast.clean.metric
    for number in some(case):
        wanted = clean - without(case, names[number])
        assert torch.allclose(found[:, number], wanted, atol=2e-5), names[number]
    assert (found.abs() > 1e-3).float().mean() > 0.02


def test_a_circuit_without_a_unit_is_a_hook_in_a_full_run(case):
    names = case.map.units.names()
    for number in some(case)[::7]:
        keep = np.ones(len(names), dtype=bool)
        keep[number] = False
        assert torch.allclose(
            kept_alone(case.units, keep), without(case, names[number]), atol=1e-6
        ), names[number]


def test_with_all_units_the_clean_run_and_with_none_the_corrupt_one(case):
    everything = np.ones(len(case.map.units), dtype=bool)
    clean, corrupt = case.contrast.clean.metric, case.contrast.reference.metric
    assert torch.equal(kept_alone(case.units, everything), clean)
    assert torch.allclose(kept_alone(case.units, ~everything), corrupt, atol=1e-6)
    assert not cuts(case.units, everything)


def test_scores_are_gradient_times_difference(case):
    """Every unit is moved by eps of its change in the corrupt run, and the metric differentiated
    by every eps."""
    found, (contrast, names) = (
        unit_scores(case.units, "eap", 1),
        (case.contrast, case.map.units.names()),
    )
    numbers, changes = some(case), {}
    eps = torch.zeros(len(numbers), requires_grad=True)
    for i, number in enumerate(numbers):
        for hook, at in where(case, names[number]).items():
            change = (contrast.clean.values[hook] - contrast.reference.values[hook]) * at
            changes.setdefault(hook, []).append((i, change))

    def move(value, hook):
        return value + sum(eps[i] * change for i, change in changes[hook.name])

    part = case.parts[1]
    with torch.enable_grad(), case.model.hooks(fwd_hooks=[(hook, move) for hook in changes]):
        total = part.reduce(part.logits(case.model), case.answers).sum()
    (wanted,) = torch.autograd.grad(total, eps)
    size = found.sum(0).abs().max()
    assert (found.sum(0)[numbers] - wanted).abs().max() < 1e-4 * size
    assert (wanted.abs() > 1e-3 * size).float().mean() > 0.05


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "internvl", "qwen3_vl"])
def test_a_node_scores_what_the_edges_out_of_it_score(family):
    """The chain rule: what a node does, it does through what reads it."""
    case = Contrasted(family, ("image",), granularity="node")
    found, wanted = unit_scores(case.units, "eap", 1), of_edges(case.units, case.scores())
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert wanted.abs().max() > 1e-2


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "clean-corrupt"])
def test_integrated_scores_are_means_over_runs_on_the_way(method):
    """Of the MLP of a layer: by plain hooks and gradients."""
    case = Contrasted("llava", granularity="neuron")
    units, contrast, hook = case.map.units, case.contrast, "blocks.1.mlp.hook_post"
    found = unit_scores(case.units, method, 2)[:, units.numbers(["m1"])]
    clean, corrupt = contrast.clean.values, contrast.reference.values
    inputs = ("vision.blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre")
    text = (case.batches[0].layout.modality < IMAGE)[..., None]

    def slope(part, edits):
        caught = []

        def catch(value, hook):
            caught.append(value.detach().requires_grad_())
            return caught[0].clone()

        with torch.enable_grad(), case.model.hooks(fwd_hooks=[*edits, (hook, catch)]):
            total = part.reduce(part.logits(case.model), case.answers).sum()
        return torch.autograd.grad(total, caught)[0]

    def towards(way):
        def move(value, hook):
            new = corrupt[hook.name] + way * (clean[hook.name] - corrupt[hook.name])
            return torch.where(text, new, value) if hook.name == inputs[1] else new

        return [(name, move) for name in ((hook,) if "activations" in method else inputs)]

    if method == "clean-corrupt":
        slopes = [slope(part, []) for part in case.parts]
    else:
        slopes = [slope(case.parts[1], towards(way)) for way in (0.5, 1.0)]
    wanted = ((clean[hook] - corrupt[hook]) * sum(slopes) / 2).sum(1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert wanted.abs().max() > 1e-3

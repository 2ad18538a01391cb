"""The reference for edge ablation is the model where every edge is on, and patching where they are
not."""

from __future__ import annotations

import pytest
import torch

from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny_hf, tiny_inputs
from mechmm.testing.edges import EdgeReference

LAYERS = 2


def tiny(**options) -> HookedMultimodal:
    return HookedMultimodal.from_hf(tiny_hf("llava", layers=LAYERS, **options))


@pytest.fixture(scope="module")
def model():
    return tiny(heads=4, key_value_heads=2)


@pytest.fixture(scope="module")
def inputs(model):
    return [tiny_inputs(model, (1, 1), (6, 4), seed=seed) for seed in (0, 1)]


def plain(model, inputs):
    with torch.no_grad():
        return model(Batch.from_inputs(model, **inputs))[:, -1].double()


@pytest.mark.parametrize(
    "options",
    [
        {"key_value_heads": 4},
        {"key_value_heads": 2},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 1, "select": "full"},
    ],
)
def test_with_all_edges_it_is_the_model(options):
    model = tiny(**options)
    inputs = tiny_inputs(model, (2, 1), (3, 7))
    found = EdgeReference(model.hf_model).logits(inputs)
    torch.testing.assert_close(found, plain(model, inputs), rtol=0, atol=1e-4)


def test_without_an_edge_it_is_the_other_run(model, inputs):
    reference = EdgeReference(model.hf_model)
    clean, corrupt = inputs
    other = reference.values(corrupt)
    expected = reference.logits(corrupt)
    torch.testing.assert_close(reference.logits(clean, (), other), expected)
    torch.testing.assert_close(
        reference.logits(clean, reference.edges, other), reference.logits(clean)
    )


@pytest.mark.parametrize(
    ("writer", "hook", "head"),
    [
        ("a0.h3", "blocks.0.attn.hook_z", 3),
        ("m0", "blocks.0.hook_mlp_out", None),
        ("vision.a1.h2", "vision.blocks.1.attn.hook_z", 2),
        ("vision.m0", "vision.blocks.0.hook_mlp_out", None),
        ("projector", "projector.hook_out", None),
    ],
)
def test_all_edges_of_a_writer_are_its_patch(model, inputs, writer, hook, head):
    reference = EdgeReference(model.hf_model)
    clean, corrupt = inputs
    _, cache = model.run_with_cache(Batch.from_inputs(model, **corrupt), names_filter=hook)

    def put(value, hook):
        if head is None:
            return cache[hook.name]
        value[:, :, head] = cache[hook.name][:, :, head]
        return value

    with model.hooks([(hook, put)]):
        expected = plain(model, clean)
    on = [edge for edge in reference.edges if not edge.startswith(f"{writer}->")]
    found = reference.logits(clean, on, reference.values(corrupt))
    assert (expected - plain(model, clean)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_edges_by_prompt_are_edges_of_each(model, inputs):
    reference = EdgeReference(model.hf_model)
    clean, corrupt = inputs
    other = reference.values(corrupt)
    off = ("vision.input->vision.a1.h0<q>", "projector->a1.h1<k>")
    each = [reference.logits(clean, lambda edge, i=i: edge != off[i], other)[i] for i in (0, 1)]
    rows = {off[0]: torch.tensor([False, True]), off[1]: torch.tensor([True, False])}
    found = reference.logits(clean, lambda edge: rows.get(edge, True), other)
    torch.testing.assert_close(found, torch.stack(each))


def test_the_number_of_edges(model):
    """Of 3 vision layers with 4 heads, and 2 layers with 4 heads and 2 key-value heads."""
    vision = sum(12 * (1 + 5 * layer) + (5 + 5 * layer) for layer in range(3)) + 16
    language = sum(8 * (2 + 5 * layer) + (6 + 5 * layer) for layer in range(LAYERS)) + 12
    edges = EdgeReference(model.hf_model).edges
    assert len(edges) == len(set(edges)) == vision + language

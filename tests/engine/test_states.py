"""What methods read at sites is what a run with a cache has there; every site has its function."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine.boxes import box_of
from mechmm.engine.checks import SiteError
from mechmm.engine.shares import direct
from mechmm.engine.sites import Sites
from mechmm.engine.source import BySite
from mechmm.engine.states import means, states
from mechmm.model.batch import Batch
from mechmm.model.hooked import UnknownHookError
from mechmm.model.layout import SpanError
from mechmm.testing import tiny, tiny_inputs
from mechmm.zoo.recipe import build_model, build_processor

FAMILIES = ("llava", "gemma3", "qwen2_vl", "mllama", "florence2", "clip")


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_hf(build_model(seed=1).eval(), build_processor())


@pytest.fixture(scope="module")
def pairs(model):
    return shapes.color_pairs(model, 2, seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_a_cached_run(family):
    model = tiny(family)
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1), words=(3, 6)))
    tower = "text" if family == "clip" else "encoder" if family == "florence2" else "language"
    prefix = model.towers[tower].prefix
    hooks = [f"{prefix}blocks.1.hook_resid_post", f"{prefix}blocks.0.attn.hook_z"]
    table = sum(
        (mm.sites.named(model, hook, ["text"]) for hook in hooks[1:]),
        mm.sites.named(model, hooks[0], ["text"]),
    )
    found = means(model, [batch], table)
    _, cache = model.run_with_cache(batch, names_filter=hooks)
    mask = batch.layout.mask("text")
    for hook, ours in zip(hooks, found, strict=True):
        wanted = torch.stack(
            [v[m].flatten(1).mean(0) for v, m in zip(cache[hook], mask, strict=True)]
        )
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_patches_of_both_towers_stand_for_one_box(model, pairs):
    """A patch of the vision tower has the box of the language position that it becomes."""
    batch = next(pairs.batches(2))
    site = mm.sites.named(model, "vision.blocks.1.hook_resid_post", ["object"])
    (found,) = states(model, batch.clean, site, batch.indices)
    every = (column.tolist() for column in (found.prompt, found.row, found.position))
    for prompt, row, position in zip(*every, strict=True):
        seen = box_of(batch.clean.layout, "vision", prompt, row, position)
        there = [
            p
            for p in batch.clean.layout.positions("object", prompt)
            if box_of(batch.clean.layout, "language", prompt, prompt, p) == seen
        ]
        assert len(there) == 1
    assert box_of(batch.clean.layout, "vision", 0, 0, 0) is None  # the class token


def test_every_site_has_its_function(model, pairs):
    """A sweep of many functions is a sweep of each."""
    one = mm.sites.residual(model, ["last"], layers=[2], towers=["language"])
    other = mm.sites.heads(model, ["image"], layers=[1], towers=["vision"])
    functions = (torch.zeros_like, lambda x: 2 * x, lambda x: x + 1, torch.neg, torch.relu)
    together = mm.Sweep(
        model, pairs, one + other, base="clean", source=BySite(functions), tokens=512
    ).run()
    for number, function in enumerate(functions):
        row = Sites((one + other).table.iloc[[number]].reset_index(drop=True))
        alone = mm.Sweep(model, pairs, row, base="clean", source=function, tokens=512).run()
        torch.testing.assert_close(together.values[number], alone.values[0], atol=1e-5, rtol=0)
    with pytest.raises(SiteError, match="1 functions for 5 sites"):
        mm.Sweep(model, pairs, one + other, base="clean", source=BySite(functions[:1]))


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_direct_shares_add_up_to_the_representation(family):
    model = tiny(family)
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1, 1)))
    found = direct(model, batch)
    total = found.heads.sum((1, 2)) + found.mlps.sum(1) + found.start + found.rest
    torch.testing.assert_close(total, found.representation, atol=1e-5, rtol=1e-5)
    embedded = model.hf_model(**batch.inputs).image_embeds.detach()
    normed = torch.nn.functional.normalize(found.representation, dim=-1)
    torch.testing.assert_close(normed, embedded, atol=1e-5, rtol=0)
    assert float(found.heads.norm()) > 0.1 * float(found.representation.norm())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("family", ["gemma3", "llama4", "clip"])
def test_untrained_is_the_same_architecture_with_other_weights(family):
    model = tiny(family)
    batch = Batch.from_inputs(model, **tiny_inputs(model))
    before = model(batch)
    first, again, other = (mm.untrained(model, seed) for seed in (1, 1, 2))
    assert set(first.hook_dict) == set(model.hook_dict)
    assert torch.equal(first(batch), again(batch))
    assert not torch.equal(first(batch), other(batch))
    assert torch.equal(model(batch), before)
    if family == "gemma3":  # its projector starts at 0, which would keep the picture out
        seen = first(Batch.from_inputs(model, **tiny_inputs(model, seed=3)))
        assert not torch.equal(seen[:, -1], first(batch)[:, -1])


def test_sites_that_cannot_be_read(model, pairs):
    with pytest.raises(UnknownHookError, match=r"nearest: .*hook_resid_post"):
        mm.sites.named(model, "blocks.1.hook_resid_pst")
    batch = next(pairs.batches(1))
    table = mm.sites.residual(model, positions=[999], layers=[1], towers=["language"])
    with pytest.raises(ValueError, match="position 999 is outside prompt 0"):
        means(model, [batch.clean], table)
    table = mm.sites.residual(model, ["nowhere"], layers=[1], towers=["language"])
    with pytest.raises(SpanError, match="unknown span 'nowhere'"):
        means(model, pairs, table)
    table = mm.sites.residual(model, ["before_image"], layers=[1], towers=["language"])
    texts = shapes.pairs(model, "color", 1, form="text")
    with pytest.raises(SpanError, match="example 0 has no position in span 'before_image'"):
        means(model, texts, table)

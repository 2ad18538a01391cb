"""Patches and words present or absent: equal to pasted pixels, to the corrupt prompt, and to hooks;
Shapley values equal those over all orders."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.corruption import Cells, swap_patches
from mechmm.data.metrics import Answers, score
from mechmm.engine.cells import Filled
from mechmm.engine.features import features_of
from mechmm.engine.presence import Presence
from mechmm.engine.shapley import shapley
from mechmm.model.layout import SpanError
from mechmm.testing import tiny_pairs

torch.set_num_threads(1)


def also(*families):
    """Further families, which take more time than they tell."""
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


FAMILIES = ["gemma3", "qwen2_5_vl", "blip-2", "chameleon", "llava_onevision"]
"""Image spans, packed vision, a Q-Former, no tower, and a mosaic of tiles."""


@pytest.fixture(scope="module")
def demo():
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


def coalitions(shape, seed=0):
    absent = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    absent[0], absent[1] = True, False
    return absent


@pytest.mark.parametrize("family", [*FAMILIES, *also("llava", "paligemma", "idefics3")])
def test_engine_and_gradient_give_the_same_v(family):
    model, pairs = tiny_pairs(family, 2)
    game = Presence(model, pairs, features_of(model, pairs), mm.logit_diff)
    absent = coalitions(game.features.present.shape)
    found = game.values(absent)
    graded = game.graded(pairs.batch([0, 1]))
    with torch.no_grad():
        wanted = graded((~absent).float().flatten(0, 1)).view(4, 2)
    torch.testing.assert_close(found.values, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.values[1], found.base)
    assert found.values.std(0).min() > 1e-3
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "blip-2", *also("llava", "idefics3")])
def test_without_any_patch_the_prompt_is_the_corrupt_one(family):
    model, pairs = tiny_pairs(family, 2)
    features = features_of(model, pairs, text=False)
    game = Presence(model, pairs, features, mm.logit_diff, "corrupt")
    found = game.values(torch.ones(1, *features.present.shape, dtype=torch.bool))
    batch = pairs.batch([0, 1])
    with torch.no_grad():
        wanted = [score(model, side, batch.answers) for side in (batch.clean, batch.corrupt)]
    torch.testing.assert_close(found.base, wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.values[0], wanted[1], atol=1e-4, rtol=1e-4)


def test_absent_patches_are_pasted_pixels(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    features = features_of(demo, pairs, text=False)
    game = Presence(demo, pairs, features, mm.logit_diff, "corrupt")
    absent = coalitions(features.present.shape, 1)
    found = game.values(absent)
    for number, pair in enumerate(pairs):
        own = Answers.of(demo, [pair.answer], [pair.foil])
        (picture,), (other,) = pair.clean.images, pair.corrupt.images
        for cell in range(4):
            there = features.where[number, absent[cell, number]][:, 4:].tolist()
            region = Cells(tuple(map(tuple, there)), (8, 8))
            pasted = swap_patches(picture, other, region) if there else picture
            with torch.no_grad():
                wanted = score(demo, demo.encode(pair.clean.text, pasted), own)
            assert float(found.values[cell, number]) == pytest.approx(float(wanted), abs=2e-4)


def test_words_are_what_has_no_space_inside(demo, monkeypatch):
    pairs = shapes.color_pairs(demo, 1, seed=0)
    plain = features_of(demo, pairs).names[0][64:]
    asked = pairs[0].meta["asked"]
    assert plain == ("what", "color", "is", "the", asked, "?", "answer", ":")
    texts = type(demo).token_texts

    def split(self, ids):
        return tuple(tuple("or" if t == " is" else t for t in row) for row in texts(self, ids))

    monkeypatch.setattr(type(demo), "token_texts", split)
    joined = features_of(demo, pairs)
    assert joined.names[0][64:67] == ("what", "coloror", "the")
    assert joined.own[0][65].read == (66, 67)


def test_blocks_hold_all_patches_once(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    blocks = features_of(demo, pairs, side=4, text=False, spans=("object",))
    assert blocks.present.shape == (2, 16)
    seen = [tuple(place) for f in blocks.own[0] for place in f.seen.tolist()]
    assert len(seen) == len(set(seen)) == 64
    assert torch.allclose(blocks.inside.sum(-1), torch.ones(1, 2))
    model, tiles = tiny_pairs("idefics3", 1)
    # Tiles go together with the part of the whole picture that they show.
    assert features_of(model, tiles, side=2, text=False).present.shape == (1, 4)


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(ValueError, match="side is 0"):
        features_of(demo, pairs, side=0)
    with pytest.raises(SpanError, match="nothing_here"):
        features_of(demo, pairs, spans=("nothing_here",))
    told = shapes.color_pairs(demo, 1, form="text")
    with pytest.raises(SpanError, match="pair 0: the clean prompt has no picture"):
        features_of(demo, told)
    features = features_of(demo, pairs)
    with pytest.raises(ValueError, match="unknown baseline 'white'; use mean, black"):
        Presence(demo, pairs, features, mm.logit_diff, "white")
    with pytest.raises(ValueError, match="aligned for another model"):
        Presence(tiny_pairs("llava", 1)[0], pairs, features, mm.logit_diff)


# Shapley values ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_exact_values_are_the_mean_over_all_orders(family):
    model, pairs = tiny_pairs(family, 2)
    game = Presence(model, pairs, features_of(model, pairs, side=2, text=False), mm.logit_diff)
    found = shapley(game, 4)
    masks = torch.tensor([[(c >> f) & 1 for f in range(4)] for c in range(16)]) == 0
    v = game.values(masks[:, None].expand(-1, 2, -1)).values
    wanted, orders = torch.zeros(2, 4), list(permutations(range(4)))
    for order in orders:
        has = 0
        for feature in order:
            wanted[:, feature] += (v[has | 1 << feature] - v[has]) / len(orders)
            has |= 1 << feature
    torch.testing.assert_close(found.values, wanted, atol=1e-5, rtol=1e-4)
    assert not found.error.any()


class Planted(Presence):
    """An additive game, with one interaction of the first two features."""

    def values(self, absent, report=None):
        has = (~absent & self.features.present).float()
        weights = torch.arange(has.shape[-1]).float()
        v = (has * weights).sum(-1) + 3 * has[..., 0] * has[..., 1]
        full = self.features.present.float() @ weights + 3
        return Filled(v, full, True)


def test_sampled_values_of_an_additive_game_are_its_weights():
    model, pairs = tiny_pairs("llava", 2)
    game = Planted(model, pairs, features_of(model, pairs), mm.logit_diff)
    found = shapley(game, 4)
    wanted = torch.arange(24.0)
    wanted[:2] += 1.5  # an order and its reverse share an interaction of two in halves
    torch.testing.assert_close(found.values, wanted.expand(2, -1))
    torch.testing.assert_close(found.error, torch.zeros(2, 24))


def test_sampled_values_add_up_and_skip_what_is_not_there():
    model, pairs = tiny_pairs("gemma3", 2)
    longer = replace(pairs[1].clean, text=pairs[1].clean.text.replace("circle", "circle circle"))
    corrupt = replace(pairs[1].corrupt, text=longer.text)
    pairs = mm.PairDataset([pairs[0], replace(pairs[1], clean=longer, corrupt=corrupt)], model)
    game = Presence(model, pairs, features_of(model, pairs, side=2), mm.logit_diff)
    assert game.features.present.sum(1).tolist() == [12, 13]
    found = shapley(game, 2)
    torch.testing.assert_close(found.values.sum(1), found.full - found.empty, atol=1e-4, rtol=1e-4)
    assert float(found.values[0, 12]) == 0

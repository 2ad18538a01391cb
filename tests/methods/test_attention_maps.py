"""Attention maps equal caches and matrix products; localisation heads carry the answer."""

from __future__ import annotations

import math

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.methods.attention_maps import elbow, spatial_entropy
from mechmm.model.layout import Box, SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

"""Further families, which take more time than they tell."""


@pytest.fixture(scope="module")
def found(demo):
    return mm.attention_maps(demo, shapes.color_pairs(demo, 32, seed=0))


def with_corner(model, pairs):
    """The same pairs, with the upper left of the picture as a span."""
    corner = {"corner": Box(0, 0, 16, 16)}
    return mm.PairDataset(
        [mm.Pair(p.clean, p.corrupt, p.answer, p.foil, corner) for p in pairs], model
    )


def patterns_with_slopes(model, pair, layers):
    """Weights of one prompt and their gradients, by a backward pass from the first block on."""
    kept = {}

    def leaf(x, hook):
        return x.detach().requires_grad_()

    def keep(x, hook):
        x.retain_grad()
        kept[hook.name] = x

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    hooks = [("blocks.0.hook_resid_pre", leaf), *((name, keep) for name in names)]
    with model.hooks(fwd_hooks=hooks):
        mm.logit_diff(last_logits(model, pair.clean), pair.answers).sum().backward()
    return [(kept[n][0].detach(), kept[n].grad[0]) for n in names]


@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "qwen2_vl", "idefics3", "internvl", "paligemma"]
)
def test_maps_equal_caches_and_products_of_matrices(family):
    model, pairs = tiny_pairs(family, 2)
    pairs = with_corner(model, pairs)
    found = mm.attention_maps(model, pairs, ["corner"], n_heads=1, threshold=0.0, n_random=1)
    layers = found.heads["layer"].unique().tolist()
    for number in range(2):
        one = pairs.batch([number])
        layout = one.clean.layout
        image, last = layout.positions("image"), int(layout.last[0])
        every = patterns_with_slopes(model, one, layers)
        rows = torch.cat([pattern[:, last][:, image] for pattern, _ in every])
        torch.testing.assert_close(found.weights[:, number], rows, atol=1e-5, rtol=0)
        rolled = relevant = eye = torch.eye(every[0][0].shape[-1])
        for pattern, slope in every:
            rolled = (pattern.mean(0) + eye) / 2 @ rolled
            relevant = relevant + (pattern * slope).clamp_min(0).mean(0) @ relevant
        wanted = torch.stack([rolled[last, image], relevant[last, image]])
        torch.testing.assert_close(found.summed[:, number], wanted, atol=1e-4, rtol=1e-3)
        on = rows[:, [image.index(p) for p in layout.positions("corner")]].sum(1) / rows.sum(1)
        torch.testing.assert_close(found._on(found.weights, 0)[:, number], on, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "qwen2_vl", "idefics3", "internvl", "paligemma"]
)
def test_closed_heads_equal_hooks_by_hand(family):
    model, pairs = tiny_pairs(family, 2)
    pairs = with_corner(model, pairs)
    found = mm.attention_maps(
        model, pairs, ["corner"], n_heads=2, threshold=0.0, metric=mm.logit_diff, n_random=1
    )
    chosen = found.heads.iloc[list(found.chosen)]
    for number in range(2):
        one = pairs.batch([number])
        image, last = one.clean.layout.positions("image"), int(one.clean.layout.last[0])

        def close(scores, hook, image=image, last=last):
            layer = int(hook.name.split("blocks.")[1].split(".")[0])
            for head in chosen.loc[chosen["layer"] == layer, "head"]:
                scores[:, head, last, image] = -torch.inf
            return scores

        hooks = [(f"blocks.{i}.attn.hook_attn_scores", close) for i in chosen["layer"].unique()]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            wanted = float(mm.logit_diff(last_logits(model, one.clean), one.answers))
        assert float(found.closed[number]) == pytest.approx(wanted, abs=3e-4)
        assert abs(float(found.base[number]) - wanted) > 1e-4


def test_spatial_entropy_counts_regions():
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    none = torch.zeros(16, dtype=torch.long)
    where = torch.stack([none, none, row.flatten(), column.flatten()], -1)[None]
    maps = torch.zeros(3, 1, 4, 4)
    maps[0, 0, :2, :2] = 1  # one region
    maps[1, 0, 0, 0] = maps[1, 0, 1, 1] = 1  # touch at a corner
    maps[2, 0, 0, 0] = maps[2, 0, 3, 3] = 1  # apart
    found = spatial_entropy(maps.flatten(2), where, torch.ones(1, 16, dtype=torch.bool))
    assert found[:, 0].tolist() == pytest.approx([0.0, 0.0, math.log(2)])
    # What lies in another view is next to nothing in the first.
    where[0, 8:, 1] = 1
    maps[0, 0] = 0
    maps[0, 0, 1:3, 0] = 1
    found = spatial_entropy(maps.flatten(2), where, torch.ones(1, 16, dtype=torch.bool))
    assert float(found[0, 0]) == pytest.approx(math.log(2))


def test_the_elbow_is_where_sums_have_fallen():
    assert elbow(torch.tensor([0.1, 1.0, 0.12, 0.9, 0.11, 0.2])) == pytest.approx(0.2)
    assert elbow(torch.tensor([0.0, 1.0, 0.85, 0.9, 0.1, 0.88])) == pytest.approx(0.85)


def test_localisation_heads_look_at_the_object_and_carry_the_answer(found):
    cover = found.coverage().set_index(["map", "span"])
    own, other = (cover.loc[("localisation heads", span)] for span in ("object", "distractor"))
    assert own["share"] >= 0.8 > 0.2 >= own["shuffled_high"]
    assert other["share"] <= 0.05
    value = found.knockout().set_index("run")["value"]
    assert value["all heads"] >= 0.95
    assert value["without random heads"] >= 0.9
    assert value["without localisation heads"] <= 0.6
    assert found.control == "heads that reach the threshold"


def test_rollout_says_less_than_relevance(found):
    cover = found.coverage().set_index(["map", "span"])["share"]
    assert cover["relevance", "object"] >= 0.6
    assert cover["rollout", "object"] <= 0.3


def test_results_are_stored_and_shown(found, tmp_path):
    again = Result.load(found.save(tmp_path / "found"))
    assert torch.equal(again.weights, found.weights)
    assert set(again.plot()) == {"heads", "coverage", "knockout", "picture"}
    assert "localisation heads" in again.summary()
    assert "shuffled" in again.page("attention").html()


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(ValueError, match="spans are"):
        mm.attention_maps(demo, pairs, ())
    with pytest.raises(SpanError, match="'last' has no token in the picture"):
        mm.attention_maps(demo, pairs, ["last"])
    with pytest.raises(SpanError, match="'bus'"):
        mm.attention_maps(demo, pairs, ["bus"])
    with pytest.raises(ValueError, match="give at most 24"):
        mm.attention_maps(demo, pairs, n_heads=25)
    with pytest.raises(ValueError, match="no head reaches threshold 2"):
        mm.attention_maps(demo, pairs, threshold=2.0)
    with pytest.raises(ValueError, match="n_random"):
        mm.attention_maps(demo, pairs, n_random=0)
    assert not any(point.fwd_hooks for point in demo.hook_dict.values())

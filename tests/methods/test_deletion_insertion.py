"""Curves equal runs by hand; areas are trapezoids; good scores beat random orders."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import score
from mechmm.engine.features import features_of
from mechmm.engine.presence import Presence
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def curves(demo):
    """By how many tokens of the asked object a patch is made of."""
    pairs = shapes.color_pairs(demo, 6, seed=0)
    inside = features_of(demo, pairs, text=False, spans=("object",)).inside[0]
    return mm.deletion_insertion(demo, pairs, inside, shares=(0.0625, 0.5), n_random=3)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava_next", "llava", "paligemma"])
def test_curves_equal_runs_by_hand(family):
    model, pairs = tiny_pairs(family, 2)
    features = features_of(model, pairs, text=False)
    scores = torch.randn(2, features.count, generator=torch.Generator().manual_seed(0))
    found = mm.deletion_insertion(
        model, pairs, scores, shares=(0.25,), baseline="corrupt", n_random=1
    )
    batch = pairs.batch([0, 1])
    graded = Presence(model, pairs, features, mm.logit_diff, "corrupt").graded(batch)
    first = scores.argsort(1, descending=True)[:, : round(features.count / 4)]
    z = torch.ones(2, features.count).scatter(1, first, 0)
    with torch.no_grad():
        wanted = torch.stack([graded(z), graded(1 - z)])
        ends = [score(model, side, batch.answers) for side in (batch.clean, batch.corrupt)]
    got = torch.stack([found.deletion[1], found.insertion[1]])
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.deletion[0], ends[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.insertion[2], ends[0], atol=2e-4, rtol=1e-3)
    if family != "llava_next":  # tiles show some of the picture beyond what patches cover
        torch.testing.assert_close(found.deletion[2], ends[1], atol=2e-4, rtol=1e-3)
    assert torch.equal(found.insertion[0], found.deletion[2])


def test_areas_are_trapezoids(curves):
    a, b, c, d = curves.deletion[:, 0].tolist()
    wanted = 0.0625 * (a + b) / 2 + 0.4375 * (b + c) / 2 + 0.5 * (c + d) / 2
    assert float(curves.area("deletion")[0]) == pytest.approx(wanted, rel=1e-5)
    assert curves.random_area("insertion").shape == (3, 6)


def test_the_asked_object_comes_first(curves):
    table = curves.areas().set_index("curve")
    assert table["gain_low"].min() > 0
    deleted = curves.to_dataframe().set_index(["curve", "share"])
    assert deleted["value"]["deletion", 0.0625] < deleted["random_low"]["deletion", 0.0625]


def test_equal_scores_keep_the_order_of_patches_and_random_orders_their_seed(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    options = {"shares": (0.5,), "n_random": 1, "side": 2}
    flat = mm.deletion_insertion(demo, pairs, torch.zeros(2, 4), **options)
    falling = mm.deletion_insertion(demo, pairs, -torch.arange(8).view(2, 4), **options)
    assert torch.equal(flat.deletion, falling.deletion)
    one = mm.deletion_insertion(demo, pairs[:1], torch.zeros(1, 4), **options)
    torch.testing.assert_close(
        one.random_deletion[:, :, 0], flat.random_deletion[:, :, 0], atol=1e-4, rtol=1e-4
    )


def test_results_are_stored_and_shown(curves, tmp_path):
    assert Result.load(curves.save(tmp_path / "found")).equals(curves)
    assert set(curves.plot()) == {"deletion", "insertion"}
    assert "under deletion" in curves.summary()
    assert "random orders" in curves.page("curves").html()


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    good = torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r"shape \[2, 63\], the pairs have \[2, 64\]"):
        mm.deletion_insertion(demo, pairs, good[:, 1:])
    bad = good.clone()
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match="pair 1, patch 3 is nan"):
        mm.deletion_insertion(demo, pairs, bad)
    for shares in ((), (0.0,), (1.0,), (0.5, 0.5)):
        with pytest.raises(ValueError, match="shares are"):
            mm.deletion_insertion(demo, pairs, good, shares=shares)
    with pytest.raises(ValueError, match="n_random"):
        mm.deletion_insertion(demo, pairs, good, n_random=0)
    with pytest.raises(ValueError, match="unknown baseline"):
        mm.deletion_insertion(demo, pairs, good, baseline="zero")

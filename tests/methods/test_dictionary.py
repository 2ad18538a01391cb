"""A dictionary is learned, judged beside its baselines, and its features are used as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine.train_sae import Recorded
from mechmm.model.batch import Batch
from mechmm.model.hooked import UnknownHookError
from mechmm.model.sparse import DictionaryError
from mechmm.results.result import Result
from mechmm.results.sheet import sheet
from mechmm.testing import tiny, tiny_inputs

HOOK = "vision.blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def train(demo):
    return shapes.color_pairs(demo, 24, seed=0)


@pytest.fixture(scope="module")
def sae(demo, train):
    site = mm.sites.named(demo, HOOK, ["image"])
    return mm.train_sae(demo, train, site, d_sae=128, k=8, steps=150)


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 8, seed=1)


@pytest.fixture(scope="module")
def found(demo, pairs, sae, train):
    few = {"n_top": 4, "n_random": 6, "n_places": 3, "steps": 100}
    return mm.dictionary(demo, pairs, sae, span="image", fit=train, **few)


def test_it_keeps_more_than_both_baselines(found):
    variance = found.recovered()["variance"]
    assert variance[0] > max(variance[1], variance[2])
    assert variance[0] > 0.8
    assert found.recovered()["recovered"][0] > 0.8
    assert (found.spliced[3].mean() - found.loss.mean()) > 1


def test_splices_are_those_of_hooks(demo, pairs, sae, found):
    batch = next(pairs.batches(8))
    mask = torch.ones(1, 65, 1, dtype=torch.bool)
    mask[:, 0] = False

    def splice(value, hook):
        return torch.where(mask, sae.reconstruct(value), value)

    def without(value, hook):
        number = int(found.features[0])
        own = sae.encode(value)[..., number, None] * sae.W_dec[number]
        return torch.where(mask, value - own, value)

    for function, metric, ours in (
        (splice, mm.log_prob, -found.spliced[0]),
        (without, mm.logit_diff, found.ablated[0]),
    ):
        with demo.hooks(fwd_hooks=[(HOOK, function)]):
            logits = demo(batch.clean, logits_to_keep=1)[:, 0]
        torch.testing.assert_close(metric(logits, batch.answers), ours, atol=1e-3, rtol=0)


def test_attribution_is_the_slope_of_the_feature(demo, pairs, sae, found):
    """Features a little weaker: the metric falls by as much of the attribution."""
    batch = next(pairs.batches(8))
    number, step = int(found.features[0]), 1e-2

    def weaker(value, hook):
        own = sae.encode(value)[..., number, None] * sae.W_dec[number]
        own[:, 0] = 0
        return value - step * own

    with demo.hooks(fwd_hooks=[(HOOK, weaker)]):
        logits = demo(batch.clean, logits_to_keep=1)[:, 0]
    slope = (found.clean - mm.logit_diff(logits, batch.answers)) / step
    torch.testing.assert_close(slope, found.attribution[:, number], atol=2e-2, rtol=0.1)


def test_its_places_are_the_most_active(demo, pairs, sae, found):
    site = mm.sites.named(demo, HOOK, ["image"])
    recorded = Recorded.of(demo, pairs, site)
    features = sae.encode(torch.cat(recorded.parts))
    number = int(found.features[0])
    own = found.places[found.places["feature"] == number]
    wanted = features[:, number].topk(len(own)).values.numpy()
    np.testing.assert_allclose(own["activation"], wanted, rtol=1e-4)
    np.testing.assert_allclose(found.active, (features > 0).float().mean(0), atol=1e-3)
    assert ((own["right"] - own["left"]) == 12).all()
    assert found.sheet(number).width > 300


def test_it_is_saved_and_shown(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    assert set(found.plot()) == {"recovered", "features"}
    assert "most active on the left" in found.page("A dictionary").html()
    assert -1 <= found.agreement <= 1


def test_the_same_seed_gives_the_same_weights(demo, train, sae):
    site = mm.sites.named(demo, HOOK, ["image"])
    few = {"d_sae": 32, "k": 4, "steps": 5}
    first, again, other = (
        mm.train_sae(demo, train[:4], site, seed=seed, keep=keep, **few)
        for seed, keep in ((1, "cpu"), (1, "disk"), (2, "cpu"))
    )
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.d_sae))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "mllama", "clip"])
def test_it_learns_the_states_of_any_family(family):
    model = tiny(family)
    batches = [Batch.from_inputs(model, **tiny_inputs(model, (1,) * 4, seed=s)) for s in (0, 1)]
    hook = "vision.blocks.1.hook_mlp_out"
    site = mm.sites.named(model, hook, ["image"])
    sae = mm.train_sae(model, batches, site, d_sae=96, k=12, steps=120, places=64, lr=1e-2)
    x = torch.cat(Recorded.of(model, batches, site).parts)
    lost = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(lost) < 0.35
    assert sae.hook == hook


def test_what_cannot_be_learned_or_spliced(demo, pairs, train, sae):
    site = mm.sites.named(demo, HOOK, ["image"])
    with pytest.raises(ValueError, match="not of 2 sites"):
        mm.train_sae(demo, train, site + site)
    with pytest.raises(ValueError, match="k is 9, but there are 4 features"):
        mm.train_sae(demo, train[:2], site, d_sae=4, k=9)
    with pytest.raises(ValueError, match="steps is 0"):
        mm.train_sae(demo, train, site, steps=0)
    last = mm.sites.named(demo, "blocks.0.hook_resid_pre", ["last"])
    with pytest.raises(ValueError, match=r"all states at blocks\.0\.hook_resid_pre are one"):
        mm.train_sae(demo, train[:4], last)
    wide = mm.train_sae(
        demo, train[:2], mm.sites.named(demo, "blocks.1.hook_resid_pre", ["image"]), k=2, steps=1
    )
    moved = type(wide)(**{**vars(wide), "hook": HOOK})
    with pytest.raises(DictionaryError, match="reads states of 128 numbers"):
        mm.dictionary(demo, pairs, moved, span="image")
    elsewhere = type(wide)(**{**vars(wide), "hook": "blocks.77.hook_resid_pre"})
    with pytest.raises(UnknownHookError, match="unknown hook"):
        mm.dictionary(demo, pairs, elsewhere)
    with pytest.raises(ValueError, match="the metric accuracy has no gradient"):
        mm.dictionary(demo, pairs, sae, metric=mm.accuracy)
    with pytest.raises(ValueError, match="n_top is 0"):
        mm.dictionary(demo, pairs, sae, n_top=0)
    with pytest.raises(ValueError, match="0 pictures and 0 frames"):
        sheet([], [])

"""A tuned lens starts as the logit lens, learns what can be learnt, and fits one model alone."""

from __future__ import annotations

import math

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.testing import tiny, tiny_hf, tiny_inputs

FAMILIES = ["llava", "gemma3", "cohere2_vision", "mllama", "florence2"]


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 6, seed=5)


@pytest.fixture(scope="module")
def lens(demo, pairs):
    return mm.tuned_lens(demo, pairs, steps=25, rate=3e-3)


@torch.no_grad()
def test_it_starts_as_the_logit_lens(demo, pairs):
    start = mm.tuned_lens(demo, pairs, steps=1, rate=0.0)
    assert torch.equal(start.kl, start.kl_logit_lens)
    options = {"ablation": None, "towers": ["language"]}
    plain = mm.logit_lens(demo, pairs[:2], **options)
    read = mm.logit_lens(demo, pairs[:2], lens=start, **options)
    assert read.lens == "tuned lens"
    torch.testing.assert_close(read.logits, plain.logits, equal_nan=True)


@torch.no_grad()
def test_divergence_is_that_of_the_two_distributions(demo, pairs):
    """By hand, for the logit lens at one held-out prompt and layer."""
    found = mm.tuned_lens(demo, pairs, steps=1)
    example = int(found.held_out[0])
    logits, cache = demo.run_with_cache(pairs.batch([example]).clean)
    head = demo.hf_model.lm_head
    said = head(demo.hf_model.model.language_model.norm(cache["resid_post", 1]))
    model, other = logits.log_softmax(-1)[0], said.log_softmax(-1)[0]
    expected = (model.exp() * (model - other)).sum(-1).mean()
    state = found.states.index[found.states["label"] == "language 1"][0]
    torch.testing.assert_close(found.kl_logit_lens[state, 0], expected, atol=1e-5, rtol=1e-4)


def test_it_comes_closer_to_the_model_than_the_logit_lens_and_the_null(lens):
    for kl in (lens.kl_logit_lens, lens.kl_null):
        assert (lens.kl[:-1].mean(1) < kl[:-1].mean(1)).all()
    assert (lens.kl[-1] < 1e-6).all()
    assert (lens.curve[0, -10:].mean() < lens.curve[0, :10].mean()).all()


def test_same_seed_same_lens(demo, pairs, lens):
    again = mm.tuned_lens(demo, pairs, steps=25, rate=3e-3)
    assert again.equals(lens)
    assert not mm.tuned_lens(demo, pairs, steps=25, rate=3e-3, seed=1).equals(lens)


def test_saved_loaded_and_used(demo, pairs, lens, tmp_path):
    lens.save(tmp_path / "lens")
    loaded = mm.TunedLens.load(tmp_path / "lens")
    assert loaded.equals(lens)
    own = [mm.logit_lens(demo, pairs[:2], lens=one, ablation=None) for one in (lens, loaded)]
    assert own[0].equals(own[1])
    assert set(own[0].states["tower"]) == {"language"}
    frame = lens.to_dataframe()
    assert frame["kl"].tolist() == pytest.approx(lens.kl.mean(1).tolist())
    assert list(lens.plot().data[0].z[-1]) == pytest.approx(
        frame.loc[0, ["kl", "logit_lens", "null"]].tolist()
    )
    lens.page("Tuned").html()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = mm.HookedMultimodal.from_hf(tiny_hf(family))
    batch = mm.Batch.from_inputs(model, **tiny_inputs(model, (1, 2, 1), [6, 4, 5]))
    found = mm.tuned_lens(model, [batch], steps=15, rate=1e-2)
    train = [float(found.curve[:-1, part].mean()) for part in (slice(0, 3), slice(-3, None))]
    assert train[1] < train[0]
    mm.logit_lens(model, batch, lens=found)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_bad_input_is_refused(demo, pairs, lens):
    with pytest.raises(ValueError, match=r"fitted for another model .*d_model 128"):
        mm.logit_lens(tiny(), _batch(tiny()), lens=lens)
    other = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    mm.logit_lens(other, pairs.batch([0]).clean, lens=lens)
    with torch.no_grad():
        other.hf_model.lm_head.weight += 0.1
    with pytest.raises(ValueError, match="other weights of it"):
        mm.logit_lens(other, pairs.batch([0]).clean, lens=lens)
    with pytest.raises(ValueError, match="not for tower 'vision'"):
        mm.logit_lens(demo, pairs, lens=lens, towers=["vision"])
    with pytest.raises(ValueError, match=r"no translator for blocks\.0\.hook_resid_mid"):
        mm.logit_lens(demo, pairs, lens=lens, middle=True)
    with pytest.raises(ValueError, match="there are 1 with positions"):
        mm.tuned_lens(demo, pairs[:1])
    with pytest.raises(ValueError, match="give a share in"):
        mm.tuned_lens(demo, pairs, held_out=1.0)
    model = tiny("clip")
    with pytest.raises(ValueError, match="encoder without an unembedding"):
        mm.tuned_lens(model, mm.Batch.from_inputs(model, **tiny_inputs(model, (1, 1))))
    assert math.isfinite(float(lens.kl.sum()))


def _batch(model):
    return mm.Batch.from_inputs(model, **tiny_inputs(model))

"""Nearest neighbours equal brute force, a state finds itself, and the nulls are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.testing import tiny, tiny_hf, tiny_inputs

FAMILIES = ["llava", "idefics2", "qwen3_vl", "blip-2", "mllama"]


@pytest.fixture(scope="module")
def texts(demo):
    return [pair.clean.text for pair in shapes.color_pairs(demo, 12, seed=11, form="text")]


@pytest.fixture(scope="module")
def bank(demo, texts):
    return mm.latent_bank(demo, texts, batch_size=5)


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 4, seed=3)


@pytest.fixture(scope="module")
def found(demo, pairs, bank):
    return mm.latent_lens(demo, pairs, bank, n_random=1, batch_size=3)


@torch.no_grad()
def test_the_bank_holds_every_word_but_the_first(demo, texts, bank):
    for number, text in enumerate(texts[:6]):
        _, cache = demo.run_with_cache(demo.encode(text, []))
        own = bank.context[:, 0] == number
        stream = torch.nn.functional.normalize(cache["resid_post", 2][0, 1:], dim=-1)
        torch.testing.assert_close(bank.vectors[3, own], stream, atol=1e-5, rtol=0)
        words = [bank.words[i].strip() for i in own.nonzero().flatten()]
        assert words == text.split()
        assert bank.context[own, 1].tolist() == list(range(1, 1 + len(words)))
    assert bank.texts == tuple(texts)


@torch.no_grad()
@pytest.mark.parametrize("same", [True, False])
def test_neighbours_equal_brute_force(demo, pairs, bank, same):
    lens = mm.latent_lens(demo, pairs.batch([0]).clean, bank, same_layer=same, top_k=4)
    _, cache = demo.run_with_cache(pairs.batch([0]).clean)
    names = bank.states["hook"].tolist()
    for state, hook in enumerate(names):
        stream = torch.nn.functional.normalize(cache[hook][0], dim=-1)
        table = bank.vectors[state] if same else bank.vectors.flatten(0, 1)
        values = (stream @ table.T).topk(4).values
        torch.testing.assert_close(lens.similarity[state, 0], values, atol=1e-5, rtol=0)
        again = (stream @ table.T).gather(1, lens.neighbours[state, 0])
        torch.testing.assert_close(again, values, atol=1e-5, rtol=0)


def test_a_word_of_the_bank_finds_itself(demo, texts, bank):
    lens = mm.latent_lens(demo, demo.encode(texts[3], []), bank, top_k=1)
    assert (lens.similarity[:, 0, 1:, 0] > 1 - 1e-5).all()
    top = lens.top(0)
    later = top[top["position"] > 0]
    assert (later["word_0"] == later["token"].str.strip()).mean() > 0.9  # equal states are ties


def test_evidence_is_the_largest_cosine_with_the_answers_word(demo, pairs, bank, found):
    _, cache = demo.run_with_cache(pairs.batch([2]).clean)
    state = found.states.index[found.states["label"] == "language 0"][0]
    with torch.no_grad():
        stream = torch.nn.functional.normalize(cache["resid_post", 0][0], dim=-1)
    near = []
    for word in (pairs[2].answer, pairs[2].foil):
        own = bank.ids == demo.to_single_token(word)
        near.append((stream @ bank.vectors[:, own].flatten(0, 1).T).amax(1))
    places = found.where[2, :, 0]
    expected = (near[0] - near[1])[-len(stream) :][places[places >= 0]]
    torch.testing.assert_close(found.evidence()[state, 2][places >= 0], expected, atol=1e-5, rtol=0)


def test_nulls(found, bank):
    assert found.random.shape == found.shuffled.shape == (len(bank.states), 64)
    assert (found.random <= 1 + 1e-5).all()
    table = found.null_table()
    real = torch.where(found.where[..., 1] == 2, found.similarity[..., 0], torch.nan)
    np.testing.assert_allclose(table["cosine"], real.flatten(1).nanmean(1).numpy(), rtol=1e-5)


def test_a_word_read_at_the_object_and_what_ablation_says(found):
    """On the demo model the object's patches are like its own color's word, not the foil's."""
    own, corrupt = (found.at_span("object", corrupt=c).mean(1) for c in (False, True))
    entering = found.states.index[found.states["label"] == "language in"][0]
    assert own[entering] > 0 > corrupt[entering]
    drops = found.drops()
    assert drops["drop"][entering] > drops["drop_null_high"][entering] + 0.5
    assert drops["drop"].iloc[-1] == pytest.approx(0, abs=1e-5)


def test_tables_figures_and_files(demo, found, bank, tmp_path):
    figures = found.plot()
    assert set(figures) == {"cosines", "picture", "spans", "ablation"}
    assert {"value", "corrupt", "null_low", "drop"} <= set(found.to_dataframe())
    found.page("Neighbours").html()
    found.save(tmp_path / "lens")
    assert mm.LatentLens.load(tmp_path / "lens").equals(found)
    bank.save(tmp_path / "bank")
    loaded = mm.LatentBank.load(tmp_path / "bank")
    assert loaded.equals(bank)
    assert len(loaded.to_dataframe()) == len(bank.words)


def test_a_bank_that_lacks_the_foils_draws_what_it_has_and_says_so(demo, pairs):
    """One text of one color: no pair has both its words, and most are not ablated."""
    bank = mm.latent_bank(demo, [f"the {pairs[0].answer.strip()} square"])
    lens = mm.latent_lens(demo, pairs, bank, spans=["object"], top_k=1, n_random=1)
    assert lens.evidence().isnan().all()
    assert set(lens.plot()) == {"cosines", "picture", "ablation"}
    assert "4 of 4 pairs have no evidence" in lens.summary()
    known = (lens.held >= 0).any(-1)
    assert 0 < known.sum() < known.numel()
    losses = (lens.clean - lens.held_values)[0]
    assert lens.drops()["drop"][0] == pytest.approx(float(losses[known[0]].mean()))
    assert losses[~known[0]].abs().max() == 0


def test_nothing_is_ablated_where_only_the_last_position_is_read(demo, pairs, bank):
    lens = mm.latent_lens(demo, pairs, bank, positions=[-1], top_k=1, n_random=1)
    assert "ablation" not in lens.plot()
    assert "drop" not in lens.to_dataframe()
    assert "none of the positions that were read" in lens.summary()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = mm.HookedMultimodal.from_hf(tiny_hf(family))
    seen = int(family == "blip-2")  # which takes no text without a picture
    texts = mm.Batch.from_inputs(model, **tiny_inputs(model, (seen,) * 3, [9, 7, 8]))
    bank = mm.latent_bank(model, texts)
    batch = mm.Batch.from_inputs(model, **tiny_inputs(model, (1, 2), [6, 4]))
    lens = mm.latent_lens(model, batch, bank, top_k=3)
    real = lens.where[..., 0] >= 0
    assert not lens.similarity[:, real].isnan().any()
    assert "observation alone" in lens.summary()
    first = mm.latent_lens(model, texts, bank, same_layer=True, top_k=1)
    inner = (first.where[..., 0] >= 1) & (first.where[..., 1] == 1)
    assert (first.similarity[:, inner] > 1 - 1e-4).all()


def test_bad_input_is_refused(demo, pairs, bank):
    model = tiny()
    with pytest.raises(ValueError, match=r"the bank is of another model .*d_model 128"):
        mm.latent_lens(model, mm.Batch.from_inputs(model, **tiny_inputs(model)), bank)
    with pytest.raises(ValueError, match="a list of texts"):
        mm.latent_bank(demo, "a red car")
    with pytest.raises(ValueError, match="a list of texts"):
        mm.latent_bank(demo, [])
    with pytest.raises(ValueError, match="no text is longer than the 9 word"):
        mm.latent_bank(demo, ["red"], skip=9)
    with pytest.raises(ValueError, match="give top_k from 1"):
        mm.latent_lens(demo, pairs, bank, top_k=0)
    small = mm.latent_bank(demo, ["is the"])
    with pytest.raises(ValueError, match="no text of the bank has the answer"):
        mm.latent_lens(demo, pairs, small, top_k=1)
    for family in ("clip", "florence2"):
        model = mm.HookedMultimodal.from_hf(tiny_hf(family))
        batch = mm.Batch.from_inputs(model, **tiny_inputs(model, (1, 1)))
        with pytest.raises(ValueError, match="no language model in which"):
            mm.latent_bank(model, batch)

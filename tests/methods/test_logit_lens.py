"""The logit lens is the model at the last layer, plain products elsewhere; its controls hold."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.tools.analysis import logit_lens as tl_logit_lens
from transformers import AutoModelForCausalLM

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.marked import MarkedPairs
from mechmm.engine.head import Head
from mechmm.engine.readout import read_out
from mechmm.engine.streams import read_layout, states
from mechmm.model.families import FAMILIES
from mechmm.model.layout import SpanError
from mechmm.results.observed import POSITION
from mechmm.results.result import concat
from mechmm.testing import RECIPES, assert_no_hooks, tiny, tiny_hf, tiny_inputs

WRITERS = [f for f, r in RECIPES.items() if FAMILIES[r.architecture].unembed is not None]
QUICK = (
    "llava",
    "gemma3",
    "cohere2_vision",
    "idefics2",
    "qwen3_vl",
    "blip-2",
    "mllama",
    "florence2",
)
"""One of every way from a tower to the language model, and of every bend of logits."""
SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in WRITERS if f not in QUICK]


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 4, seed=3)


@pytest.fixture(scope="module")
def found(demo, pairs):
    return mm.logit_lens(demo, pairs, entropy=True, n_random=2, batch_size=3)


def batch_of(family, kind=None):
    model = mm.HookedMultimodal.from_hf(tiny_hf(family))
    kind = kind or next(iter(RECIPES[family].makers))
    return model, mm.Batch.from_inputs(model, **tiny_inputs(model, (1, 2), [6, 4], kind=kind))


# Products without all logits at once ----------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return tiny().towers["language"]


@pytest.mark.parametrize("vocabulary", [7, 77, 1024, 5003])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_readout_equals_all_logits_at_once(tower, vocabulary, cap):
    random = torch.Generator().manual_seed(vocabulary)
    unembed = nn.Linear(32, vocabulary, bias=cap is None).requires_grad_(False)
    stream = torch.randn(40, 32, generator=random)
    targets = torch.randint(vocabulary, (40, 3), generator=random)
    banned = torch.zeros(1, vocabulary, dtype=torch.bool)
    banned[0, 3] = True
    head = Head(tower, unembed, cap, None, banned, 2.0)
    ours = read_out(head, stream, 5, targets, entropy=True, rows=16)
    logits = head.bent(unembed(head.normed(stream[None])[0])).masked_fill(
        banned, torch.finfo(torch.float32).min
    )
    values, ids = logits.topk(5)
    torch.testing.assert_close(ours.logits, values)
    torch.testing.assert_close(logits.gather(1, ours.ids), values)
    if cap is None:  # capped logits may be equal
        assert torch.equal(ours.ids, ids)
    torch.testing.assert_close(ours.normaliser, logits.logsumexp(1))
    log_probs = logits.log_softmax(1)
    expected = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(1)
    torch.testing.assert_close(ours.entropy, expected, atol=1e-4, rtol=1e-4)
    chosen = logits.gather(1, targets)
    torch.testing.assert_close(ours.targets, chosen)
    if cap is None:
        ranks = (logits[:, None] > chosen[..., None]).sum(-1)
        assert torch.equal(ours.ranks, ranks)


def test_readout_of_large_logits_neither_overflows_nor_vanishes(tower):
    for size in (3e3, 1e-3):
        unembed = nn.Linear(32, 3000, bias=False).requires_grad_(False)
        unembed.weight *= size
        head, stream = Head(tower, unembed, None), torch.randn(3, 32)
        ours = read_out(head, stream, 3, entropy=True)
        logits = unembed(head.normed(stream[None])[0])
        torch.testing.assert_close(ours.normaliser, logits.logsumexp(1))
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(ours.entropy, expected, atol=1e-3, rtol=1e-4)


# Every family ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", [*QUICK, *SLOW])
def test_the_last_layer_is_the_model_and_the_last_vision_layer_the_projector(family):
    model, batch = batch_of(family)
    lens = mm.logit_lens(model, batch, top_k=4)
    logits = model(batch).float()
    layout = read_layout(model, batch)
    for prompt in range(len(batch)):
        real = layout.positions("all", prompt)
        at = (lens.where[prompt, :, POSITION] >= 0).nonzero().flatten()
        assert len(at) == len(real)
        values = logits[prompt, real].topk(4).values
        torch.testing.assert_close(lens.logits[-1, prompt, at], values, atol=1e-4, rtol=1e-4)
        norm = logits[prompt, real].logsumexp(-1)
        torch.testing.assert_close(lens.normaliser[-1, prompt, at], norm, atol=1e-4, rtol=1e-4)
    table = lens.states
    entering = table.index[(table["tower"] == "language") & (table["layer"] == -1)][0]
    for tower in set(table["tower"]) - {"language"}:
        rows = table.index[table["tower"] == tower]
        last, first = lens.logits[rows[-1]], lens.logits[rows[0]]
        seen = ~last[..., 0].isnan()
        assert seen.any()
        torch.testing.assert_close(last[seen], lens.logits[entering][seen], atol=1e-4, rtol=1e-4)
        assert (first[seen] - last[seen]).abs().max() > 1e-3  # layers differ
    assert not any(point.has_hooks() for point in model.hook_points())


@torch.no_grad()
def test_a_vision_layer_is_read_through_projector_norm_and_unembedding(demo, pairs):
    """By hand: a CLIP layer without its class token, projected, normed, unembedded."""
    batch = pairs.batch([0, 1]).clean
    lens = mm.logit_lens(demo, batch, spans=["image"], top_k=3)
    _, cache = demo.run_with_cache(batch)
    hf = demo.hf_model.model
    for label in ("vision in", "vision 0", "vision 2"):
        hook = lens.states.set_index("label").loc[label, "hook"]
        projected = hf.multi_modal_projector(cache[hook][:, 1:])
        logits = demo.hf_model.lm_head(hf.language_model.norm(projected))
        state = lens.states.index[lens.states["label"] == label][0]
        image = lens.inside[lens.spans.index("image")]
        own = lens.logits[state][image].view(2, 64, 3)
        torch.testing.assert_close(own, logits.topk(3).values, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_states_between_attention_and_mlp(demo, pairs):
    batch = pairs.batch([0]).clean
    lens = mm.logit_lens(demo, batch, positions=[-1], middle=True, towers=["language"], top_k=2)
    assert len(lens.states) == 1 + 2 * demo.cfg.n_layers
    _, cache = demo.run_with_cache(batch)
    state = lens.states.index[lens.states["label"] == "language 2 mid"][0]
    norm = demo.hf_model.model.language_model.norm
    logits = demo.hf_model.lm_head(norm(cache["resid_mid", 2][0, -1]))
    torch.testing.assert_close(lens.logits[state, 0, 0], logits.topk(2).values)


@torch.no_grad()
def test_text_equals_transformer_lens():
    model = tiny(text="llama")
    ours = model.hf_model
    config = deepcopy(ours.config.text_config)
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone.model.load_state_dict(ours.get_submodule("model.language_model").state_dict())
    alone.lm_head.load_state_dict(ours.lm_head.state_dict())
    name = type(alone).__name__
    settings = build_bridge_config_from_hf(alone.config, name, "tiny", torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(settings)
    bridge = TransformerBridge(alone, adapter, None)
    ids = tiny_inputs(model, (0, 0), 9)["input_ids"]
    batch = mm.Batch.from_inputs(model, input_ids=ids)
    lens = mm.logit_lens(model, batch, top_k=5, targets=[7, 11], entropy=True)
    theirs = tl_logit_lens(bridge, ids, positions=None, top_k=5)
    torch.testing.assert_close(lens.logits, theirs.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(lens.ids, theirs.readout.top_ids)
    torch.testing.assert_close(lens.entropy, theirs.readout.entropy, atol=1e-4, rtol=1e-4)
    theirs = tl_logit_lens(bridge, ids, positions=None, targets=[7, 11], return_type="log_probs")
    torch.testing.assert_close(lens.log_probs(), theirs.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(lens.ranks, theirs.readout.target_ranks)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_size_of_chunks_changes_nothing(demo, pairs, chunk):
    batch = pairs.batch([0, 1]).clean
    options = {"targets": ["red"], "entropy": True, "positions": range(60, 70)}
    free = mm.logit_lens(demo, batch, **options)
    bound = mm.logit_lens(demo, batch, **options, chunk=chunk)
    for name in ("logits", "normaliser", "targets", "entropy"):
        own, other = getattr(bound, name), getattr(free, name)
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert torch.equal(bound.ranks, free.ranks)


# Pairs and controls ---------------------------------------------------------------------------


def test_answer_and_foil_are_the_models_own_at_the_end(demo, pairs, found):
    check = pairs.check(demo)
    last = found.inside[found.spans.index("last")]
    difference = found.evidence()[-1][last].numpy()
    np.testing.assert_allclose(difference, check["clean_logit_diff"], atol=1e-3)
    corrupt = found.corrupt_evidence()[-1][last].numpy()
    np.testing.assert_allclose(corrupt, check["corrupt_logit_diff"], atol=1e-3)
    assert (found.ranks[-1][last][:, 0] == 0).all() == check["clean_right"].all()


def test_the_prompts_stand_where_their_batches_put_them(demo, pairs):
    """Examples do not depend on what they are batched with: texts have different lengths."""
    words = shapes.pairs(demo, "color", 3, seed=2, form="text")
    mixed = mm.PairDataset([*words, *pairs[:2]], demo)
    whole = mm.logit_lens(demo, mixed, ablation=None)
    alone = mm.logit_lens(demo, mixed, ablation=None, batch_size=1)
    assert torch.equal(whole.where, alone.where)
    assert torch.equal(whole.inside, alone.inside)
    assert whole.tokens == alone.tokens
    for name in ("logits", "targets", "corrupt_targets"):
        own, other = getattr(whole, name), getattr(alone, name)
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3, equal_nan=True)
    assert whole.normaliser[0, :3].isnan().all()  # texts have nothing in the vision tower


def test_spans_are_means_over_their_positions(found):
    own = found.at_span("object")
    inside = found.inside[found.spans.index("object")]
    for example in range(4):
        places = inside[example].nonzero().flatten()
        assert len(places)
        expected = found.evidence()[:, example, places].mean(1)
        torch.testing.assert_close(own[:, example], expected)


def test_the_null_is_as_many_other_positions_of_the_same_modality(found):
    inside = found.inside[found.spans.index("object")]
    for mask in found._drawn("object", 5):
        assert not (mask & inside).any()
        assert torch.equal(mask.sum(1), inside.sum(1))
        assert (found.where[mask][:, 1] == 2).all()  # patches, as the object's
    assert found.null("object", 5).shape == (len(found.states), 5)
    assert torch.equal(found.null("object", 5), found.null("object", 5))


def test_ablation_is_that_of_a_sweep_at_the_chosen_positions(demo, pairs, found):
    state = found.states.index[found.states["label"] == "language 0"][0]
    held = found.held[state]
    evidence = found.log_probs()[state, ..., 0]
    image = found.where[..., 1] == 2
    for example in range(4):
        places = image[example].nonzero().flatten()
        best = places[evidence[example, places].topk(4).indices]
        assert set(found.where[example, best, 0].tolist()) == set(held[example].tolist())
    marked = MarkedPairs(pairs, {"mine": held.tolist()})
    sites = mm.sites.residual(demo, ["mine"], towers=["language"], layers=[0], point="resid_post")
    swept = mm.Sweep(demo, marked, sites, base="clean", source="mean").run()
    torch.testing.assert_close(found.held_values[state], swept.values[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.clean, swept.base, atol=1e-4, rtol=0)
    drops = found.drops()
    assert drops["drop"].iloc[-1] == pytest.approx(0, abs=1e-5)  # nothing reads it any more


def test_ablation_of_every_candidate_is_the_same_at_random(demo, pairs):
    lens = mm.logit_lens(
        demo, pairs[:2], positions=range(1, 9), towers=["language"], n_held=8, n_random=1
    )
    assert (lens.random_values == lens.clean).all()  # no other patch was read: nothing to draw
    assert (lens.held_values[0] != lens.clean).any()


def test_marks_follow_a_selection_and_need_one_entry_per_pair(demo, pairs):
    marked = MarkedPairs(pairs, {"mine": [[0], [1], [2], []]})
    batch = marked[[2, 0]].batch([0, 1])
    assert batch.clean.layout.mask("mine").nonzero().tolist() == [[0, 2], [1, 0]]
    assert batch.corrupt.layout.mask("mine").nonzero().tolist() == [[0, 2], [1, 0]]
    with pytest.raises(ValueError, match="span 'mine' has positions of 1 pairs, but there are 4"):
        MarkedPairs(pairs, {"mine": [[0]]})


# What comes out -------------------------------------------------------------------------------


def test_tables(found):
    frame = found.to_dataframe()
    columns = {"value", "low", "high", "corrupt", "null_low", "null_high", "drop", "rank"}
    assert columns <= set(frame)
    row = frame[(frame["label"] == "language 5") & (frame["span"] == "last")].iloc[0]
    assert row["value"] == pytest.approx(float(found.at_span("last")[-1].mean()), rel=1e-5)
    top = found.top(1)
    last = top[(top["state"] == "language 5") & (top["spans"] == "last")].iloc[0]
    assert last["prob_0"] == pytest.approx(float(found.probs()[-1, 1].nan_to_num()[-1, 0]), 1e-4)
    assert found.text(int(found.ids[-1, 1, -1, 0])) == last["word_0"]


def test_figures(found):
    figures = found.plot(example=1)
    assert set(figures) == {"tokens", "picture", "spans", "ablation"}
    slider = figures["picture"].layout.sliders[0]
    assert [step.label for step in slider.steps] == found.states["label"].tolist()
    for number, step in enumerate(slider.steps):
        shown = step.args[0]["visible"]
        assert len(shown) == len(figures["picture"].data)
        assert sum(shown) == 4  # two pictures, two maps
        assert shown[1 + number]
    cells = figures["tokens"].data[0]
    assert cells.z.shape == (1 + 6, len([t for t in found.tokens[1] if t.strip() != "<image>"]))
    assert "random" in " ".join(figures["spans"].layout.xaxis2.ticktext)
    assert "random" in figures["ablation"].layout.xaxis.ticktext
    found.page("Lens").html()


def test_the_picture_shows_values_where_their_patches_are(found):
    figure = found.picture_figure()
    own = found.where[0]
    state = len(found.states) - 1
    grid = np.array(figure.data[1 + state].z, dtype=float)
    for place in (own[:, 4] >= 0).nonzero().flatten().tolist():
        row, column = own[place, 4:].tolist()
        value = float(found.evidence()[state, 0, place])
        assert grid[row, column] == pytest.approx(value, rel=1e-5)


def test_saved_loaded_and_joined(demo, pairs, found, tmp_path):
    found.save(tmp_path / "lens")
    assert mm.LogitLens.load(tmp_path / "lens").equals(found)
    parts = [
        mm.logit_lens(demo, pairs[at], entropy=True, n_random=2, ablation=None)
        for at in (slice(0, 2), slice(2, 4))
    ]
    joined = concat(parts)
    torch.testing.assert_close(joined.logits, found.logits, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert len(joined.top(3))


def test_a_batch_alone_says_that_nothing_was_ablated(demo, pairs):
    lens = mm.logit_lens(demo, pairs.batch([0]).clean, targets=["red", "blue"])
    assert lens.target_names == ("red", "blue")
    assert "observation alone" in lens.summary()
    torch.testing.assert_close(lens.evidence(), lens.log_probs()[..., 0], equal_nan=True)
    assert set(lens.plot()) == {"tokens", "picture", "spans"}
    bare = mm.logit_lens(demo, pairs.batch([0]).clean)
    assert set(bare.plot()) == {"tokens", "picture", "spans"}


def test_spans_read_as_many_others(demo, pairs):
    lens = mm.logit_lens(demo, pairs, spans=["object"], ablation=None)
    inside = lens.inside[lens.spans.index("object")]
    assert ((lens.where[..., 0] >= 0).sum(1) == 2 * inside.sum(1)).all()
    assert not lens.null("object", 3).isnan().any()


# Refusals -------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_runs(demo, pairs):
    batch = pairs.batch([0]).clean
    for options, error, message in (
        ({"positions": [500]}, ValueError, "position 500 is outside prompt 0, which has"),
        ({"spans": ["bus"]}, SpanError, "unknown span 'bus'; this layout has"),
        ({"towers": ["audio"]}, ValueError, "unknown tower 'audio'; this model has"),
        ({"targets": ["red blue"]}, ValueError, "target 'red blue': .* 2 tokens, not one"),
        ({"targets": ["zebra"]}, ValueError, "cannot write"),
        ({"targets": "red"}, ValueError, "a list of words, not one text"),
        ({"targets": [77]}, ValueError, "token 77 is not one of 0..76"),
        ({"top_k": 78}, ValueError, "give top_k from 0 to the 77 words"),
        ({"n_held": 0}, ValueError, "at least 1"),
        ({"chunk": 0}, ValueError, "chunk is 0; give a number of 1 or more"),
        ({"spans": ["image"], "positions": [0]}, ValueError, "either spans or positions"),
    ):
        with pytest.raises(error, match=message):
            mm.logit_lens(demo, batch, **options)
    with pytest.raises(ValueError, match="aligned for another model"):
        mm.logit_lens(tiny(), pairs)
    assert not any(point.has_hooks() for point in demo.hook_points())


def test_answers_of_several_tokens_are_refused(demo, pairs):
    long = mm.Pair(pairs[0].clean, pairs[0].corrupt, "red red", "blue blue")
    with pytest.raises(ValueError, match="pair 0: the answer 'red red' is 2 tokens, but a lens"):
        mm.logit_lens(demo, mm.PairDataset([long], demo))


def test_encoders_and_towers_that_reach_no_position_are_refused():
    model, batch = batch_of("clip")
    with pytest.raises(ValueError, match="CLIPModel is an encoder without an unembedding"):
        mm.logit_lens(model, batch)
    model, batch = batch_of("mllama")
    with pytest.raises(ValueError, match="tower 'vision' cannot be read as words: it reaches"):
        mm.logit_lens(model, batch, towers=["vision"])
    model, batch = batch_of("llava")
    text = mm.Batch.from_inputs(model, input_ids=tiny_inputs(model, (0,), 5)["input_ids"])
    with pytest.raises(ValueError, match="the prompts have nothing to see or hear"):
        mm.logit_lens(model, text, towers=["vision"])
    assert set(states(model, text.layout)["tower"]) == {"language"}


def test_nothing_is_left_on_the_model(pairs):
    hf_model = tiny_hf("llava")
    model = mm.HookedMultimodal.from_hf(hf_model)
    mm.logit_lens(model, mm.Batch.from_inputs(model, **tiny_inputs(model)))
    model.unwrap()
    assert_no_hooks(hf_model)

"""Direct effects add up to the logits, equal TransformerLens's on text, and the vision tower's part
equals what its components do to the projector."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformer_lens import ActivationCache

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import Answers, last_logits
from mechmm.engine.direct import (
    DirectError,
    end_of,
    gained,
    language_terms,
    language_writers,
    seen_run,
)
from mechmm.engine.seen import reads, vision_terms
from mechmm.engine.wiring import StreamError, wired
from mechmm.model.batch import Batch
from mechmm.model.layout import IMAGE
from mechmm.results.result import Result, concat
from mechmm.testing import tiny_hf, tiny_inputs

FAMILIES = ("llava", "gemma3", "qwen2_vl", "internvl", "blip-2", "mllama", "qwen3_5")
SPANS = ("image", "question")


class Split:
    """One family's tiny model, a run of two prompts, and its end."""

    def __init__(self, family, spans=SPANS):
        self.model = mm.HookedMultimodal.from_hf(tiny_hf(family))
        self.batch = Batch.from_inputs(self.model, **tiny_inputs(self.model, (1, 1), (6, 9)))
        self.answers = Answers(torch.full((2, 1), 7), torch.full((2, 1), 11))
        self.wiring, self.spans = wired(self.model), spans
        self.writers = language_writers(self.model, self.wiring, self.batch)
        self.run = seen_run(self.model, self.writers, self.batch, spans, [1])
        self.end = end_of(self.model, self.run, self.answers, True)

    def language(self, spans=None, neurons=()):
        given = (self.run, self.end, self.spans if spans is None else spans, neurons)
        return language_terms(self.model, self.writers, *given)

    def vision(self):
        g = reads(gained(self.writers, self.run), self.run, self.end.direction)
        return vision_terms(self.model, self.wiring, self.run, self.answers, g), g


@cache
def split_of(family):
    return Split(family)


def total(terms):
    return torch.stack([score for _, score in terms]).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_logit_difference(family):
    split = split_of(family)
    with torch.no_grad():
        logits = last_logits(split.model, split.batch)
    expected = mm.logit_diff(logits, split.answers)
    torch.testing.assert_close(split.end.total, expected, atol=1e-5, rtol=0)
    for spans in ((), SPANS):
        torch.testing.assert_close(total(split.language(spans)), expected, atol=1e-5, rtol=0)
    if family != "mllama":
        terms = split.language((), [1])
        torch.testing.assert_close(total(terms), expected, atol=1e-5, rtol=0)
        assert sum(c.kind == "neuron" for c, _ in terms) == split.model.cfg.d_mlp


def test_a_softcap_comes_behind_what_is_split():
    split = split_of("paligemma")
    with torch.no_grad():
        logits = last_logits(split.model, split.batch)
    assert split.end.softcap == 15
    before = 15 * torch.atanh(logits.double() / 15)
    expected = mm.logit_diff(before, split.answers).float()
    torch.testing.assert_close(total(split.language()), expected, atol=1e-4, rtol=0)


def test_heads_split_by_span_read_there_alone():
    split = split_of("llava")
    whole = {c.name: s for c, s in split.language(())}
    parts = split.language(SPANS)
    for name in (f"a{layer}.h{h}" for layer in range(2) for h in range(2)):
        own = [s for c, s in parts if c.name.startswith(f"{name}<")]
        assert len(own) == 3
        torch.testing.assert_close(sum(own), whole[name], atol=1e-6, rtol=0)
    _, kept = split.model.run_with_cache(split.batch, names_filter=lambda name: True)
    layout, e = split.batch.layout, split.end.direction
    pattern, v = kept["blocks.1.attn.hook_pattern"], kept["blocks.1.attn.hook_v"]
    h, prompt = 3, 1
    group = h * v.shape[2] // pattern.shape[1]
    keys = layout.mask("image")[prompt]
    z = pattern[prompt, h, -1, keys] @ v[prompt, keys, group]
    expected = z @ split.model.towers["language"].weight("W_O", 1)[h] @ e[prompt]
    found = next(s for c, s in parts if c.name == "a1.h3<image>")
    torch.testing.assert_close(found[prompt], expected, atol=1e-6, rtol=0)


def test_text_equals_transformer_lens():
    """TransformerLens wants the norm's weight folded into the unembedding; one of ones is."""
    hf = tiny_hf("llava")
    with torch.no_grad():
        hf.model.language_model.norm.weight.fill_(1.0)
    model = mm.HookedMultimodal.from_hf(hf)
    batch = Batch.from_inputs(
        model, input_ids=torch.tensor([[1, 20, 9, 33, 14], [1, 8, 25, 7, 30]])
    )
    answers = Answers(torch.tensor([[7], [12]]), torch.tensor([[11], [9]]))
    wiring = wired(model)
    writers = language_writers(model, wiring, batch)
    run = seen_run(model, writers, batch, ())
    end = end_of(model, run, answers, True)
    ours = {c.name: s for c, s in language_terms(model, writers, run, end, (), ())}
    _, kept = model.run_with_cache(batch, names_filter=lambda name: True)
    theirs = ActivationCache(dict(kept), model)
    stack, labels = theirs.stack_head_results(pos_slice=-1, return_labels=True)
    normed = theirs.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    u = model.W_U[:, answers.answer_ids[:, 0]] - model.W_U[:, answers.foil_ids[:, 0]]
    scores = (normed * u.T).sum(-1)
    assert len(labels) == 8
    for label, score in zip(labels, scores, strict=True):
        layer, head = label.removeprefix("L").split("H")
        torch.testing.assert_close(ours[f"a{layer}.h{head}"], score, atol=1e-5, rtol=0)
    parts, names = theirs.decompose_resid(pos_slice=-1, return_labels=True, mode="mlp")
    normed = (theirs.apply_ln_to_stack(parts, layer=-1, pos_slice=-1) * u.T).sum(-1)
    for name, score in zip(names, normed, strict=True):
        mine = "input" if name == "embed" else f"m{name.split('_')[0]}"
        torch.testing.assert_close(ours[mine], score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "internvl", "blip-2"])
def test_vision_parts_and_a_constant_are_what_heads_read(family):
    split = split_of(family)
    (terms, read), g = split.vision()
    torch.testing.assert_close(total(terms), read, atol=1e-5, rtol=0)
    assert terms[-1][0].name == "vision.projector constant"
    assert len(terms) > 5
    assert float(torch.stack([s for _, s in terms[:-1]]).abs().max()) > 1e-4
    # Moving the picture's embeddings along g moves what heads read, and so the logits.
    seen = split.batch.layout.modality >= IMAGE
    assert bool((g[~seen] == 0).all())
    assert bool((g[seen] != 0).any())


def test_what_heads_read_of_the_picture_by_hand():
    split = split_of("llava")
    (terms, read), _ = split.vision()
    model, towers = split.model, split.model.towers
    _, kept = model.run_with_cache(split.batch, names_filter=lambda name: True)
    stream = kept["blocks.0.hook_resid_pre"]
    expected = torch.zeros(2)
    for prompt in range(2):
        at = split.batch.layout.positions("image", prompt)
        for layer in range(2):
            norm = towers["language"].blocks[layer].input_layernorm.weight
            scale = kept[f"blocks.{layer}.ln1.hook_scale"][prompt, at]
            W_V, W_O = (towers["language"].weight(w, layer) for w in ("W_V", "W_O"))
            for h in range(4):
                v = (stream[prompt, at] / scale * norm) @ W_V[h * len(W_V) // 4]
                row = kept[f"blocks.{layer}.attn.hook_pattern"][prompt, h, -1, at]
                expected[prompt] += row @ v @ W_O[h] @ split.end.direction[prompt]
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=0)
    # A component's part is what it does to the projector's output, to first order.
    projector = model.hf_model.model.multi_modal_projector
    last = model.family.reads(model.config)[0] - 1
    x = kept[f"vision.blocks.{last}.hook_resid_post"][:, 1:]
    _, g = split.vision()
    place = torch.stack([g[p, split.batch.layout.positions("image", p)] for p in range(2)])
    for name, hook in (
        ("m0", "vision.blocks.0.hook_mlp_out"),
        ("input", "vision.blocks.0.hook_resid_pre"),
    ):
        change = kept[hook][:, 1:]
        _, moved = torch.autograd.functional.jvp(projector, x, change)
        part = next(s for c, s in terms if c.name == f"vision.{name}")
        torch.testing.assert_close(part, (moved * place).sum((1, 2)), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def found(demo):
    pairs = shapes.pairs(demo, "where", 4, seed=3)
    return mm.direct_logit_attribution(demo, pairs, spans=("object", "image"), n_ablated=4)


def test_the_demo_model_reads_the_asked_object(found, demo):
    assert found.gap < 1e-4
    checked = shapes.pairs(demo, "where", 4, seed=3).check()
    torch.testing.assert_close(
        found.total, torch.tensor(checked["clean_logit_diff"].to_numpy()), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(found.base, found.total, atol=1e-3, rtol=0)
    table = found.to_dataframe()
    heads = table[(table["kind"] == "head") & (table["tower"] == "language")]
    by_span = heads.groupby("span")["score"].sum()
    assert by_span["object"] > 3 * abs(by_span["image"])  # all other patches together
    seen = table.loc[table["tower"] == "vision", "score"].sum()
    assert seen == pytest.approx(float(found.read.mean()), abs=1e-3)


def test_strong_components_are_ablated_beside_random_ones(found, demo):
    table = found.ablations()
    own = table[table["tower"] == "language"]
    assert own["random"].tolist() == [False] * 4 + [True] * 4
    scores = found.to_dataframe().groupby(["tower", "layer", "kind", "part"])["score"].sum()
    for row in own.itertuples():
        expected = scores[row.tower, row.layer, row.kind, row.part]
        assert row.score == pytest.approx(expected, abs=1e-5)
    pairs = shapes.pairs(demo, "where", 4, seed=3)
    for row in [own.iloc[0], own.iloc[-1]]:
        make = mm.sites.heads if row["kind"] == "head" else mm.sites.mlps
        sites = make(demo, ("last",), towers=["language"], layers=[int(row["layer"])])
        if row["kind"] == "head":
            sites = sites.where(head=int(row["part"]))
        patched = mm.patch(demo, pairs, sites, direction="mean", n_null=0)
        expected = float((patched.clean - patched.values).mean())
        assert row["loss"] == pytest.approx(expected, abs=1e-3)
    assert own[~own["random"]]["loss"].mean() > own[own["random"]]["loss"].mean()
    assert found.agreement > 0.3


def test_it_is_saved_joined_and_drawn(found, tmp_path):
    assert Result.load(found.save(tmp_path / "direct")).equals(found)
    assert concat([found, found]).scores.shape[1] == 8
    assert set(found.plot()) == {"strongest", "heads", "ablation"}
    assert "add up to" in found.page("Direct logit attribution").html()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "foil"}, "unknown of 'foil'"),
        ({"ablation": "noise"}, "unknown ablation 'noise'"),
        ({"n_ablated": -1}, "n_ablated is -1"),
        ({"neurons": [6]}, "layers 0..5, not 6"),
        ({"spans": ["thing"]}, "unknown span 'thing'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_input_is_refused(demo, options, message):
    with pytest.raises(ValueError, match=message):
        mm.direct_logit_attribution(demo, shapes.color_pairs(demo, 2), **options)


def test_answers_and_models_that_cannot_be_split_are_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=3)
    longer = [mm.Pair(p.clean, p.corrupt, f"{p.answer} circle", p.foil, p.spans) for p in pairs]
    with pytest.raises(ValueError, match="several tokens"):
        mm.direct_logit_attribution(demo, mm.PairDataset(longer, demo))
    split = split_of("llama4")
    with pytest.raises(DirectError, match="MLP"):
        split.language((), [1])
    with pytest.raises(StreamError):
        wired(mm.HookedMultimodal.from_hf(tiny_hf("florence2")))

"""Captum's attributions through our forward: complete, equal to pixels and to hand computations."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.corruption import blank
from mechmm.data.metrics import accuracy, score
from mechmm.engine.features import features_of
from mechmm.engine.presence import Presence
from mechmm.model.layout import SpanError
from mechmm.model.untrained import restored
from mechmm.results.result import Result
from mechmm.testing import tiny_hf, tiny_pairs

FAMILIES = ["gemma3", "qwen2_5_vl", "llava", "paligemma", "internvl", "chameleon"]
NAMES = ("integrated-gradients", "occlusion", "shapley", "grad-cam")
needs_captum = pytest.mark.usefixtures("captum")


@pytest.fixture(scope="module")
def captum():
    return pytest.importorskip("captum.attr", reason="the extra captum is not installed")


@pytest.fixture(scope="module")
def found(demo, captum):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    return mm.input_attribution(demo, pairs, steps=16)


@needs_captum
def test_256_steps_are_complete_on_the_demo_model(demo):
    pairs = shapes.color_pairs(demo, 1, seed=0)
    found = mm.input_attribution(demo, pairs, steps=256, untrained=False)
    assert float(found.gap().max()) < 1e-3
    batch = pairs.batch([0])
    with torch.no_grad():
        clean = score(demo, batch.clean, batch.answers)
    assert float(found.full) == pytest.approx(float(clean), abs=1e-4)
    assert "completeness gap" in found.summary()


def test_patches_have_the_integrated_gradients_of_their_pixels(captum):
    """The same points on the same line, so that they are equal at any number of steps."""
    model, pairs = tiny_pairs("llava", 1)
    found = mm.input_attribution(
        model, pairs, steps=7, baseline="black", text=False, spans=(), untrained=False
    )
    batch = pairs.batch([0])
    pixels = batch.clean.extra["pixel_values"]
    black = model.encode(pairs[0].clean.text, blank(pairs[0].clean.images[0], color=(0, 0, 0)))

    def forward(x):
        logits = torch.cat(
            [model.hf_model(**{**batch.clean.inputs, "pixel_values": p[None]}).logits for p in x]
        )
        own = batch.answers.repeat(len(x))
        return mm.logit_diff(logits[:, -1], own)

    by_pixel = captum.IntegratedGradients(forward).attribute(
        pixels, baselines=black.extra["pixel_values"], n_steps=7
    )
    side = pixels.shape[-1] // 4
    by_patch = by_pixel[0].sum(0).unflatten(0, (4, side)).unflatten(2, (4, side)).sum((1, 3))
    torch.testing.assert_close(found.scores[0], by_patch.flatten().float(), atol=1e-4, rtol=1e-3)


@needs_captum
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_complete_or_single_losses_in_every_family(family):
    model, pairs = tiny_pairs(family, 2)
    options = {"spans": (), "untrained": False}
    found = mm.input_attribution(model, pairs, steps=32, **options)
    change = found.full - found.empty
    size = found.scores.abs().sum(1)
    assert ((found.scores.sum(1) - change).abs() < 0.05 * size).all()
    lost = mm.input_attribution(model, pairs, "occlusion", baseline="corrupt", **options)
    features = features_of(model, pairs)
    graded = Presence(model, pairs, features, mm.logit_diff, "corrupt").graded(pairs.batch([0, 1]))
    z = 1 - torch.eye(features.count)
    with torch.no_grad():
        without = graded(z.repeat_interleave(2, 0)).view(-1, 2)
        full = graded(torch.ones(2, features.count))
    torch.testing.assert_close(lost.scores, (full - without).T, atol=2e-4, rtol=1e-3)


@needs_captum
def test_sampled_shapley_values_come_near_to_those_of_all_coalitions():
    model, pairs = tiny_pairs("qwen2_vl", 1)
    options = {"side": 2, "text": False, "spans": (), "untrained": False}
    found = mm.input_attribution(model, pairs, "shapley", steps=8, **options)
    features = features_of(model, pairs, side=2, text=False)
    masks = torch.tensor([[(c >> f) & 1 for f in range(4)] for c in range(16)]) == 0
    v = Presence(model, pairs, features, mm.logit_diff).values(masks[:, None]).values[:, 0]
    weight = {0: 1 / 4, 1: 1 / 12, 2: 1 / 12, 3: 1 / 4}
    for f in range(4):
        gains = {c: v[c | 1 << f] - v[c] for c in range(16) if not c >> f & 1}
        exact = sum(weight[c.bit_count()] * gain for c, gain in gains.items())
        spread = float(torch.stack(list(gains.values())).std())
        assert abs(float(found.scores[0, f]) - float(exact)) < 4 * spread / 8**0.5
    assert float(found.gap()) < 1e-4
    one, again = (mm.input_attribution(model, pairs, "shapley", steps=1, **options) for _ in "ab")
    assert torch.equal(again.scores, one.scores)


@needs_captum
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "paligemma", "llava", "llava_next"])
def test_grad_cam_is_a_hand_computation(family):
    model, pairs = tiny_pairs(family, 2)
    found = mm.input_attribution(model, pairs, "grad-cam", spans=(), untrained=False)
    for number in range(2):
        one = pairs.batch([number])
        layout, caught = one.clean.layout, []

        def catch(value, hook, caught=caught):
            caught.append(value.detach().requires_grad_())
            return caught[0].clone()

        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", catch)]):
            slope = torch.autograd.grad(score(model, one.clean, one.answers).sum(), caught[0])[0]
        cells = [p for p in layout.positions("image") if int(layout.row[0, p]) >= 0]
        wanted = (slope[0, cells].mean(0) * caught[0][0, cells]).sum(-1).relu()
        torch.testing.assert_close(found.scores[number], wanted.detach(), atol=1e-5, rtol=1e-3)
        assert found.where[number, :, 0].tolist() == [p - 0 for p in cells]


def test_the_trained_map_lies_on_the_asked_object(found):
    table = found.mass().set_index(["map", "span"])
    assert table["share"]["scores", "object"] > 3 * table["area"]["scores", "object"]
    assert table["share"]["scores", "object"] > table["share"]["untrained", "object"]
    assert table["area"]["scores", "object"] == pytest.approx(4 / 64)
    alike = found.agreement().set_index(["with", "absolute"])["correlation"]
    assert abs(alike["random", False]) < 0.3
    assert alike["untrained", True] < 0.9


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "blip-2", "mllama", "florence2"])
def test_untrained_models_get_their_weights_back_from_the_inputs_up(family):
    model = mm.HookedMultimodal.from_hf(tiny_hf(family))
    fresh = mm.untrained(model, seed=1)
    old = dict(model.hf_model.named_parameters())
    parts, missing = [], []
    for names in restored(fresh, model):
        new = fresh.hf_model.named_parameters()
        missing.append({path for path, value in new if not torch.equal(value, old[path])})
        parts.append(names)
    assert parts[0][0] == "unembedding"
    assert parts[0][-1] == "embeddings and the rest"
    assert [len(names) for names in parts] == list(range(len(parts[0]), 0, -1))
    assert all(less < more for more, less in pairwise(missing))
    tower = model.towers["language"]
    tied = {id(tower.unembed.weight)}
    assert missing[-1]
    for path in missing[-1]:
        assert "norm" in path or "lm_head" in path or id(old[path]) in tied


def _check_cascade_figure(found, series):
    """Every line is a column of the table, over the range of random scores; the last point is the
    untrained model's."""
    figure, table = found.plot()["cascade"], found.cascaded()
    band, *drawn = (trace for trace in figure.data if trace.x is not None)
    assert [line.name for line in drawn] == list(series)
    for line, absolute in zip(drawn, series.values(), strict=True):
        own = table[table["absolute"] == absolute]
        assert list(line.x) == list(range(1, len(found.parts) + 1))
        np.testing.assert_allclose(line.y, own["correlation"])
        tops = np.asarray(line.y) + np.asarray(line.error_y.array)
        np.testing.assert_allclose(tops, own["high"].fillna(own["correlation"]))
    chance = found.agreement().query("`with` == 'random'")
    assert (min(band.y), max(band.y)) == (chance["low"].min(), chance["high"].max())
    assert band.name == "random scores"


@needs_captum
def test_a_cascade_attributes_models_that_are_untrained_from_the_logits_down():
    model, pairs = tiny_pairs("llava", 2)
    found = mm.input_attribution(model, pairs, "grad-cam", spans=(), cascade=True, seed=3)
    assert found.parts[0] == "unembedding"
    assert len(found.cascade) == len(found.parts) - 1
    language = ("lm_head", "model.language_model.norm", "model.language_model.layers")
    count = 1 + len(model.towers["language"].blocks)
    assert found.parts[count - 1] == "language 0"
    by_hand = mm.untrained(model, 3)
    for path, value in by_hand.hf_model.named_parameters():
        if not path.startswith(language):
            value.data.copy_(model.hf_model.get_parameter(path))
    own = mm.input_attribution(
        by_hand, mm.PairDataset(pairs, by_hand), "grad-cam", spans=(), untrained=False
    )
    torch.testing.assert_close(found.cascade[count - 1], own.scores)
    table = found.cascaded()
    assert table["parts"].tolist() == [n + 1 for n in range(len(found.parts)) for _ in range(2)]
    last = found.agreement().set_index(["with", "absolute"])["correlation"]["untrained", True]
    assert table["correlation"].iloc[-1] == pytest.approx(last, nan_ok=True)
    _check_cascade_figure(found, {"of the scores": False})
    signed = replace(found, scores=-found.scores)
    _check_cascade_figure(signed, {"of the scores": False, "of their sizes": True})
    with pytest.raises(ValueError, match="a cascade ends at the untrained model"):
        mm.input_attribution(model, pairs, "grad-cam", untrained=False, cascade=True)


def test_results_are_stored_and_shown(found, tmp_path):
    again = Result.load(found.save(tmp_path / "found"))
    assert again.equals(found)
    assert set(found.plot()) == {"mass", "agreement", "picture"}
    assert "integrated-gradients" in found.page("attribution").html()
    table = found.to_dataframe()
    assert len(table) == int((found.where[..., 1] >= 0).sum())
    assert table["score"].sum() == pytest.approx(float(found.scores.sum()), abs=1e-3)
    assert torch.equal(found.image_scores(), found.scores[:, :64])
    with pytest.raises(ValueError, match="example 1 is not kept"):
        found.overlay(1)


def test_a_missing_captum_names_the_extra(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install 'mechmm\[captum\]'"):
        mm.input_attribution(demo, shapes.color_pairs(demo, 1))


@needs_captum
def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(ValueError, match="unknown method 'saliency'; use integrated-gradients"):
        mm.input_attribution(demo, pairs, "saliency")
    with pytest.raises(ValueError, match="steps is 0"):
        mm.input_attribution(demo, pairs, steps=0)
    with pytest.raises(ValueError, match="unknown baseline"):
        mm.input_attribution(demo, pairs, baseline="white")
    with pytest.raises(ValueError, match="accuracy has no gradient"):
        mm.input_attribution(demo, pairs, metric=accuracy)
    with pytest.raises(SpanError, match="nothing"):
        mm.input_attribution(demo, pairs, spans=("nothing",))
    with pytest.raises(SpanError, match="no picture"):
        mm.input_attribution(demo, shapes.color_pairs(demo, 1, form="text"), spans=())
    model, queries = tiny_pairs("blip-2", 1)
    with pytest.raises(SpanError, match="nothing to map"):
        mm.input_attribution(model, queries, "grad-cam", spans=())

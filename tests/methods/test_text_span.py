"""Text bases find what was planted, and ablation is that of a hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import mechmm as mm
from mechmm.engine.shares import direct
from mechmm.methods.text_span import basis
from mechmm.results.result import Result
from mechmm.testing import tiny
from mechmm.testing.single import llava_config

TEXTS = {"color": ["red", "blue", "green"], "shape": ["circle", "square", "star"]}
FEW = {"n_texts": 3, "n_random": 4, "n_ablated": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    shape = (6, 32, 32, 3)
    return [Image.fromarray(p) for p in random.integers(0, 255, shape, dtype=np.uint8)]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def found(model, pictures):
    return mm.text_span(model, pictures, TEXTS, **FEW)


def test_planted_texts_are_chosen_in_the_order_of_their_spread():
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, 64, generator=random), dim=-1)
    weights = torch.randn(50, 3, generator=random) * torch.tensor((5.0, 3.0, 2.0))
    shares = weights @ directions[[7, 21, 3]] + 0.05 * torch.randn(50, 64, generator=random)
    shares = shares - shares.mean(0)
    chosen, projections = basis(shares, directions, 5)
    assert chosen[:3].tolist() == [7, 21, 3]
    explained = projections.square().sum(-1).cumsum(0) / shares.square().sum()
    assert float(explained[2]) > 0.95
    assert (explained.diff() >= 0).all()
    nothing, _ = basis(shares, directions[:2], 4)
    assert (nothing[2:] == -1).all()  # two texts have no third direction


def test_what_is_explained_is_what_projection_leaves(model, pictures, found):
    """By least squares on the chosen texts' directions within the span of the shares."""
    shares = torch.cat(
        [direct(model, model.encode("red", pictures[i : i + 4])).heads for i in (0, 4)]
    )[:, 1, 2]
    shares = shares - shares.mean(0)
    every = [text for some in TEXTS.values() for text in some]
    embedded = model.hf_model(**model.encode(every, pictures[:1]).inputs).text_embeds.detach()
    rows = torch.linalg.svd(shares, full_matrices=False)[2][:5]  # 6 pictures less their mean
    used = embedded[found.chosen[1, 2]] @ rows.T @ rows
    left = shares.T - used.T @ torch.linalg.lstsq(used.T, shares.T).solution
    wanted = 1 - left.square().sum() / shares.square().sum()
    torch.testing.assert_close(found.explained()[1, 2, -1], wanted, atol=1e-3, rtol=0)


def test_ablation_is_that_of_a_hook(model, pictures, found):
    (layer, head), other = found.heads["color"]
    assert [layer, head] != other
    batch = model.encode("red", pictures)
    live = []
    for i, h in found.heads["color"]:
        hook = f"vision.blocks.{i}.attn.hook_z"
        _, cache = model.run_with_cache(batch, names_filter=hook)
        mean = cache[hook].mean(0)[:, h]

        def ablate(value, hook, h=h, mean=mean):
            value[:, :, h] = mean
            return value

        live.append((hook, ablate))
    every = [text for some in TEXTS.values() for text in some]
    texts = model.hf_model(**model.encode(every, pictures[:1]).inputs).text_embeds
    with model.hooks(fwd_hooks=live):
        images = model.hf_model(**batch.inputs).image_embeds
    torch.testing.assert_close(found.ablated[0], (images @ texts.T).detach(), atol=1e-4, rtol=0)


def test_a_head_that_is_made_large_is_found_and_missed(pictures):
    model = tiny("clip")
    o = model.towers["vision"].linear(2, "o")
    with torch.no_grad():
        o.weight[:, 8 * 3 : 8 * 4] *= 30
    found = mm.text_span(model, pictures, TEXTS, **{**FEW, "n_ablated": 1, "n_random": 12})
    table = found.to_dataframe()
    top = table.loc[table["variance"].idxmax()]
    assert (top["layer"], top["head"]) == (2, 3)
    assert found.heads["color"] == found.heads["shape"] == [[2, 3]]
    moved = (found.ablated - found.clean).abs().mean((1, 2))
    others = (found.random - found.clean).abs().mean((1, 2))
    assert float(moved.min()) > 2 * float(others.median())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_of_a_language_model_is_read_by_its_dual_encoder(pictures, kind):
    """With the encoder's own weights in the tower it is the encoder's result; with others in both
    alike, again; and the encoder is left as it was."""
    dual = tiny(kind)
    model = seeing(kind, dual.towers["vision"].config)
    tower, own = model.towers["vision"].root, dual.towers["vision"].root
    tower.load_state_dict(own.state_dict(), strict=False)
    found = mm.text_span(model, pictures, TEXTS, text_model=dual, **FEW)
    assert found.equals(mm.text_span(dual, pictures, TEXTS, **FEW))
    with torch.no_grad():
        tower.encoder.layers[1].mlp.fc2.weight.mul_(2)
        before = {name: value.clone() for name, value in own.state_dict().items()}
        lent = mm.text_span(model, pictures, TEXTS, text_model=dual, **FEW)
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
        own.encoder.layers[1].mlp.fc2.weight.mul_(2)
    assert not lent.equals(found)
    assert lent.equals(mm.text_span(dual, pictures, TEXTS, **FEW))


def seeing(kind, sizes):
    """A tiny LLaVA with a vision tower of some sizes."""
    config = llava_config(vision=kind, select="full")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(config.vision_config, key, getattr(sizes, key))
    return mm.HookedMultimodal.from_hf(LlavaForConditionalGeneration(config).eval())


def test_labels_and_files(pictures, found, tmp_path):
    assert found.right(found.clean).mean() == 1  # no labels: the nearest text is the right one
    model = tiny("clip")
    labels = {"color": ["red", "blue"] * 3, "shape": ["star"] * 6}
    own = mm.text_span(model, pictures, TEXTS, labels=labels, **FEW)
    nearest = own.clean[:, 3:].argmax(-1) == 2
    assert torch.equal(own.right(own.clean)[1].bool(), nearest)
    assert Result.load(own.save(tmp_path / "span")).equals(own)
    assert set(own.plot()) == {"variance", "explained", "ablation"}
    assert "random heads" in own.page("Heads").html()


def test_what_has_no_text_span(pictures):
    model = tiny("clip")
    with pytest.raises(ValueError, match=r"is no dual encoder.*give text_model"):
        mm.text_span(tiny("llava"), pictures, TEXTS)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is no dual encoder"):
        mm.text_span(model, pictures, TEXTS, text_model=tiny("llava"))
    with pytest.raises(ValueError, match=r"hidden_size.* are \[32.* and \[48"):
        mm.text_span(tiny("llava"), pictures, TEXTS, text_model=model)
    with pytest.raises(ValueError, match=r"ChameleonFor.* has no vision tower"):
        mm.text_span(tiny("chameleon"), pictures, TEXTS, text_model=model)
    with pytest.raises(ValueError, match=r"1 picture\(s\)"):
        mm.text_span(model, pictures[:1], TEXTS)
    with pytest.raises(ValueError, match="'color' needs a list of two texts"):
        mm.text_span(model, pictures, {"color": ["red"]})
    with pytest.raises(ValueError, match="the text 'red' is given twice"):
        mm.text_span(model, pictures, {"color": ["red", "blue"], "shape": ["red", "star"]})
    with pytest.raises(ValueError, match="texts are lists by property"):
        mm.text_span(model, pictures, {})
    with pytest.raises(ValueError, match="n_ablated is 99, but there are 18 heads"):
        mm.text_span(model, pictures, TEXTS, n_ablated=99)
    with pytest.raises(ValueError, match="'pink' is none of its texts"):
        mm.text_span(model, pictures, TEXTS, labels={**TEXTS, "color": ["pink"] * 6})
    with pytest.raises(ValueError, match="3 for 6 pictures"):
        mm.text_span(model, pictures, TEXTS, labels=TEXTS)

"""The gap is what the formula says of a cached run; shuffled modalities have none."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.methods.modality_gap import MEASURES
from mechmm.model.batch import Batch
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny, tiny_inputs


def directly(image, text):
    """The three measures from lists of states by example."""
    means = [torch.stack([x.mean(0) for x in side]).mean(0) for side in (image, text)]
    spread = torch.stack(
        [
            torch.stack([(x - mean).square().sum(-1).mean() for x in side]).mean()
            for side, mean in zip((image, text), means, strict=True)
        ]
    )
    gap = (means[0] - means[1]).norm()
    cosine = 1 - torch.nn.functional.cosine_similarity(*means, dim=0)
    return torch.stack([gap, cosine, gap / spread.mean().sqrt()])


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "smolvlm", "paligemma"])
def test_it_is_that_of_a_cached_run(family):
    model = tiny(family)
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1), words=(3, 6)))
    found = mm.modality_gap(model, [batch], close=False, n_shuffled=3, layers=[1])
    _, cache = model.run_with_cache(batch, names_filter="blocks.1.hook_resid_pre")
    states = cache["blocks.1.hook_resid_pre"]
    image, text = (
        [s[m] for s, m in zip(states, batch.layout.mask(span), strict=True)]
        for span in ("image", "text")
    )
    torch.testing.assert_close(found.gap()[0], directly(image, text), atol=1e-4, rtol=1e-4)


def test_it_is_there_in_the_demo_and_not_with_shuffled_modalities(tmp_path):
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    pairs = shapes.color_pairs(model, 8, seed=0)
    found = mm.modality_gap(model, pairs, layers=[0, 3, 5], n_random=3)
    table = found.to_dataframe().set_index(["measure", "layer"])
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    for measure in MEASURES:
        assert (table.loc[measure, "low"] > 3 * table.loc[measure, "null_high"]).all()
    # Before the first block, what the picture says is lost with the gap, as with random shifts.
    assert table.loc["spread", "change_high"][0] < -2
    assert abs(table.loc["spread", "change"][5]) < 1
    # Closed by the engine: as with a hook.
    move = found.centroids.mean(2)[1].diff(dim=0)[0]
    batch = next(pairs.batches(8))
    image = batch.clean.layout.mask("image")

    def closed(value, hook):
        return value + image[..., None] * move

    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_pre", closed)]):
        logits = model(batch.clean, logits_to_keep=1)[:, 0]
    assert found.closed is not None
    wanted = mm.logit_diff(logits, batch.answers)
    torch.testing.assert_close(found.closed[1], wanted, atol=1e-3, rtol=0)
    assert Result.load(found.save(tmp_path / "gap")).equals(found)
    assert set(found.plot()) == {*MEASURES, "closed"}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_dual_encoder_it_is_that_of_its_embeddings(family):
    model = tiny(family)
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1,) * 5))
    found = mm.modality_gap(model, [batch], n_shuffled=4)
    output = model.hf_model(**batch.inputs)
    sides = [list(side.detach()[:, None]) for side in (output.image_embeds, output.text_embeds)]
    torch.testing.assert_close(found.gap()[0], directly(*sides), atol=1e-4, rtol=1e-4)
    own = output.logits_per_image.argmax(-1) == torch.arange(5)
    assert torch.equal(found.clean, own.float())


def test_what_has_no_gap():
    model, clip = tiny("llava"), tiny("clip")
    batch = Batch.from_inputs(model, **tiny_inputs(model))
    with pytest.raises(ValueError, match="batches have no answers to change"):
        mm.modality_gap(model, [batch])
    with pytest.raises(ValueError, match="tower 'vision' has no positions of both"):
        mm.modality_gap(model, [batch], tower="vision", close=False)
    with pytest.raises(ValueError, match=r"layers 0\.\.1, not 7"):
        mm.modality_gap(model, [batch], layers=[7], close=False)
    with pytest.raises(ValueError, match="n_shuffled is 0"):
        mm.modality_gap(model, [batch], n_shuffled=0, close=False)
    text = Batch.from_inputs(model, **tiny_inputs(model, (0,)))
    with pytest.raises(SpanError, match="example 0 has no position in span 'image'"):
        mm.modality_gap(model, [text], close=False)
    inputs = tiny_inputs(clip, (1, 1))
    uneven = Batch.from_inputs(clip, **{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="batch 0 has 1 pictures and 2 texts"):
        mm.modality_gap(clip, [uneven])

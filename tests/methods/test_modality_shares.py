"""Shares add up; a picture that cannot be seen has none; exchanged pictures are those of others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.exchanged import exchanged
from mechmm.data.metrics import Answers, score
from mechmm.data.pairs import PairError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def found():
    model, pairs = tiny_pairs("llava", 2)
    return mm.modality_shares(model, pairs, control=pairs[:1], side=1, n_orders=2)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava", "paligemma", "internvl"])
def test_shares_add_up_and_pictures_are_exchanged(family):
    model, pairs = tiny_pairs(family, 2)
    found = mm.modality_shares(model, pairs, side=1, n_orders=2)
    torch.testing.assert_close(found.values.sum(1), found.full - found.empty, atol=2e-4, rtol=1e-3)
    for number in range(2):
        own = Answers.of(model, [pairs[number].answer], [pairs[number].foil])
        picture = pairs[1 - number].clean.images[0]
        with torch.no_grad():
            wanted = score(model, model.encode(pairs[number].clean.text, picture), own)
        assert float(found.exchanged_full[number]) == pytest.approx(float(wanted), abs=2e-4)
    size = found.values.abs()
    image = found.where[..., 1] == 2
    wanted = (size * ~image).sum(1) / size.sum(1)
    torch.testing.assert_close(found.text_shares()["pairs"], wanted)


def test_a_picture_that_cannot_be_seen_has_no_share():
    model, pairs = tiny_pairs("llava", 2)
    projector = model.hf_model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        projector.weight.zero_()
    found = mm.modality_shares(model, pairs, side=1, n_orders=2)
    for share in found.text_shares().values():
        torch.testing.assert_close(share, torch.ones(2), atol=1e-5, rtol=0)


def test_a_metric_that_nothing_moves_has_no_shares():
    model, pairs = tiny_pairs("llava", 2)

    def constant(logits, answers):
        return torch.zeros(len(logits))

    found = mm.modality_shares(model, pairs, side=1, n_orders=2, metric=constant)
    assert found.text_shares()["pairs"].isnan().all()
    assert found.to_dataframe()["examples"].tolist() == [0, 0]


def test_results_are_stored_and_shown(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    table = found.to_dataframe().set_index("run")
    assert table.index.tolist() == ["pairs", "other pictures", "control"]
    assert table["alike"].unique() == pytest.approx([8 / 9])
    assert np.allclose(table["text"] + table["image"], 1)
    assert set(found.plot()) == {"shares"}
    assert "T-SHAP over 2 pairs" in found.summary()
    assert "other pictures" in found.page("shares").html()
    assert len(found.features()) == 18


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(PairError, match="one pair alone"):
        mm.modality_shares(demo, pairs[:1])
    with pytest.raises(ValueError, match="n_orders"):
        mm.modality_shares(demo, pairs, n_orders=0)
    with pytest.raises(ValueError, match="unknown baseline"):
        mm.modality_shares(demo, pairs, baseline="grey")
    with pytest.raises(SpanError, match="no picture"):
        mm.modality_shares(demo, shapes.color_pairs(demo, 2, form="text"))
    with pytest.raises(ValueError, match="aligned for another model"):
        mm.modality_shares(demo, pairs, control=tiny_pairs("llava", 2)[1])
    wordless = [
        replace(
            p, clean=replace(p.clean, text="<image>"), corrupt=replace(p.corrupt, text="<image>")
        )
        for p in pairs
    ]
    with pytest.raises(SpanError, match="pair 0 of pairs: the clean prompt has no words"):
        mm.modality_shares(demo, mm.PairDataset(wordless, demo))


def test_pictures_of_other_sizes_are_not_exchanged():
    model, pairs = tiny_pairs("qwen2_vl", 2)
    large = [replace(side, images=(_resized(side.images[0]),)) for side in _sides(pairs[1])]
    other = replace(pairs[1], clean=large[0], corrupt=large[1])
    with pytest.raises(PairError, match="pair 0"):
        exchanged(mm.PairDataset([pairs[0], other], model))


def _sides(pair):
    return pair.clean, pair.corrupt


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize((64, 128))

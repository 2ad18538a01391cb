"""Crossed texts and pictures equal encoded ones; the projection is exact on additive functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.data.pairs import PairError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

FAMILIES = ["gemma3", "qwen3_vl", "blip-2", "llava", "paligemma", "llava_next"]


def result(logits, own, foil):
    answers = tuple(map(str, range(logits.shape[-1])))
    return mm.Emap(logits, torch.tensor(own), torch.tensor(foil), answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_with_every_picture_is_as_encoded(family):
    model, pairs = tiny_pairs(family, 3)
    texts = [
        pair.clean.text.replace("color", word) for pair, word in zip(pairs, "abc", strict=True)
    ]
    pairs = mm.PairDataset(
        [
            replace(p, clean=replace(p.clean, text=t), corrupt=replace(p.corrupt, text=t))
            for p, t in zip(pairs, texts, strict=True)
        ],
        model,
    )
    found = mm.emap(model, pairs, batch_size=2)
    read = torch.tensor([model.answer_tokens(text)[0] for text in found.answers])
    for text in range(3):
        for picture in range(3):
            batch = model.encode(texts[text], list(pairs[picture].clean.images))
            with torch.no_grad():
                wanted = last_logits(model, batch)[0, read]
            torch.testing.assert_close(
                found.logits[text, picture], wanted.float(), atol=2e-4, rtol=1e-3
            )
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_additive_function_is_its_own_projection():
    text, picture = torch.randn(5, 1, 3), torch.randn(1, 5, 3)
    found = result(text + picture + 2, [0, 1, 2, 0, 1], [1, 2, 0, 1, 2])
    both = found.projections()
    torch.testing.assert_close(both["additive (EMAP)"], both["model"], atol=1e-5, rtol=1e-5)
    assert found.interaction() < 1e-9


def test_the_projection_is_the_nearest_additive_function():
    logits = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0))
    found = result(logits, [0, 1, 0, 1], [1, 0, 1, 0])
    columns = [torch.eye(4).repeat_interleave(4, 0), torch.eye(4).repeat(4, 1)]
    design = torch.cat(columns, dim=1)  # one column per text and per picture
    fitted = design @ torch.linalg.pinv(design) @ logits.flatten(0, 1)
    wanted = fitted.view(4, 4, 2).diagonal().T
    torch.testing.assert_close(found.projections()["additive (EMAP)"], wanted, atol=1e-5, rtol=1e-4)


def test_exclusive_or_is_all_interaction():
    """The answer is whether text and picture differ: neither says anything alone."""
    bits = torch.tensor([0, 0, 1, 1])
    texts, pictures = bits, torch.tensor([0, 1, 0, 1])
    differ = (texts[:, None] != pictures).float()
    logits = torch.stack([1 - differ, differ], -1)
    own = (texts != pictures).long().tolist()
    found = result(logits, own, [1 - o for o in own])
    assert found.interaction() == pytest.approx(1)
    assert float(found.accuracy()["model"].mean()) == 1
    assert found.logit_diff()["additive (EMAP)"].abs().max() < 1e-6


def test_the_demo_model_needs_interaction_for_colors(demo, tmp_path):
    found = mm.emap(demo, shapes.color_pairs(demo, 6, seed=0))
    table = found.to_dataframe().set_index("run")
    assert table["accuracy"]["model"] >= 0.85
    assert table["logit_diff"]["additive (EMAP)"] < 0.75 * table["logit_diff"]["model"]
    assert table["accuracy"]["other pictures"] < 0.6
    assert found.interaction() > 0.2
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    assert set(found.plot()) == {"accuracy", "logit_diff"}
    assert "nearest additive" in found.summary()
    assert "EMAP" in found.page("emap").html()


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(PairError, match="one pair alone"):
        mm.emap(demo, pairs[:1])
    with pytest.raises(SpanError, match="pair 0: the clean prompt has no picture"):
        mm.emap(demo, shapes.color_pairs(demo, 2, form="text"))
    with pytest.raises(ValueError, match="batch_size is 0"):
        mm.emap(demo, pairs, batch_size=0)
    alike = [replace(p, answer="red circle", foil="red square") for p in pairs]
    with pytest.raises(PairError, match="the same first token"):
        mm.emap(demo, mm.PairDataset(alike, demo))
    model, small = tiny_pairs("qwen2_vl", 2)
    sides = [
        replace(side, images=(side.images[0].resize((64, 128)),))
        for side in (small[1].clean, small[1].corrupt)
    ]
    other = replace(small[1], clean=sides[0], corrupt=sides[1])
    with pytest.raises(SpanError, match="pair 1: its pictures are cut into other patches"):
        mm.emap(model, mm.PairDataset([small[0], other], model))

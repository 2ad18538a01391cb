"""Ablated image tokens equal tokens set by hand, and show where the demo model's answer enters."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.engine.checks import SiteError
from mechmm.model.layout import Box, SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

"""Further families, which take more time than they tell."""


@pytest.fixture(scope="module")
def found(demo):
    return mm.ablate_tokens(demo, shapes.color_pairs(demo, 32, seed=0), n_random=3)


def with_corner(model, pairs):
    """The same pairs, with the upper left of the picture as a span."""
    corner = {"corner": Box(0, 0, 16, 16)}
    return mm.PairDataset(
        [mm.Pair(p.clean, p.corrupt, p.answer, p.foil, corner) for p in pairs], model
    )


@pytest.mark.parametrize("by", ["mean", "zero", "corrupt"])
@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "qwen2_vl", "idefics3", "internvl", "paligemma"]
)
def test_cells_equal_tokens_set_by_hand(family, by):
    model, pairs = tiny_pairs(family, 2)
    pairs = with_corner(model, pairs)
    found = mm.ablate_tokens(
        model, pairs, ["corner"], by=by, layer=1, metric=mm.logit_diff, n_random=1
    )
    hook = "blocks.1.hook_resid_pre"
    batch = next(pairs.batches(2))
    clean, corrupt = (model.run_with_cache(b)[1][hook] for b in (batch.clean, batch.corrupt))
    image, corner = (batch.clean.layout.mask(span) for span in ("image", "corner"))
    new = {"mean": clean[image].mean(0), "zero": torch.zeros_like(clean), "corrupt": corrupt}[by]
    for number, mask in enumerate((image & corner, image & ~corner)):

        def put(x, hook, mask=mask):
            return torch.where(mask[..., None], new.to(x), x)

        with torch.no_grad(), model.hooks(fwd_hooks=[(hook, put)]):
            wanted = mm.logit_diff(last_logits(model, batch.clean), batch.answers)
        torch.testing.assert_close(found.values[number], wanted.float(), atol=3e-4, rtol=0)
        assert found.tokens[number].tolist() == mask.sum(1).tolist()
    assert found.cells["span"].tolist() == ["corner", "background"]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_demo_model_needs_the_tokens_of_the_object_it_is_asked_for(found):
    table = found.to_dataframe().set_index("span")
    assert table["base"].iloc[0] >= 0.95
    assert table.loc["object", "value"] <= 0.6
    assert table.loc["object", "random_low"] >= 0.9
    assert table.loc["distractor", "value"] >= 0.95
    # The background is most of the picture, and as many tokens with the object among them are not.
    assert table.loc["background", "value"] >= 0.95
    assert table.loc["background", "control"] == "anywhere"
    assert table.loc["background", "random_high"] <= 0.8


def test_results_are_stored_and_shown(found, tmp_path):
    again = Result.load(found.save(tmp_path / "found"))
    assert torch.equal(again.random, found.random)
    assert "tokens of object" in again.summary()
    assert "accuracy" in again.page("tokens").html()
    assert len(again.plot()["tokens"].data[0].y) == 6


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    with pytest.raises(ValueError, match="spans are"):
        mm.ablate_tokens(demo, pairs, ())
    with pytest.raises(ValueError, match="spans are"):
        mm.ablate_tokens(demo, pairs, ["object", "background"])
    with pytest.raises(SpanError, match="'last' has no token in the picture"):
        mm.ablate_tokens(demo, pairs, ["last"])
    with pytest.raises(SpanError, match="'bus'"):
        mm.ablate_tokens(demo, pairs, ["bus"])
    with pytest.raises(ValueError, match="median"):
        mm.ablate_tokens(demo, pairs, by="median")
    with pytest.raises(ValueError, match="n_random"):
        mm.ablate_tokens(demo, pairs, n_random=0)
    with pytest.raises((SiteError, ValueError), match="99"):
        mm.ablate_tokens(demo, pairs, layer=99)
    assert not any(point.fwd_hooks for point in demo.hook_dict.values())

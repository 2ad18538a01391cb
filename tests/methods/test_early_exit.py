"""An early exit is what the model would say if the blocks behind it were taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.engine.exits import HeadError, exits_of
from mechmm.model.batch import Batch
from mechmm.results.result import Result, concat
from mechmm.testing import tiny_hf, tiny_inputs

FAMILIES = ("llava", "gemma3", "qwen3_vl", "mllama", "qwen3_5")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_exit_equals_a_model_without_the_later_blocks(family):
    hf = tiny_hf(family)
    model = mm.HookedMultimodal.from_hf(hf)
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1), (6, 4)))
    exits = list(exits_of(model, batch))
    blocks = model.towers["language"].blocks
    assert len(exits) == len(blocks) + 1
    for layer in range(-1, len(blocks)):
        for block in blocks[layer + 1 :]:
            block.forward = first_argument
        expected = last_logits(model, batch)
        for block in blocks:
            block.__dict__.pop("forward", None)
        error = (exits[layer + 1] - expected).abs().max() / expected.abs().max()
        deepstack = family == "qwen3_vl" and layer < 2  # added behind the blocks all the same
        assert error < 1e-5 or deepstack, (layer, error)


def first_argument(*args, **kwargs):
    """A block that lets everything pass."""
    return args[0] if args else kwargs["hidden_states"]


@pytest.fixture(scope="module")
def found(demo):
    return mm.early_exit(demo, shapes.color_pairs(demo, 12, seed=3))


def test_the_last_layer_is_the_model(demo, found):
    batch = next(shapes.color_pairs(demo, 12, seed=3).batches(12))
    logits = last_logits(demo, batch.clean)
    assert found.said[-1].tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(
        found.logit_diff[-1], mm.logit_diff(logits, batch.answers), atol=1e-4, rtol=0
    )
    table = found.to_dataframe()
    assert table["agreement"].iloc[-1] == table["settled"].iloc[-1] == 1
    assert table["layer"].tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert (table["agreement"] > table["null"])[2:].all()
    assert table["agreement"].iloc[0] == 0  # the last token alone tells nothing


def test_exits_and_null_by_hand(found):
    said, final = found.said, found.said[-1]
    for example, layer in enumerate(found.exits().tolist()):
        own = said[:, example] == final[example]
        assert own[layer + 1 :].all()
        assert layer == -1 or not own[layer]
    others = [
        np.mean([int(said[2, i] == final[j]) for j in range(12) if j != i]) for i in range(12)
    ]
    np.testing.assert_allclose(found.null()[2], others, atol=1e-6)


def test_it_is_saved_joined_and_drawn(found, tmp_path):
    assert Result.load(found.save(tmp_path / "exit")).equals(found)
    assert concat([found, found]).said.shape == (7, 24)
    assert set(found.plot()) == {"agreement", "logit_diff"}
    assert "say" in found.page("Early exit").html()


def test_what_cannot_be_read_is_refused(demo, monkeypatch):
    pairs = shapes.color_pairs(demo, 2, seed=3)
    with pytest.raises(ValueError, match="unknown prompt 'dirty'"):
        mm.early_exit(demo, pairs, prompt="dirty")
    longer = [mm.Pair(p.clean, p.corrupt, f"{p.answer} circle", p.foil, p.spans) for p in pairs]
    with pytest.raises(ValueError, match="several tokens"):
        mm.early_exit(demo, mm.PairDataset(longer, demo))
    tower = demo.towers["language"]
    monkeypatch.setattr(tower, "unembed", nn.Linear(tower.cfg.d_model, tower.cfg.d_vocab))
    with pytest.raises(HeadError, match="do not give the model's logits"):
        mm.early_exit(demo, pairs)
    clip = mm.HookedMultimodal.from_hf(tiny_hf("clip"))
    inputs = tiny_inputs(clip, (1,))
    with pytest.raises(ValueError, match="only encodes"):
        next(exits_of(clip, Batch.from_inputs(clip, **inputs)))

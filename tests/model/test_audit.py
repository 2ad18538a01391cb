"""The audit finds no dead hook, and finds one that is made dead."""

import dataclasses
import json

import pytest
import torch

from mechmm.model import attention, taps
from mechmm.model.audit import audit
from mechmm.model.batch import Batch
from mechmm.testing import assert_no_hooks, tiny, tiny_inputs

SMALL = {"layers": 1, "vision_layers": 2}


def small_batch(model) -> Batch:
    return Batch.from_inputs(model, **tiny_inputs(model, (1,), 3))


@pytest.mark.parametrize(
    "options",
    [
        {"vision": "clip", "text": "llama", "key_value_heads": 4},
        {"vision": "clip", "text": "qwen2", "key_value_heads": 2},
        {"vision": "siglip", "text": "mistral", "key_value_heads": 1},
        {"vision": "siglip", "text": "llama", "key_value_heads": 2, "select": "full"},
        {"vision": "clip", "text": "llama", "attention": "eager", "vision_feature_layer": [0, -1]},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_hook_is_live_but_those_behind_the_last_vision_layer(options):
    model = tiny(**options)
    found = audit(model, small_batch(model))
    assert found.dead == []
    assert found.unused == ["vision.ln_final.hook_scale", "vision.ln_final.hook_normalized"]
    assert [hook.name for hook in found.hooks] == list(model.hook_dict)
    assert all(hook.fired == 1 for hook in found.hooks)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_hooks_behind_the_layer_that_is_read_are_listed_with_the_reason(vision):
    model = tiny(vision=vision, vision_feature_layer=-2)
    found = audit(model, small_batch(model))
    assert found.dead == []
    last = {name for name in model.hook_dict if name.startswith("vision.blocks.2.")}
    assert set(found.unused) == last | {
        "vision.ln_final.hook_scale",
        "vision.ln_final.hook_normalized",
    }
    assert "projector reads vision layer [-2]" in str(found)
    before = [hook for hook in found.hooks if hook.name == "vision.blocks.1.hook_resid_post"]
    assert before[0].status == "live"


def test_a_hook_whose_edit_is_dropped_is_dead(monkeypatch):
    """The audit can fail: one point fires, and what its hooks return goes nowhere."""
    target = "vision.blocks.1.hook_mlp_out"
    honest = taps.fire

    def forgetful(hook, value, *view, **named):
        if hook.name != target:
            return honest(hook, value)
        honest(hook, value)
        return value

    monkeypatch.setattr(taps, "fire", forgetful)
    model = tiny(**SMALL)
    found = audit(model, small_batch(model))
    assert found.dead == [target]
    assert f"dead: {target} (an edit changes no logit; no gradient reaches it)" in str(found)


def test_a_dropped_pattern_edit_is_not_hidden_by_the_rounding_of_another_path(monkeypatch):
    target = "blocks.0.attn.hook_pattern"
    honest = attention.fire

    def forgetful(hook, value, *view, **named):
        out = honest(hook, value)
        return value if hook.name == target else out

    monkeypatch.setattr(attention, "fire", forgetful)
    model = tiny(**SMALL)
    assert audit(model, small_batch(model)).dead == [target]


def test_a_hook_that_never_fires_and_one_without_gradient_are_dead(monkeypatch):
    honest = taps.fire

    def broken(hook, value, *view, **named):
        if hook.name == "blocks.0.hook_mlp_out":
            return value
        out = honest(hook, value)
        return out.detach() if hook.name == "vision.blocks.1.mlp.hook_post" else out

    monkeypatch.setattr(taps, "fire", broken)
    model = tiny(**SMALL)
    reasons = {hook.name: hook.reason for hook in audit(model, small_batch(model)).hooks}
    assert reasons["blocks.0.hook_mlp_out"] == "it never fired"
    assert reasons["vision.blocks.1.mlp.hook_post"] == "no gradient reaches it"


def test_nothing_is_left_behind():
    model = tiny(**SMALL)
    parameter = model.hf_model.lm_head.weight
    parameter.grad = torch.ones_like(parameter)
    frozen = model.hf_model.get_submodule("model.multi_modal_projector").requires_grad_(False)
    audit(model, small_batch(model))
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    others = [p for p in model.hf_model.parameters() if p is not parameter]
    assert all(p.grad is None for p in others)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert sum(p.requires_grad for p in others) == len(others) - 4
    assert not any(attention.listening(hook) for hook in model.hook_points())
    assert_no_hooks(model.unwrap())


def test_a_frozen_model_is_audited_all_the_same():
    model = tiny(**SMALL)
    model.hf_model.requires_grad_(False)
    assert audit(model, small_batch(model)).dead == []
    assert not any(p.requires_grad for p in model.hf_model.parameters())


def test_no_hook_is_left_after_an_exception(monkeypatch):
    model = tiny(**SMALL)
    batch = small_batch(model)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.hf_model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        audit(model, batch)
    assert not any(attention.listening(hook) for hook in model.hook_points())


def test_the_table_has_a_row_per_hook():
    model = tiny(**SMALL)
    found = audit(model, small_batch(model))
    frame = found.to_dataframe()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(found.hooks[0])]
    assert len(frame) == len(model.hook_dict)
    assert json.loads(json.dumps(found.rows))[0]["name"] == found.hooks[0].name
    shapes = dict(zip(frame["name"], frame["shape"], strict=True))
    assert shapes["vision.blocks.0.attn.hook_pattern"] == (1, 4, 17, 17)
    assert found.table().count("\n") == len(model.hook_dict)
    assert (
        f"{len(frame)} hook points: {len(frame) - 2} live, 2 unused by this model, 0 dead"
        in str(found)
    )


def test_the_same_seed_gives_the_same_audit():
    model = tiny(**SMALL, vision="siglip")
    batch = small_batch(model)
    assert audit(model, batch, seed=3) == audit(model, batch, seed=3)


def test_a_batch_that_cannot_show_anything_is_refused():
    model = tiny(**SMALL)
    with pytest.raises(ValueError, match="the batch has no image"):
        audit(model, model.encode("what color", images=[]))
    empty = Batch.from_inputs(model, input_ids=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="the batch is empty"):
        audit(model, empty)

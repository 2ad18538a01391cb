"""TransformerLens's interchange and its controls work at hooks of a hooked multimodal model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.methods.subspace_interchange import _Case
from mechmm.model.hooked import UnknownHookError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

HOOK = "blocks.2.hook_resid_pre"
"""Further families, which take more time than they tell."""


@pytest.fixture(scope="module")
def pairs(model):
    return shapes.pairs(model, "color", 4, seed=1)


@torch.no_grad()
def by_hand(model, pairs, case, at=HOOK):
    """Logits of a base whose last position holds what the source's does."""
    base, source = pairs[int(case["base"])].corrupt, pairs[int(case["source"])].clean
    batch = model.encode(source.text, source.images)
    _, cache = model.run_with_cache(batch, names_filter=[at])

    def write(value, hook):
        value[:, -1] = cache[at][:, -1]
        return value

    with model.hooks(fwd_hooks=[(at, write)]):
        return last_logits(model, model.encode(base.text, base.images))


def test_moving_everything_is_a_patch_of_the_last_position(model, pairs):
    case = _Case(model, pairs, HOOK, "last", 32)
    half = (np.array([0, 1, 2]), np.array([3, 0, 1]))
    (targets,) = case.targets([half])
    found = case.correct(half, targets, lambda base, source: source)
    for number, (base, source) in enumerate(zip(*half, strict=True)):
        said = by_hand(model, pairs, {"base": base, "source": source})[0, case.ids].argmax()
        assert bool(found[number]) == (case.classes[int(said)] == pairs[int(source)].answer)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics3", "internvl", "blip-2"])
def test_families(family):
    """Of two answers a tiny model says the one whose logit is larger after the interchange."""
    model, pairs = tiny_pairs(family, 4)
    hook, half = "blocks.1.hook_resid_pre", (np.array([0, 1, 2]), np.array([3, 0, 1]))
    pairs = mm.PairDataset(
        [*pairs[:2], *(mm.Pair(p.clean, p.corrupt, p.foil, p.answer) for p in pairs[2:])], model
    )
    case = _Case(model, pairs, hook, "last", 32)
    found = case.correct(half, case.targets([half])[0], lambda base, source: source)
    for number, (base, source) in enumerate(zip(*half, strict=True)):
        said = by_hand(model, pairs, {"base": base, "source": source}, hook)[0, case.ids].argmax()
        assert bool(found[number]) == (case.classes[int(said)] == pairs[int(source)].answer)


@pytest.mark.slow
def test_the_whole_space_leaves_nothing_out(model, pairs, tmp_path):
    width = model.cfg.d_model
    flags = [p.requires_grad for p in model.hf_model.parameters()]
    found = mm.subspace_interchange(model, pairs, HOOK, rank=width, sources=1, epochs=1)
    assert [p.requires_grad for p in model.hf_model.parameters()] == flags
    assert all(p.grad is None for p in model.hf_model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    words = sorted({word for pair in pairs for word in (pair.answer, pair.foil)})
    ids = [model.to_single_token(word) for word in words]
    for number, case in found.cases.iterrows():
        said = by_hand(model, pairs, case)[0, ids].argmax()
        right = ids[int(said)] == model.to_single_token(case["answer"])
        assert bool(found.correct[found.conditions.index("everything"), number]) == right
        # A basis of the whole space leaves nothing out, learned or random.
        for name in ("learned", "random subspace", "placebo"):
            assert bool(found.correct[found.conditions.index(name), number]) == right
    basis = found.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(width), atol=1e-4, rtol=0)
    assert len(found.cases) == len(set(found.cases["base"])) == 2
    assert set(found.cases["source"]) <= set(found.cases["base"])
    assert Result.load(found.save(tmp_path / "subspace")).equals(found)
    assert set(found.plot()) == {"accuracy"}
    assert "best control" in found.page("Interchange").html()


def test_positions_hold_however_prompts_are_padded(model):
    longer = shapes.pairs(model, "where", 2, seed=1)
    both = mm.PairDataset([*shapes.pairs(model, "color", 2, seed=1), *longer], model)
    case = _Case(model, both, HOOK, "last", 32)
    _, cache = model.run_with_cache(next(both.batches(1)).clean, names_filter=[HOOK])
    states = case.states(torch.arange(4).numpy())
    torch.testing.assert_close(states[0], cache[HOOK][0, -1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_demo_model_carries_the_answer_in_a_few_directions():
    demo = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    pairs = shapes.pairs(demo, "color", 32, seed=3)
    found = mm.subspace_interchange(demo, pairs, "blocks.3.hook_resid_pre", rank=8, lr=3e-2)
    accuracy = found.to_dataframe().set_index("condition")["accuracy"]
    assert accuracy["everything"] > 0.95
    assert accuracy["learned"] > accuracy["arbitrary labels"] + 0.2
    assert accuracy["learned"] > accuracy["untrained model"] + 0.2
    assert accuracy[["nothing", "random subspace", "placebo"]].max() < 0.35


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"hook": "blocks.9.hook_resid_pre"}, UnknownHookError, "blocks.9"),
        ({"hook": "blocks.1.attn.hook_z"}, ValueError, "no value"),
        ({"hook": "projector.hook_out", "span": "last"}, ValueError, "needs one"),
        ({"span": "image"}, ValueError, "covers 64 positions"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 9999}, ValueError, "9999"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"train": 0.0}, ValueError, "train=0.0 leaves"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_input_is_refused_first(model, pairs, options, kind, message, monkeypatch):
    def runs(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.hf_model, "forward", runs)
    with pytest.raises(kind, match=message):
        mm.subspace_interchange(model, pairs, **{"hook": HOOK, **options})

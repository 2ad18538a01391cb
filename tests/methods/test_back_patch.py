"""Back-patching equals a second run by hand, and chooses on other pairs than it reports."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import score
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

"""Further families, which take more time than they tell."""


@pytest.fixture(scope="module")
def pairs(model):
    return shapes.pairs(model, "color", 4, seed=1)


@pytest.fixture(scope="module")
def found(model, pairs):
    rest = {"targets": [0, 1], "metric": mm.logit_diff, "n_null": 1}
    return mm.back_patch(model, pairs, windows=(1, 2), **rest)


def by_hand(model, pairs, source, target, window, states=None, span="image"):
    """The metric of a second run with later states written into earlier layers."""
    batch = next(pairs.batches(len(pairs)))
    mask = batch.clean.layout.mask(span)
    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(source, source + window)]
    _, cache = model.run_with_cache(batch.clean, names_filter=hooks)
    kept = {f"blocks.{target + i}.hook_resid_pre": cache[h].clone() for i, h in enumerate(hooks)}

    def write(value, hook):
        value[mask] = kept[hook.name][mask] if states is None else states(kept[hook.name])[mask]
        return value

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, write) for name in kept]):
        return score(model, batch.clean, batch.answers, mm.logit_diff)


def test_cells_equal_a_second_run_by_hand(model, pairs, found):
    for number in (0, 4, len(found.cells) - 1):
        cell = found.cells.iloc[number]
        expected = by_hand(model, pairs, cell["source"], cell["target"], cell["window"])
        torch.testing.assert_close(found.values[number], expected, atol=1e-5, rtol=0)
    assert (found.cells["source"] > found.cells["target"]).all()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics3", "internvl", "blip-2"])
def test_families(family):
    model, pairs = tiny_pairs(family, 4)
    rest = {"metric": mm.logit_diff, "n_null": 1, "batch_size": 3}
    found = mm.back_patch(model, pairs, sources=[1], targets=[0], **rest)
    expected = by_hand(model, pairs, 1, 0, 1)
    torch.testing.assert_close(found.values[0], expected, atol=3e-4, rtol=0)
    assert (found.values[0] - found.base).abs().max() > 1e-4


def test_the_null_takes_states_of_other_pairs_and_other_positions(model, pairs):
    found = mm.back_patch(
        model, pairs, sources=[2], targets=[1], metric=mm.logit_diff, n_null=3, span="image"
    )
    order = {pair: p for pair, p in enumerate(found.null_cells["kind"])}
    own = [i for i, kind in order.items() if kind == "another image"]
    every = [by_hand(model, pairs, 2, 1, 1, lambda s, k=k: s.roll(k, 0)) for k in range(1, 4)]
    # Every draw gives each pair the states of another one, and all draws together all of them.
    ours = found.null[own].sort(0).values
    torch.testing.assert_close(ours, torch.stack(every).sort(0).values, atol=1e-4, rtol=0)
    shuffled = found.null[[i for i, kind in order.items() if kind == "shuffled positions"]]
    assert (shuffled - found.values).abs().max() > 1e-4


def test_the_choice_is_made_on_the_training_pairs_alone(found):
    gains = found.gains()
    assert int(found.train.sum()) == 2
    assert found.best == int(gains[:, found.train].mean(1).argmax())
    table = found.to_dataframe()
    assert table["best"].sum() == 1
    row = table[table["best"]].iloc[0]
    assert row["held_out"] == pytest.approx(float(gains[found.best, ~found.train].mean()), abs=1e-6)
    verdict = found.verdict().set_index("states")
    assert verdict.loc["chosen", "gain"] == pytest.approx(row["held_out"], abs=1e-6)
    assert set(verdict.index) == {"chosen", "another image", "shuffled positions"}


def test_it_is_saved_and_drawn(found, tmp_path):
    assert Result.load(found.save(tmp_path / "back")).equals(found)
    assert set(found.plot()) == {"window 1", "window 2", "held out"}
    assert "held-out" in found.page("Back-patching").html()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sources": [9]}, ValueError, "source 9 is outside"),
        ({"targets": [-1]}, ValueError, "target -1 is outside"),
        ({"sources": [1], "targets": [2]}, ValueError, "no source lies behind"),
        ({"windows": [0]}, ValueError, "window of 0"),
        ({"windows": [9]}, ValueError, "window of 9"),
        ({"train": 1.0}, ValueError, "train=1.0 leaves"),
        ({"n_null": -1}, ValueError, "n_null"),
        ({"span": "thing"}, SpanError, "unknown span"),
        ({"span": "video"}, SpanError, "unknown span"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    model, pairs, options, kind, message, monkeypatch
):
    def runs(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.hf_model, "forward", runs)
    with pytest.raises(kind, match=message):
        mm.back_patch(model, pairs, **options)

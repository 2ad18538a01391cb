"""Pruned image tokens equal keys hidden by hand; attention hardly ranks them on the demo model."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits, score
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def found(demo):
    pairs = shapes.color_pairs(demo, 32, seed=0)
    return mm.pruning_curve(demo, pairs, layer=0, fractions=(0.05, 0.5, 1.0), n_random=2)


def by_hand(model, batch, answers, dropped, layers):
    """The logit difference with keys hidden from every other position, by a hook on each layer."""
    dropped = torch.tensor(sorted(dropped), dtype=torch.long)
    left = [p for p in range(batch.input_ids.shape[1]) if p not in set(dropped.tolist())]

    def hide(scores, hook):
        scores[:, :, torch.tensor(left)[:, None], dropped] = torch.finfo(scores.dtype).min
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in layers]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return float(mm.logit_diff(last_logits(model, batch), answers))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "paligemma", "internvl"])
def test_cells_equal_keys_hidden_by_hand(family):
    model, pairs = tiny_pairs(family, 2)
    found = mm.pruning_curve(
        model, pairs, layer=0, fractions=(0.5, 1.0), metric=mm.logit_diff, n_random=1
    )
    later = range(1, model.cfg.n_layers)
    for number in range(2):
        one = pairs.batch([number])
        pattern = model.run_with_cache(one.clean)[1]["blocks.0.attn.hook_pattern"]
        last, image = int(one.clean.layout.last[0]), one.clean.layout.positions("image")
        ranked = sorted(image, key=lambda p: -float(pattern[0, :, last, p].mean()))
        size = int(found.kept[0, number])
        assert size == round(len(image) / 2)
        for values, order in ((found.most, ranked), (found.least, ranked[::-1])):
            wanted = by_hand(model, one.clean, one.answers, order[size:], later)
            assert float(values[0, number]) == pytest.approx(wanted, abs=3e-4)
        whole = [float(v[1, number]) for v in (found.most, found.least, found.random[:, 0])]
        assert whole == pytest.approx([float(found.base[number])] * 3, abs=1e-4)


def test_answers_of_several_tokens_do_not_read_what_was_dropped(demo):
    pairs = [
        mm.Pair(p.clean, p.corrupt, f"{p.answer} circle", f"{p.foil} circle")
        for p in shapes.color_pairs(demo, 1, seed=1)
    ]
    longer = mm.PairDataset(pairs, demo)
    found = mm.pruning_curve(
        demo, longer, layer=0, fractions=(0.02,), metric=mm.logit_diff, n_random=1
    )
    one = longer.batch([0])
    image, last = one.clean.layout.positions("image"), int(one.clean.layout.last[0])
    pattern = demo.run_with_cache(one.clean)[1]["blocks.0.attn.hook_pattern"]
    best = max(image, key=lambda p: float(pattern[0, :, last, p].mean()))
    dropped = torch.tensor([p for p in image if p != best])

    def hide(scores, hook):
        scores[:, :, last:, dropped] = -torch.inf
        scores[:, :, best, dropped] = torch.finfo(scores.dtype).min
        rest = torch.arange(max(image) + 1, last)
        scores[:, :, rest[:, None], dropped] = -torch.inf
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(1, 6)]
    with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
        wanted = float(score(demo, one.clean, one.answers, mm.logit_diff))
    assert int(found.kept[0, 0]) == 1
    assert float(found.most[0, 0]) == pytest.approx(wanted, abs=3e-4)


def test_dropping_more_never_reads_what_was_dropped(demo):
    """With one token kept behind layer 0, what the dropped ones become cannot matter."""
    pairs = shapes.color_pairs(demo, 2, seed=1)
    one = pairs.batch([0])
    image = one.clean.layout.positions("image")
    later = range(1, demo.cfg.n_layers)
    plain = by_hand(demo, one.clean, one.answers, image[1:], later)

    def noise(x, hook):
        x[:, image[1:]] += 10
        return x

    with demo.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", noise)]):
        other = by_hand(demo, one.clean, one.answers, image[1:], later)
    assert other == pytest.approx(plain, abs=1e-4)


def test_half_of_the_tokens_are_as_good_by_attention_as_by_chance(found):
    table = found.to_dataframe().set_index(["keep", "share"])["value"]
    assert table["most attended", 1.0] >= 0.95
    assert table["most attended", 0.05] <= 0.75
    assert abs(table["most attended", 0.5] - table["random", 0.5]) <= 0.15


def test_the_picture_is_in_the_words_behind_the_second_layer(demo):
    pairs = shapes.color_pairs(demo, 16, seed=0)
    found = mm.pruning_curve(demo, pairs, layer=1, fractions=(0.02,), n_random=1)
    assert min(float(v.mean()) for v in (found.most, found.least, found.random)) >= 0.9


def test_results_are_stored_and_shown(found, tmp_path):
    again = Result.load(found.save(tmp_path / "found"))
    assert torch.equal(again.random, found.random)
    assert set(found.plot()) == {"most", "least"}
    assert "5 % of them kept" in again.summary()
    assert "least attended" in again.page("pruning").html()


def test_bad_input_is_refused(demo):
    pairs = shapes.color_pairs(demo, 2, seed=0)
    for fractions in ((), (0.0,), (1.5,), (0.5, 0.5)):
        with pytest.raises(ValueError, match="fractions are"):
            mm.pruning_curve(demo, pairs, layer=0, fractions=fractions)
    with pytest.raises(ValueError, match="no layer behind layer 5"):
        mm.pruning_curve(demo, pairs, layer=5)
    with pytest.raises(ValueError, match="99"):
        mm.pruning_curve(demo, pairs, layer=99)
    with pytest.raises(ValueError, match="n_random"):
        mm.pruning_curve(demo, pairs, layer=0, n_random=0)
    words = [mm.Prompt(f"what color is the {shape} ? answer :") for shape in ("circle", "square")]
    text = mm.PairDataset([mm.Pair(words[0], words[1], "red", "blue")], demo)
    with pytest.raises(SpanError, match="no image tokens"):
        mm.pruning_curve(demo, text, layer=0)

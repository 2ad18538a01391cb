"""Contrastive decoding follows its formula at every step; signals are judged as in scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import mechmm as mm
from mechmm.data import corruption, shapes
from mechmm.data.metrics import continued, last_logits
from mechmm.methods.hallucination import Hallucination, outcome
from mechmm.model.batch import InputError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs

UNSEEN = corruption.on_images(corruption.blur, radius=10)


"""Further families, which take more time than they tell."""


@pytest.fixture(scope="module")
def dim(demo):
    """Pictures that contradict expectation, hard to see."""
    blurred = corruption.on_images(corruption.blur, radius=2.5)
    asked = shapes.prior_pairs(demo, 48, seed=0)
    return mm.PairDataset([replace(pair, clean=blurred(pair.clean)) for pair in asked], demo)


@pytest.fixture(scope="module")
def found(demo, dim):
    options = {"spans": ("object", "image"), "beta": 1e-3, "scale": 8.0, "n_random": 2}
    return mm.hallucination(demo, dim, UNSEEN, **options)


def test_contrast_is_its_formula():
    p, q = torch.randn(2, 3, 20).unbind()
    alone = mm.contrasted(p, q, alpha=0.0, beta=0.0)
    torch.testing.assert_close(alone, p.log_softmax(-1))
    found, share = mm.contrasted(p, q, 1.5, 0.2), p.softmax(-1)
    kept = share >= 0.2 * share.amax(-1, keepdim=True)
    assert (found[~kept] == -torch.inf).all()
    wanted = 2.5 * share.log() - 1.5 * q.log_softmax(-1)
    torch.testing.assert_close(found[kept], wanted[kept])


@pytest.mark.parametrize("family", ["llava", "gemma3", "llava_next", "idefics3", "aya_vision"])
def test_generation_contrasts_every_step(family):
    model, pairs = tiny_pairs(family, 2)
    batch = next(pairs.batches(2))
    decoding = mm.ContrastiveDecoding(model, batch.clean, batch.corrupt, alpha=2.0, beta=0.0)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    made = model.generate(batch.clean, logits_processor=[decoding], **options)
    for step in range(3):
        with torch.no_grad():
            p, q = (
                last_logits(model, continued(prompts, made[:, :step]))
                for prompts in (batch.clean, batch.corrupt)
            )
        assert mm.contrasted(p, q, 2.0, 0.0).argmax(-1).tolist() == made[:, step].tolist()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics3", "internvl", "blip-2"])
def test_signals_equal_those_of_single_runs(family):
    model, pairs = tiny_pairs(family, 3)
    found = mm.hallucination(model, pairs, UNSEEN, batch_size=2)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]
    unseen = corruption.corrupt(pairs, UNSEEN)
    for number in range(3):
        batch, other = (some.batch([number]) for some in (pairs, unseen))
        layout = batch.clean.layout
        with torch.no_grad():
            p, q = (last_logits(model, b).log_softmax(-1)[0] for b in (batch.clean, other.corrupt))
            cache = model.run_with_cache(batch.clean, names_filter=names)[1]
        image, last = layout.positions("image", 0), int(layout.last[0])
        looks = torch.stack([cache[n][0, :, last, image].sum(-1).mean() for n in names]).mean()
        wanted = {"doubt": 1 - p.max().exp(), "blindness": -(p.exp() * (p - q)).sum()}
        for name, value in {**wanted, "inattention to image": -looks}.items():
            own = found.signals[found.names.index(name), number]
            assert float(own) == pytest.approx(float(value), abs=1e-4)


def test_both_interventions_mend_prior_driven_errors_and_looking_elsewhere_does_not(found):
    table = found.to_dataframe().set_index("way")
    plain = table.loc["plain", "foil"]
    assert plain > 0.25
    assert table.loc["contrast", "change_high"] < -0.05
    assert table.loc["attention to object x 8", "change_high"] < -0.1
    assert abs(table.loc["attention elsewhere x 8", "change"]) < 0.05
    assert table["control"].sum() == 2 * 2
    ranges = found.ranges().set_index("way")
    assert ranges["draws"].tolist() == [2, 2]
    assert ranges.loc["attention to object x 8", "change"] < -0.1
    assert ranges.loc["attention to object x 8", "control_low"] > -0.05
    # Contrast takes away what is expected after the text, so that any picture does.
    assert ranges.loc["contrast", "control_high"] < -0.05
    assert np.allclose(table[["right", "foil", "other"]].sum(axis=1), 1)


def test_the_picture_tells_errors_better_than_confidence_does(found):
    signals = found.predictors().set_index("signal")
    assert signals.loc["blindness", "gain_low"] > 0
    assert signals.loc["inattention to object", "auroc"] > signals.loc["doubt", "auroc"]
    wrong = (found.said[0] != 0).numpy()
    for name, values in zip(found.names, found.signals, strict=True):
        assert signals.loc[name, "auroc"] == pytest.approx(roc_auc_score(wrong, values.numpy()))
    assert (signals["null_low"] < 0.5).all()
    assert (signals["null_high"] > 0.5).all()


def test_saved_is_loaded_and_figures_show_the_numbers(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    figures = found.plot()
    shares, ranges = found.to_dataframe().set_index("way")["foil"], found.ranges()
    plain, contrast, other, looked, elsewhere = figures["errors"].data[0].x
    names = ["plain", "contrast", "attention to object x 8"]
    assert [plain, contrast, looked] == pytest.approx(shares[names].tolist())
    assert [other, elsewhere] == pytest.approx((plain + ranges["control_mean"]).tolist())
    ends = figures["errors"].data[0].error_x
    assert other - ends.arrayminus[2] == pytest.approx(plain + ranges["control_low"][0])
    assert other + ends.array[2] == pytest.approx(plain + ranges["control_high"][0])
    assert "its control by" in found.summary()
    assert "Best predictor of errors" in found.page("Hallucination").html()


def test_draws_of_controls_are_those_of_single_ones():
    """The first draw is the only one of a run with one; the n-th contrasts with the n-th next
    pair's picture."""
    model, pairs = tiny_pairs("llava", 4)
    found = mm.hallucination(model, pairs, UNSEEN, n_random=5, batch_size=3)
    assert len(found.ways) == 1 + (1 + 3) + (1 + 5)  # there are three other pairs
    one = mm.hallucination(model, pairs, UNSEEN, n_random=1)
    assert len(one.ways) == 5
    assert torch.equal(one.said, found.said[[found.ways.index(way) for way in one.ways]])
    unseen = corruption.corrupt(pairs, UNSEEN)
    for number in range(4):
        batch = pairs.batch([number])
        other = unseen.batch([(number + 3) % 4])  # all texts are alike
        with torch.no_grad():
            p, r = last_logits(model, batch.clean), last_logits(model, other.corrupt)
        said = outcome(mm.contrasted(p, r), batch.answers)
        assert said == found.said[found.ways.index("contrast, another picture, draw 3"), number]


def test_bad_input_is_refused(demo, dim):
    with pytest.raises(ValueError, match="alpha is 0 or more"):
        mm.hallucination(demo, dim, UNSEEN, alpha=-1)
    with pytest.raises(ValueError, match="beta a share"):
        mm.contrasted(torch.zeros(1, 2), torch.zeros(1, 2), beta=2)
    with pytest.raises(ValueError, match="n_random is 0"):
        mm.hallucination(demo, dim, UNSEEN, n_random=0)
    with pytest.raises(ValueError, match="one pair has no other"):
        mm.hallucination(demo, dim[:1], UNSEEN)
    one, other = (next(dim[i : i + 1].batches(1)).clean for i in (0, 4))
    if one.input_ids.tolist() != other.input_ids.tolist():
        with pytest.raises(InputError, match="other texts than those generated from"):
            mm.ContrastiveDecoding(demo, one, other)
    right = Hallucination(torch.zeros(1, 3).long(), ("plain",), (), torch.zeros(1, 3), ("doubt",))
    with pytest.raises(ValueError, match="all 3 plain answers are right"):
        right.predictors()


def test_a_model_that_never_errs_has_a_report_all_the_same(demo):
    found = mm.hallucination(demo, shapes.prior_pairs(demo, 3, seed=0), UNSEEN)
    assert (found.said[0] == 0).all()
    assert set(found.plot()) == {"errors"}
    assert "no signal can tell" in found.page("Hallucination").html()

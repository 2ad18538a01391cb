"""Probes find what is there, permuted labels do not, and what is erased is gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.pairs import PairDataset
from mechmm.engine.states import means
from mechmm.methods.probe import Erase, _erasing
from mechmm.model.batch import Batch
from mechmm.model.hooked import UnknownHookError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny, tiny_inputs

QUICK = {"folds": 3, "n_permuted": 5, "n_random": 3}


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 30, seed=0)


@pytest.fixture(scope="module")
def found(demo, pairs):
    sites = mm.sites.residual(demo, ["last"], layers=[0, 5], towers=["language"])
    return mm.probe(demo, pairs, "answer", sites, folds=3, n_random=5)


def test_the_color_asked_for_is_read_and_used(found):
    """At the last token: nothing before the first block, all of it before the last one."""
    table = found.to_dataframe()
    first, last = table.iloc[0], table.iloc[1]
    assert abs(first["accuracy"] - 1 / len(found.classes)) < 0.1
    assert last["accuracy"] >= 0.9
    assert abs(last["permuted"] - 1 / len(found.classes)) < 0.05
    assert last["permuted_high"] < 0.5
    assert last["untrained"] < last["accuracy"] - 0.2
    assert first["change"] == pytest.approx(0, abs=1e-4)
    assert last["change_high"] < min(3 * last["random_low"], last["shuffled_low"]) < 0
    assert found.permuted.shape == (2, 20, 60)


def test_it_is_saved_and_shown(found, tmp_path):
    assert Result.load(found.save(tmp_path / "probe")).equals(found)
    assert set(found.plot()) == {"accuracy", "erased"}
    assert "Best: " in found.page("A probe").html()
    assert "untrained" in found.summary()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "idefics3", "clip"])
def test_the_last_token_is_read_from_its_embedding(family):
    """Planted: which of two words a text ends with, which the first stream has and a label of
    coins has not."""
    model = tiny(family)
    inputs = [tiny_inputs(model, (1,) * 8, words=3, seed=seed) for seed in range(3)]
    rng, labels, batches = np.random.default_rng(0), [], []
    for one in inputs:
        ids = one["input_ids"]
        words = torch.as_tensor(rng.choice(ids[0, -3:-1].tolist(), len(ids)))
        ids[:, -2] = words if family == "clip" else ids[:, -2]
        ids[:, -1] = ids[:, -1] if family == "clip" else words
        labels += words.tolist()
        batches.append(Batch.from_inputs(model, **one))
    place, tower = (-2, "text") if family == "clip" else (-1, "language")
    sites = mm.sites.residual(model, positions=[place], layers=[0], towers=[tower])
    few = {"erase": False, "untrained": False, **QUICK}
    assert float(mm.probe(model, batches, labels, sites, **few).accuracy()) > 0.9
    coins = rng.integers(2, size=len(labels))
    assert float(mm.probe(model, batches, coins, sites, **few).accuracy()) < 0.8


def test_erasing_makes_all_class_means_one():
    random = torch.Generator().manual_seed(0)
    y = np.arange(60) % 4
    x = torch.randn(60, 12, generator=random) + 3 * torch.eye(12)[y]
    erase = _erasing(x, y)
    gone = erase(x)
    for k in range(4):
        torch.testing.assert_close(gone[y == k].mean(0), x.mean(0), atol=1e-5, rtol=0)
    away = torch.nn.functional.normalize(torch.randn(12, generator=random), dim=0)
    shifted = Erase(erase.mean, erase.basis, away)(x)
    torch.testing.assert_close((shifted - x).norm(dim=-1), (gone - x).norm(dim=-1))


def test_directions_are_in_units_of_the_state(demo, pairs, found):
    """Class scores of the direction alone rank as the probe does."""
    site = mm.sites.residual(demo, ["last"], layers=[5], towers=["language"])
    (x,) = means(demo, pairs, site, sides=("clean", "corrupt"))
    scores = (x - x.mean(0)) @ found.directions[1].T
    said = np.array(found.classes)[scores.argmax(-1).numpy()]
    assert (said == np.array(found.labels)).mean() > 0.9


def test_twins_stay_in_one_fold(demo, pairs):
    """A label that only the pair tells: a probe that had seen the twin would know it."""
    labels = [[str(i % 7)] * 2 for i in np.random.default_rng(1).permutation(len(pairs))]
    sites = mm.sites.residual(demo, ["object"], layers=[0], towers=["vision"])
    few = {"erase": False, "untrained": False, **QUICK}
    assert float(mm.probe(demo, pairs, labels, sites, **few).accuracy()) < 0.45


def test_what_cannot_be_probed(demo, pairs):
    sites = mm.sites.residual(demo, ["last"], layers=[5], towers=["language"])
    batches = [batch.clean for batch in pairs[:6].batches(6)]
    with pytest.raises(ValueError, match="all labels are 'red'; a probe needs two classes"):
        mm.probe(demo, pairs, ["red"] * len(pairs), sites)
    with pytest.raises(ValueError, match="3 examples or pairs cannot be dealt out to 5 folds"):
        mm.probe(demo, pairs[:3], "answer", sites)
    with pytest.raises(ValueError, match=r"labels of shape \[4\] for 30 examples"):
        mm.probe(demo, pairs, list("abcd"), sites)
    with pytest.raises(ValueError, match="batches have no answers to lose"):
        mm.probe(demo, batches, list("aabbab"), sites)
    with pytest.raises(ValueError, match=r"without fold . all labels are 'a'"):
        mm.probe(demo, batches, list("aaaaab"), sites, erase=False)
    with pytest.raises(ValueError, match="pair 0 has no label 'size'"):
        mm.probe(demo, pairs, "size", sites)
    with pytest.raises(ValueError, match="'answer' is looked up in pairs"):
        mm.probe(demo, batches, "answer", sites, erase=False)
    with pytest.raises(ValueError, match="n_permuted is 0"):
        mm.probe(demo, pairs, "answer", sites, n_permuted=0)
    nowhere = mm.sites.residual(demo, ["cat"], layers=[5], towers=["language"])
    with pytest.raises(SpanError, match="unknown span 'cat'"):
        mm.probe(demo, pairs, "answer", nowhere)
    outside = mm.sites.residual(demo, positions=[500], layers=[5], towers=["language"])
    with pytest.raises(ValueError, match="position 500 is outside"):
        mm.probe(demo, pairs, "answer", outside)
    table = sites.table.assign(hook="blocks.9.hook_resid_pre")
    with pytest.raises(UnknownHookError, match=r"unknown hook 'blocks\.9"):
        mm.probe(demo, pairs, "answer", type(sites)(table))


def test_a_span_that_some_pair_lacks(demo, pairs):
    bare = replace(pairs[2], spans={})
    sites = mm.sites.residual(demo, ["object"], layers=[1], towers=["vision"])
    lacking = PairDataset([*pairs.pairs[:2], bare, *pairs.pairs[3:6]], demo)
    with pytest.raises(SpanError, match="example 2 has no position in span 'object'"):
        mm.probe(demo, lacking, "answer", sites, **QUICK)

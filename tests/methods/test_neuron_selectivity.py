"""Firing rates and entropies are those counted by hand; shuffled groups leave nothing selective."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.methods.neuron_selectivity import entropies
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def same(demo):
    return shapes.pairs(demo, "same", 12, seed=0)


@pytest.fixture(scope="module")
def found(demo, same):
    return mm.neuron_selectivity(demo, same, n_shuffled=8)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3", "internvl"])
def test_it_is_what_is_counted_by_hand(family):
    model, pairs = tiny_pairs(family, 3)
    found = mm.neuron_selectivity(model, pairs, threshold=0.01, batch_size=2)
    for number in range(3):
        batch = pairs.batch([number]).clean
        names = [f"blocks.{layer}.mlp.hook_pre" for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(batch, names_filter=names)
        value = torch.cat([cache[name][0] for name in names], dim=1)
        for group, span in enumerate(("image", "text")):
            places = list(batch.layout.positions(span, 0))
            count = (value[places] > 0.01).sum(0).float()
            assert torch.equal(found.fired[number, group], count)
            assert found.positions[number, group] == len(places)
    rates = found.fired.sum(0) / found.positions.sum(0)[:, None]
    for neuron in range(5):
        shares = (rates[:, neuron] / rates[:, neuron].sum()).tolist()
        expected = -sum(p * math.log(p) for p in shares if p > 0)
        own = found.entropy()[neuron].item()
        assert math.isnan(own) if math.isnan(shares[0]) else own == pytest.approx(expected)


PROJECTORS = ("llava", "qwen2_vl", "glm4v", "idefics2")


@pytest.mark.parametrize(
    ("family", "tower"), [*((family, "projector") for family in PROJECTORS), ("llava", "vision")]
)
def test_towers_of_pictures_are_counted_by_hand(family, tower):
    """Every token of a projector, and every patch of a tower, stands for a part of a picture."""
    model, pairs = tiny_pairs(family, 3)
    asked = {"spans": ["image"], "domains": ["a", "b", "a"], "threshold": 0.01, "n_shuffled": 2}
    found = mm.neuron_selectivity(model, pairs, tower=tower, **asked)
    layers = range(model.towers["vision"].cfg.n_layers)
    names = [f"vision.blocks.{layer}.mlp.hook_pre" for layer in layers]
    names = ["projector.hook_pre"] if tower == "projector" else names
    for number, group in enumerate((0, 1, 0)):
        _, cache = model.run_with_cache(pairs.batch([number]).clean, names_filter=names)
        value = torch.cat([cache[name] for name in names], dim=-1)
        value = value[:, 1:] if tower == "vision" else value  # the class token is no patch
        count = (value > 0.01).sum((0, 1)).float()
        assert torch.equal(found.fired[number, group], count)
        assert found.positions[number, group] == value.shape[:2].numel()
        assert found.positions[number, 1 - group] == 0
    assert len(found.neurons) == found.fired.shape[-1]
    assert found.tower == tower


def test_projectors_whose_neurons_say_nothing_alone_are_refused():
    for family, message in (("aya_vision", "values and gates in one"), ("gemma3", "hidden layer")):
        model, pairs = tiny_pairs(family, 2)
        with pytest.raises(ValueError, match=message):
            mm.neuron_selectivity(model, pairs, tower="projector", domains=["a", "b"])


def test_layers_with_experts_are_left_out():
    """They have as many hidden units as experts let through, other ones at every position."""
    model, pairs = tiny_pairs("qwen3_vl_moe", 4)
    experts = [
        layer
        for layer in range(model.cfg.n_layers)
        if not any(f"blocks.{layer}.mlp.hook_post" == name for name in model.hook_dict)
    ]
    assert experts
    found = mm.neuron_selectivity(model, pairs, n_shuffled=2)
    scored = mm.neuron_attribution(model, pairs, top=2, n_random=1)
    for table in (found.neurons, scored.neurons):
        assert not set(table["layer"]) & set(experts)
        assert len(table)


def test_entropy_of_known_rates():
    rates = torch.tensor([[0.4, 0.4, 0.0, 0.0], [0.4, 0.0, 0.1, 0.0]])
    found = entropies(rates)
    torch.testing.assert_close(found[:3], torch.tensor([math.log(2), 0.0, 0.0]))
    assert found[3].isnan()


def test_neurons_of_the_demo_are_selective_and_shuffles_leave_none(found):
    table = found.to_dataframe()
    counts = table[table["selective"]]["group"].value_counts()
    assert counts["image"] > 50
    assert counts["text"] > 50
    assert found.by_chance().max() < 0.1 * counts.sum()


def test_domains_are_groups_of_examples(demo):
    """Real digits and drawn scenes; the null deals the domains out to whole examples."""
    seen = [*shapes.pairs(demo, "digit", 4, seed=0), *shapes.pairs(demo, "color", 4, seed=0)]
    pairs, names = mm.PairDataset(seen, demo), ["digit"] * 4 + ["color"] * 4
    found = mm.neuron_selectivity(
        demo, pairs, spans=("image",), domains=names, layers=[1], batch_size=3, n_shuffled=6
    )
    assert found.spans == ("color", "digit")
    apart = [mm.neuron_selectivity(demo, pairs[i : i + 4], layers=[1]) for i in (4, 0)]
    rates = torch.stack([own.rates()[0] for own in apart])
    torch.testing.assert_close(found.rates(), rates)
    assert (found.positions[:4, 0] == 0).all()
    assert (found.positions[4:, 1] == 0).all()
    assert found.null.shape == (6, 352)
    per_example = found.fired.sum(1)
    splits = [list(own) for own in combinations(range(8), 4)]
    rest = [[i for i in range(8) if i not in own] for own in splits]
    sums = torch.stack(
        [
            torch.stack([per_example[a].sum(0), per_example[b].sum(0)])
            for a, b in zip(splits, rest, strict=True)
        ]
    )
    every = entropies(sums / (4 * 64))
    near = (found.null[:, None].nan_to_num(-1) - every.nan_to_num(-1)).abs().amax(-1).amin(1)
    assert near.max() < 1e-4
    assert set(found.plot()) >= {"selective"}


def test_overlapping_groups_are_refused(demo, same):
    with pytest.raises(ValueError, match="two of the spans"):
        mm.neuron_selectivity(demo, same, spans=("image", "all"))


def test_a_shuffle_keeps_how_often_a_neuron_fires(demo, same):
    """Entropies of shuffles are near those of equal rates where neurons fire often."""
    found = mm.neuron_selectivity(demo, same, n_shuffled=4, layers=[2])
    often = found.rates().amin(0) > 0.2
    assert often.sum() > 20
    assert found.null[:, often].min() > 0.97 * math.log(2)
    assert set(found.neurons["layer"]) == {2}


def test_saved_is_loaded_and_figures_show_the_numbers(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    figures = found.plot()
    chosen = found.to_dataframe().query("selective")["group"]
    expected = [(chosen == span).sum() for span in ("image", "text")]
    assert list(figures["selective"].data[0].x) == expected
    groups = found.groups()
    assert groups["share"].sum() * 352 == pytest.approx(sum(expected))
    assert "2112 neurons" in found.summary()
    found.page("Neurons")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": ("image",)}, "two or more"),
        ({"spans": ("image", "image")}, "different"),
        ({"domains": ["a"]}, "1 domains for"),
        ({"domains": ["a"] * 12}, "all examples are of the domain 'a'"),
        ({"n_shuffled": 1}, "2 or more"),
        ({"tower": "audio"}, "unknown tower"),
        ({"tower": "projector", "layers": [0]}, "the projector has one"),
        ({"layers": [9]}, "layers 0..5"),
        ({"most": 0.0}, "most is"),
        ({"most": 1.0}, "most is"),
    ],
)
def test_bad_input_is_refused(demo, same, options, message):
    with pytest.raises(ValueError, match=message):
        mm.neuron_selectivity(demo, same, **options)


def test_a_span_that_is_not_there_is_refused(demo, same):
    with pytest.raises(SpanError, match="nowhere"):
        mm.neuron_selectivity(demo, same, spans=("image", "nowhere"))

"""Steered runs are full runs with a hook that adds, and random pushes are as long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import corruption, shapes
from mechmm.data.metrics import last_logits
from mechmm.engine.checks import SiteError
from mechmm.engine.routes import RouteError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def colors(demo):
    return shapes.color_pairs(demo, 40, seed=2)


def at_last(model, layer, point="resid_pre"):
    return mm.sites.residual(model, ("last",), towers=["language"], layers=[layer], point=point)


@pytest.fixture(scope="module")
def steered(demo, colors):
    return mm.steering(demo, colors, at_last(demo, 4), scales=(0.0, 1.0), n_random=3, seed=1)


def test_a_color_is_steered_and_random_directions_steer_nothing(steered):
    table = steered.to_dataframe().set_index("scale")
    assert table.loc[0.0, ["value", "random_high"]].tolist() == [0, 0]
    assert table.loc[1.0, "value"] >= 0.95
    assert table.loc[1.0, "random_high"] <= 0.1
    assert table.loc[1.0, "norm"] > 0


def test_saved_is_loaded_and_figures_show_the_numbers(steered, tmp_path):
    assert Result.load(steered.save(tmp_path / "steered")).equals(steered)
    (figure,) = steered.plot().values()
    assert list(figure.data[0].x) == pytest.approx(steered.values.mean(1).tolist())
    assert "scale 1" in steered.summary()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "idefics3", "internvl"])
def test_it_is_a_full_run_with_the_direction_added(family):
    model, pairs = tiny_pairs(family, 4)
    found = mm.steering(model, pairs, at_last(model, 1), metric=mm.logit_diff, n_random=1)
    chosen = np.random.default_rng(0).permutation(4)
    fit, rest = chosen[:2], np.sort(chosen[2:])
    states = {"clean": [], "corrupt": []}
    for side, kept in states.items():
        for number in fit:
            batch = getattr(pairs.batch([int(number)]), side)
            hook = "blocks.1.hook_resid_pre"
            _, cache = model.run_with_cache(batch, names_filter=hook)
            kept.append(cache[hook][0, batch.layout.last[0]])
    direction = torch.stack(states["corrupt"]).mean(0) - torch.stack(states["clean"]).mean(0)
    for column, number in enumerate(rest):
        batch = pairs.batch([int(number)])
        last = batch.clean.layout.last[0]

        def push(value, hook, last=last):
            value[:, last] += direction
            return value

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", push)]):
            wanted = mm.logit_diff(last_logits(model, batch.clean), batch.answers)
        assert float(found.values[0, column]) == pytest.approx(float(wanted), abs=2e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "paligemma", "internvl"])
def test_raised_attention_multiplies_weights_before_they_are_normalised(family):
    model, pairs = tiny_pairs(family, 2)
    found = mm.attention_steering(
        model, pairs, "image->last", scales=(3.0,), layers=[1], metric=mm.logit_diff, n_random=1
    )
    for number in range(2):
        batch = pairs.batch([number]).clean
        last, image = batch.layout.last[0], batch.layout.mask("image")[0]

        def raised(pattern, hook, last=last, image=image):
            row = pattern[:, :, last]
            row = torch.where(image.to(row.device), 3 * row, row)
            pattern[:, :, last] = row / row.sum(-1, keepdim=True)
            return pattern

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", raised)]):
            wanted = mm.logit_diff(last_logits(model, batch), pairs.batch([number]).answers)
        assert float(found.values[0, number]) == pytest.approx(float(wanted), abs=2e-4)


def test_looking_at_the_object_mends_what_language_expects(demo):
    asked = shapes.prior_pairs(demo, 32, seed=0)
    blurred = corruption.on_images(corruption.blur, radius=2.5)
    dim = mm.PairDataset([replace(p, clean=blurred(p.clean)) for p in asked], demo)
    table = mm.attention_steering(demo, dim, "object->last", scales=(1.0, 16.0)).to_dataframe()
    same, more = table["value"]
    assert same == table["base"].iloc[0]
    assert more < 0.5 * same
    assert table["random_low"].iloc[1] >= 0.8 * same


def test_bad_input_is_refused(demo, colors):
    site = at_last(demo, 4)
    with pytest.raises(ValueError, match="scales are"):
        mm.steering(demo, colors, site, scales=())
    with pytest.raises(ValueError, match="leaves 40 of 40 pairs"):
        mm.steering(demo, colors, site, train=1.0)
    with pytest.raises(ValueError, match="no training pair has the answer or foil"):
        mm.steering(demo, colors[:3], site)
    with pytest.raises(ValueError, match="part of a component"):
        mm.steering(demo, colors, mm.sites.heads(demo, layers=[0]))
    with pytest.raises(SiteError, match="empty"):
        mm.steering(demo, colors, mm.sites.residual(demo, ()))
    with pytest.raises(RouteError, match="is no route"):
        mm.attention_steering(demo, colors, "image")
    with pytest.raises(SpanError, match="unknown span 'bus'"):
        mm.attention_steering(demo, colors, "bus->last")
    with pytest.raises(ValueError, match="numbers above 0"):
        mm.attention_steering(demo, colors, "image->last", scales=(0.0,))

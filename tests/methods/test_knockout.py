"""Knockout equals plain hooks on scores, and tells what the demo model does not see."""

from __future__ import annotations

from html import unescape

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import score
from mechmm.engine.routes import RouteError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result, concat


@pytest.fixture(scope="module")
def colors(demo):
    return shapes.color_pairs(demo, 4, seed=3)


@pytest.fixture(scope="module")
def found(demo, colors):
    return mm.knockout(demo, colors, ["object->last", "distractor->last"], window=4, n_null=1)


def by_hand(model, pairs, query_span, key_span, layers):
    """The metric with -inf written into the scores by a hook on each layer."""
    batch = next(pairs.batches(len(pairs)))
    layout = batch.clean.layout
    hide = layout.mask(query_span)[:, :, None] & layout.mask(key_span)[:, None, :]

    def close(scores, hook):
        scores[hide[:, None].expand_as(scores)] = -torch.inf
        return scores

    hooks = [(f"blocks.{i}.attn.hook_attn_scores", close) for i in layers]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return score(model, batch.clean, batch.answers, mm.logit_diff)


def test_cells_equal_hooks_by_hand(demo, colors, found):
    for number, cell in found.cells.iterrows():
        source = cell["route"].split("->")[0]
        layers = range(cell["first"], cell["last"] + 1)
        expected = by_hand(demo, colors, "last", source, layers)
        torch.testing.assert_close(found.values[number], expected, atol=2e-4, rtol=0)
    assert found.cells["first"].tolist() == [0, 1, 2] * 2


def test_several_routes_close_together(demo, colors):
    batch = next(colors.batches(4))
    route = "image->last + object->question - last"
    with torch.no_grad(), demo.hooks(fwd_hooks=mm.knockout_hooks(demo, batch.clean, route)):
        expected = score(demo, batch.clean, batch.answers, mm.logit_diff)
    values = mm.knockout(demo, colors, route, n_null=0).values
    torch.testing.assert_close(values[0], expected, atol=2e-4, rtol=0)


def test_answers_of_several_tokens_read_as_the_last_position(demo):
    pairs = shapes.color_pairs(demo, 2, seed=1)
    longer = mm.PairDataset(
        [
            mm.Pair(p.clean, p.corrupt, f"{p.answer} circle", f"{p.foil} circle", p.spans)
            for p in pairs
        ],
        demo,
    )
    batch = next(longer.batches(2))
    with torch.no_grad(), demo.hooks(fwd_hooks=mm.knockout_hooks(demo, batch.clean, "image->last")):
        expected = score(demo, batch.clean, batch.answers, mm.logit_diff)
    values = mm.knockout(demo, longer, "image->last", n_null=0).values[0]
    torch.testing.assert_close(values, expected, atol=2e-4, rtol=0)


def test_without_its_routes_from_the_picture_the_model_cannot_tell_pictures_apart(demo):
    pairs = shapes.pairs(demo, "where", 8, seed=3)
    both = mm.knockout(demo, pairs, "image->question", n_null=0)
    batch = next(pairs.batches(8))
    hooks = mm.knockout_hooks(demo, batch.corrupt, "image->question")
    with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
        corrupt = score(demo, batch.corrupt, batch.answers, mm.logit_diff)
    torch.testing.assert_close(both.values[0], corrupt, atol=1e-3, rtol=0)
    routes = ["image->question", "object->question", "distractor->last", "distractor->question"]
    seen = mm.knockout(demo, pairs, routes, metric=mm.accuracy, n_null=1).to_dataframe()
    value = seen.set_index("route")["value"]
    assert value["image->question"] <= 0.25  # at random 1 of 16 cells
    assert value["object->question"] <= 0.25
    assert value["distractor->last"] == value["distractor->question"] == 1
    row = seen.set_index("route").loc["object->question"]
    assert row["null_high"] < 0.2 < row["low"]


def test_direct_and_mediated_ways_are_told_apart(demo):
    pairs = shapes.pairs(demo, "where", 3, seed=3)
    found = mm.knockout(demo, pairs, mm.mediation(), n_null=0)
    paths = found.paths()
    effects = found.to_dataframe()["effect"]
    assert paths.loc[0, ["direct", "mediated", "both"]].tolist() == effects.tolist()
    joint = effects[2] - effects[1] - effects[0]
    assert paths.loc[0, "joint"] == pytest.approx(joint, abs=1e-6)
    whole = mm.knockout(demo, pairs, "image->question", n_null=0)
    torch.testing.assert_close(found.values[2], whole.values[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="mediation"):
        whole.paths()


def test_effects_and_tables_follow_from_values(found, demo, colors):
    table = found.to_dataframe()
    change = (found.clean - found.values).mean(1) / (found.clean - found.corrupt).mean()
    np.testing.assert_allclose(table["effect"], change, rtol=1e-5)
    np.testing.assert_allclose(
        found.effects()[3, 2],
        (found.clean - found.values)[3, 2] / (found.clean - found.corrupt)[2],
        rtol=1e-5,
    )
    checked = colors.check()
    np.testing.assert_allclose(found.clean, checked["clean_logit_diff"], atol=1e-4)
    np.testing.assert_allclose(found.corrupt, checked["corrupt_logit_diff"], atol=1e-4)
    assert len(found.null) == len(found.cells)
    assert set(found.null_cells["kind"]) == {"positions"}
    assert table["null_low"].le(table["null_high"]).all()


def test_results_do_not_depend_on_batches_and_survive_saving(found, demo, colors, tmp_path):
    again = mm.knockout(
        demo, colors, ["object->last", "distractor->last"], window=4, n_null=1, batch_size=2
    )
    torch.testing.assert_close(again.values, found.values, atol=2e-4, rtol=0)
    torch.testing.assert_close(again.null, found.null, atol=2e-4, rtol=0)
    assert Result.load(found.save(tmp_path / "knockout")).equals(found)
    assert concat([found, found]).values.shape == (6, 8)


def test_figures_show_every_route_over_its_null(found, demo, colors):
    (figure,) = found.plot().values()
    names = {unescape(trace.name) for trace in figure.data}
    assert names == {"object->last", "distractor->last", "random routes"}
    single = mm.knockout(demo, colors[:2], ["object->last", "vision.object->image"], n_null=1)
    assert set(single.plot()) == {"routes"}
    assert single.page("Knockout").html().count("object") > 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"routes": []}, ValueError, "give one or more"),
        ({"routes": ["image->last"] * 2}, ValueError, "each once"),
        ({"routes": "image>last"}, RouteError, "is no route"),
        ({"routes": "thing->last"}, SpanError, "unknown span 'thing'"),
        ({"routes": "all->last"}, RouteError, "pair 0: .* nothing to attend"),
        ({"routes": "last->before_image", "layers": [6]}, ValueError, "layers 0..5"),
        ({"routes": "image->last", "layers": []}, ValueError, "empty"),
        ({"routes": "image->last", "layers": [[0], []]}, ValueError, "empty"),
        ({"routes": "image->last", "layers": [[0]], "window": 1}, ValueError, "windows already"),
        ({"routes": "image->last", "window": 7}, ValueError, "window is 7"),
        ({"routes": "image->last", "window": 0}, ValueError, "window is 0"),
        ({"routes": "image->last", "layers": [1, 2], "window": 3}, ValueError, "2 layers"),
        ({"routes": "image->last", "n_null": -1}, ValueError, "n_null"),
        ({"routes": "image->last", "seed": -1}, ValueError, "seed"),
        ({"routes": "vision.image->last"}, SpanError, "both of its ends"),
        ({"routes": "projector.image->image"}, SpanError, "unknown span"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    demo, colors, options, kind, message, monkeypatch
):
    def runs(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(demo.hf_model, "forward", runs)
    with pytest.raises(kind, match=message):
        mm.knockout(demo, colors, **options)

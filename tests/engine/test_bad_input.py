"""A sweep refuses what it cannot do, in words, and before any forward pass."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine import sites as tables
from mechmm.engine.checks import SiteError, check_places
from mechmm.engine.sites import Sites
from mechmm.engine.source import InterventionError, Steer
from mechmm.engine.sweep import Sweep
from mechmm.model.hooked import UnknownHookError
from mechmm.model.layout import SpanError
from mechmm.testing import tiny
from mechmm.zoo.recipe import build_model, build_processor


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_hf(build_model().eval(), build_processor())


@pytest.fixture(scope="module")
def pairs(model):
    return shapes.pairs(model, "color", 2, seed=1)


@pytest.fixture(scope="module")
def table(model):
    return tables.residual(model, ("object",), layers=[1])


@pytest.fixture
def passes(model):
    """Grows with every forward pass of the model."""
    counted = []
    handle = model.hf_model.register_forward_pre_hook(lambda module, args: counted.append(1))
    yield counted
    handle.remove()


def changed(sites, **columns):
    """A table with other values in some columns of its last row."""
    other = sites.table.copy()
    for name, value in columns.items():
        other.loc[other.index[-1], name] = value
    return Sites(other)


def test_what_is_good_runs(model, pairs, table, passes):
    Sweep(model, pairs, table).run()
    assert passes


BAD = {
    "no sites": (lambda m: tables.residual(m, ()), SiteError, "the table of sites is empty"),
    "hook": (
        lambda m: changed(tables.mlps(m, layers=[0]), hook="blocks.9.hook_mlp_out"),
        UnknownHookError,
        "unknown hook 'blocks.9.hook_mlp_out'",
    ),
    "head": (
        lambda m: changed(tables.heads(m, layers=[0]), head=8),
        SiteError,
        r"blocks\.0\.attn\.hook_z has heads 0\.\.7, not 8",
    ),
    "head of the vision tower": (
        lambda m: changed(tables.heads(m, towers=["vision"], layers=[1]), head=4),
        SiteError,
        r"vision\.blocks\.1\.attn\.hook_z has heads 0\.\.3, not 4",
    ),
    "key-value head": (
        lambda m: changed(tables.heads(m, layers=[0]), hook="blocks.0.attn.hook_k", head=4),
        SiteError,
        r"hook_k has heads 0\.\.3, not 4",
    ),
    "negative head": (
        lambda m: changed(tables.heads(m, layers=[0]), head=-2),
        SiteError,
        r"heads 0\.\.7",
    ),
    "neuron": (
        lambda m: tables.neurons(m, {1: [0, 352]}),
        SiteError,
        r"blocks\.1\.mlp\.hook_post has neurons 0\.\.351, not 352",
    ),
    "neuron of the vision tower": (
        lambda m: tables.neurons(m, {1: [320]}, tower="vision"),
        SiteError,
        r"neurons 0\.\.319, not 320",
    ),
    "entry of the stream": (
        lambda m: changed(tables.residual(m, layers=[0], towers=["language"]), neuron=128),
        SiteError,
        r"neurons 0\.\.127, not 128",
    ),
    "entry of a norm's scale": (
        lambda m: changed(tables.mlps(m, layers=[1]), hook="blocks.1.ln1.hook_scale", neuron=1),
        SiteError,
        r"hook_scale has neurons 0\.\.0, not 1",
    ),
    "head in no block": (
        lambda m: changed(tables.projector(m), head=0),
        SiteError,
        "lies in no block",
    ),
    "head of the stream": (
        lambda m: changed(tables.residual(m, layers=[0], towers=["language"]), head=3),
        SiteError,
        "hook_resid_pre has no heads",
    ),
    "neuron of heads": (
        lambda m: changed(tables.attention(m, layers=[0]), hook="blocks.0.attn.hook_z", neuron=50),
        SiteError,
        "hook_z has no neurons",
    ),
    "another tower": (
        lambda m: changed(tables.residual(m, layers=[0], towers=["vision"]), tower="language"),
        SiteError,
        "vision.blocks.0.hook_resid_pre belongs to 'vision', but the table of sites says",
    ),
    "span": (lambda m: tables.residual(m, ("bus",), layers=[1]), SpanError, "unknown span 'bus'"),
    "position": (
        lambda m: tables.residual(m, positions=[900], towers=["language"]),
        ValueError,
        "position 900 is outside prompt 0",
    ),
    "position from the end": (
        lambda m: tables.residual(m, positions=[-66], towers=["vision"]),
        ValueError,
        "position -66 is outside prompt 0, which has 65 positions",
    ),
}
"""Name -> (sites, error, message)."""


@pytest.mark.parametrize("name", BAD)
def test_sites_that_are_not_there_are_refused(model, pairs, passes, name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        Sweep(model, pairs, make(model)).plan()
    with pytest.raises(error, match=message):
        Sweep(model, pairs, make(model)).run()
    assert not passes


@pytest.fixture
def without_types():
    """As in use: types are not checked."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_an_unknown_source_is_refused(model, pairs, table, passes, without_types):
    with pytest.raises(ValueError, match="unknown source 'median'; use clean, corrupt, zero, mean"):
        Sweep(model, pairs, table, source="median").run()
    assert not passes


OPTIONS = {
    "budget": ({"budget": -1}, "budget is -1; give a number of 1 or more, or None"),
    "budget in words": ({"budget": "2GB"}, "budget is '2GB'; give a number"),
    "tokens": ({"tokens": 0}, "tokens is 0; give a number of 1 or more"),
    "seed": ({"seed": -1}, "seed is -1; give a whole number, 0 or more"),
    "sites": ({"sites": 3}, "sites are a table made by mechmm.sites, not int"),
    "pairs": ({"pairs": []}, "pairs are a PairDataset, not list; make one"),
    "metric": ({"metric": "logit_diff"}, "a metric is a function .* not 'logit_diff'"),
}
"""Name -> (options of a sweep, message)."""


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_mean_nothing_are_refused(model, pairs, table, passes, without_types, name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        Sweep(**{"model": model, "pairs": pairs, "sites": table, **options})
    assert not passes


@pytest.mark.parametrize("family", ["clip", "florence2"])
def test_models_without_logits_after_a_prompt_are_refused(pairs, family):
    other = tiny(family)
    sites = tables.residual(other, ("image",))
    with pytest.raises(ValueError, match=r"reads logits after the last token .* gives none there"):
        Sweep(other, pairs, sites)


def test_one_pair_alone_is_not_resampled(model, pairs, table, passes):
    with pytest.raises(ValueError, match="there is one pair alone; give two or more, or ablate"):
        Sweep(model, pairs[:1], table, base="clean", source="resample")
    assert not passes


def test_a_direction_is_not_added_to_a_neuron(model, pairs, passes):
    with pytest.raises(InterventionError, match=r"shape \[128\] cannot be added to 1 number"):
        Sweep(model, pairs, tables.neurons(model, {1: [3]}), source=Steer(torch.ones(128)))
    assert not passes


def test_an_unknown_point_is_refused(model):
    with pytest.raises(ValueError, match="unknown point 'resid_psot'; use resid_pre, resid_mid"):
        tables.residual(model, point="resid_psot")


FUNCTIONS = {
    "shape": (lambda now: now[:1], r"returned torch\.float32 \[1, 128\]; it must return one new"),
    "dtype": (lambda now: now.double(), r"returned torch\.float64"),
    "nothing": (lambda now: None, "returned NoneType"),
    "nan": (lambda now: now * float("nan"), "returned NaN"),
    "gradient": (
        lambda now: torch.autograd.grad(now.square().sum(), now)[0],
        "needs gradients, but sweeps run without them",
    ),
    "asked for": (
        lambda now: torch.autograd.grad(now.requires_grad_().square().sum(), now)[0],
        "needs gradients, but sweeps run without them",
    ),
}
"""Name -> (function, message)."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_no_interventions_are_refused(model, pairs, table, passes, name):
    function, message = FUNCTIONS[name]
    with pytest.raises(InterventionError, match=message):
        Sweep(model, pairs, table, source=function)
    assert not passes


def test_a_steering_vector_of_another_size_is_refused(model, pairs, table, passes):
    with pytest.raises(ValueError, match="96"):
        Sweep(model, pairs, table.where(tower="vision"), source=Steer(torch.ones(128)))
    assert not passes


def test_a_function_that_fails_later_is_refused_then(model, pairs, table):
    def late(now):
        return now if len(now) == 2 else now[:, :1]

    with pytest.raises(InterventionError, match="must return one new value for each"):
        Sweep(model, pairs, table, source=late).run()


def test_a_function_keeps_its_own_errors(model, pairs, table):
    def wrong(now):
        raise RuntimeError("a mistake of mine")

    with pytest.raises(RuntimeError, match="a mistake of mine"):
        Sweep(model, pairs, table, source=wrong)


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (lambda logits, answers: mm.logit_diff(logits, answers).mean(), r"\[\]"),
        (lambda logits, answers: logits, r"\[2, \d+\]"),
        (lambda logits, answers: 0.5, "float"),
    ],
    ids=["mean", "logits", "number"],
)
def test_a_metric_gives_one_number_an_example(model, pairs, table, passes, metric, shape):
    with pytest.raises(ValueError, match=rf"gave {shape} for 2 example\(s\); it must give one"):
        Sweep(model, pairs, table, metric)
    assert not passes


def test_a_metric_of_ones_own_reads_single_tokens(model, pairs, table, passes):
    several = mm.PairDataset([replace(pairs[0], answer="yellow circle")], model)
    with pytest.raises(ValueError, match="some answers have several tokens"):
        Sweep(model, several, table, lambda logits, answers: logits[:, 0]).run()
    assert not passes


def test_what_is_no_sequence_has_no_further_positions(model, pairs):
    pooled = changed(
        tables.residual(model, positions=[1], towers=["vision"], layers=[0]),
        hook="vision.ln_final.hook_normalized",
    )
    for source in ("clean", "zero"):
        with pytest.raises(ValueError, match=r"hook_normalized has 1 position\(s\), and so no"):
            Sweep(model, pairs, pooled, source=source).run()


def test_spans_of_unequal_size_are_refused(pairs, table, passes):
    batch = next(pairs.batches(2))
    layout = batch.corrupt.layout
    mask = layout.mask("object").clone()
    first = mask[1].nonzero()[0]
    mask[1, first] = False
    fewer = replace(layout, defined={**layout.defined, "object": mask})
    unlike = replace(batch, corrupt=batch.corrupt.with_layout(fewer))
    check_places(table, batch, 0)
    with pytest.raises(SiteError, match=r"pair 1: span 'object' .* has 4 .* and 3 in the corrupt"):
        check_places(table, unlike, 0)


def test_a_pair_without_the_span_cannot_give_it(model, pairs, table, passes):
    bare = mm.PairDataset([pairs[0], replace(pairs[1], spans={}), *pairs[:1]], model)
    sweep = Sweep(model, bare, table, base="clean", source="resample", batch_size=1)
    with pytest.raises(ValueError, match="pair 1 has no position in span 'object' to resample"):
        sweep.run()
    assert not passes

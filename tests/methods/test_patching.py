"""Patching equals TransformerLens's on text and a loop of plain PyTorch hooks on pictures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import patching as tl_patching

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine import estimate
from mechmm.engine.source import InterventionError
from mechmm.methods.patching import baselines
from mechmm.results.result import concat
from mechmm.zoo.recipe import build_model, build_processor


def last_logit_diff(logits, pair, model):
    answer, foil = (model.to_single_token(word) for word in (pair.answer, pair.foil))
    return logits[:, -1, answer] - logits[:, -1, foil]


@pytest.mark.parametrize("point", ["resid_pre", "attn_out", "mlp_out"])
def test_text_equals_transformer_lens(model, point):
    pair = shapes.pairs(model, "where", 1, seed=3, form="text")
    batch = next(pair.batches(1))
    _, cache = model.run_with_cache(batch.clean)
    theirs = getattr(tl_patching, f"get_act_patch_{point}")(
        model,
        batch.corrupt.input_ids,
        cache,
        lambda logits: last_logit_diff(logits, pair[0], model).mean(),
    )
    positions = range(batch.clean.input_ids.shape[1])
    make = {
        "resid_pre": mm.sites.residual,
        "attn_out": mm.sites.attention,
        "mlp_out": mm.sites.mlps,
    }
    table = make[point](model, positions=positions, towers=["language"])
    ours = mm.patch(model, pair, table, n_null=1)
    torch.testing.assert_close(ours.values.view(theirs.shape), theirs.float(), atol=1e-5, rtol=0)


def test_text_heads_equal_transformer_lens(model):
    pair = shapes.pairs(model, "where", 1, seed=4, form="text")
    batch = next(pair.batches(1))
    _, cache = model.run_with_cache(batch.clean)
    theirs = tl_patching.get_act_patch_attn_head_out_all_pos(
        model,
        batch.corrupt.input_ids,
        cache,
        lambda logits: last_logit_diff(logits, pair[0], model).mean(),
    )
    ours = mm.patch(model, pair, mm.sites.heads(model, towers=["language"]), n_null=1)
    torch.testing.assert_close(ours.values.view(theirs.shape), theirs.float(), atol=1e-5, rtol=0)


def by_hand(model, pair, module, find, swap):
    """The metric with one module's output changed by a plain PyTorch hook."""
    hf, batch = model.hf_model, next(pair.batches(1))
    kept = {}
    handle = module.register_forward_hook(lambda m, a, out: kept.update(clean=find(out).clone()))
    hf(**batch.clean.inputs)
    handle.remove()
    handle = module.register_forward_hook(lambda m, a, out: swap(out, kept["clean"]))
    logits = hf(**batch.corrupt.inputs).logits
    handle.remove()
    return float(last_logit_diff(logits, pair[0], model))


@torch.no_grad()
def test_pictures_equal_plain_hooks(model, pictures):
    one = pictures[:1]
    layout = next(one.batches(1)).clean.layout
    where = [p for _, p in layout.vision_positions("object")]
    at = layout.positions("object")

    def swap_positions(positions):
        def swap(out, clean):
            new = out.clone()
            new[:, positions] = clean[:, positions]
            return new

        return swap

    hf = model.hf_model.model
    cases = {
        ("vision", "mlp", 1): (hf.vision_tower.encoder.layers[1].mlp, where),
        ("vision", "mlp", 3): (hf.vision_tower.encoder.layers[3].mlp, where),
        ("language", "mlp", 2): (hf.language_model.layers[2].mlp, at),
    }
    table = mm.sites.mlps(model, ("object",)) + mm.sites.projector(model, ("object",))
    found = mm.patch(model, one, table, n_null=1).to_dataframe()
    for (tower, kind, layer), (module, positions) in cases.items():
        row = found[(found.tower == tower) & (found.kind == kind) & (found.layer == layer)].iloc[0]
        expected = by_hand(model, one, module, lambda out: out, swap_positions(positions))
        assert row["value"] == pytest.approx(expected, abs=1e-5)
    tokens = [p - 1 for p in at]
    expected = by_hand(
        model, one, hf.multi_modal_projector, lambda out: out, swap_positions(tokens)
    )
    row = found[found.tower == "projector"].iloc[0]
    assert row["value"] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_vision_heads_equal_plain_hooks(model, pictures):
    one = pictures[:1]
    out_proj = model.hf_model.model.vision_tower.encoder.layers[2].self_attn.out_proj
    batch, kept, d = next(one.batches(1)), {}, 24
    handle = out_proj.register_forward_pre_hook(lambda m, a: kept.update(clean=a[0].clone()))
    model.hf_model(**batch.clean.inputs)
    handle.remove()
    expected = []
    for head in range(4):

        def swap(module, args, head=head):
            new = args[0].clone()
            new[..., head * d : (head + 1) * d] = kept["clean"][..., head * d : (head + 1) * d]
            return (new,)

        handle = out_proj.register_forward_pre_hook(swap)
        logits = model.hf_model(**batch.corrupt.inputs).logits
        handle.remove()
        expected.append(last_logit_diff(logits, one[0], model))
    table = mm.sites.heads(model, towers=["vision"], layers=[2])
    found = mm.patch(model, one, table, n_null=1)
    torch.testing.assert_close(found.values[:, 0], torch.cat(expected), atol=1e-5, rtol=0)


def test_one_pair_at_a_time_equals_all_together(model, pictures):
    table = mm.sites.residual(model, ("object", "question")) + mm.sites.heads(model, layers=[1])
    together = mm.patch(model, pictures, table, n_null=1, batch_size=3)
    small = mm.patch(model, pictures, table, n_null=1, batch_size=2, tokens=200)
    torch.testing.assert_close(together.values, small.values, atol=1e-5, rtol=0)


def test_whole_input_restores_the_clean_metric(model, pictures):
    table = mm.sites.residual(model, ("image",), towers=["language"], layers=[0])
    found = mm.patch(model, pictures, table, n_null=1)
    torch.testing.assert_close(found.values[0], found.clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.effects()[0], torch.ones(3), atol=1e-3, rtol=0)
    noised = mm.patch(model, pictures, table, direction="noise", n_null=1)
    torch.testing.assert_close(noised.values[0], noised.corrupt, atol=1e-5, rtol=0)


@torch.no_grad()
def test_ablations_equal_plain_edits(model, pictures):
    table = mm.sites.mlps(model, ("object",), towers=["language"], layers=[1])
    batch = next(pictures.batches(3))
    _, cache = model.run_with_cache(batch.clean)
    values, mask = cache["blocks.1.hook_mlp_out"], batch.clean.layout.mask("object")
    mean = values[mask].mean(0)
    for direction, new in (("zero", torch.zeros_like(mean)), ("mean", mean)):

        def edit(x, hook, new=new):
            return torch.where(mask[..., None], new, x)

        logits = model.run_with_hooks(batch.clean, fwd_hooks=[("blocks.1.hook_mlp_out", edit)])
        expected = mm.logit_diff(logits[:, -1], batch.answers)
        found = mm.patch(model, pictures, table, direction=direction, n_null=1)
        torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_resample_takes_another_pairs_clean_value(model, pictures):
    table = mm.sites.mlps(model, ("object",), towers=["language"], layers=[1])
    found = mm.patch(model, pictures, table, direction="resample", n_null=1, seed=5)
    batch = next(pictures.batches(3))
    _, cache = model.run_with_cache(batch.clean)
    values, mask = cache["blocks.1.hook_mlp_out"], batch.clean.layout.mask("object")
    possible = []
    for shift in (1, 2):
        donors = values[mask].view(3, -1, values.shape[-1]).roll(shift, 0)

        def edit(x, hook, donors=donors):
            x[mask] = donors.flatten(0, 1)

        logits = model.run_with_hooks(batch.clean, fwd_hooks=[("blocks.1.hook_mlp_out", edit)])
        possible.append(mm.logit_diff(logits[:, -1], batch.answers))
    gaps = [float((found.values[0] - one).abs().max()) for one in possible]
    assert min(gaps) < 1e-5 < max(gaps)


def test_unread_layers_are_no_sites(model):
    llava = build_model(seed=2).eval()
    llava.config.vision_feature_layer = -2
    other = mm.HookedMultimodal.from_hf(llava, build_processor())
    assert mm.sites.residual(other, towers=["vision"]).table["layer"].tolist() == [0] * 1 + [1, 2]


def test_null_and_interval(model, pictures):
    table = mm.sites.residual(model, ("object",))
    found = mm.patch(model, pictures, table, n_null=4, seed=2)
    assert found.null.shape == (8, 3)
    frame = found.to_dataframe()
    assert (frame["low"] <= frame["effect"] + 1e-6).all()
    assert (frame["effect"] <= frame["high"] + 1e-6).all()
    towers = ("vision", "language")
    assert set(found.null_range()) == {(tower, "resid_pre", "object") for tower in towers}
    again = mm.patch(model, pictures, table, n_null=4, seed=2)
    assert torch.equal(found.null, again.null)


def test_normalisation_is_as_defined(model, pictures):
    table = mm.sites.residual(model, ("object",), layers=[1])
    found = mm.patch(model, pictures, table, n_null=1)
    clean, corrupt = baselines(model, pictures, mm.logit_diff)
    expected = (found.values - corrupt) / (clean - corrupt)
    assert torch.equal(found.effects(), expected)
    change = (found.values - corrupt).mean(1) / (clean - corrupt).mean()
    torch.testing.assert_close(found.mean_effects(), change)


def test_saved_equals_loaded(model, pictures, tmp_path):
    found = mm.patch(
        model, pictures, mm.sites.residual(model) + mm.sites.projector(model), n_null=2
    )
    found.save(tmp_path / "run")
    loaded = mm.Patching.load(tmp_path / "run")
    assert torch.equal(loaded.values, found.values)
    assert torch.equal(loaded.null, found.null)
    pd.testing.assert_frame_equal(loaded.to_dataframe(), found.to_dataframe())
    assert np.array_equal(np.asarray(loaded.picture), np.asarray(found.picture))


def test_figures_show_the_numbers(model, pictures):
    table = (
        mm.sites.residual(model, ("object", "last"))
        + mm.sites.heads(model)
        + mm.sites.patches(model, layers=[1])
    )
    figures = mm.patch(model, pictures, table, n_null=2).plot()
    assert set(figures) == {"resid_pre", "heads", "patches", "strongest"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"sites": "none"}, "the table of sites is empty"),
        ({"sites": "span"}, "unknown span 'bus'"),
        ({"sites": "position"}, "position 900 is outside prompt 0"),
        ({"n_null": -1}, "n_null is -1; give 0 or more random sites"),
    ],
)
def test_bad_input_is_refused(model, pictures, change, message):
    table = {
        "none": mm.sites.residual(model, ()),
        "span": mm.sites.residual(model, ("bus",)),
        "position": mm.sites.residual(model, positions=[900], towers=["language"]),
    }.get(change.get("sites"), mm.sites.residual(model))
    options = {key: value for key, value in change.items() if key != "sites"}
    with pytest.raises(ValueError, match=message):
        mm.patch(model, pictures, table, **options)


def test_random_sites_do_not_depend_on_how_pairs_are_batched(model, pictures):
    sites = mm.sites.residual(model, ("object",), layers=[1])
    whole, single = (mm.patch(model, pictures, sites, n_null=4, batch_size=n) for n in (3, 1))
    torch.testing.assert_close(single.null, whole.null, atol=1e-4, rtol=1e-4)
    assert (whole.null != whole.corrupt).any()


def test_a_screen_keeps_to_the_budget(model, pictures, monkeypatch):
    """As many pairs at once as the sweep has; what it estimates is the same."""
    sizes, usual_slopes = [], estimate.slopes

    def watched(model, part, *rest):
        sizes.append(len(part.batch))
        return usual_slopes(model, part, *rest)

    sites = mm.sites.residual(model, ("image", "last"))
    options = {"screen": "attribution", "keep": 0.2, "n_null": 0}
    usual = mm.patch(model, pictures, sites, **options)
    one = mm.Sweep(model, pictures, sites, batch_size=1).plan().state_bytes
    monkeypatch.setattr(estimate, "slopes", watched)
    kept = mm.patch(model, pictures, sites, **options, budget=one, state="disk")
    assert set(sizes) == {1}
    torch.testing.assert_close(kept.values, usual.values, atol=1e-4, rtol=1e-4)


def test_a_screen_leaves_the_null_as_it_is(model, pictures):
    sites = mm.sites.heads(model, ("object",), towers=["language"])
    whole = mm.patch(model, pictures, sites, n_null=4)
    screened = mm.patch(model, pictures, sites, n_null=4, screen="attribution", keep=0.1)
    assert screened.exact.sum() < len(sites)
    torch.testing.assert_close(screened.null, whole.null, atol=1e-4, rtol=1e-4)


def test_a_metric_without_a_name_is_called_by_its_class(model, pictures):
    sites = mm.sites.residual(model, ("object",), layers=[1], towers=["language"])
    found = mm.patch(model, pictures, sites, partial(mm.logit_diff), n_null=0)
    assert found.metric == "partial"


def test_unknown_tower_and_layer_are_refused(model):
    with pytest.raises(ValueError, match="unknown tower 'audio'; this model has vision, language"):
        mm.sites.residual(model, towers=["audio"])
    with pytest.raises(ValueError, match=r"tower 'vision' has layers 0\.\.3, not 7"):
        mm.sites.residual(model, towers=["vision"], layers=[7])


def test_no_hook_is_left_behind(model, pictures):
    mm.patch(model, pictures, mm.sites.residual(model), n_null=1)
    with pytest.raises(ValueError, match="unknown span"):
        mm.patch(model, pictures, mm.sites.residual(model, ("bus",)), n_null=1)
    assert not any(point.has_hooks() for point in model.hook_points())


@pytest.mark.parametrize("direction", ["zero", "mean"])
def test_pairs_of_text_alone_may_stand_beside_pictures(model, pictures, direction):
    words = shapes.pairs(model, "color", 2, seed=9, form="text")
    mixed = mm.PairDataset([*words, *pictures], model)
    table = mm.sites.mlps(model, ("object",), layers=[1])
    found = mm.patch(model, mixed, table, direction=direction, n_null=1, batch_size=2)
    moved = (found.values[0] - found.clean).abs()
    assert (moved[:2] < 1e-5).all()  # no vision tower to ablate
    assert (moved[2:] > 1e-4).all()


@pytest.mark.parametrize("metric", [mm.logit_diff, mm.kl, mm.accuracy])
@pytest.mark.parametrize("direction", ["denoise", "noise", "zero"])
def test_baselines_are_those_of_unpatched_runs(model, pictures, metric, direction):
    table = mm.sites.residual(model, ("object",)) + mm.sites.patterns(model, layers=[1])
    found = mm.patch(model, pictures, table, metric, direction, n_null=1, batch_size=2)
    clean, corrupt = baselines(model, pictures, metric, batch_size=2)
    assert torch.equal(found.clean, clean)
    assert torch.equal(found.corrupt, corrupt)


def test_cells_that_change_nothing_hold_exactly_the_baseline(model, pictures):
    table = mm.sites.residual(model, ("last",), towers=["language"], layers=[0])
    found = mm.patch(model, pictures, table, n_null=1)
    assert torch.equal(found.values[0], found.corrupt)
    assert (found.effects() == 0).all()


def test_limits_do_not_change_what_is_found(model, pictures):
    table = mm.sites.residual(model, ("object",)) + mm.sites.heads(model, layers=[1])
    free = mm.patch(model, pictures, table, n_null=1)
    for options in (
        {"state": "disk", "tokens": 300},
        {"state": "cpu", "budget": 10**6, "batch_size": 2},
        {"budget": 1},
    ):
        bound = mm.patch(model, pictures, table, n_null=1, **options)
        torch.testing.assert_close(bound.values, free.values, atol=1e-5, rtol=0)


# Interventions of one's own ------------------------------------------------------------------


def halved(now):
    """Half of what is there."""
    return now / 2


@torch.no_grad()
def test_a_function_is_applied_to_the_clean_prompt(model, pictures, tmp_path):
    table = mm.sites.mlps(model, ("object",), towers=["language"], layers=[1])
    found = mm.patch(model, pictures, table, direction=halved, n_null=1)
    batch = next(pictures.batches(3))
    mask = batch.clean.layout.mask("object")[..., None]

    def edit(x, hook):
        return torch.where(mask, x / 2, x)

    logits = model.run_with_hooks(batch.clean, fwd_hooks=[("blocks.1.hook_mlp_out", edit)])
    expected = mm.logit_diff(logits[:, -1], batch.answers)
    torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)
    assert found.direction == "halved"
    effect = (found.clean - found.values) / (found.clean - found.corrupt)
    torch.testing.assert_close(found.effects(), effect)
    loaded = mm.Patching.load(found.save(tmp_path / "run"))
    assert loaded.direction == "halved"
    assert torch.equal(loaded.effects(), found.effects())


@torch.no_grad()
def test_steering_adds_a_direction(model, pictures):
    table = mm.sites.residual(model, ("last",), towers=["language"], layers=[2])
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    found = mm.patch(model, pictures, table, direction=mm.Steer(vector, 3.0), n_null=1)
    batch = next(pictures.batches(3))

    def edit(x, hook):
        x[:, -1] += 3 * vector

    logits = model.run_with_hooks(batch.clean, fwd_hooks=[("blocks.2.hook_resid_pre", edit)])
    expected = mm.logit_diff(logits[:, -1], batch.answers)
    torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)
    assert found.direction == "steer"


def test_unfit_functions_are_refused(model, pictures):
    def denoise(now):
        return now

    def wrong(now):
        return now.sum(-1)

    table = mm.sites.residual(model, ("last",))
    with pytest.raises(ValueError, match="'denoise' is a direction already; name your function"):
        mm.patch(model, pictures, table, direction=denoise)
    with pytest.raises(InterventionError, match="must return one new value for each"):
        mm.patch(model, pictures, table, direction=wrong)


# Interrupts ----------------------------------------------------------------------------------


def interrupted(model, pairs, table, after, **options):
    """A run that is interrupted after so many reports."""
    calls = []

    def report(done, total):
        calls.append(done)
        if len(calls) > after:
            raise KeyboardInterrupt

    return mm.patch(model, pairs, table, report=report, **options)


@pytest.fixture(scope="module")
def mixture(model):
    return (
        mm.sites.residual(model, ("object", "last"))
        + mm.sites.heads(model, layers=[1])
        + mm.sites.patches(model, layers=[1])
    )


@pytest.mark.parametrize("after", [0, 2, 5, 9])
def test_an_interrupted_run_keeps_what_is_finished(model, pictures, mixture, after, tmp_path):
    options = {"n_null": 2, "batch_size": 1, "tokens": 2000}
    full = mm.patch(model, pictures, mixture, **options)
    found = interrupted(model, pictures, mixture, after, **options)
    known = ~found.values.isnan()
    assert torch.equal(found.values[known], full.values[known])
    assert found.interrupted
    assert found.missing == int((~known).sum() + found.null.isnan().sum()) > 0
    assert f"{found.missing} of {found.values.numel() + found.null.numel()}" in found.summary()
    frame = found.to_dataframe()
    for row, own in enumerate(known):
        if own.any():
            change = (full.values - full.corrupt)[row, own].mean()
            expected = change / (full.clean - full.corrupt)[own].mean()
            assert frame["effect"][row] == pytest.approx(float(expected), abs=1e-6)
            alone = full.values[row, own].mean()
            assert frame["value"][row] == pytest.approx(float(alone), abs=1e-6)
        else:
            assert np.isnan(frame.loc[row, ["effect", "low", "high", "value"]].astype(float)).all()
    assert frame["low"].notna().tolist() == (known.sum(1) > 1).tolist()
    assert set(found.plot()) == {"resid_pre", "heads", "patches", "strongest"}
    found.page("Interrupted").html()
    found.save(tmp_path / "run")
    assert mm.Patching.load(tmp_path / "run").equals(found)


def test_a_complete_run_is_not_interrupted(model, pictures, mixture):
    found = mm.patch(model, pictures, mixture, n_null=1)
    assert not found.interrupted
    assert found.missing == 0
    assert "missing" not in found.summary()


def test_finished_and_interrupted_results_are_joined(model, pictures, mixture):
    one = mm.patch(model, pictures[:1], mixture, n_null=0)
    part = interrupted(model, pictures[1:], mixture, 3, n_null=0, batch_size=1)
    joined = concat([one, part])
    assert joined.finished.tolist() == [True, *part.finished.tolist()]
    assert joined.interrupted
    assert not joined.mean_effects().isnan().any()  # the first pair is whole


# Figures -------------------------------------------------------------------------------------


def made_up(table):
    """A result with random numbers."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(len(table), 4, generator=random)
    return mm.Patching(
        values=values,
        clean=torch.ones(4),
        corrupt=torch.zeros(4),
        null=torch.zeros(0, 4),
        sites=table.table,
        null_sites=table.table[:0],
        direction="denoise",
        metric="logit_diff",
    )


def test_every_kind_of_site_has_its_figure(model):
    table = (
        mm.sites.residual(model, ("image", "last"))
        + mm.sites.heads(model, ("image", "last"))
        + mm.sites.patterns(model)
        + mm.sites.neurons(model, {1: [3, 200], 2: [5]}, ("last",))
    )
    found = made_up(table)
    figures = found.plot()
    assert set(figures) == {"resid_pre", "heads, image", "heads, last", "patterns", "strongest"}
    assert "patterns" in figures["patterns"].layout.title.text
    frame = found.to_dataframe()
    for name, kind, span in (("heads, last", "head", "last"), ("patterns", "pattern", "all")):
        rows = frame[(frame.kind == kind) & (frame.span == span) & (frame.tower == "language")]
        wide = rows.pivot(index="layer", columns="head", values="effect")[::-1]
        shown = figures[name].data[-1].z  # the language model stands last
        np.testing.assert_allclose(shown, wide.to_numpy(float))
    bars = found.strongest(15, ("head", "pattern", "neuron"))["label"].tolist()
    assert list(figures["strongest"].layout.yaxis.ticktext) == bars
    neuron = frame[frame.kind == "neuron"].iloc[1]
    assert neuron["label"] == "language layer 1 neuron 200, last"

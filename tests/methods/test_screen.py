"""Estimates of attribution patching equal gradients by hand, finite differences and linear effects;
a screened run equals the full one where it is exact."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import score
from mechmm.engine import estimate
from mechmm.engine.estimate import estimated
from mechmm.engine.sites import COLUMNS, table_of
from mechmm.results.result import concat
from mechmm.zoo.recipe import build_model, build_processor


@pytest.fixture(scope="module")
def precise():
    """The same in double precision, where differences of small steps mean something."""
    return mm.HookedMultimodal.from_hf(build_model(seed=1).eval().double(), build_processor())


@pytest.fixture(scope="module")
def many(model):
    """Sites of both towers and of several kinds."""
    return (
        mm.sites.residual(model, ("object", "last"))
        + mm.sites.heads(model, layers=[1, 2])
        + mm.sites.mlps(model, ("object",))
        + mm.sites.projector(model, ("object",))
    )


@pytest.fixture(scope="module")
def full(model, pictures, many):
    return mm.patch(model, pictures, many, n_null=2)


def test_estimates_equal_autograd_by_hand(model, pictures):
    one, hf = pictures[:1], model.hf_model.model
    batch = next(one.batches(1))
    layout = batch.clean.layout
    answer, foil = batch.answers.answer_ids[0, 0], batch.answers.foil_ids[0, 0]
    seen, read = [p for _, p in layout.vision_positions("object")], layout.positions("object")
    modules = {
        "vision": (hf.vision_tower.encoder.layers[2].mlp, seen),
        "language": (hf.language_model.layers[3].mlp, read),
    }
    expected = []
    for module, positions in modules.values():
        kept = []
        handle = module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        model.hf_model(**batch.clean.inputs)
        logits = model.hf_model(**batch.corrupt.inputs).logits[0, -1]
        handle.remove()
        clean, corrupt = kept
        (slope,) = torch.autograd.grad(logits[answer] - logits[foil], corrupt)
        expected.append(((clean - corrupt) * slope)[0, positions].sum().detach())
    table = mm.sites.mlps(model, ("object",), towers=["vision"], layers=[2])
    table += mm.sites.mlps(model, ("object",), towers=["language"], layers=[3])
    found = estimated(model, one, table)
    torch.testing.assert_close(found[:, 0], torch.stack(expected), atol=1e-6, rtol=1e-5)


def longer(pairs, model):
    """The same pairs with answers of two tokens."""
    both = (replace(p, answer=f"{p.answer} circle", foil=f"{p.foil} circle") for p in pairs)
    return mm.PairDataset(both, model)


@pytest.mark.parametrize("metric", [mm.logit_diff, mm.prob, mm.kl])
@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_estimates_are_the_slope_of_a_small_step(precise, metric, tokens):
    pairs = shapes.pairs(precise, "color", 2, seed=1)
    pairs = pairs if tokens == 1 else longer(pairs, precise)
    (batch,) = pairs.batches(2)
    layout = batch.corrupt.layout
    read, seen = layout.mask("object"), torch.zeros(2, 65, dtype=torch.bool)
    for prompt in range(2):
        for image, position in layout.vision_positions("object", prompt):
            seen[prompt + image, position] = True
    places = {
        "blocks.1.hook_resid_pre": (read, None),
        "blocks.2.hook_resid_mid": (read, None),
        "blocks.4.attn.hook_z": (read, 1),
        "blocks.3.attn.hook_q": (read, None),
        "blocks.2.mlp.hook_post": (read, 7),
        "blocks.5.hook_attn_out": (read, None),
        "vision.blocks.1.hook_resid_pre": (seen, None),
        "vision.blocks.2.attn.hook_z": (seen, 3),
        "vision.blocks.3.hook_mlp_out": (seen, None),
    }
    rows = [
        dict.fromkeys(COLUMNS)
        | {"hook": hook, "tower": "vision" if hook.startswith("v") else "language"}
        | {"kind": "any", "span": "object", ("neuron" if "mlp.h" in hook else "head"): part}
        for hook, (_, part) in places.items()
    ]
    found = estimated(precise, pairs, table_of(rows), metric)
    _, cache = precise.run_with_cache(batch.clean, names_filter=list(places))
    answers = batch.answers
    if metric is mm.kl:
        answers = answers.with_reference(precise(batch.clean)[:, -1])
    for row, (hook, (mask, part)) in enumerate(places.items()):
        slope = slope_of(precise, batch, answers, metric, hook, mask, part, cache[hook])
        torch.testing.assert_close(
            found[row].double(), slope, atol=3e-5, rtol=2e-3, msg=lambda m, h=hook: f"{h}: {m}"
        )


def slope_of(model, batch, answers, metric, hook, mask, part, clean, step=0.05):
    """The metric's slope towards the clean value, by differences of fourth order: norms compute in
    single precision, so steps cannot be tiny."""
    rows, positions = mask.nonzero(as_tuple=True)
    at = (rows, positions) if part is None else (rows, positions, part)

    def towards(step):
        def edit(x, hook):
            x[at] += step * (clean[at] - x[at])
            return x

        with model.hooks(fwd_hooks=[(hook, edit)]):
            return score(model, batch.corrupt, answers, metric)

    near, far = (towards(size) - towards(-size) for size in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def test_estimates_are_exact_where_the_metric_is_linear(model, pictures):
    final = dict.fromkeys(COLUMNS) | {"tower": "language", "kind": "final", "span": "last"}
    table = table_of([{**final, "hook": "ln_final.hook_normalized"}])
    swept = mm.Sweep(model, pictures, table).run()
    guess = estimated(model, pictures, table)
    torch.testing.assert_close(swept.base + guess, swept.values, atol=1e-5, rtol=0)
    assert (guess.abs() > 5e-3).all()


def test_small_changes_are_estimated_well(model, pictures, many):
    def nearly(now):
        return now + 0.01 * torch.tanh(now)

    table = many + mm.sites.patterns(model, layers=[1])
    swept = mm.Sweep(model, pictures, table, base="clean", source=nearly).run()
    guess = estimated(model, pictures, table, base="clean", source=nearly)
    torch.testing.assert_close(swept.values - swept.base, guess, atol=2e-5, rtol=0.02)
    assert guess.abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 2])
def test_estimates_do_not_depend_on_the_batch(model, pictures, many, size):
    table = many + mm.sites.patterns(model, layers=[1])
    for source in ("clean", "resample", "mean"):
        together = estimated(model, pictures, table, source=source, batch_size=16)
        apart = estimated(model, pictures, table, source=source, batch_size=size)
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


def test_a_batch_that_does_not_fit_is_halved(model, pictures, many, monkeypatch):
    expected, sizes, run = estimated(model, pictures, many), [], estimate._estimated

    def narrow(*arguments):
        *_, size, _ = arguments
        sizes.append(size)
        if size > 2:
            raise torch.OutOfMemoryError
        return run(*arguments)

    monkeypatch.setattr(estimate, "_estimated", narrow)
    found = estimated(model, pictures, many, batch_size=8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert sizes == [8, 4, 2]


def test_nothing_is_left_behind(model, pictures, many):
    first, *others = model.hf_model.parameters()
    first.requires_grad_(False)
    with torch.inference_mode():
        estimated(model, pictures, many)
    with torch.no_grad():
        estimated(model, pictures, many)
    assert not first.requires_grad
    first.requires_grad_()
    assert all(parameter.requires_grad for parameter in others)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert not any(point.has_hooks() for point in model.hook_points())


def test_text_alone_has_no_estimates_in_the_vision_tower(model, pictures):
    words = shapes.pairs(model, "color", 2, seed=9, form="text")
    mixed = mm.PairDataset([*words, *pictures], model)
    table = mm.sites.mlps(model, ("object",), layers=[1])
    found = estimated(model, mixed, table, base="clean", source="zero", batch_size=2)
    assert (found[0, :2] == 0).all()
    assert (found[0, 2:] != 0).all()
    assert (found[1] != 0).all()


# Screened runs -------------------------------------------------------------------------------


def test_keeping_everything_is_no_screen(model, pictures, many, full):
    screened = mm.patch(model, pictures, many, n_null=2, screen="attribution", keep=1.0)
    assert screened.equals(full)
    assert math.isnan(screened.agreement)
    assert full.to_dataframe()["exact"].all()


def test_the_top_share_is_exact_and_the_rest_estimated(model, pictures, many, full):
    found = mm.patch(model, pictures, many, n_null=2, screen="attribution", keep=0.1, seed=3)
    guess = estimated(model, pictures, many)
    torch.testing.assert_close(found.estimates, guess)
    checked = found.sites["checked"].to_numpy()
    kept = found.exact & ~checked
    assert (kept.sum(), checked.sum()) == (round(0.1 * len(many)), 20)
    size = guess.mean(1).abs().numpy()
    assert size[kept].min() >= size[~kept].max()
    exact = torch.tensor(found.exact)
    torch.testing.assert_close(found.values[exact], full.values[exact], atol=1e-5, rtol=0)
    assert torch.equal(found.values[~exact], (found.corrupt + guess)[~exact])
    assert torch.equal(found.clean, full.clean)
    assert torch.equal(found.corrupt, full.corrupt)
    assert found.null.shape == full.null.shape
    frame = found.to_dataframe()
    assert frame["exact"].tolist() == found.exact.tolist()
    change = (full.values - full.corrupt).mean(1)
    expected = spearmanr(change.numpy()[checked], guess.mean(1).numpy()[checked]).statistic
    assert found.agreement == pytest.approx(expected, abs=1e-6)


def test_what_is_estimated_is_said(model, pictures, many):
    table = many + mm.sites.patches(model, layers=[1])
    found = mm.patch(model, pictures, table, n_null=2, screen="attribution", keep=0.02)
    kept = round(0.02 * len(table))
    assert f"chose {kept} sites" in found.summary()
    assert f"the other {len(table) - kept - 20} sites are estimates" in found.summary()
    assert f"rank correlation {found.agreement:.2f}" in found.summary()
    figures = found.plot()
    assert "exact, the others estimated" in figures["heads"].layout.title.text
    assert "exact, the others estimated" in figures["patches"].layout.title.text
    page = found.page("Screened").html()
    assert "rank correlation" in page
    assert ">exact</th>" in page
    labels = figures["strongest"].layout.yaxis.ticktext
    assert sum("(estimated)" in label for label in labels) == sum(
        not exact for exact in found.strongest(15, ("head", "mlp"))["exact"]
    )


def test_a_screened_result_is_saved_and_joined(model, pictures, many, tmp_path):
    found = mm.patch(model, pictures, many, n_null=1, screen="attribution", keep=0.1)
    found.save(tmp_path / "run")
    loaded = mm.Patching.load(tmp_path / "run")
    assert loaded.equals(found)
    assert loaded.agreement == found.agreement
    twice = concat([found, found])
    assert twice.estimates.shape == (len(many), 6)
    assert twice.agreement == pytest.approx(found.agreement)


def test_results_of_earlier_days_load(full, tmp_path):
    older = replace(full, sites=full.sites.drop(columns="exact"))
    folder = older.save(tmp_path / "run")
    record = json.loads((folder / "result.json").read_text())
    for name in ("estimates", "finished"):
        del record["fields"][name]
    (folder / "result.json").write_text(json.dumps(record))
    loaded = mm.Patching.load(folder)
    assert loaded.exact.all()
    assert not loaded.interrupted
    assert math.isnan(loaded.agreement)
    pd.testing.assert_frame_equal(loaded.to_dataframe(), full.to_dataframe(), check_like=True)
    assert "exact" not in loaded.page("Older").html().lower().split("<table>")[-1]


def rounded(logits, answers):
    """A metric whose only step has no slope."""
    return (logits.argmax(-1) == answers.answer_ids[:, 0]).float()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep is 0, .*\(0, 1\]"),
        ({"keep": 1.5}, r"keep is 1.5"),
        ({"keep": math.nan}, r"keep is nan"),
        ({"screen": "guess"}, "unknown screen 'guess'; use attribution"),
        ({"metric": mm.accuracy}, "the metric accuracy has no gradient.*screen with logit_diff"),
        ({"metric": rounded}, "the metric rounded has no gradient"),
        ({"metric": mm.kl, "direction": "noise"}, "kl is flat at the clean run"),
        ({"budget": 0}, "budget is 0"),
        ({"tokens": -5}, "tokens is -5"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, pictures, many, options, message):
    runs = []
    handle = model.hf_model.register_forward_pre_hook(lambda *a: runs.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            mm.patch(model, pictures, many, **{"screen": "attribution", **options})
    finally:
        handle.remove()
    assert not runs


def test_interrupted_screen(model, pictures, many):
    def stop(done, total):
        raise KeyboardInterrupt

    options = {"n_null": 1, "batch_size": 1, "screen": "attribution", "keep": 0.1}
    found = mm.patch(model, pictures, many, report=stop, **options)
    assert found.interrupted
    assert found.missing
    assert not found.clean.isnan().any()  # that prompt runs first
    assert math.isnan(found.agreement) or -1 <= found.agreement <= 1
    assert "the run was interrupted" in found.summary()
    found.page("Interrupted").html()

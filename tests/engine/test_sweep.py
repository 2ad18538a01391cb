"""A sweep is a loop over sites of runs with plain hooks: values, memory, errors and interrupts."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch
from safetensors import SafetensorError
from torch.nn.functional import log_softmax

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import accuracy, kl, log_prob, logit_diff, prob, score
from mechmm.engine import head, shelf
from mechmm.engine import sites as tables
from mechmm.engine.engine import Engine
from mechmm.engine.located import Located
from mechmm.engine.rerun import Rerun
from mechmm.engine.source import InterventionError, Steer
from mechmm.engine.sweep import UNMATCHED, Sweep
from mechmm.engine.whole import Whole
from mechmm.model import attention
from mechmm.testing import assert_no_hooks
from mechmm.zoo.recipe import build_model, build_processor

CLOSE = 2e-5
"""Of values of the order of 1 to 10."""


def lively():
    """The demo model untrained, with weights so large that every part of it matters."""
    hf = build_model(seed=1).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return mm.HookedMultimodal.from_hf(hf, build_processor())


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def pairs(model):
    """Three pairs of pictures; the last prompt is longer."""
    short, long = (shapes.pairs(model, *what, seed=1) for what in (("color", 2), ("beside", 1)))
    return mm.PairDataset([*short, *long], model)


@pytest.fixture(scope="module")
def table(model):
    """Sites of every kind in both towers."""
    spans = ("object", "question", "last")
    return (
        tables.residual(model, spans, layers=[0, 3])
        + tables.residual(model, positions=[1, -1], layers=[1], point="resid_mid")
        + tables.residual(model, ("image",), towers=["language"], layers=[5], point="resid_post")
        + tables.heads(model, ("object",), towers=["vision"], layers=[2])
        + tables.heads(model, towers=["language"], layers=[4])
        + tables.mlps(model, ("object",), layers=[1])
        + tables.attention(model, ("all",), layers=[2])
        + tables.neurons(model, {1: [3, 300]}, ("object", "last"))
        + tables.neurons(model, {2: [7]}, ("object",), tower="vision")
        + tables.projector(model, ("object",))
    )


@pytest.fixture(scope="module")
def patterns(model):
    """Sites in patterns of both towers, and two beside them."""
    return (
        tables.patterns(model, ("last", "object"), towers=["language"], layers=[3]).where(head=2)
        + tables.patterns(model, ("object",), towers=["vision"], layers=[1]).where(head=1)
        + tables.residual(model, positions=[0, -1], towers=["language"], layers=[4])
        + tables.mlps(model, ("object",), layers=[2])
    )


# A loop of full runs --------------------------------------------------------------------------


class Place:
    """One place of a site, to read and to fill."""

    def __init__(self, site, row, position):
        part = [int(site[name]) for name in ("head", "neuron") if site[name] == site[name]]
        if site["hook"].endswith(("hook_pattern", "hook_attn_scores")):
            self.index = (row, *(part or [slice(None)]), position)
        else:
            self.index = (row, position, *part)

    def of(self, tensor):
        return tensor[self.index].clone()

    def put(self, tensor, value):
        tensor[self.index] = value


def spots(sites, layout):
    """(hook, places of every prompt) of every site."""
    finder = Located(layout)
    rows = sites.table.astype({name: float for name in ("head", "neuron")}).to_dict("records")
    for number, site in enumerate(rows):
        found = [finder.places(site, number, prompt) for prompt in range(len(layout.tokens))]
        yield site["hook"], [[Place(site, *map(int, at)) for at in some] for some in found]


@torch.no_grad()
def cached(model, batch, hook):
    kept = {}
    with model.hooks(fwd_hooks=[(hook, lambda value, hook: kept.update(value=value.clone()))]):
        model(batch)
    return kept["value"]


def values_of(model, batch, hook, found, source):
    """What every place of a site is set to [prompt][place]; None for a function."""
    if callable(source):
        return None
    given = cached(model, batch.corrupt if source == "corrupt" else batch.clean, hook)
    held = [[place.of(given) for place in some] for some in found]
    if source in ("clean", "corrupt"):
        return held
    every = [value for some in held for value in some]
    mean = torch.stack(every).double().mean(0).float() * (source == "mean") if every else None
    return [[mean for _ in some] for some in held]


@torch.no_grad()
def loop(model, pairs, sites, metric=logit_diff, base="corrupt", source="clean"):
    """The metric of every pair with every site changed [site, pair], one full run per site."""
    batch = next(pairs.batches(len(pairs)))
    run, answers, values = getattr(batch, base), batch.answers, []
    if metric is kl:
        answers = answers.with_reference(model(batch.clean)[:, -1])
    for name, found in spots(sites, run.layout):
        new = values_of(model, batch, name, found, source)

        def edit(tensor, hook, found=found, new=new):
            for prompt, some in enumerate(found):
                for index, place in enumerate(some):
                    old = place.of(tensor)[None]
                    place.put(tensor, source(old)[0] if new is None else new[prompt][index])
            return tensor

        with model.hooks(fwd_hooks=[(name, edit)]):
            values.append(score(model, run, answers, metric).float())
    return torch.stack(values)


def near(found, wanted):
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)


# Values ---------------------------------------------------------------------------------------

SOURCES = {
    "clean": ("corrupt", "clean"),
    "corrupt": ("clean", "corrupt"),
    "zero": ("clean", "zero"),
    "mean": ("clean", "mean"),
    "function": ("clean", lambda now: now * 0.3 - 0.2),
}
"""Name -> base and source."""


@pytest.mark.parametrize("name", SOURCES)
def test_a_sweep_equals_a_loop_of_full_runs(model, pairs, table, name):
    base, source = SOURCES[name]
    swept = Sweep(model, pairs, table, base=base, source=source).run()
    wanted = loop(model, pairs, table, base=base, source=source)
    near(swept.values, wanted)
    batch = next(pairs.batches(3))
    with torch.no_grad():
        near(swept.base, logit_diff(model(getattr(batch, base))[:, -1], batch.answers))
    moved = (wanted - swept.base).abs() > 10 * CLOSE
    assert moved.float().mean() > 0.5
    assert swept.complete


@pytest.mark.parametrize("name", SOURCES)
def test_patterns_equal_a_loop_of_full_runs(model, pairs, patterns, name):
    base, source = SOURCES[name]
    swept = Sweep(model, pairs, patterns, base=base, source=source).run()
    near(swept.values, loop(model, pairs, patterns, base=base, source=source))


@torch.no_grad()
def test_resampling_takes_the_other_pairs_clean_value(model, pairs, table):
    two, sites = pairs[[0, 1]], table.where(span="object")
    swept = Sweep(model, two, sites, base="clean", source="resample").run()
    batch = next(two.batches(2))
    for number, (name, found) in enumerate(spots(sites, batch.clean.layout)):
        clean = cached(model, batch.clean, name)
        donors = [[place.of(clean) for place in some] for some in reversed(found)]

        def edit(tensor, hook, found=found, donors=donors):
            for some, given in zip(found, donors, strict=True):
                for place, value in zip(some, given, strict=True):
                    place.put(tensor, value)
            return tensor

        with model.hooks(fwd_hooks=[(name, edit)]):
            near(swept.values[number], logit_diff(model(batch.clean)[:, -1], batch.answers))


def test_steering_adds_a_direction(model, pairs):
    sites = tables.residual(model, ("last", "question"), towers=["language"])
    push = Steer(torch.linspace(-2, 2, model.cfg.d_model), scale=0.7)
    swept = Sweep(model, pairs, sites, base="clean", source=push).run()

    def by_hand(now):
        return now + 0.7 * torch.linspace(-2, 2, model.cfg.d_model)

    near(swept.values, loop(model, pairs, sites, base="clean", source=by_hand))


@pytest.mark.parametrize("metric", [log_prob, prob, kl, accuracy], ids=lambda m: m.__name__)
def test_every_metric(model, pairs, table, metric):
    sites = table.where(span="object") + table.where(kind="resid_mid")
    swept = Sweep(model, pairs, sites, metric).run()
    near(swept.values, loop(model, pairs, sites, metric))


def test_a_metric_of_ones_own(model, pairs, table):
    def entropy(logits, answers):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    sites = table.where(span="object")
    swept = Sweep(model, pairs, sites, entropy).run()
    near(swept.values, loop(model, pairs, sites, entropy))


@torch.no_grad()
def said(model, batch, hook, edit, answer):
    """log p of an answer to one prompt and whether it is said, token by token."""
    ids, total, greedy = batch.input_ids, 0.0, True
    for token in model.answer_tokens(answer):
        with model.hooks(fwd_hooks=[(hook, edit)]):
            logits = model.hf_model(input_ids=ids, **batch.extra).logits[0, -1]
        total += float(log_softmax(logits, -1)[token])
        greedy &= int(logits.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return total, greedy


def test_answers_of_several_tokens(model, pairs, table):
    texts = [("red circle in b2", "green"), ("yellow", "blue star"), ("cross", "red ring .")]
    several = [replace(p, answer=a, foil=f) for p, (a, f) in zip(pairs, texts, strict=True)]
    sites = table.where(span="object", kind="resid_pre") + table.where(kind="head", layer=2)
    found = {
        metric: Sweep(model, mm.PairDataset(several, model), sites, metric).run()
        for metric in (logit_diff, log_prob, accuracy)
    }
    for index, pair in enumerate(several):
        batch = next(mm.PairDataset([pair], model).batches(1))
        for number, (name, (where,)) in enumerate(spots(sites, batch.clean.layout)):
            clean = cached(model, batch.clean, name)

            def edit(tensor, hook, where=where, clean=clean):
                for place in where:
                    place.put(tensor, place.of(clean))
                return tensor

            answer, greedy = said(model, batch.corrupt, name, edit, pair.answer)
            foil, _ = said(model, batch.corrupt, name, edit, pair.foil)
            got = {metric: float(swept.values[number, index]) for metric, swept in found.items()}
            assert got[log_prob] == pytest.approx(answer, abs=1e-4)
            assert got[logit_diff] == pytest.approx(answer - foil, abs=1e-4)
            assert got[accuracy] == greedy


def test_cells_of_equal_values_hold_exactly_the_baseline(model, pairs, table):
    swept = Sweep(model, pairs, table).run()
    batch = next(pairs.batches(3))
    wanted = torch.zeros(len(table), 3, dtype=torch.bool)
    for number, (name, found) in enumerate(spots(table, batch.clean.layout)):
        clean, corrupt = (cached(model, run, name) for run in (batch.clean, batch.corrupt))
        for prompt, some in enumerate(found):
            same = [torch.equal(place.of(clean), place.of(corrupt)) for place in some]
            wanted[number, prompt] = all(same)
    assert 0 < wanted.sum() < wanted.numel()
    assert (swept.values == swept.base)[wanted].all()
    assert swept.run == int((~wanted).sum())


def test_patterns_beside_them_leave_equal_cells_equal(model):
    """Attention that shows its pattern rounds otherwise, in the donor's run as in the base's."""
    told = shapes.pairs(model, "color", 2, seed=1, form="text")
    stream = tables.residual(model, positions=range(30), towers=["language"], layers=[3])
    seen = tables.patterns(model, ("last",), towers=["language"], layers=[1])
    alone, beside = Sweep(model, told, stream).run(), Sweep(model, told, stream + seen).run()
    assert 0 < alone.run < alone.values.numel()
    own = beside.values[: len(stream)]
    assert torch.equal(own == beside.base, alone.values == alone.base)
    assert beside.run == alone.run + len(seen) * 2


def test_batches_of_any_size_give_the_same(model, pairs, table):
    whole = Sweep(model, pairs, table).run()
    small = Sweep(model, pairs, table, batch_size=2, tokens=100).run()
    near(small.values, whole.values)


@pytest.mark.parametrize("source", ["mean", "resample"])
def test_patterns_of_prompts_of_unequal_length_are_not_mixed(model, pairs, patterns, source):
    one = patterns.where(kind="pattern", tower="language", span="last")
    with pytest.raises(ValueError, match="unequal length"):
        Sweep(model, pairs, one, base="clean", source=source, batch_size=1).run()


def test_no_gradients_are_tracked(model, pairs, table):
    swept = Sweep(model, pairs, table.where(span="object")).run()
    assert not swept.values.requires_grad
    assert not swept.base.requires_grad
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


# Memory ---------------------------------------------------------------------------------------


def test_a_budget_makes_batches_smaller_and_then_records_nothing(model, pairs, table):
    sites = table.where(span="object") + table.where(kind="head", layer=4)
    free = Sweep(model, pairs, sites)
    one = replace(free, batch_size=1).plan().state_bytes
    assert free.plan().batch_size == 3
    halved, none = (replace(free, budget=budget) for budget in (2 * one, one - 1))
    assert halved.plan().batch_size == 1
    assert halved.plan().state_bytes == one
    assert "1 instead of 3 pairs at once" in halved.plan().notes[0]
    assert none.plan().state_bytes == 0
    assert "nothing is recorded, every trial runs the whole model" in none.plan().notes[0]
    wanted = free.run().values
    near(halved.run().values, wanted)
    near(none.run().values, wanted)


@pytest.mark.parametrize("state", ["cpu", "disk"])
def test_state_may_be_kept_elsewhere(model, pairs, table, state, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    sweep = Sweep(model, pairs, table, tokens=500)
    there = replace(sweep, state=state)
    swept = there.run(lambda done, work: seen.append(len(list(tmp_path.rglob("*.safetensors")))))
    assert torch.equal(swept.values, sweep.run().values)
    assert (max(seen) > 0) == (state == "disk")
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_the_other_prompts_had_is_kept_there_too(model, pairs, table, monkeypatch, tmp_path):
    """A sweep that records nothing itself still keeps the values that it sets sites to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep = Sweep(model, pairs[:1], table.where(span="object"), budget=1, state="disk", tokens=500)
    assert sweep.plan().state_bytes == 0
    seen = []
    sweep.run(lambda done, work: seen.append(len(list(tmp_path.rglob("*.safetensors")))))
    without = []
    replace(sweep, source="zero").run(
        lambda done, work: without.append(len(list(tmp_path.rglob("*.safetensors"))))
    )
    assert max(seen) == max(without) + 1


def test_one_memory_under_two_names_may_be_kept_on_disk(model, pairs):
    """What leaves a block and what enters the next one are one tensor."""
    sites = tables.residual(model, ("object",), towers=["language"], layers=[2], point="resid_post")
    sites += tables.residual(model, ("object",), towers=["language"], layers=[3])
    sweep = Sweep(model, pairs, sites)
    assert torch.equal(replace(sweep, state="disk").run().values, sweep.run().values)


def test_files_of_one_batch_go_before_the_next(model, pairs, table, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def most(some):
        seen = []
        sweep = Sweep(model, some, table, batch_size=1, state="disk", tokens=500)
        sweep.run(lambda *work: seen.append(len(list(tmp_path.rglob("*.safetensors")))))
        return max(seen)

    assert most(pairs) == most(pairs[:1])


def test_a_disk_that_cannot_be_written_to_is_said(model, pairs, table, monkeypatch):
    def full(tensors, file):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(shelf, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written to .*: No space left .* point TMPDIR to"):
        Sweep(model, pairs, table, state="disk").run()


def test_one_recording_is_held_at_a_time(model, pairs, table, monkeypatch):
    alive = WeakSet()

    class Watched(Engine):
        def __init__(self, *args, **options):
            assert not alive
            super().__init__(*args, **options)
            alive.add(self)

    monkeypatch.setattr("mechmm.engine.sweep.Engine", Watched)
    several = [replace(pair, answer="red circle", foil="blue star") for pair in pairs]
    Sweep(model, mm.PairDataset(several, model), table.where(span="object"), batch_size=2).run()


@pytest.mark.parametrize("answer", ["red", "red circle in b2"])
def test_recorded_state_is_that_of_the_longest_pair(model, pairs, table, answer):
    long = replace(pairs[2], answer=answer)
    some, rest = (mm.PairDataset(p, model) for p in ([pairs[0], long], [long, pairs[0]]))
    sizes = [
        Sweep(model, p, table, batch_size=1).plan().state_bytes for p in (some, rest, some[1:])
    ]
    assert len(set(sizes)) == 1
    assert sizes[0] > Sweep(model, pairs[:1], table, batch_size=1).plan().state_bytes


def test_an_end_that_does_not_match_the_model_is_not_used_and_said(
    model, pairs, table, monkeypatch
):
    sweep = Sweep(model, pairs, table)
    usual = sweep.run()
    monkeypatch.setattr(head, "close", lambda a, b: False)
    whole = sweep.run()
    assert UNMATCHED in whole.plan.notes
    assert UNMATCHED not in usual.plan.notes
    near(whole.values, usual.values)


def test_files_go_after_an_error_and_an_interrupt(model, pairs, table, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep = Sweep(model, pairs, table, tokens=500, state="disk")
    for error in (KeyboardInterrupt, RuntimeError):

        def stop(done, work, error=error):
            assert list(tmp_path.rglob("*.safetensors"))
            raise error

        try:
            sweep.run(stop)
        except RuntimeError:
            assert error is RuntimeError
        gc.collect()
        assert not list(tmp_path.iterdir())


def crowded(monkeypatch, most):
    """A device that runs out of memory where more than so many trials run together."""
    sizes = []

    def limited(run):
        def call(self, trials, *rest, **options):
            sizes.append(len(trials))
            if len(trials) > most:
                raise torch.OutOfMemoryError("no memory")
            return run(self, trials, *rest, **options)

        return call

    for kind in (Rerun, Whole):
        monkeypatch.setattr(kind, "run", limited(kind.run))
    return sizes


@pytest.mark.parametrize("most", [3, 8])
def test_passes_that_do_not_fit_are_halved(model, pairs, table, monkeypatch, most):
    sweep = Sweep(model, pairs, table, tokens=4096)
    wanted = sweep.run().values
    sizes = crowded(monkeypatch, most)
    near(sweep.run().values, wanted)
    assert max(sizes) > most
    assert len([size for size in sizes if size > most]) < len(sizes) / 2


def test_one_trial_that_does_not_fit_is_refused(model, pairs, table, monkeypatch):
    crowded(monkeypatch, 0)
    for sites in (table.where(tower="language"), table.where(tower="vision")):
        with pytest.raises(torch.OutOfMemoryError, match="one trial alone does not fit"):
            Sweep(model, pairs, sites).run()


# Reports and ends -----------------------------------------------------------------------------


def test_the_report_grows_up_to_the_total(model, pairs, table):
    seen = []
    Sweep(model, pairs, table, batch_size=2, tokens=500).run(lambda *both: seen.append(both))
    done, work = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(done)) > 5
    assert set(work) == {done[-1]}


@pytest.mark.parametrize("last", [1, 4, 12])
def test_an_interrupt_returns_what_is_finished(model, pairs, table, last):
    sweep = Sweep(model, pairs, table, batch_size=2, tokens=500)
    whole, calls = sweep.run(), []

    def stop(done, work):
        calls.append(done)
        if len(calls) == last:
            raise KeyboardInterrupt

    swept = sweep.run(stop)
    there = ~swept.values.isnan()
    assert not swept.complete
    assert 0 < there.sum() < there.numel()
    assert torch.equal(swept.values[there], whole.values[there])
    started = ~swept.base.isnan()
    assert torch.equal(swept.base[started], whole.base[started])
    assert not there[:, ~started].any()


def test_nothing_is_left_on_the_model_however_a_sweep_ends(pairs, table):
    model = lively()
    kept = mm.PairDataset(list(pairs), model)
    sweep = Sweep(model, kept, table, tokens=500)

    def clean():
        held = [name for name, m in model.hf_model.named_modules() if "forward" in vars(m)]
        assert not held
        assert not attention._REENTRIES
        assert not any(point.has_hooks() for point in model.hook_points())

    def fail(*work):
        raise RuntimeError("a mistake in a report")

    def stop(*work):
        raise KeyboardInterrupt

    def broken(now, calls=[]):  # noqa: B006 - counts
        calls.append(now)
        if len(calls) > 30:
            raise RuntimeError("a mistake in a function")
        return now * 0.5

    sweep.run()
    clean()
    sweep.run(stop)
    clean()
    with pytest.raises(RuntimeError, match="report"):
        sweep.run(fail)
    clean()
    with pytest.raises(RuntimeError, match="function"):
        replace(sweep, source=broken).run()
    clean()
    with pytest.raises(InterventionError, match="NaN"):
        replace(sweep, source=lambda now: now / 0 * 0 if len(now) > 2 else now).run()
    clean()
    assert_no_hooks(model.unwrap())

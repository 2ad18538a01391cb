"""A plan says before anything runs what will run, and what it will cost."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from full_runs import Subject
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LlavaForConditionalGeneration

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine import sites as tables
from mechmm.engine.plain import Plains
from mechmm.engine.plan import predicted_starts, scaled
from mechmm.engine.record import record, resumes
from mechmm.engine.sweep import Sweep
from mechmm.engine.trials import starts
from mechmm.testing import RECIPES
from mechmm.zoo.recipe import build_model, build_processor


@pytest.fixture(scope="module")
def model():
    """The demo model with fewer and wider layers, so that weights outweigh all else."""
    config = build_model().config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 3
    config.text_config.hidden_size, config.text_config.intermediate_size = 256, 768
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 256, 768
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval()
    return mm.HookedMultimodal.from_hf(hf, build_processor())


@pytest.fixture(scope="module")
def pictures(model):
    return shapes.pairs(model, "color", 4, seed=1)


@pytest.fixture(scope="module")
def words(model):
    return shapes.pairs(model, "color", 3, seed=1, form="text")


def differing(pairs):
    """Positions of the first token that differs, and whether each does [pair, pos]."""
    batch = next(pairs.batches(len(pairs)))
    differs = (batch.clean.input_ids != batch.corrupt.input_ids).numpy()
    return differs.argmax(1), differs


def test_positions_before_the_word_that_differs_take_no_run(model, words):
    layout = next(words.batches(3)).clean.layout
    begin = np.array([layout.positions("all", row)[0] for row in range(3)])
    count = int((layout.modality >= 0).sum(1).min()) - int(begin.max())
    table = tables.residual(model, positions=range(count), towers=["language"], layers=[1])
    sweep = Sweep(model, words, table)
    plan, (first, _) = sweep.plan(), differing(words)
    absolute = begin[None] + np.arange(count)[:, None]
    assert np.array_equal(plan.changes == 0, absolute < first[None])
    assert plan.equal == int((absolute < first[None]).sum()) > 0
    swept = sweep.run()
    assert torch.equal(swept.values == swept.base, torch.as_tensor(plan.changes == 0))


def test_what_enters_the_first_block_differs_where_the_words_do(model, words):
    table = tables.residual(model, positions=range(-12, 0), towers=["language"], layers=[0])
    plan, (_, differs) = Sweep(model, words, table).plan(), differing(words)
    assert np.array_equal(plan.changes.T > 0, differs[:, -12:])


def test_a_picture_changes_everything_from_its_first_position_on(model, pictures):
    language = tables.residual(model, positions=[0, 1, -1], towers=["language"], layers=[0, 2])
    vision = tables.residual(model, positions=[0], towers=["vision"], layers=[0])
    plan = Sweep(model, pictures, language + vision).plan()
    wanted = {0: [0, 1, 0], 2: [0, 1, 1]}  # the text behind the picture is the same at first
    for layer, changes in wanted.items():
        own = (plan.sites["layer"] == layer) & (plan.sites["tower"] == "language")
        assert plan.changes[own].tolist() == [[n] * 4 for n in changes]
    assert (plan.changes[-1] == 1).all()


def test_the_first_position_is_that_of_the_change_or_of_the_picture(model, pictures):
    layout = next(pictures.batches(4)).corrupt.layout
    table = (
        tables.residual(model, ("object", "last"), towers=["language"], layers=[1])
        + tables.residual(model, ("object",), towers=["vision"], layers=[1])
        + tables.projector(model, ("object",))
    )
    plan = Sweep(model, pictures, table).plan()
    for row in range(4):
        places = [layout.positions(span, row)[0] for span in ("object", "last", "image", "image")]
        assert plan.first[:, row].tolist() == places
    assert plan.changes[:, 0].tolist() == [4, 1, 4, 4]


def test_sites_say_where_their_trials_enter(model, pictures):
    table = (
        tables.residual(model, ("last",), towers=["language"], layers=[1])
        + tables.heads(model, towers=["language"], layers=[1]).where(head=0)
        + tables.mlps(model, towers=["language"], layers=[1])
        + tables.attention(model, towers=["language"], layers=[2])
        + tables.mlps(model, towers=["vision"], layers=[1])
        + tables.residual(model, towers=["vision"], layers=[1])
    )
    found = Sweep(model, pictures, table).plan().sites
    assert found["enters"].tolist() == ["whole", "middle", "end", "middle", "middle", "whole"]
    assert found["layer"].tolist() == [1, 1, 1, 2, 1, 1]


def test_a_plan_is_made_without_a_pass_and_reads_well(model, pictures, monkeypatch):
    def ran(*args, **options):
        raise AssertionError("a plan runs nothing")

    monkeypatch.setattr(model.hf_model, "forward", ran)
    table = tables.residual(model, ("object", "last"), layers=[0, 1])
    table += tables.patterns(model, ("last",), towers=["language"], layers=[0])
    plan = Sweep(model, pictures, table, batch_size=3, tokens=800).plan()
    assert (plan.batch_size, plan.tokens) == (3, 800)
    assert plan.notes == ("scores and patterns: the block of the change runs whole prompts",)
    cells, written = plan.changes.size, str(plan)
    assert f"{cells}, of which {plan.equal} need no run" in written
    assert f"{plan.passes} of about 800 tokens (naive: {cells} of the whole model)" in written
    assert f"(naive: {scaled(plan.naive_flops)}FLOP" in written
    assert f"{scaled(plan.state_bytes)}B for 3 pair(s) at once" in written
    assert "logits of answer and foil after the last token" in written
    assert written.splitlines()[-1] == f"note              {plan.notes[0]}"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (5.6e13, "56 T")]
)
def test_large_numbers_have_prefixes(number, text):
    assert scaled(number) == text


# Operations -----------------------------------------------------------------------------------


def flash(query, key, value, *rest, out_val=None, **options):
    """The CPU's own attention, which the counter does not know."""
    return sdpa_flop_count(query, key, value)


def counted(run):
    """Operations as PyTorch counts them, and what the run gives."""
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        found = run()
    return counter.get_total_flops(), found


@torch.no_grad()
def full(model, pairs):
    """Operations of one full run of all corrupt prompts."""
    batch = next(pairs.batches(len(pairs))).corrupt
    return counted(partial(model, batch, logits_to_keep=1))[0]


TABLES = {
    "positions": lambda m: tables.residual(m, positions=range(0, 70, 7), towers=["language"]),
    "spans": lambda m: tables.residual(m, ("object", "question", "last")),
    "patches": lambda m: tables.residual(m, positions=range(0, 65, 9), towers=["vision"]),
    "heads": lambda m: tables.heads(m, ("object",), towers=["language"]),
    "vision heads": lambda m: tables.heads(m, towers=["vision"]),
    "mlps": lambda m: tables.mlps(m),
    "attention": lambda m: tables.attention(m, ("object",), towers=["language"]),
    "behind blocks": lambda m: tables.residual(m, ("object",), point="resid_post"),
    "neurons": lambda m: tables.neurons(m, {0: [1, 2], 2: [3]}),
    "projector": lambda m: tables.projector(m, ("object",)),
    "patterns": lambda m: tables.patterns(m, ("last",), towers=["language"]).where(head=0),
}


@pytest.fixture
def trying(monkeypatch):
    """Operations that it takes to see which blocks are sums."""
    counts, alike = [], Plains._alike

    def tried(self, parts, layer):
        count, found = counted(partial(alike, self, parts, layer))
        counts.append(count)
        return found

    monkeypatch.setattr(Plains, "_alike", tried)
    return counts


@pytest.mark.parametrize("name", TABLES)
def test_operations_are_those_that_pytorch_counts(model, pictures, name, trying):
    """Less the runs of the base and of the donor, one of each kind of attention."""
    table = TABLES[name](model)
    sweep = Sweep(model, pictures, table, tokens=300)
    plan = sweep.plan()
    total, swept = counted(sweep.run)
    recorded = 3 if name == "patterns" else 2
    ran = (swept.values != swept.base).numpy()
    recorded = recorded * full(model, pictures) + sum(trying)
    estimate = plan.flops[ran].sum() / (total - recorded)
    assert estimate == pytest.approx(1, abs=0.05)


def test_naive_operations_are_those_of_full_runs(model, pictures):
    table = tables.residual(model, ("object",))
    plan = Sweep(model, pictures, table).plan()
    assert plan.naive_flops == pytest.approx(len(table) * full(model, pictures), rel=0.01)


# First positions ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", RECIPES)
def test_predicted_first_positions_are_those_of_the_masks(family, side):
    subject = Subject(family, side=side)
    model, batch = subject.model, subject.batch
    if not resumes(model):
        pytest.skip("runs whole prompts")
    real = batch.attention_mask > 0
    masks = starts(record(model, batch, subject.wanted, [], []).blocks, real)
    predicted = torch.as_tensor(predicted_starts(model, batch.layout))
    assert torch.equal(predicted[real], masks[real])

"""Blocks that are sums of their modules run as sums, and all others as they are written."""

from __future__ import annotations

import pytest
import torch
from full_runs import Change, Subject, Trial, engine_runs, error

from mechmm.engine.plain import Plains
from mechmm.engine.plan import AS_WRITTEN, fallbacks
from mechmm.testing import RECIPES

CLOSE = 1e-5


def entering(subject: Subject) -> list[Trial]:
    """Trials that change what enters a block, one position each."""
    return [
        Trial(prompt, (change,))
        for layer in (0, 1, 2)
        for prompt in (0, 1)
        for at in (0.1, 0.5, 0.9, 1.0)
        if isinstance(
            change := subject.change(f"blocks.{layer}.hook_resid_pre", prompt, at), Change
        )
    ]


def sharp(subject: Subject) -> Subject:
    """The same with large weights, so that attention is far from even."""
    with torch.no_grad():
        for block in subject.model.towers["language"].blocks:
            for weight in block.parameters():
                if weight.ndim == 2:
                    weight *= 2
    return subject


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", ["few", "all"])
def test_sums_equal_full_runs_where_attention_is_sharp(attention, heads):
    subject = sharp(Subject({"few": "llava", "all": "internvl"}[heads], attention=attention))
    engine, trials = subject.engine(entering(subject), tokens=900), entering(subject)
    assert engine.plains.every
    found, wanted = engine_runs(engine, trials), subject.full_runs(trials)
    assert error(found, wanted) < CLOSE


@pytest.fixture
def projected():
    """Counts what each projection of the last block is given."""
    handles = []

    def watch(subject: Subject) -> dict[str, int]:
        counts = dict.fromkeys("qkvo", 0)
        tower = subject.model.towers["language"]
        for name in counts:
            linear = tower.linear(2, name)

            def count(x, name=name, forward=linear.forward):
                counts[name] += x[..., 0].numel()
                return forward(x)

            linear.forward = count
            handles.append(linear)
        return counts

    yield watch
    for linear in handles:
        del linear.forward


def test_values_of_the_last_block_are_not_computed(projected):
    subject = Subject("llava")
    change = subject.change("blocks.1.hook_resid_pre", 1, 0.5)
    assert isinstance(change, Change)
    trials = [Trial(1, (change,))]
    engine = subject.engine(trials, tokens=900)
    assert engine.plains.every
    counts = projected(subject)
    engine_runs(engine, trials)
    reached = subject.batch.input_ids.shape[1] - change.position
    assert counts == {"q": 1, "k": reached, "v": 0, "o": 1}


def test_a_block_runs_as_written_where_somebody_listens():
    subject = Subject("llava")
    trials = entering(subject)
    engine, heard = subject.engine(trials, tokens=900), []
    with subject.model.hooks(
        fwd_hooks=[("blocks.1.mlp.hook_post", lambda value, hook: heard.append(hook.name))]
    ):
        assert Plains(subject.model, engine.recording).of(1) is None
        found = engine_runs(engine, trials)
    assert heard
    assert error(found, subject.full_runs(trials)) < CLOSE


def test_a_block_that_gives_something_else_runs_as_written(monkeypatch):
    subject = Subject("llava")
    trials, block = entering(subject), type(subject.model.towers["language"].blocks[1])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **given: forward(self, x, **given) * 1.01)
    engine = subject.engine(trials, tokens=900)
    assert error(engine_runs(engine, trials), subject.full_runs(trials)) < CLOSE
    assert engine.plains.refused
    assert not engine.plains.every


@pytest.mark.parametrize("family", RECIPES)
def test_plans_name_families_whose_blocks_run_as_written(family):
    subject = Subject(family)
    engine = subject.engine([], tokens=900)
    if engine.head is None:
        pytest.skip("runs whole prompts")
    planned = AS_WRITTEN in fallbacks(subject.model, {})
    assert engine.plains.every != (planned or bool(engine.plains.refused))

"""A trial of the engine gives what a run of the whole model with hooks gives."""

from __future__ import annotations

import pytest
import torch
from full_runs import Change, Subject, Trial, engine_runs, error, hooks_of
from torch.utils.flop_counter import FlopCounterMode

from mechmm.engine.engine import seen_positions
from mechmm.engine.places import Entry, spot_of
from mechmm.engine.plan import fallbacks
from mechmm.engine.projections import Projections
from mechmm.model.families import FAMILIES
from mechmm.testing import RECIPES

CLOSE = 1e-5
ROUNDING = 1e-3
"""Floor under the error that half precision may have, in units of the largest logit."""
WHOLE = {
    "mllama": "cross-attention",
    "lfm2_vl": "linear-attention blocks",
    "qwen3_5": "linear-attention blocks",
    "florence2": "the encoder's output",
    **{f: "all positions" for f, r in RECIPES.items() if FAMILIES[r.architecture].unembed is None},
}
"""Families whose language model cannot run some positions alone -> what the note says of it."""
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
SEVERAL = ("llava", "gemma3", "qwen2_vl", "paligemma", "mllama", "chameleon")
TOGETHER = {
    "vision and language": [("vision.blocks.1.hook_mlp_out", 0.5), ("blocks.1.hook_mlp_out", 0.9)],
    "two heads": [("blocks.0.attn.hook_z", 0.4, 1), ("blocks.2.attn.hook_z", 1.0, 3)],
    "heads of one block": [("blocks.1.attn.hook_z", 0.7, 0), ("blocks.1.attn.hook_z", 0.7, 2)],
    "a head and all": [("blocks.1.attn.hook_z", 0.4, 0), ("blocks.1.attn.hook_z", 0.9)],
    "z and MLP": [("blocks.1.attn.hook_z", 0.5), ("blocks.1.hook_mlp_out", 0.5)],
    "z and what leaves": [("blocks.1.attn.hook_z", 0.5), ("blocks.1.hook_resid_post", 0.9)],
    "z and a neuron": [("blocks.1.attn.hook_z", 0.5, 1), ("blocks.1.mlp.hook_post", 0.5, 2)],
    "z and result": [("blocks.1.attn.hook_z", 0.5), ("blocks.1.attn.hook_result", 0.5, 1)],
    "early and pattern": [("blocks.0.hook_resid_pre", 0.2), ("blocks.2.attn.hook_pattern", 1.0, 1)],
    "scores and pattern": [
        ("blocks.1.attn.hook_attn_scores", 0.5, 1),
        ("blocks.1.attn.hook_pattern", 1.0, 0),
    ],
    "MLP and what leaves": [("blocks.1.hook_mlp_out", 0.4), ("blocks.1.hook_resid_post", 0.9)],
    "the same place": [("blocks.1.hook_mlp_out", 0.9), ("blocks.1.hook_resid_post", 0.9)],
    "leaves and enters": [("blocks.0.hook_resid_post", 0.6), ("blocks.1.hook_resid_pre", 0.6)],
    "norm and keys": [("blocks.2.ln1.hook_normalized", 0.3), ("blocks.2.attn.hook_k", 0.6, 1)],
    "last block": [("blocks.2.attn.hook_q", 1.0, 0), ("blocks.2.attn.hook_v", 0.2)],
    "attention and norm": [("blocks.1.hook_attn_out", 0.5), ("blocks.1.ln2.hook_normalized", 0.8)],
    "both ends": [("hook_embed", 0.1), ("ln_final.hook_normalized", 1.0)],
    "projector and head": [("projector.hook_out", 0.5), ("blocks.1.attn.hook_z", 0.8, 2)],
}
"""Name -> (hook, how far along the prompt, part) of every place that a trial changes."""


class Run:
    """Changes at every kind of hook of one family, run both ways."""

    def __init__(self, subject: Subject, turn: int = 0) -> None:
        self.subject, self.trials = subject, list(subject.every_kind(turn))
        self.engine = subject.engine(self.trials, tokens=900)
        self.wanted = subject.full_runs(self.trials)
        self.found = engine_runs(self.engine, self.trials)


@pytest.fixture(scope="module", params=RECIPES)
def run(request):
    return Run(Subject(request.param), turn=list(RECIPES).index(request.param))


def test_a_trial_equals_a_full_run(run):
    assert error(run.found, run.wanted) < CLOSE
    plain = run.subject.plain()
    moved = [error(plain[t.prompt], w) > CLOSE for t, w in zip(run.trials, run.wanted, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_full_run_of_many_copies_equals_that_of_one(run):
    number = len(run.trials) // 2
    alone = run.subject.full_runs([run.trials[number]])
    assert error(alone[0], run.wanted[number]) < CLOSE


def test_families_resume_where_they_can_and_say_why_elsewhere(run):
    family = run.subject.family
    notes = "\n".join(fallbacks(run.subject.model, run.engine.spots))
    assert (run.engine.head is not None) == (family not in WHOLE)
    assert ("trials run whole prompts" in notes) == (family in WHOLE)
    assert WHOLE.get(family, "") in notes
    assert ("vision features enter several" in notes) == (family in DEEPSTACK)


def test_trials_that_begin_behind_attention_equal_full_runs(run):
    subject, resumed = run.subject, run.subject.family not in WHOLE
    spots = {hook: spot_of(subject.model, hook) for hook in subject.model.hook_dict}
    hooks = [
        hook
        for hook, spot in spots.items()
        if hook in subject.cache
        and spot.entry != Entry.WHOLE
        and spot.layer == 1
        and not (resumed and spot.tower == "language")
    ]
    trials = [Trial(i % 2, (subject.change(h, i % 2, 0.5),)) for i, h in enumerate(hooks)]
    if not trials:
        pytest.skip("no block that begins behind its attention")
    engine = subject.engine(trials, tokens=1)
    assert error(engine_runs(engine, trials), subject.full_runs(trials)) < CLOSE
    begun = {(spots[hook].tower, 1) for hook in hooks if ".attn." in hook or "attn_out" in hook}
    assert begun <= engine.recording.z.keys()


def together(subject: Subject, *, add: bool) -> list[Trial]:
    """Trials that change several hooks, of those that a family has."""
    trials = []
    for prompt, places in enumerate(TOGETHER.values()):
        if all(hook in subject.cache for hook, *_ in places):
            changes = [
                subject.change(hook, prompt % 2, at, *part, add=add) for hook, at, *part in places
            ]
            trials.append(Trial(prompt % 2, tuple(changes)))
    return trials


@pytest.mark.parametrize("add", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("family", SEVERAL)
def test_several_changes_of_a_trial_act_together(family, add):
    subject = Subject(family)
    trials = together(subject, add=add)
    assert len(trials) >= len(TOGETHER) / 2
    found = engine_runs(subject.engine(trials, tokens=900), trials)
    assert error(found, subject.full_runs(trials)) < CLOSE


@pytest.mark.parametrize("family", [family for family in RECIPES if family not in WHOLE])
def test_projections_of_unchanged_positions_are_computed_once(family, monkeypatch):
    subject, known = Subject(family), []
    forwards = Projections.forwards

    def spy(self, layer, tokens, unchanged):
        known.append(int(unchanged.sum()))
        return forwards(self, layer, tokens, unchanged)

    monkeypatch.setattr(Projections, "forwards", spy)
    hooks = [
        f"blocks.1.{name}" for name in ("hook_resid_pre", "attn.hook_k", "ln1.hook_normalized")
    ]
    trials = [
        Trial(prompt, (subject.change(hook, prompt, at / 12),))
        for hook in hooks
        if hook in subject.cache
        for prompt in (0, 1)
        for at in range(1, 9, 2)
    ]
    found = engine_runs(subject.engine(trials, tokens=200), trials)
    assert error(found, subject.full_runs(trials)) < CLOSE
    assert any(known), "all positions were computed for every trial"


def test_one_entry_of_the_stream_can_be_changed():
    subject = Subject("llava")
    names = [f"blocks.1.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    trials = [Trial(0, (subject.change(name, 0, 0.6, 3),)) for name in names]
    found = engine_runs(subject.engine(trials, tokens=900), trials)
    assert error(found, subject.full_runs(trials)) < CLOSE


@pytest.mark.parametrize(
    "subject",
    [
        *(Subject(f, attention="eager") for f in ("llava", "gemma3")),
        *(Subject(f, even=True) for f in ("llava", "qwen2_vl", "internvl")),
        *(Subject(f, side="right") for f in ("llava", "gemma3", "qwen2_vl", "paligemma")),
        *(Subject(f, answered=True) for f in ("llava", "gemma3", "qwen2_vl", "paligemma")),
        Subject("llava", side="right", answered=True),
    ],
    ids=lambda s: f"{s.family}-{s.attention}-{s.side}{'-even' * s.even}{'-answered' * s.answered}",
)
def test_other_attention_padding_and_answers_behind_the_prompt(subject):
    run = Run(subject)
    assert run.engine.head is not None
    assert run.found.shape[1] == (3 if subject.answered else 1)
    assert error(run.found, run.wanted) < CLOSE


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_half_precision_is_no_worse_than_a_full_run_in_it(family):
    half, exact = Subject(family, dtype=torch.bfloat16), Subject(family, rounded=True)
    run = Run(half)
    true = exact.full_runs(run.trials)
    ours, full = ((found.float() - true).abs().mean() for found in (run.found, run.wanted))
    assert full > 0
    assert ours < 1.5 * full + ROUNDING * true.abs().max()


def test_passes_of_any_size_give_the_same():
    subject = Subject("llava")
    trials = list(subject.every_kind(0))
    one, many = (engine_runs(subject.engine(trials, tokens=n), trials) for n in (1, 100_000))
    assert error(one, many) < CLOSE
    assert not many.requires_grad


@pytest.fixture
def entered():
    """Counts positions that enter the MLP of every block of a model."""
    handles = []

    def watch(subject: Subject) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, tower in subject.model.towers.items():
            for layer in range(len(tower.blocks)):

                def count(module, args, key=f"{name} {layer}"):
                    counts[key] = counts.get(key, 0) + args[0][..., 0].numel()

                mlp = tower.part(layer, "mlp", "")
                handles.append(mlp.register_forward_pre_hook(count))
        return counts

    yield watch
    for handle in handles:
        handle.remove()


def trial(subject: Subject, hook: str, at: float) -> list[Trial]:
    change: Change = subject.change(hook, 1, at)
    return [Trial(1, (change,))]


def test_attention_before_a_change_in_the_vision_tower_does_not_run():
    subject, ran = Subject("llava"), {}
    for name in ("hook_resid_pre", "attn.hook_z"):
        trials = trial(subject, f"vision.blocks.1.{name}", 0.5)
        engine = subject.engine(trials, tokens=900)
        with FlopCounterMode(display=False) as counter:
            engine_runs(engine, trials)
        ran[name] = counter.get_total_flops()
        assert torch.ops.aten.convolution not in counter.get_flop_counts()["Global"]
    tower = subject.model.towers["vision"]
    weights = sum(tower.linear(1, name).weight.numel() for name in "qkv")
    skipped = 2 * weights * seen_positions(subject.batch.layout)
    assert ran["hook_resid_pre"] - ran["attn.hook_z"] >= skipped


def test_what_a_change_cannot_reach_does_not_run(entered):
    subject = Subject("llava")
    trials = trial(subject, "blocks.1.hook_resid_pre", 0.8)
    engine = subject.engine(trials, tokens=900)
    counts = entered(subject)
    engine_runs(engine, trials)
    reached = subject.batch.input_ids.shape[1] - trials[0].changes[0].position
    assert counts == {"language 1": reached, "language 2": 1}


def test_blocks_of_the_vision_tower_before_a_change_do_not_run(entered):
    subject = Subject("llava")
    trials = trial(subject, "vision.blocks.1.hook_mlp_out", 0.5)
    engine = subject.engine(trials, tokens=900)
    counts = entered(subject)
    engine_runs(engine, trials)
    first = subject.batch.layout.positions("image", 1)[0]
    reached = subject.batch.input_ids.shape[1] - first
    assert "vision 0" not in counts
    assert counts["vision 1"] > 0
    assert {key: n for key, n in counts.items() if key.startswith("language")} == {
        "language 0": reached,
        "language 1": reached,
        "language 2": 1,
    }
    assert hooks_of(trials) == tuple(engine.spots)

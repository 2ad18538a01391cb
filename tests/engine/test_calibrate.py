"""How many tokens a pass holds follows from what passes of several sizes take."""

from __future__ import annotations

import pytest
import torch
from full_runs import Change, Subject, Trial

from mechmm.engine import calibrate
from mechmm.engine.calibrate import SIZES, calibrated


@pytest.fixture
def engine():
    subject = Subject("llava")
    change = subject.change("blocks.1.hook_resid_pre", 0, 0.5)
    assert isinstance(change, Change)
    return subject.engine([Trial(0, (change,))], tokens=900)


def chosen(engine, monkeypatch, each):
    """The size that is chosen where a token takes so long in passes of these sizes."""

    def seconds(model, recording, head, plains, size):
        if each[size] is None:
            raise torch.OutOfMemoryError
        return each[size]

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    monkeypatch.setattr(calibrate, "_most", lambda model, recording, sums: max(each))
    return calibrated(engine.model, engine.recording, engine.head, engine.plains)


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ((4.0, 3.0, 2.0, 1.0), 768),
        ((4.0, 3.0, 2.98, 2.97), 384),
        ((1.0, 1.0, 1.0, 1.0), 256),
        ((4.0, 3.0, None), 384),
        ((None,), 256),
    ],
    ids=["larger is faster", "hardly", "all alike", "no memory", "no memory at all"],
)
def test_the_smallest_of_the_fastest_sizes_is_chosen(engine, monkeypatch, times, wanted):
    assert chosen(engine, monkeypatch, dict(zip(SIZES, times, strict=False))) == wanted


def test_a_pass_takes_no_more_memory_than_what_is_recorded(engine):
    recording = engine.recording
    state = sum(b.stream.numel() + b.keys.numel() + b.values.numel() for b in recording.blocks)
    assert recording.numbers == state, "a hook that is a stream counts once"
    for sums, streams in ((False, 10), (True, 8)):
        most = calibrate._most(engine.model, recording, sums)
        assert 0 < most * streams * engine.model.cfg.d_model <= state
    assert calibrated(engine.model, recording, engine.head, engine.plains) in SIZES
    assert calibrated(engine.model, recording, None, engine.plains) == calibrate.DEFAULT

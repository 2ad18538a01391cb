"""A headline that asks in vain costs no result: it is mended, and read anew."""

from __future__ import annotations

import json

import pytest
from small import CONFIG, contents

import mechmm as mm
from mechmm.runs import mending, runner
from mechmm.runs.command import run_command
from mechmm.runs.headlines import HeadlineError
from mechmm.runs.paths import RunError
from mechmm.runs.place import ConfigError

WRONG = """
[[headlines]]
name = "at layer 2"
step = "exit"
column = "efect"
where = { layer = 77 }
"""
RIGHT = ['headlines.at layer 2.column="agreement"', "headlines.at layer 2.where.layer=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("mended") / "demo.toml"
    path.write_text(CONFIG.replace("\n[engine]", f"{WRONG}\n[engine]"))
    return path


@pytest.fixture(scope="module")
def whole(config):
    return contents(mm.runs.run(config, config.parent / "whole", RIGHT).folder)


@pytest.fixture
def out(config, tmp_path):
    """A run whose steps are done, and that has not ended."""
    folder = tmp_path / "out"
    with pytest.raises(HeadlineError):
        mm.runs.run(config, folder, [RIGHT[0]])
    return folder


def test_only_headlines_are_computed_anew(config, whole, monkeypatch, capsys):
    folder = config.parent / "anew"
    assert run_command(str(config), [], folder, None) == 1
    first, *_, last = capsys.readouterr().err.split("mechmm: ")[1:]
    assert "'at layer 2'" in first
    assert "has no column 'efect'; it has layer, agreement" in first
    assert first.rstrip().endswith("(the run goes on)")
    assert f"mechmm run --resume {folder} 'headlines.at layer 2.column=VALUE'" in last
    assert mm.runs.open(folder).steps == ("exit", "said")
    monkeypatch.setattr(runner, "load_model", None)
    assert run_command(RIGHT[0], [], None, folder) == 1
    said = capsys.readouterr().err
    assert "has no row with layer = 77; there is -1, 0, 1" in said
    assert "'headlines.at layer 2.where.layer=VALUE'" in said
    assert run_command(RIGHT[1], [], None, folder) == 0
    assert contents(folder) == whole


def test_killed_while_it_is_mended_it_can_be_mended_again(whole, out, monkeypatch):
    write = mending.write_whole

    for writes in range(3):
        left = iter([True] * writes)

        def dying(path, data, left=left):
            next(left)
            return write(path, data)

        monkeypatch.setattr(mending, "write_whole", dying)
        with pytest.raises(StopIteration):
            mm.runs.resume(out, [f"headlines.1.where.layer={70 + writes}"])
        monkeypatch.undo()
        with pytest.raises(HeadlineError, match="there is -1, 0, 1"):
            mm.runs.resume(out)
    mm.runs.resume(out, [RIGHT[1]])
    record = json.loads((out / "resolved.json").read_text())
    assert record["overrides"][0] == RIGHT[0]
    assert record["overrides"][-1] == RIGHT[1]
    assert contents(out)["headlines.json"] == whole["headlines.json"]


NOT = (
    ("pairs.color.n=3", RunError, "other headlines, not another pairs.color.n"),
    ("steps.exit.method=answers", RunError, r"not another steps\[0\].method"),
    ("headlines.1.stp=exit", ConfigError, "unknown key; did you mean `step`"),
    ("headlines.none.step=exit", ConfigError, "has no 'none'"),
    ("headlines.1.where.layer=[1, 2]", ConfigError, "must be one value or a comparison"),
)


def test_nothing_else_can_be_mended(out):
    before = contents(out)
    for override, error, message in NOT:
        with pytest.raises(error, match=message):
            mm.runs.resume(out, [override])
    assert contents(out) == before


def test_a_finished_run_keeps_its_headlines(config, whole):
    with pytest.raises(RunError, match="is finished; run its config anew"):
        mm.runs.resume(config.parent / "whole", RIGHT)
    assert contents(config.parent / "whole") == whole

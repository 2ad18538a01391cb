"""The command line, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import mechmm as mm
from mechmm import cli
from mechmm.data import shapes
from mechmm.zoo.recipe import build_model, save

run = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that `from_pretrained` loads."""
    path = tmp_path_factory.mktemp("model")
    save(build_model().eval(), path)
    return path


@pytest.fixture(scope="module")
def pairs_folder(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs"
    model = mm.HookedMultimodal.from_pretrained(folder)
    shapes.pairs(model, "color", 3, seed=0).save(path)
    return path


@pytest.mark.parametrize(
    "words", [[], ["demo"], ["info"], ["audit"], ["patch"], ["zoo"], ["zoo", "evaluate"]]
)
def test_help_explains_itself(words):
    answer = run.invoke(cli.app, [*words, "--help"])
    assert answer.exit_code == 0
    assert "Usage" in answer.output


def test_info(folder):
    table = run.invoke(cli.app, ["info", str(folder)])
    assert table.exit_code == 0
    assert "vision" in table.output
    assert "blocks.0.attn.hook_pattern" in table.output
    found = json.loads(run.invoke(cli.app, ["info", str(folder), "--json"]).stdout)
    assert found["towers"]["language"]["n_layers"] == 6
    assert "vision.blocks.3.attn.hook_pattern" in found["hooks"]


def test_audit_reports_no_dead_hook(folder):
    answer = run.invoke(cli.app, ["audit", str(folder), "--json"])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)
    assert {row["status"] for row in rows} <= {"live", "unused by this model"}


def test_patch_writes_numbers_and_a_report(folder, pairs_folder, tmp_path):
    out = tmp_path / "out"
    words = ["patch", "--model", folder, "--pairs", pairs_folder, "--out", out]
    words += ["--sites", "residual,projector", "--spans", "object,last", "--json"]
    answer = run.invoke(cli.app, [str(word) for word in words])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)
    assert len(rows) == 4 + 2 * 6 + 1
    loaded = mm.Patching.load(out / "result")
    assert loaded.values.shape == (len(rows), 3)
    assert "Patching pairs" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sites": "residual,thoughts"}, "unknown sites ['thoughts']"),
        ({"--metric": "joy"}, "unknown metric 'joy'"),
        ({"--direction": "sideways"}, "unknown direction 'sideways'"),
        ({"--spans": "bus"}, "unknown span 'bus'"),
        ({"--pairs": "nowhere"}, "pairs.jsonl"),
        ({"--model": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    folder, pairs_folder, tmp_path, monkeypatch, capsys, change, message
):
    out = tmp_path / "out"
    words = {
        "--model": folder,
        "--pairs": pairs_folder,
        "--out": out,
        "--sites": "residual",
    } | change
    flat = [str(part) for item in words.items() for part in item]
    monkeypatch.setattr(sys, "argv", ["mechmm", "patch", *flat])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_output_folder_in_use_is_refused(folder, pairs_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    words = ["--model", folder, "--pairs", pairs_folder, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["mechmm", "patch", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_help_does_not_import_torch():
    code = "import sys; from mechmm import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

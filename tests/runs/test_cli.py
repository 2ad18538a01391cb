"""The command line, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

import mechmm as mm
from mechmm import cli
from mechmm.data import shapes
from mechmm.runs import patch as patch_runs
from mechmm.runs.patch import bytes_of
from mechmm.runs.terminal import progress
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
        ({"--budget": "lots"}, "'lots' is no number of bytes; write for example 800MB"),
        ({"--state": "moon"}, "unknown state 'moon'; use device, cpu, disk"),
        ({"--screen": "5"}, "keep is 5.0, but a screen keeps a share of sites in (0, 1]"),
        ({"--screen": "0.5", "--metric": "accuracy"}, "the metric accuracy has no gradient"),
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


@pytest.mark.parametrize(
    ("text", "size"),
    [("800", 800), ("2GB", 2 * 10**9), ("1.5 GiB", 1536 * 2**20), ("40mb", 40 * 10**6)],
)
def test_budgets_have_units(text, size):
    assert bytes_of(text) == size


def test_plan_says_what_would_run_and_ends(folder, pairs_folder, monkeypatch):
    monkeypatch.setattr(patch_runs, "patch", None)  # nothing may be patched
    words = ["patch", "--model", folder, "--pairs", pairs_folder, "--plan", "--budget", "1GB"]
    words = [str(word) for word in [*words, "--sites", "residual"]]
    answer = run.invoke(cli.app, words)
    assert answer.exit_code == 0, answer.output
    assert "forward passes" in answer.output
    facts = json.loads(run.invoke(cli.app, [*words, "--json"]).stdout)
    null = 20 * (1 + 3)  # vision: image; language: image, question, last
    assert facts["cells"] == 3 * (4 + 3 * 6 + null)
    assert facts["passes"] > 0


def test_a_folder_is_needed_unless_it_is_a_plan(folder, pairs_folder, monkeypatch, capsys):
    words = ["patch", "--model", folder, "--pairs", pairs_folder]
    monkeypatch.setattr(sys, "argv", ["mechmm", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "patch needs --out" in capsys.readouterr().err


def test_screened_run(folder, pairs_folder, tmp_path):
    out = tmp_path / "out"
    words = ["patch", "--model", folder, "--pairs", pairs_folder, "--out", out, "--screen", "0.1"]
    words += ["--sites", "heads", "--state", "cpu", "--tokens", "2000", "--budget", "1GB"]
    answer = run.invoke(cli.app, [str(word) for word in words])
    assert answer.exit_code == 0, answer.output
    assert "exact" in answer.stdout
    loaded = mm.Patching.load(out / "result")
    assert loaded.exact.sum() == round(0.1 * len(loaded.sites)) + 20
    assert "Attribution patching chose" in (out / "report.html").read_text()


def test_an_interrupted_run_is_written(folder, pairs_folder, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(label):
        def report(done, total):
            raise KeyboardInterrupt

        yield report

    monkeypatch.setattr(patch_runs, "progress", interrupting)
    out = tmp_path / "out"
    words = ["patch", "--model", folder, "--pairs", pairs_folder, "--out", out, "--json"]
    answer = run.invoke(cli.app, [str(word) for word in words])
    assert answer.exit_code == 130
    loaded = mm.Patching.load(out / "result")
    said = f"interrupted, {loaded.missing} cells are missing; the others are in {out}"
    assert said in answer.stderr
    assert len(json.loads(answer.stdout)) == len(loaded.sites)
    assert "the run was interrupted" in (out / "report.html").read_text()


def test_progress_shows_per_cent(capsys):
    with progress("patching") as report:
        report(250, 1000)
    shown = capsys.readouterr().err
    assert "25%" in shown
    assert "1000" not in shown


def test_an_output_folder_in_use_is_refused(folder, pairs_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    words = ["--model", folder, "--pairs", pairs_folder, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["mechmm", "patch", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_an_output_folder_that_cannot_be_made_is_refused_before_the_work(
    folder, pairs_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(patch_runs, "patch", None)  # nothing may be patched
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        words = ["--model", folder, "--pairs", pairs_folder, "--out", out]
        monkeypatch.setattr(sys, "argv", ["mechmm", "patch", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert str(tmp_path / "file") in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = "import sys; from mechmm import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

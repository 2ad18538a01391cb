"""A run is run again from its folder alone: the same numbers, or where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mechmm.cli import app
from mechmm.results.result import Result
from mechmm.runs import manifest, replaying
from mechmm.runs.archive import pack, unpack
from mechmm.runs.difference import environment
from mechmm.runs.paths import RunError
from mechmm.runs.replaying import RELATIVE, print_replay, replay
from mechmm.runs.runner import run
from mechmm.runs.verification import verify
from mechmm.zoo.recipe import build_model, save

CONFIG = """
format = 1
name = "objects"
[model]
name = "model"
[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 2
[[steps]]
name = "patched"
method = "patch"
sites = { kind = "residual", spans = ["last"], layers = [1] }
n_null = 0
[[headlines]]
name = "effect"
step = "patched"
column = "effect"
[engine]
chunk = 1
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run and its model, in two folders side by side."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    save(build_model().eval(), home / "model")
    (home / "config.toml").write_text(CONFIG)
    return run(home / "config.toml", home / "run").folder


@pytest.fixture
def folder(first, tmp_path):
    """A copy of it that may be changed, with its model."""
    shutil.copytree(first.parent, tmp_path / "home")
    return tmp_path / "home" / "run"


def seal(folder, **changed):
    """Write a manifest that fits changed files."""
    known = json.loads((folder / "manifest.json").read_text())
    found = {**known, "outputs": manifest.outputs(folder), **changed}
    (folder / "manifest.json").write_text(json.dumps(found))


def test_an_archive_with_weights_gives_the_same_numbers_anywhere(first, tmp_path):
    archive = pack(first, tmp_path / "run.zip", weights=first.parent / "model")
    back = unpack(archive, tmp_path / "elsewhere" / "run")
    found = replay(back, tmp_path / "again")
    assert found.relative == 0
    assert found.agrees
    assert found.difference.same
    assert len(found.difference.values) > 10
    assert not len(found.difference.versions)
    assert verify(tmp_path / "again").ok


def test_a_forged_number_is_found_though_the_folder_verifies(folder):
    place = folder / "results" / "patched"
    result = Result.load(place)
    result.values[0, 1] *= 1.01
    shutil.rmtree(place)
    result.save(place)
    seal(folder, python="3.0.0")  # on another version numbers need only be near
    assert verify(folder).ok
    answer = CliRunner().invoke(app, ["replay", str(folder), "--json"])
    assert answer.exit_code == 1
    found = json.loads(answer.stdout)
    assert found["agrees"] is False
    assert found["relative"] == RELATIVE
    assert [row["key"] for row in found["versions"]] == ["python"]
    (row,) = (row for row in found["values"] if not row["same"])
    assert (row["step"], row["field"], row["where"]) == ("patched", "values", "[0, 1]")


def test_a_forged_headline_is_found_though_the_folder_verifies(folder):
    path = folder / "headlines.json"
    (head,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**head, "value": head["value"] + 0.01}]))
    seal(folder, python="3.0.0")  # on another version numbers need only be near
    assert verify(folder).ok
    found = replay(folder)
    assert not found.agrees
    assert found.difference.values["same"].all()
    assert found.as_json()["agrees"] is False


def test_a_folder_without_what_is_made_anew_is_replayed(folder):
    """Pairs are made from the config; of the result its table is left."""
    for name in ("report.html", "figures", "pairs", "results/patched"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not verify(folder).ok
    found = replay(folder)
    assert found.agrees
    assert found.difference.same
    assert "report.html" in found.absent
    assert set(found.difference.values["field"].str.partition(".")[0]) == {"table"}
    (folder / "headlines.json").unlink()
    with pytest.raises(RunError, match=r"(?s)does not verify.*\bmissing: headlines\.json"):
        replay(folder)


def test_pairs_that_come_out_otherwise_are_refused(folder):
    shutil.rmtree(folder / "pairs")
    known = json.loads((folder / "manifest.json").read_text())
    pairs = {"color": {**known["pairs"]["color"], "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps({**known, "pairs": pairs}))
    with pytest.raises(RunError, match="the pairs color come out otherwise here"):
        replay(folder)


def test_another_model_is_refused_before_it_runs(folder):
    file = folder.parent / "model" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(
        RunError, match=r"config\.json has the SHA-256 \w{64}, the run's had \w{64}"
    ):
        replay(folder)
    answer = CliRunner().invoke(app, ["replay", str(folder)])
    assert answer.exit_code == 1
    assert "is not the one that ran" in answer.stderr


def test_another_number_of_threads_is_said(folder, capsys):
    seal(folder, threads=77)
    found = replay(folder)
    assert (found.relative, found.elsewhere, found.threads) == (RELATIVE, ("threads",), 77)
    print_replay(found)
    said = capsys.readouterr().out
    assert "not as the run had it: threads\n" in said
    assert "with OMP_NUM_THREADS=77 all numbers" in said


def test_a_manifest_from_before_processors_were_noted_is_compared_in_the_rest(folder):
    known = json.loads((folder / "manifest.json").read_text())
    known.pop("processor")
    (folder / "manifest.json").write_text(json.dumps(known))
    found = replay(folder)
    assert found.agrees
    assert (found.relative, found.elsewhere) == (0, ())


def test_another_checkpoint_is_refused_before_any_step(folder, monkeypatch):
    known = {"early": "0" * 64}
    seal(folder, checkpoints=known)
    monkeypatch.setattr(replaying, "checkpoints", lambda config: {"early": {"a": "b"}})
    monkeypatch.setattr(replaying, "run", None)
    with pytest.raises(RunError, match="the checkpoint early is not the one that ran"):
        replay(folder)
    record = json.loads((folder / "manifest.json").read_text())
    assert environment(record)["checkpoints.early.sha256"] == "0" * 64


def test_a_model_that_is_not_there_is_asked_for(folder, tmp_path):
    alone = tmp_path / "alone"
    shutil.move(folder, alone)
    with pytest.raises(RunError, match="cannot load the model 'model': it is no local folder"):
        replay(alone)
    with pytest.raises(RunError, match="there is no model in"):
        replay(alone, model=tmp_path)


def test_what_does_not_verify_is_not_replayed(folder):
    (folder / "headlines.json").write_text("[]")
    with pytest.raises(RunError, match=r"does not verify.*\bchanged: headlines\.json"):
        replay(folder)
    with pytest.raises(FileNotFoundError, match="is no run"):
        replay(folder.parent)
    (folder / "manifest.json").write_text('{"format": 9, "mechmm": "2.0"}')
    answer = CliRunner().invoke(app, ["replay", str(folder)])
    assert answer.exit_code == 1
    assert "written by mechmm 2.0 in format 9" in answer.stderr


@pytest.mark.slow
def test_a_committed_finding_is_found_again():
    experiments = Path(__file__).parents[2] / "experiments"
    assert replay(experiments / "where_sight_enters" / "results").agrees

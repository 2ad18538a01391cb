"""An experiment's results: interrupted, gone on with, and never without the old ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made import write_run

from mechmm.runs import experiment as experiments
from mechmm.runs.experiment import experiment, renewed
from mechmm.runs.runner import Interrupted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment whose runs take no time."""

    def made(kind: str):
        def make(*places: Path) -> None:
            shutil.rmtree(places[-1], ignore_errors=True)
            write_run(places[-1], notes=[kind])

        return make

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").write_text('name = "made"\n')
    monkeypatch.setattr(experiments, "run", made("run"))
    monkeypatch.setattr(experiments, "resume", made("resumed"))
    return tmp_path


def notes(folder: Path) -> list[str]:
    return json.loads((folder / "results" / "manifest.json").read_text())["notes"]


def test_an_interrupted_run_of_the_same_config_goes_on(folder: Path) -> None:
    config = folder / "configs" / "demo.toml"
    write_run(folder / "results.partial", state="running")
    renewed(folder, config)
    assert notes(folder) == ["resumed"]
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []
    write_run(folder / "results.partial", state="running")
    config.write_text('name = "another"\n')
    renewed(folder, config)
    assert notes(folder) == ["run"]


def test_old_results_are_never_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rename = folder / "configs" / "demo.toml", Path.rename
    write_run(folder / "results", notes=["old"])

    def fails(path: Path, target: Path) -> Path:
        if path.name == "results.partial":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="gone"):
        renewed(folder, config)
    assert (folder / "results.old.partial" / "manifest.json").is_file()
    assert (folder / "results.partial" / "manifest.json").is_file()


@pytest.mark.parametrize(("said", "shown"), [("go on with it", "go on with it"), ("", "interr")])
def test_an_interruption_has_its_own_exit_code(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: str,
    shown: str,
) -> None:
    def stops(*_: Path) -> None:
        raise Interrupted(said) if said else KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", stops)
    assert experiment(folder, arguments=[]) == 130
    assert shown in capsys.readouterr().err

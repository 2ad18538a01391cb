"""Every experiment runs on few pairs, and what is committed is of the committed config."""

import json
import re
from pathlib import Path

import pytest

from mechmm.runs.config import load
from mechmm.runs.experiment import BEGIN, END, experiment, headline_table
from mechmm.runs.folder import Run
from mechmm.runs.paths import GIVEN
from mechmm.runs.runner import run

ROOT = Path(__file__).parents[2] / "experiments"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/run.py"))
CONFIGS = sorted(ROOT.glob("*/configs/*.toml"))


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("config", CONFIGS, ids=_named)
def test_config_is_one(config: Path) -> None:
    found = load(config)
    assert found.name.startswith(config.parents[1].name)
    assert found.question
    assert found.prediction
    assert any(one.expect for one in found.headlines)


@pytest.mark.parametrize("folder", FOLDERS, ids=_named)
def test_smoke_config_runs(folder: Path, tmp_path: Path) -> None:
    config = load(folder / "configs" / "smoke.toml")
    demo = load(folder / "configs" / "demo.toml")
    found = run(config, tmp_path / "run")
    assert found.finished
    assert found.headlines["value"].notna().all()
    assert list(found.headlines["name"]) == [one.name for one in config.headlines]
    assert [one.method for one in config.steps] == [one.method for one in demo.steps]


@pytest.mark.parametrize("folder", FOLDERS, ids=_named)
def test_what_is_committed_is_of_the_demo_config(folder: Path) -> None:
    found = Run.open(folder / "results")
    assert found.finished
    assert (folder / "results" / GIVEN).read_bytes() == (folder / "configs/demo.toml").read_bytes()
    readme = (folder / "README.md").read_text()
    table = re.search(f"{BEGIN}\n(.*)\n{END}", readme, re.DOTALL)
    assert table is not None
    assert table[1] == headline_table(found.headlines)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (folder / picture).is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=_named)
def test_log_has_the_run(folder: Path) -> None:
    from mechmm.runs.experiment import run_id

    assert f"| {run_id(Run.open(folder / 'results'))} |" in (ROOT / "LOG.md").read_text()


def test_other_configs_do_not_replace_what_is_committed(capsys) -> None:
    folder = FOLDERS[0]
    before = json.loads((folder / "results" / "manifest.json").read_text())
    assert experiment(folder, arguments=["smoke"]) == 1
    assert "--out" in capsys.readouterr().err
    assert json.loads((folder / "results" / "manifest.json").read_text()) == before

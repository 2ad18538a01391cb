"""Verifying a run's folder and comparing two, against changes made on purpose."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from made import measured, seal, write_run
from typer.testing import CliRunner

from mechmm.cli import app
from mechmm.runs.compare import compare
from mechmm.runs.difference import diff
from mechmm.runs.paths import RunError
from mechmm.runs.verification import verify


def test_a_run_as_it_was_verifies(tmp_path):
    run = write_run(tmp_path / "run")
    found = verify(run)
    assert found.ok
    assert found.checked == 7
    (run / ".lock").write_text("")
    assert verify(run).ok


def test_every_file_that_differs_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    arrays = run / "results" / "objects" / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"\x00\x01"[-1:])
    (run / "config.toml").unlink()
    (run / "notes.txt").write_text("mine")
    found = verify(run)
    assert found.changed == ("results/objects/arrays.safetensors",)
    assert found.missing == ("config.toml",)
    assert found.extra == ("notes.txt",)
    assert not found.ok
    assert "missing: config.toml" in str(found)


def test_a_link_is_not_the_file(tmp_path):
    run = write_run(tmp_path / "run")
    kept = tmp_path / "kept"
    (run / "config.toml").rename(kept)
    (run / "config.toml").symlink_to(kept)
    assert verify(run).changed == ("config.toml",)


def test_an_unfinished_run_does_not_verify(tmp_path):
    run = write_run(tmp_path / "run", state="running")
    assert not verify(run).ok
    assert "--resume" in str(verify(run))


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ('{"format": 2, "mechmm": "9"}', "format 2; this mechmm reads up to 1: update it"),
        ('{"format": 1', "damaged"),
        ("[]", "damaged"),
        ("[" * 100_000, "damaged"),
        (
            '{"format": 1, "mechmm": "0", "name": "x", "state": "finished", "outputs": []}',
            "'outputs' is no dict",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, manifest, said):
    (tmp_path / "manifest.json").write_text(manifest)
    for ask in (verify, lambda folder: diff(folder, folder)):
        with pytest.raises(RunError, match=said):
            ask(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no manifest\.json"):
        verify(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no run"):
        verify(tmp_path / "none")


# Comparing -----------------------------------------------------------------------------------


def test_a_run_does_not_differ_from_itself(tmp_path):
    run = write_run(tmp_path / "run")
    found = diff(run, run)
    assert found.same
    assert set(found.values["field"]) == {
        "class", "effects", "curve.share", "curve.kind", "labels", "table.label", "table.value",
    }  # fmt: skip


def test_every_difference_is_found_and_placed(tmp_path):
    effects = measured().effects.clone()
    effects[1, 2] += 0.01
    curve = measured().curve.assign(kind=["a", "b", "d"])
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other", measured(effects=effects, curve=curve), packages={"torch": "2.14.0"}
    )
    (other / "resolved.json").write_text(
        (other / "resolved.json").read_text().replace(": 0", ": 7")
    )
    seal(other, packages={"torch": "2.14.0"})
    found = diff(one, other)
    rows = found.values.set_index("field")
    assert rows.loc["effects", "where"] == "[1, 2]"
    assert rows.loc["effects", "largest"] == pytest.approx(0.01, abs=1e-6)
    assert rows.loc["effects", "relative"] == pytest.approx(0.01 / 5.01, abs=1e-6)
    assert rows.loc["curve.kind", "second"] == "d"
    assert set(rows.index[~rows["same"]]) == {"effects", "curve.kind", "table.value"}
    assert found.settings.values.tolist() == [["seed", "0", "7"]]
    assert found.versions["key"].tolist() == ["packages.torch", "packages.transformers"]
    assert not found.agrees(0.1)  # texts differ
    assert json.loads(json.dumps(found.as_json()))["same"] is False


def test_numbers_may_agree_within_a_share_of_the_largest(tmp_path):
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", measured(effects=measured().effects + 1e-4))
    found = diff(one, other)
    assert found.agrees(2e-4)  # the headline is that far from 1
    assert not found.agrees(1e-6)
    assert not found.same
    assert found.headlines.loc[0, "difference"] == pytest.approx(1e-4, rel=1e-3)


def test_steps_and_fields_of_one_run_only_are_named(tmp_path):
    one, other = (write_run(tmp_path / name) for name in ("one", "other"))
    measured().save(other / "results" / "more")
    seal(other)
    found = diff(one, other)
    assert not found.agrees(1.0)
    assert set(found.differing()["why"]) == {"only in the second run"}
    assert set(found.differing()["step"]) == {"more"}


@pytest.mark.parametrize(
    ("a", "b", "same", "relative"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.nan, np.inf], True, 0.0),
        ([1.0, np.nan], [1.0, 2.0], False, np.inf),
        ([1.0, np.inf], [1.0, -np.inf], False, np.inf),
        ([0.0, 0.0], [-0.0, 0.0], True, 0.0),
        ([0.0, 8.0], [1.0, 8.0], False, 0.125),
        ([1.0, 2.0], [1.0, 2.0, 3.0], False, np.inf),
        ([True, False], [True, True], False, np.inf),
        ([], [], True, 0.0),
    ],
)
def test_arrays_are_compared_by_their_largest_value(a, b, same, relative):
    found = compare(np.array(a), np.array(b))
    assert found["same"] == same
    assert found["relative"] == relative


def test_half_precision_is_compared_too(tmp_path):
    half = measured(effects=torch.ones(2, 3, dtype=torch.bfloat16))
    one = write_run(tmp_path / "one", half)
    assert diff(one, write_run(tmp_path / "other", half)).same


def test_a_damaged_result_is_named(tmp_path):
    one, other = (write_run(tmp_path / name) for name in ("one", "other"))
    (other / "results" / "objects" / "arrays.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"result in .*other/results/objects is damaged"):
        diff(one, other)
    (one / "resolved.json").write_text("{")
    with pytest.raises(RunError, match=r"resolved\.json is missing or damaged"):
        diff(one, other)


def test_tables_with_missing_values_are_equal_to_themselves(tmp_path):
    curve = pd.DataFrame({"share": [0.0, np.nan, 1.0], "kind": ["a", "b", "c"]})
    run = write_run(tmp_path / "run", measured(curve=curve))
    assert diff(run, run).same


@pytest.mark.parametrize(
    ("changed", "agrees"),
    [
        ({"value": 1.0 + 5e-5}, True),
        ({"value": 1.1}, False),
        ({"value": None}, False),
        ({"value": True}, True),
        ({"value": 10**400}, False),
        ({"low": 0.5}, False),
        ({"agrees": False}, False),
        ({"agrees": None}, False),
        ({"name": "another"}, False),
    ],
)
def test_headlines_have_to_agree_too(tmp_path, changed, agrees):
    one, other = (write_run(tmp_path / name) for name in ("one", "other"))
    (head,) = json.loads((one / "headlines.json").read_text())
    (one / "headlines.json").write_text(json.dumps([head]))
    (other / "headlines.json").write_text(json.dumps([{**head, **changed}]))
    found = diff(one, other)
    assert found.agrees(1e-4) == agrees
    assert found.same == (changed == {"value": True})
    assert json.dumps(found.as_json())


def test_a_headline_that_comes_twice_hides_none(tmp_path):
    one, other = (write_run(tmp_path / name) for name in ("one", "other"))
    (head,) = json.loads((one / "headlines.json").read_text())
    (other / "headlines.json").write_text(json.dumps([{**head, "value": 9.0}, head]))
    assert not diff(one, other).agrees(1e-4)
    (other / "headlines.json").write_text('["no"]')
    with pytest.raises(RunError, match=r"headlines\.json is not what a run writes"):
        diff(one, other)


# From the shell ------------------------------------------------------------------------------

shell = CliRunner()


def test_the_shell_says_what_differs_and_by_exit_code(tmp_path):
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", measured(effects=measured().effects + 1e-4))
    assert shell.invoke(app, ["verify", str(one)]).exit_code == 0
    alike = shell.invoke(app, ["diff", str(one), str(one)])
    assert alike.exit_code == 0
    assert "1 of 1 headlines are equal" in alike.output
    assert "Headlines that differ" not in alike.output
    (head,) = json.loads((one / "headlines.json").read_text())
    (other / "headlines.json").write_text(json.dumps([{**head, "value": 9.0}]))
    seal(other)
    answer = shell.invoke(app, ["diff", str(one), str(other)])
    assert answer.exit_code == 1
    assert "effects" in answer.output
    assert "Headlines that differ" in answer.output
    assert "0 of 1 headlines are equal" in answer.output
    found = shell.invoke(app, ["diff", str(one), str(other), "--json"])
    assert found.exit_code == 1
    assert [r["field"] for r in json.loads(found.stdout)["values"] if not r["same"]] == [
        "effects", "table.value",
    ]  # fmt: skip
    (one / "config.toml").unlink()
    gone = shell.invoke(app, ["verify", str(one), "--json"])
    assert gone.exit_code == 1
    assert json.loads(gone.stdout)["missing"] == ["config.toml"]


def test_the_shell_packs_and_unpacks(tmp_path):
    one, file, back = write_run(tmp_path / "one"), tmp_path / "a.zip", tmp_path / "back"
    assert shell.invoke(app, ["pack", str(one), "--out", str(file)]).exit_code == 0
    named = shell.invoke(app, ["pack", str(one), "--model", str(tmp_path)])
    assert named.exit_code == 1
    assert "give --weights, too" in named.output
    small = shell.invoke(app, ["unpack", str(file), "--out", str(back), "--limit", "1kB"])
    assert small.exit_code == 1
    assert "would unpack to" in small.output
    assert not back.exists()
    assert shell.invoke(app, ["unpack", str(file), "--out", str(back)]).exit_code == 0
    assert verify(back).ok

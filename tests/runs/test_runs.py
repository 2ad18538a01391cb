"""Runs in folders: the same bytes again, and after a kill; errors before anything is written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mechmm as mm
from mechmm.data import shapes
from mechmm.results import result as results
from mechmm.runs import manifest, runner, steps
from mechmm.runs.folder import RunError, locked

CONFIG = """\
name = "demo"
model = { name = "mechmm/demo" }

[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 5

[[steps]]
name = "patch"
method = "patch"
sites = { kind = "residual", spans = ["object", "last"], layers = [2], towers = ["language"] }
n_null = 2

[[steps]]
name = "exit"
method = "early_exit"

[[headlines]]
name = "object"
step = "patch"
column = "effect"
where = { span = "object", layer = 2 }
expect = "in [0, 2]"

[engine]
chunk = 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "demo.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(config):
    return mm.runs.run(config, config.parent / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    """All files by relative path, of the manifest what is not about time and place."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if name != ".lock"}
    record = json.loads(found.pop("manifest.json"))
    for name in ("started", "seconds", "peak_memory_bytes", "git", "threads"):
        record.pop(name)
    return {**found, "manifest": json.dumps(record, sort_keys=True).encode()}


def command(*words: object, **options) -> subprocess.Popen:
    code = "from mechmm.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(manifest.machine()["threads"])}
    words = [sys.executable, "-c", code, "run", *map(str, words)]
    return subprocess.Popen(words, env=environment, text=True, stderr=subprocess.PIPE, **options)


def test_a_folder_holds_everything(whole):
    again = mm.runs.open(whole.folder)
    assert again.finished
    assert again.steps == ("patch", "exit")
    assert not (whole.folder / "steps").exists()
    outputs = again.manifest["outputs"]
    assert outputs == manifest.outputs(whole.folder)
    assert {"config.toml", "resolved.json", "headlines.json", "results/patch.csv"} <= set(outputs)
    assert any(name.startswith("figures/patch.") for name in outputs)
    assert again.config.to_dict() == whole.config.to_dict()
    assert again.manifest["model"]["files"]["model.safetensors"]
    assert again.manifest["pairs"]["color"]["n"] == 5


def test_chunks_are_what_one_call_gives(whole):
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    pairs = mm.PairDataset.load(whole.folder / "pairs" / "color", model)
    sites = mm.sites.residual(model, ["object", "last"], layers=[2], towers=["language"])
    direct = mm.patch(model, pairs, sites, n_null=2, tokens=4096)
    joined = whole.result("patch")
    for name in ("values", "clean", "corrupt", "null"):
        assert getattr(joined, name).numpy() == pytest.approx(
            getattr(direct, name).numpy(), abs=1e-4
        )
    table = whole.table("patch")
    row = table[(table["span"] == "object") & (table["layer"] == 2)].iloc[0]
    (headline,) = whole.headlines.to_dict("records")
    assert headline["value"] == row["effect"]
    assert (headline["low"], headline["high"]) == (row["low"], row["high"])
    assert headline["agrees"] == (0 <= row["effect"] <= 2)
    assert whole.verdict in ("all expectations agree", "some expectations disagree")


def test_nothing_of_the_machine_is_written(whole, config):
    host = re.compile(rb"(?<![\w+/=-])%s(?![\w+/=-])" % re.escape(os.uname().nodename.encode()))
    for name, content in contents(whole.folder).items():
        assert str(config.parent).encode() not in content, name
        assert not host.search(content), name


def test_interrupted_it_says_how_to_go_on(config, whole, monkeypatch, capsys):
    out, usual = config.parent / "interrupted", signal.getsignal(signal.SIGINT)
    words = ["run", str(config), "--out", str(out)]
    run = steps.run_part

    def interrupted(config, step, parts, number, *rest):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return run(config, step, parts, number, *rest)

    monkeypatch.setattr(steps, "run_part", interrupted)
    monkeypatch.setattr(sys, "argv", ["mechmm", *words])
    with pytest.raises(SystemExit) as ended:
        mm_main()
    assert ended.value.code == 130
    assert f"mechmm run --resume {out}" in capsys.readouterr().err
    assert (out / "steps" / "patch" / "00000").is_dir()
    assert signal.getsignal(signal.SIGINT) is usual
    monkeypatch.setattr(steps, "run_part", run)
    assert contents(mm.runs.resume(out).folder) == contents(whole.folder)


def mm_main():
    from mechmm.cli import main

    main()


def test_a_full_disk_leaves_finished_chunks(config, whole, monkeypatch):
    out, write = config.parent / "full", results.write_folder

    def full(folder, record, files):
        if folder.name == "00001":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, record, files)

    monkeypatch.setattr(results, "write_folder", full)
    with pytest.raises(RunError, match="disk is full; finished chunks are intact"):
        mm.runs.run(config, out)
    assert results.Result.load(out / "steps" / "patch" / "00000")
    monkeypatch.setattr(results, "write_folder", write)
    assert contents(mm.runs.resume(out).folder) == contents(whole.folder)


def hold(folder: Path, held, done) -> None:
    with locked(folder):
        held.set()
        done.wait(30)


def test_a_second_process_is_refused(whole):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(whole.folder, held, done))
    other.start()
    assert held.wait(30)
    try:
        with pytest.raises(RunError, match="another process is writing into"):
            mm.runs.resume(whole.folder)
    finally:
        done.set()
        other.join()
    assert mm.runs.resume(whole.folder).finished


@pytest.fixture
def halted(config, tmp_path, monkeypatch):
    """The folder of a run that has just begun."""
    monkeypatch.setattr(runner, "_go", lambda job, scene: mm.runs.open(job.out))
    out = config.parent / tmp_path.name
    mm.runs.run(config, out)
    monkeypatch.undo()
    return out


def test_what_changed_cannot_be_resumed(halted):
    changes = {
        "config.toml": (b'name = "demo"', b'name = "dome"', "config.toml changed"),
        "pairs/color/pairs.jsonl": (b'"foil": "', b'"foil": " ', "pairs in .* changed"),
        "manifest.json": (b'"format": 1', b'"format": 2', "update it"),
    }
    for name, (old, new, message) in changes.items():
        path = halted / name
        before = path.read_bytes()
        assert old in before
        path.write_bytes(before.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            mm.runs.resume(halted)
        path.write_bytes(before)
    record = json.loads((halted / "manifest.json").read_text())
    record["model"]["files"]["config.json"] = "0" * 64
    (halted / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="files of the model mechmm/demo changed"):
        mm.runs.resume(halted)


def test_only_what_was_half_written_is_swept_up_and_only_at_last(halted, whole, monkeypatch):
    own = [halted / ".note", halted / "pairs" / ".git", whole.folder / ".half.0123abcd"]
    half = halted / "pairs" / ".color.0123abcd"
    for folder in (*own, half):
        folder.mkdir()
    monkeypatch.setattr(runner, "_go", lambda job, scene: mm.runs.open(job.out))
    path = halted / "config.toml"
    before = path.read_bytes()
    path.write_bytes(before + b"#")
    with pytest.raises(RunError, match="changed"):
        mm.runs.resume(halted)
    assert half.exists()
    path.write_bytes(before)
    mm.runs.resume(halted)
    mm.runs.resume(whole.folder)
    assert not half.exists()
    assert all(folder.exists() for folder in own)
    own[-1].rmdir()


def test_a_resumed_run_that_fails_stays(halted, monkeypatch):
    def broken(job, *rest):
        raise OSError("no card")

    monkeypatch.setattr(steps, "run_part", broken)
    with pytest.raises(OSError, match="no card"):
        mm.runs.resume(halted)
    assert mm.runs.open(halted).manifest["state"] == "running"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threads", 77, "set OMP_NUM_THREADS=77"),
        ("device", "cuda:0", "began with the device cuda:0, this is"),
        ("dtype", "float64", "began with the dtype float64, this is"),
    ],
)
def test_another_place_cannot_resume(halted, name, value, message):
    record = json.loads((halted / "manifest.json").read_text())
    (halted / "manifest.json").write_text(json.dumps({**record, name: value}))
    with pytest.raises(RunError, match=message):
        mm.runs.resume(halted)


def test_another_processor_is_noted(halted, monkeypatch):
    record = json.loads((halted / "manifest.json").read_text())
    (halted / "manifest.json").write_text(json.dumps({**record, "processor": "abacus"}))
    monkeypatch.setattr(runner, "_go", lambda job, scene: mm.runs.open(job.out))
    (note,) = mm.runs.resume(halted).manifest["notes"]
    assert "began on the processor abacus" in note


def test_the_base_is_absolute(whole, monkeypatch):
    monkeypatch.chdir(whole.folder.parent)
    base = mm.runs.open(whole.folder.name).config.base
    assert base.is_absolute()
    assert base.samefile(whole.folder.parent)


def write(path: Path, old: str, new: str) -> Path:
    assert old in CONFIG
    path.write_text(CONFIG.replace(old, new, 1))
    return path


MADE = 'make = "shapes.pairs"\nkind = "color"\nn = 5'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (MADE, 'folder = "nothing"', "pairs.color: .*does not exist"),
        (MADE, 'folder = "pairs"', "pairs.color: .*is missing or no image"),
        ("n = 5", f'n = 5\nsha256 = "{"0" * 64}"', "pairs.color have the digest"),
        (
            "n = 5",
            'n = 1\nkeep = "flips"\nseed = 0\ncorrupt = { kind = "blur", radius = 0 }',
            "same",
        ),
        ('"mechmm/demo"', f'"mechmm/demo", sha256 = "{"0" * 64}"', "the model mechmm/demo have"),
        ("layers = [2]", "layers = [99]", r"step 'patch' \(patch\): .*not 99"),
        ('["object", "last"]', '["objects", "last"]', r"step 'patch' \(patch\): .*objects"),
        ("layer = 2 }", "layer = 77 }", "no row with layer = 77; there is 2"),
        ('column = "effect"', 'column = "efect"', "no column 'efect'; it has .*effect"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, old, new, message, request):
    if "folder = " in new:
        model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
        shapes.pairs(model, "color", 1).save(tmp_path / "pairs")
        next((tmp_path / "pairs" / "images").iterdir()).unlink()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        mm.runs.run(write(tmp_path / "demo.toml", old, new), out)
    assert out.exists() == ("77" in new or "efect" in new)  # then its steps are done, and stay
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_with_something_in_it_is_refused(config, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        mm.runs.run(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_wrong_command_is_one_line(tmp_path):
    path = write(tmp_path / "demo.toml", "n_null", "n_nul")
    process = command(path, "--out", tmp_path / "out")
    _, said = process.communicate()
    assert process.returncode == 1
    assert said == (
        "mechmm: demo.toml, line 13, steps[0].n_nul: unknown key; did you mean `n_null`?\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("remote", "kept"),
    [
        ("https://user:token@host.org/x/y.git", "https://host.org/x/y.git"),
        ("https://token@host.org/x?private_token=abc", "https://host.org/x"),
        ("ssh://git:secret@host.org:22/x", "ssh://host.org:22/x"),
        ("https://u:p@ss@host.org/x", "https://host.org/x"),
        ("git@github.com:x/y.git", "github.com:x/y.git"),
        ("/home/somebody/repo", "repo"),
        ("file:///home/somebody/repo", "repo"),
        ("", None),
    ],
)
def test_addresses_lose_credentials(remote, kept):
    assert manifest.address(remote) == kept


def test_the_repository_of_the_config_is_recorded(tmp_path):
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "first")
    git("remote", "add", "origin", "https://me:secret@host.org/x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert not manifest.git(tmp_path)["dirty"]
    (tmp_path / "a.txt").write_text("https://me:secret@host.org/x\n")
    found = manifest.git(tmp_path)
    assert found["dirty"]
    assert len(found["commit"]) == 40
    assert "+https://host.org/x" in found["diff"]
    assert "secret" not in json.dumps(found)
    assert manifest.lock_digest(tmp_path) is None

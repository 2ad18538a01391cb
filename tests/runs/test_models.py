"""The commit of a hub model is recorded and used again; what a cache lacks is said at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mechmm as mm
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs import manifest, runner
from mechmm.runs.config import Model
from mechmm.runs.hub import missing
from mechmm.runs.models import load_model
from mechmm.runs.paths import RunError
from mechmm.runs.replaying import replay

COMMIT, LATER = "a" * 40, "b" * 40
CONFIG = """\
name = "demo"
model = { name = "org/tiny" }
pairs.color = { make = "shapes.pairs", kind = "color", n = 1 }
steps = [{ name = "said", method = "answers" }]
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub whose branch `main` is at a commit with the demo model."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "models--org--tiny" / "refs").mkdir(parents=True)
    fill(folder, COMMIT)
    with pytest.MonkeyPatch.context() as patched:
        for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
            patched.setattr(f"{module}.HF_HUB_CACHE", str(folder), raising=False)
        patched.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(folder))
        yield folder / "models--org--tiny"


def fill(folder: Path, commit: str) -> Path:
    demo = manifest.model_folder("mechmm/demo", Path())
    snapshot = folder / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(demo, snapshot, ignore=shutil.ignore_patterns("README.md", "*.jsonl"))
    (folder / "models--org--tiny" / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def moved(hub):
    """Moves a file of the snapshot away for a while."""
    snapshot, away = hub / "snapshots" / COMMIT, hub / "away"
    away.mkdir()
    yield lambda name: (snapshot / name).rename(away / name)
    for path in away.iterdir():
        path.rename(snapshot / path.name)
    away.rmdir()


def test_a_run_stays_with_the_commit_that_it_began_with(hub, tmp_path, monkeypatch):
    path, out = tmp_path / "demo.toml", tmp_path / "out"
    path.write_text(CONFIG)
    monkeypatch.setattr(runner, "_go", lambda job, scene: mm.runs.open(job.out))
    found = mm.runs.run(path, out)
    monkeypatch.undo()
    said = found.manifest["model"]
    assert (said["commit"], said["revision"], found.config.model.revision) == (COMMIT,) * 3
    later = fill(hub.parent, LATER)  # what `main` is now
    config = json.loads((later / "config.json").read_text())
    (later / "config.json").write_text(json.dumps({**config, "image_seq_length": 1}))
    (hub / "snapshots" / COMMIT / "LICENSE.txt").write_text("as you like")
    done = mm.runs.resume(out)
    assert done.finished
    assert load_model(Model("org/tiny"), tmp_path)[1]["commit"] == LATER
    again = replay(out)
    assert again.agrees
    assert again.relative == 0
    weights = hub / "snapshots" / COMMIT / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(RunError, match=r"model\.safetensors has the SHA-256"):
        replay(out)
    weights.write_bytes(before)
    shutil.rmtree(later)
    (hub / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "cannot load the model 'org/tiny': .*nor the cache has its config.json"),
        ("model.safetensors", f"a part of .* the commit {COMMIT}: missing is the weights"),
        ("tokenizer.json", r"missing is the vocabulary \(tokenizer.json\)"),
        ("processor_config.json", "missing is the image processor"),
    ],
)
def test_a_cache_that_is_partly_filled_is_refused(hub, moved, name, message):
    moved(name)
    with pytest.raises(RunError, match=message) as said:
        load_model(Model("org/tiny"), Path())
    assert "hf download org/tiny" in str(said.value)


def test_missing_parts_of_weights_are_named(tmp_path):
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    for name in ("config.json", "processor_config.json", parts["a"]):
        (tmp_path / name).write_text("{}")
    assert missing(tmp_path) == [parts["b"]]
    (tmp_path / parts["b"]).symlink_to(tmp_path / "nothing")
    assert missing(tmp_path) == [parts["b"]]


def test_files_that_the_hub_gives_while_loading_are_hashed(hub, moved, monkeypatch):
    moved("model.safetensors")  # as a look at the config alone leaves a cache
    snapshot = hub / "snapshots" / COMMIT

    class Loaded(HookedMultimodal):
        processor = "any"

    def loaded(name, **options):
        (snapshot / "model.safetensors").write_bytes(b"weights")
        return object.__new__(Loaded)

    monkeypatch.setattr(HookedMultimodal, "from_pretrained", loaded)
    _, facts = load_model(Model("org/tiny"), Path())
    assert {"config.json", "model.safetensors"} <= set(facts["files"])
    load_model(Model("org/tiny", sha256=facts["sha256"]), Path())
    (snapshot / "model.safetensors").unlink()

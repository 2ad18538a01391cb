"""The model's files are hashed as they are when it is loaded."""

from __future__ import annotations

from mechmm.model.hooked import HookedMultimodal
from mechmm.runs import manifest
from mechmm.runs.config import Model
from mechmm.runs.models import load_model


def test_files_that_the_hub_gives_while_loading_are_hashed(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")  # as a look at the config alone leaves a cache

    def loaded(name, **options):
        (snapshot / "model.safetensors").write_bytes(b"weights")
        return object.__new__(HookedMultimodal)

    monkeypatch.setattr(manifest, "model_folder", lambda *place: snapshot)
    monkeypatch.setattr(HookedMultimodal, "from_pretrained", loaded)
    _, facts = load_model(Model("someone/model"), tmp_path)
    assert set(facts["files"]) == {"config.json", "model.safetensors"}
    digest = facts["sha256"]
    (snapshot / "model.safetensors").unlink()
    load_model(Model("someone/model", sha256=digest), tmp_path)

"""The folder of a run, written by hand as the layout says, and archives that mean harm."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.results.result import Result


@dataclass(frozen=True, eq=False)
class Measured(Result):
    """A result with a tensor, a table and texts."""

    effects: Float[Tensor, "site example"] = field(metadata={"axis": -1})
    curve: pd.DataFrame
    labels: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame({"label": self.labels, "value": self.effects.mean(-1).tolist()})


def measured(**changed) -> Measured:
    effects = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    curve = pd.DataFrame({"share": [0.0, 0.5, 1.0], "kind": ["a", "b", "c"]})
    return Measured(**{"effects": effects, "curve": curve, "labels": ("here", "there"), **changed})


def write_run(folder: Path, result: Result | None = None, **manifest) -> Path:
    """A finished run of one step."""
    result = result if result is not None else measured()
    result.save(folder / "results" / "objects")
    result.to_dataframe().to_csv(folder / "results" / "objects.csv", index=False)
    value = float(result.to_dataframe().iloc[0, -1])
    heads = [{"name": "first", "step": "objects", "value": value, "n": 1, "agrees": True}]
    (folder / "headlines.json").write_text(json.dumps(heads))
    asked = "Is it so?"
    config = {
        "name": "made",
        "question": asked,
        "seed": 0,
        "steps": [{"name": "objects", "method": "ablate_tokens"}],
    }
    (folder / "resolved.json").write_text(json.dumps(config))
    (folder / "config.toml").write_text('name = "made"\n')
    seal(folder, headlines=heads, **manifest)
    return folder


def seal(folder: Path, **changed) -> None:
    """Write a manifest that fits the files there are."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    outputs = {str(p.relative_to(folder)): digest(p.read_bytes()) for p in sorted(files)}
    record = {
        "format": 1,
        "mechmm": "0.1.0",
        "name": "made",
        "state": "finished",
        "started": "2026-11-27T10:00:00+00:00",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "python": "3.11.9",
        "model": {"name": "mechmm/demo", "files": {}, "sha256": "0" * 64},
        "pairs": {"color": {"n": 8, "sha256": "1" * 64}},
        "outputs": outputs,
        "headlines": [],
    }
    (folder / "manifest.json").write_text(json.dumps({**record, **changed}))


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def with_entries(archive: Path, *added: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    """An archive with more in it than was packed."""
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        for entry, data in added:
            file.writestr(entry, data)
    return archive


def link(name: str) -> zipfile.ZipInfo:
    """An entry that is a symbolic link."""
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    return entry


def inside(folder: Path) -> dict[str, bytes]:
    """All files by path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}

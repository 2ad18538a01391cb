"""Is the folder of a run what its manifest says? Every file's SHA-256, and no file more or less.

`manifest.json` names every other file of the folder with its SHA-256. Two parts may lie beside
them: `weights/`, the model's files of an archive that holds them, each checked against the
manifest's hashes of the model, and `CITATION.cff`, which is there to be edited and is not checked.
The manifest itself is covered by the digest that `Verification` gives: cite it with the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mechmm.runs.paths import CITATION, FINISHED, LOCK, MANIFEST, WEIGHTS, damaged, read_manifest

BLOCK = 1 << 20


@dataclass(frozen=True)
class Verification:
    """What was found of a run's files.

    Attributes:
        checked: how many files the manifest names.
        missing, extra, changed: paths within the folder, sorted.
        finished: whether the run came to its end.
        digest: SHA-256 of the manifest.
    """

    checked: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    changed: tuple[str, ...]
    finished: bool
    digest: str

    @property
    def ok(self) -> bool:
        """Whether the run is finished and every file is what it was."""
        return self.finished and not (self.missing or self.extra or self.changed)

    def __str__(self) -> str:
        names = {"missing": self.missing, "not of the run": self.extra, "changed": self.changed}
        lines = [f"{what}: {name}" for what, found in names.items() for name in found]
        if not self.finished:
            lines.append("the run is not finished: go on with mechmm run --resume")
        if lines:
            return "\n".join(lines)
        return f"{self.checked} files are what they were; SHA-256 of the manifest: {self.digest}"


def verify(folder: str | Path) -> Verification:
    """Check every file of a run's folder against its manifest.

    Raises:
        FileNotFoundError: the folder is no run.
        RunError: its manifest cannot be read, or its format is newer.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = expected(manifest, folder)
    present = dict(_files(folder))
    beside = {LOCK, MANIFEST, CITATION}
    changed = [n for n, digest in wanted.items() if n in present and not _is(present[n], digest)]
    weights = {n for n in wanted if n.startswith(f"{WEIGHTS}/")}
    if not any(name.startswith(f"{WEIGHTS}/") for name in present):
        wanted = {n: digest for n, digest in wanted.items() if n not in weights}
    return Verification(
        len(wanted),
        tuple(sorted(wanted.keys() - present.keys())),
        tuple(sorted(present.keys() - wanted.keys() - beside)),
        tuple(sorted(changed)),
        manifest["state"] == FINISHED,
        file_digest(folder / MANIFEST),
    )


def expected(manifest: Mapping[str, Any], where: str | Path) -> dict[str, str]:
    """SHA-256 by path within the folder, of what the manifest names and of the model's files.

    Raises:
        RunError: a path that leads out of the folder, or a value that is no SHA-256.
    """
    weights = manifest["model"].get("files", {})
    named = {**manifest["outputs"], **{f"{WEIGHTS}/{name}": d for name, d in weights.items()}}
    for name, digest in named.items():
        if not is_inside(name):
            raise damaged(where, f"it names the path {name!r}")
        if not (isinstance(digest, str) and len(digest) == 64):
            raise damaged(where, f"the hash of {name!r} is {digest!r}")
    return named


def is_inside(name: str) -> bool:
    """Whether a path is relative, plain on every system, and cannot leave its folder."""
    parts = name.split("/")
    odd = any(ord(c) < 32 or c in '\\:*?"<>|' for c in name)
    return (
        not odd
        and len(name) < 1000
        and not any(part in ("", ".", "..") or part != part.rstrip(" .") for part in parts)
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, which need not fit in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, digest: str) -> bool:
    return not path.is_symlink() and path.is_file() and file_digest(path) == digest


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything but folders; links are not followed."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield str(PurePosixPath(path.relative_to(folder))), path

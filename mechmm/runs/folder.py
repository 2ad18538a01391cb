"""The folder of a run: where everything lies, and what can be read from it."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from mechmm.results.result import Result
from mechmm.results.table import table_html
from mechmm.runs import config as configs
from mechmm.runs.config import Config
from mechmm.runs.paths import (
    FINISHED,
    GIVEN,
    HEADLINES,
    LOCK,
    RESOLVED,
    RESULTS,
    RunError,
    read_manifest,
)
from mechmm.runs.place import Place

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names that files and folders have until they are written whole."""


@dataclass(frozen=True)
class Run:
    """A run in its folder; from `mm.runs.open`.

    Attributes:
        folder: where it lies. manifest: what is known of how it was made.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            FileNotFoundError: there is no run.
            RunError: a manifest that cannot be read, or of a newer format.
        """
        return cls(Path(folder), read_manifest(Path(folder)))

    @property
    def config(self) -> Config:
        """What was run, every default filled in.

        Raises:
            ConfigError: a damaged file, or one of a mechmm with other methods.
        """
        raw = json.loads((self.folder / RESOLVED).read_text())
        base = (self.folder / self.manifest.get("base", ".")).absolute()  # workers start elsewhere
        given = (self.folder / GIVEN).read_bytes()
        overrides = tuple(raw.pop("overrides", ()))
        return configs.parse(raw, Place(RESOLVED), base, given, overrides)

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return self.manifest["state"] == FINISHED

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps whose result is there, in order."""
        named = [step["name"] for step in json.loads((self.folder / RESOLVED).read_text())["steps"]]
        return tuple(name for name in named if (self.folder / RESULTS / name).is_dir())

    def result(self, step: str) -> Result:
        """The result of a step.

        Raises:
            RunError: there is none of this name.
            ValueError: it is damaged.
        """
        self._check(step)
        return load_result(self.folder / RESULTS / step)

    def table(self, step: str) -> pd.DataFrame:
        """The table of a step's result."""
        self._check(step)
        return self.result(step).to_dataframe()

    @property
    def headlines(self) -> pd.DataFrame:
        """One row per headline: its value, interval, expectation, and whether they agree."""
        path = self.folder / HEADLINES
        return pd.DataFrame(json.loads(path.read_text()) if path.is_file() else [])

    @property
    def verdict(self) -> str:
        """Whether all stated expectations agree."""
        return str(self.manifest.get("verdict", ""))

    def _repr_html_(self) -> str:
        """What a notebook shows: name, state, verdict, and the headlines."""
        name, state = (escape(str(self.manifest.get(key, ""))) for key in ("name", "state"))
        found = self.headlines
        table = table_html(found) if len(found) else ""
        return f"<div><b>Run {name}</b> ({state})<p>{escape(self.verdict)}</p>{table}</div>"

    def _check(self, step: str) -> None:
        if step not in self.steps:
            raise RunError(
                f"{self.folder} has no result of a step {step!r}; it has those of "
                f"{', '.join(self.steps) or 'none'}"
            )


def open_run(folder: str | Path) -> Run:
    """The run in a folder; errors as `Run.open`."""
    return Run.open(folder)


def load_result(folder: Path) -> Result:
    """A result of any method."""
    import mechmm.runs.methods  # noqa: F401 - defines the classes

    return Result.load(folder)


def as_json(value: Any) -> bytes:
    """A record as the files of a run have it."""
    return f"{json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)}\n".encode()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone; the system gives it free when the process ends, however it does.

    Raises:
        RunError: somebody else holds it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is writing into {folder}; wait for it, or choose another folder"
            ) from None
        yield


def sweep_up(folder: Path) -> None:
    """Remove what a killed process left half-written, and nothing that somebody else put there."""
    for path in sorted(folder.rglob(".*")):
        if _UNFINISHED.fullmatch(path.name) and not path.is_symlink() and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def sweep_beside(folder: Path) -> None:
    """Remove what processes left that were killed before they could give a folder its name; what
    another one is still writing is locked, and stays."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}")
    for path in sorted(folder.parent.glob(".*")):
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _give_up(path)


def _give_up(path: Path) -> None:
    if not any(path.iterdir()):  # killed before it could be locked
        path.rmdir()
    elif (path / LOCK).is_file():
        with suppress(RunError), locked(path):
            discard(path)


def discard(folder: Path) -> None:
    """Remove a folder, its lock last: what a kill leaves of it then can be told and swept up."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    shutil.rmtree(folder)

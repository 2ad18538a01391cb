"""A config, the folder that it is run into, and the manifest while it is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechmm.results.result import Result
from mechmm.results.store import write_whole
from mechmm.runs import manifest
from mechmm.runs.config import Config, Step
from mechmm.runs.folder import Run, as_json, load_result
from mechmm.runs.paths import MANIFEST, RESULTS, RunError


@dataclass(frozen=True)
class Job:
    """A config and the folder that it is run into.

    Attributes:
        start: by the clock of `time.monotonic`, less what an earlier process took.
        new: whether this process makes the folder.
    """

    config: Config
    out: Path
    start: float
    new: bool = False

    @property
    def missing(self) -> list[Step]:
        """The steps whose result is not there yet."""
        return [step for step in self.config.steps if not (self.out / RESULTS / step.name).exists()]

    def result(self, step: str) -> Result:
        """The result of a step that is done."""
        return load_result(self.out / RESULTS / step)

    def note(self, **changes: Any) -> None:
        """Bring the manifest up to date."""
        known = dict(Run.open(self.out).manifest)
        peak = max(known["peak_memory_bytes"], manifest.peak_memory())
        seconds = round(time.monotonic() - self.start, 1)
        record = {**known, "seconds": seconds, "peak_memory_bytes": peak, **changes}
        write_whole(self.out / MANIFEST, as_json(record))

    def add_note(self, text: str) -> None:
        """One more of the manifest's notes."""
        self.note(notes=sorted({*Run.open(self.out).manifest.get("notes", ()), text}))


@contextmanager
def about(step: Step) -> Iterator[None]:
    """Say of an error in which step it is."""
    try:
        yield
    except (ValueError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise RunError(f"step {step.name!r} ({step.method}): {text}") from error

"""Names in the folder of a run, and its manifest; what reads these alone needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the folder's layout; raised when an older mechmm could no longer read it."""
MANIFEST, LOCK, GIVEN, RESOLVED = "manifest.json", ".lock", "config.toml", "resolved.json"
HEADLINES, REPORT = "headlines.json", "report.html"
PAIRS, STEPS, RESULTS, FIGURES = "pairs", "steps", "results", "figures"
CITATION, WEIGHTS = "CITATION.cff", "weights"
"""What an archive may add."""
RUNNING, FINISHED = "running", "finished"
_KINDS = {"name": str, "state": str, "outputs": dict, "model": dict, "pairs": dict}


class RunError(ValueError):
    """A run's folder cannot be used as it is."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        FileNotFoundError: there is none.
        RunError: it cannot be read, lacks something, or is of a newer format.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no {MANIFEST}")
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(data: bytes, where: str | Path) -> dict[str, Any]:
    """A manifest from its bytes.

    Raises:
        RunError: as `read_manifest`.
    """
    try:
        found = json.loads(data)
        newer = found["format"] > FORMAT
        written = found["mechmm"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(where, f"it cannot be read ({error})") from error
    if newer:
        raise RunError(
            f"{where} was written by mechmm {written} in format {found['format']}; this "
            f"mechmm reads up to {FORMAT}: update it"
        )
    for key, kind in _KINDS.items():
        if not isinstance(found.get(key), kind):
            raise damaged(where, f"its {key!r} is no {kind.__name__}")
    if not isinstance(found["model"].get("files", {}), dict):
        raise damaged(where, "the model's files are no table")
    if not isinstance(found.get("base", ""), str):
        raise damaged(where, "its 'base' is no path")
    return found


def damaged(where: str | Path, why: str) -> RunError:
    """What to say of a manifest that cannot be used."""
    return RunError(f"the {MANIFEST} of {where} is damaged: {why}; copy the run again or repeat it")

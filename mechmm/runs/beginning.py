"""How a run begins: what its steps ask of the model is checked, and its folder appears in one
rename, with all that is known before the first step."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import mechmm
from mechmm.results.store import write_whole
from mechmm.runs import manifest
from mechmm.runs.arguments import Scene
from mechmm.runs.config import Config
from mechmm.runs.folder import as_json, discard, locked, sweep_beside
from mechmm.runs.job import Job, about
from mechmm.runs.methods import METHODS
from mechmm.runs.paths import FORMAT, GIVEN, MANIFEST, PAIRS, RESOLVED, RUNNING, RunError
from mechmm.runs.unchanged import checkpoints_of, place_of


def check_new(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        RunError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _taken(out)


def check_steps(config: Config, scene: Scene) -> None:
    """Refuse, before anything runs, models that a step cannot use, and sites that the model does
    not have.

    Raises:
        RunError: in which step.
    """
    for step in config.steps:
        method = METHODS[step.method]
        with about(step):
            method.check_model(scene.model)
            for name, value in step.options.items():
                argument = method.argument(name)
                if argument is not None and not _refers(value):
                    argument.make(value, scene)


@contextmanager
def begun(job: Job, scene: Scene, facts: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder of a run; nobody else can write into it from its first moment on.

    Args:
        facts: what the manifest says of the model.

    Raises:
        RunError: somebody else took the folder.
    """
    out = job.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(out)
    near = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    near.mkdir()
    try:
        with locked(near):
            _fill(near, job, scene, facts)
            _appear(near, out)
            yield
    finally:
        if near.exists():
            discard(near)


def _fill(near: Path, job: Job, scene: Scene, facts: Mapping[str, Any]) -> None:
    config = job.config
    (near / GIVEN).write_bytes(config.given)
    resolved = {**config.to_dict(), "overrides": list(config.overrides)}
    write_whole(near / RESOLVED, as_json(resolved))
    for name, pairs in scene.pairs.items():
        pairs.save(near / PAIRS / name)
    write_whole(near / MANIFEST, as_json(_manifest(near, job, scene, facts)))


def _manifest(near: Path, job: Job, scene: Scene, facts: Mapping[str, Any]) -> dict[str, Any]:
    config = job.config
    return {
        "format": FORMAT,
        "mechmm": mechmm.__version__,
        "name": config.name,
        "state": RUNNING,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "peak_memory_bytes": 0,
        **place_of(scene.model),
        "seed": config.seed,
        "base": Path(os.path.relpath(config.base, job.out.absolute())).as_posix(),
        **manifest.machine(),
        "processor": manifest.processor(scene.model.device),
        "lock_sha256": manifest.lock_digest(config.base),
        "git": manifest.git(config.base),
        "model": dict(facts),
        "checkpoints": checkpoints_of(config),
        "pairs": {
            name: {"n": len(pairs), "sha256": pairs.content_hash()}
            for name, pairs in scene.pairs.items()
        },
        "outputs": manifest.outputs(near),
        "notes": [],
        "headlines": [],
        "verdict": "",
    }


def _taken(out: Path) -> RunError:
    return RunError(f"{out} is not empty; give a new folder, or go on with --resume {out}")


def _appear(near: Path, out: Path) -> None:
    """Give a folder its name, unless somebody else took it meanwhile."""
    try:
        if out.exists():
            out.rmdir()
        near.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _taken(out) from error
        raise


def _refers(value: Any) -> bool:
    """Whether a value is made of an earlier step's result."""
    if isinstance(value, list):
        return any(_refers(each) for each in value)
    return isinstance(value, Mapping) and "step" in value

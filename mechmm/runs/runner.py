"""Runs a config into a folder, and goes on with a run that was interrupted or killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechmm.runs.arguments import Scene
from mechmm.runs.beginning import begun, check_new, check_steps
from mechmm.runs.config import Config
from mechmm.runs.config import load as load_config
from mechmm.runs.ending import fail, finish
from mechmm.runs.engines import check_ray
from mechmm.runs.folder import Run, locked, sweep_up
from mechmm.runs.job import Job
from mechmm.runs.mending import mend, settled
from mechmm.runs.models import load_model
from mechmm.runs.paths import MANIFEST, PAIRS, RunError
from mechmm.runs.sets import scene_of
from mechmm.runs.steps import run_steps
from mechmm.runs.unchanged import (
    check_checkpoints,
    check_model,
    check_pairs,
    check_place,
    check_setting,
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; what is finished is kept."""


def run(
    config: Config | str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    saved: Path | None = None,
    source: Path | None = None,
) -> Run:
    """Run a config into a new folder.

    Args:
        config: from `mechmm.runs.config.load`, or the path of its file.
        overrides: `key=value` each, where config is a path.
        saved: folder of the sets of pairs, which are read there instead of being made.
        source: folder of the model's files, if not where the config says.

    Raises:
        ConfigError: a config that cannot be run.
        RunError: a folder that is not empty; a model or pairs with another digest than stated.
        PairError, ValueError, OSError: pairs, model or a step's input that cannot be used. Nothing
            is left behind where this happens before the first chunk is finished.
        Interrupted: Ctrl-C; `resume` goes on from there.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    out = Path(out)
    check_new(out)
    if config.engine.name == "ray":
        check_ray()
    start = time.monotonic()
    model, facts = load_model(config.model, config.base, source)
    # Whatever follows uses the commit of a hub model, wherever its branch stands by then.
    config = replace(config, model=replace(config.model, revision=facts["revision"]))
    job = Job(config, out, start, new=True)
    scene = scene_of(model, config, saved, job.result)
    check_steps(config, scene)
    with begun(job, scene, facts):
        return _go(job, scene)


def resume(folder: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Go on with a run that was interrupted or killed; only what is missing is computed.

    Args:
        overrides: `key=value` each, of headlines alone, for example `headlines.0.where.layer=3`.

    Raises:
        ConfigError: an override that cannot be applied.
        FileNotFoundError: there is no run.
        RunError: somebody else is writing; the config, the model, the pairs or a package changed
            since the run began; a newer format.
        Interrupted: Ctrl-C.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder} is no run: it has no {MANIFEST}; a run that was killed before it began is "
            f"begun again, with mechmm run CONFIG.toml --out {folder}"
        )
    Run.open(folder)
    with locked(folder):
        found = Run.open(folder)
        if found.finished and overrides:
            raise RunError(f"{folder} is finished; run its config anew with other headlines")
        if found.finished:
            return found
        check_setting(found)
        found = mend(settled(found), overrides) if overrides else settled(found)
        job = Job(found.config, folder, time.monotonic() - found.manifest["seconds"])
        scene = _again(job, found) if job.missing else None
        sweep_up(folder)
        return _go(job, scene)


def _again(job: Job, found: Run) -> Scene:
    """The model and the pairs of a run that is taken up, which are those it began with."""
    config = job.config
    model, facts = load_model(config.model, config.base)
    check_model(found, config.model.name, facts)
    scene = scene_of(model, config, job.out / PAIRS, job.result)
    check_pairs(found, scene.pairs)
    check_checkpoints(found, config)
    note = check_place(found, model)
    if note is not None:
        job.add_note(note)
    return scene


def _go(job: Job, scene: Scene | None) -> Run:
    """Compute what is missing and finish."""
    try:
        with _interruptible() as stopped:
            run_steps(job, scene, stopped)
            return finish(job)
    except KeyboardInterrupt:
        job.note()
        raise Interrupted(
            f"interrupted; what is finished is kept, go on with: mechmm run --resume {job.out}"
        ) from None
    except Exception as error:
        fail(job, error)
        raise


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Know of Ctrl-C even where a method takes it to end early; yields whether it came."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: Any) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)

"""The steps of a run, chunk by chunk.

Every chunk is written whole or not at all, and what is written is read back before it is joined, so
that a run that was killed and resumed ends with the same files as one that was not.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechmm.data.part import Part
from mechmm.engine.sweep import Report
from mechmm.results.result import Result, concat
from mechmm.results.store import write_whole
from mechmm.runs import headlines as heads
from mechmm.runs import tables
from mechmm.runs.arguments import Scene
from mechmm.runs.config import Config, Step
from mechmm.runs.folder import Run, load_result
from mechmm.runs.job import Job, about
from mechmm.runs.methods import METHODS
from mechmm.runs.paths import FIGURES, RESULTS, STEPS
from mechmm.runs.terminal import progress

Results = Callable[[Step, Sequence[Scene], Sequence[int], Report], Iterator[tuple[int, Result]]]
"""Computes missing chunks of a step, and gives each with its number."""


def run_steps(job: Job, scene: Scene | None, stopped: threading.Event) -> None:
    """Compute what is missing of every step, and show it.

    Args:
        scene: what the missing steps run on; None where none is missing.
        stopped: set by Ctrl-C.

    Raises:
        RunError: a step that cannot be run.
    """
    if scene is None:
        for step in job.config.steps:
            _end_step(job, step)
        return
    with _engine(job) as results:
        for step in job.config.steps:
            if step in job.missing:
                _compute(job, scene, step, results, stopped)
            _end_step(job, step)


def _compute(
    job: Job, scene: Scene, step: Step, results: Results, stopped: threading.Event
) -> None:
    """Compute the missing chunks of a step, and join them."""
    parts = chunks(job.config, scene, step)
    folders = [job.out / STEPS / step.name / f"{number:05d}" for number in range(len(parts))]
    missing = [number for number, folder in enumerate(folders) if not folder.exists()]
    with progress(step.name) as report:
        for number, found in _said(step, results(step, parts, missing, report)):
            if stopped.is_set():  # some methods end with what they have
                raise KeyboardInterrupt
            found.save(folders[number])
            job.note()
            if number == missing[0] and len(parts) > 1:
                _warn(job, step, found, heads.check_columns)
    with about(step):
        _join(folders, job.out / RESULTS / step.name)
    _warn(job, step, job.result(step.name), heads.measured)


def _end_step(job: Job, step: Step) -> None:
    """Remove the chunks of a step that are joined, and show its result."""
    folder = job.out / STEPS / step.name
    if folder.exists():
        shutil.rmtree(folder)
    _show(job, step)


@contextmanager
def _engine(job: Job) -> Iterator[Results]:
    """What computes chunks: this process, or workers."""
    if job.config.engine.name == "local":

        def results(
            step: Step, parts: Sequence[Scene], missing: Sequence[int], report: Report
        ) -> Iterator[tuple[int, Result]]:
            for number in missing:
                yield number, run_part(job.config, step, parts, number, report)

        yield results
        return
    from mechmm.runs.cluster import workers

    with workers(job.config, Run.open(job.out).manifest["model"]) as found:
        yield found.results


def run_part(
    config: Config, step: Step, parts: Sequence[Scene], number: int, report: Report
) -> Result:
    """One chunk of a step, in this process."""

    def told(done: int, total: int) -> None:
        report(number * total + done, len(parts) * total)

    method, tokens = METHODS[step.method], config.engine.tokens
    return method.run(step.options, parts[number], tokens=tokens, report=told)


def chunks(config: Config, scene: Scene, step: Step) -> list[Scene]:
    """What a step runs on, one chunk after another."""
    method = METHODS[step.method]
    used = set(method.sets(step.options).values())
    sizes = {len(scene.pairs[name]) for name in used}
    if not method.chunked(step.options) or len(sizes) != 1:
        return [scene]
    (size,), chunk = sizes, config.engine.chunk
    return [
        replace(scene, pairs={name: Part(scene.pairs[name], at, chunk) for name in used})
        for at in range(0, size, chunk)
    ]


def _warn(job: Job, step: Step, found: Result, look: Callable[..., Any]) -> None:
    """Say at once what a step's headlines ask in vain; no reason to stop what may take a night,
    since they can be mended."""
    own = [headline for headline in job.config.headlines if headline.step == step.name]
    read = tables.read_each(found, (headline.table for headline in own))
    for headline in own:
        try:
            look(headline, read[headline.table])
        except heads.HeadlineError as error:
            print(f"mechmm: {error} (the run goes on)", file=sys.stderr)


def _show(job: Job, step: Step) -> None:
    """The table and the figures of a step."""
    found = job.result(step.name)
    table = found.to_dataframe()
    write_whole(
        job.out / RESULTS / f"{step.name}.csv",
        table.to_csv(index=table.index.name is not None, lineterminator="\n").encode(),
    )
    try:
        drawn = figures(found)
    except ValueError as error:  # numbers that cannot be drawn are no reason to lose the rest
        job.add_note(f"step {step.name!r} has no figures: {error}")
        return
    for key, figure in drawn.items():
        path = job.out / FIGURES / f"{step.name}.{key}.json"
        write_whole(path, figure.to_json().encode())


def _join(folders: Sequence[Path], joined: Path) -> None:
    """One result of all chunks."""
    if len(folders) > 1:
        concat([load_result(folder) for folder in folders]).save(joined)
        return
    joined.parent.mkdir(exist_ok=True)
    folders[0].rename(joined)


def figures(result: Result) -> dict[str, Any]:
    """What a result draws by itself, by a name that fits a file."""
    plot = getattr(result, "plot", None)
    if plot is None:
        return {}
    try:
        drawn = plot()
    except TypeError:  # one that needs to be told what to draw
        return {}
    found = drawn if isinstance(drawn, Mapping) else {"figure": drawn}
    return {_slug(str(key)): figure for key, figure in found.items()}


def _slug(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in key)


def _said(step: Step, results: Iterator[tuple[int, Result]]) -> Iterator[tuple[int, Result]]:
    """The same, with errors that say in which step they are."""
    with about(step):
        yield from results

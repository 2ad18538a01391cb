"""Runs a config: pairs, steps chunk by chunk, headlines, manifest, into one folder.

Every chunk is written whole or not at all, and what is written is read back before it is joined, so
that a run that was killed and resumed ends with the same files as one that was not.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import mechmm
from mechmm.data.pairs import PairDataset, PairError
from mechmm.data.part import Part
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.result import Result, concat
from mechmm.results.store import write_whole
from mechmm.runs import headlines as heads
from mechmm.runs import makers, manifest, tables
from mechmm.runs.arguments import Scene
from mechmm.runs.config import Config, PairSet, Step
from mechmm.runs.config import load as load_config
from mechmm.runs.engines import check_ray
from mechmm.runs.folder import Run, as_json, load_result, locked, sweep_beside, sweep_up
from mechmm.runs.mending import MENDED, mend, settled
from mechmm.runs.methods import METHODS
from mechmm.runs.models import differing, load_model
from mechmm.runs.paths import (
    FIGURES,
    FINISHED,
    FORMAT,
    GIVEN,
    HEADLINES,
    MANIFEST,
    PAIRS,
    RESOLVED,
    RESULTS,
    RUNNING,
    STEPS,
    RunError,
)
from mechmm.runs.terminal import progress
from mechmm.runs.verification import file_digest

SAME = ("torch", "transformers", "transformer-lens")
"""Packages whose version a resumed run must share with its beginning."""


Results = Callable[[Step, Sequence[Scene], Sequence[int], Report], Iterator[tuple[int, Result]]]
"""Computes missing chunks of a step, and gives each with its number."""


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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _taken(out)
    if config.engine.name == "ray":
        check_ray()
    start = time.monotonic()
    model, facts = load_model(config.model, config.base, source)
    config = _pinned(config, facts)
    sets = {
        name: makers.loaded(saved / name, model) if saved else _made(one, model, config)
        for name, one in config.pairs.items()
    }
    job = _Job(config, out, model, sets, start, new=True)
    job.check()
    with job.begun(facts):
        return job.go()


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
        _check_unchanged(found)
        found = mend(settled(found), overrides) if overrides else settled(found)
        config, start = found.config, time.monotonic() - found.manifest["seconds"]
        model, facts = load_model(config.model, config.base)
        if odd := differing(found.manifest["model"], facts):
            raise RunError(
                f"the files of the model {config.model.name} changed since the run began: "
                f"{', '.join(odd)}"
            )
        sets = {name: makers.loaded(folder / PAIRS / name, model) for name in config.pairs}
        for name, pairs in sets.items():
            if pairs.content_hash() != found.manifest["pairs"][name]["sha256"]:
                raise RunError(f"the pairs in {folder / PAIRS / name} changed since the run began")
        job = _Job(config, folder, model, sets, start)
        job.check_checkpoints(found.manifest.get("checkpoints", {}))
        job.check_place(found.manifest)
        sweep_up(folder)
        return job.go()


@dataclass(frozen=True)
class _Job:
    """A config with its model and pairs, and the folder that it writes into, which is `new` where
    this process makes it."""

    config: Config
    out: Path
    model: HookedMultimodal
    sets: Mapping[str, PairDataset]
    start: float
    new: bool = False

    def scene(self) -> Scene:
        return Scene(self.model, self.sets, self._result, self.config.base)

    def _result(self, step: str) -> Result:
        return load_result(self.out / RESULTS / step)

    # Beginning -------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse, before anything runs, models that a step cannot use, and sites that the model
        does not have."""
        for step in self.config.steps:
            method = METHODS[step.method]
            with _about(step):
                method.check_model(self.model)
            for name, value in step.options.items():
                argument = method.argument(name)
                if argument is not None and not _refers(value):
                    with _about(step):
                        argument.make(value, self.scene())

    @contextmanager
    def begun(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder with all that is known before the first step, in one rename; nobody else
        can write into it from its first moment on."""
        out = self.out.absolute()
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(out)
        near = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
        near.mkdir()
        try:
            with locked(near):
                self._fill(near, facts)
                _appear(near, out)
                yield
        finally:
            shutil.rmtree(near, ignore_errors=True)

    def _fill(self, near: Path, facts: Mapping[str, Any]) -> None:
        (near / GIVEN).write_bytes(self.config.given)
        _write(near / RESOLVED, _resolved(self.config))
        for name, pairs in self.sets.items():
            pairs.save(near / PAIRS / name)
        _write(near / MANIFEST, self._manifest(facts, near))

    def _manifest(self, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        config = self.config
        return {
            "format": FORMAT,
            "mechmm": mechmm.__version__,
            "name": config.name,
            "state": RUNNING,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "peak_memory_bytes": 0,
            **self._place(),
            "seed": config.seed,
            "base": Path(os.path.relpath(config.base, self.out.absolute())).as_posix(),
            **manifest.machine(),
            "processor": manifest.processor(self.model.device),
            "lock_sha256": manifest.lock_digest(config.base),
            "git": manifest.git(config.base),
            "model": dict(facts),
            "checkpoints": self._checkpoints(),
            "pairs": {
                name: {"n": len(pairs), "sha256": pairs.content_hash()}
                for name, pairs in self.sets.items()
            },
            "outputs": manifest.outputs(folder),
            "notes": [],
            "headlines": [],
            "verdict": "",
        }

    def _checkpoints(self) -> dict[str, str]:
        """SHA-256 over the files of every checkpoint of a step."""
        return {name: manifest.combined(files) for name, files in checkpoints(self.config).items()}

    def check_checkpoints(self, known: Mapping[str, str]) -> None:
        """Refuse checkpoints other than those that the run began with."""
        absent = manifest.combined({})  # then the hub gave it, or still has to
        for name, found in self._checkpoints().items():
            if found != known.get(name) and absent not in (found, known.get(name)):
                raise RunError(f"the files of checkpoint {name} changed since the run began")

    def check_place(self, known: Mapping[str, Any]) -> None:
        """Refuse another device or dtype than the run began with; note another processor."""
        for name, now in self._place().items():
            if now != known.get(name, now):
                raise RunError(
                    f"the run began with the {name} {known[name]}, this is {now}: its numbers "
                    "would not belong together; go on where it began, or begin anew"
                )
        before, now = known.get("processor"), manifest.processor(self.model.device)
        if before not in (None, now):
            note = f"began on the processor {before}, resumed on {now}: last digits may differ"
            self._note(notes=sorted({*known.get("notes", ()), note}))

    def _place(self) -> dict[str, str]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"device": str(self.model.device), "dtype": dtype}

    # Running ---------------------------------------------------------------------------------

    def go(self) -> Run:
        """Compute what is missing and finish."""
        try:
            with _interruptible() as stopped:
                with self._engine() as results:
                    for step in self.config.steps:
                        self._step(step, results, stopped)
                return self._finish()
        except KeyboardInterrupt:
            self._note()
            raise Interrupted(
                f"interrupted; what is finished is kept, go on with: mechmm run --resume {self.out}"
            ) from None
        except Exception as error:
            self._fail(error)
            raise

    def _step(self, step: Step, results: Results, stopped: threading.Event) -> None:
        """Compute what is missing of a step, join it and show it."""
        joined, chunks = self.out / RESULTS / step.name, self.out / STEPS / step.name
        if not joined.exists():
            parts = self._chunks(step)
            folders = [chunks / f"{number:05d}" for number in range(len(parts))]
            missing = [number for number, folder in enumerate(folders) if not folder.exists()]
            with progress(step.name) as report:
                for number, found in _said(step, results(step, parts, missing, report)):
                    if stopped.is_set():  # some methods end with what they have
                        raise KeyboardInterrupt
                    found.save(folders[number])
                    self._note()
                    if number == missing[0] and len(parts) > 1:
                        self._warn(step, found, heads.check_columns)
            with _about(step):
                _join(folders, joined)
            self._warn(step, self._result(step.name), heads.measured)
        if chunks.exists():
            shutil.rmtree(chunks)
        self._show(step)

    @contextmanager
    def _engine(self) -> Iterator[Results]:
        """What computes chunks: this process, or workers."""
        if self.config.engine.name == "local":
            yield self._local
            return
        from mechmm.runs.cluster import workers

        with workers(self.config, Run.open(self.out).manifest["model"]) as found:
            yield found.results

    def _local(
        self, step: Step, parts: Sequence[Scene], missing: Sequence[int], report: Report
    ) -> Iterator[tuple[int, Result]]:
        """One chunk after another, in this process."""
        for number in missing:
            yield number, self._run(step, parts[number], number, len(parts), report)

    def _warn(self, step: Step, found: Result, look: Callable[..., Any]) -> None:
        """Say at once what a step's headlines ask in vain; no reason to stop what may take a
        night, since they can be mended."""
        own = [headline for headline in self.config.headlines if headline.step == step.name]
        read = tables.read_each(found, (headline.table for headline in own))
        for headline in own:
            try:
                look(headline, read[headline.table])
            except heads.HeadlineError as error:
                print(f"mechmm: {error} (the run goes on)", file=sys.stderr)

    def _run(self, step: Step, part: Scene, number: int, count: int, report: Report) -> Result:
        def told(done: int, total: int) -> None:
            report(number * total + done, count * total)

        method, tokens = METHODS[step.method], self.config.engine.tokens
        return method.run(step.options, part, tokens=tokens, report=told)

    def _chunks(self, step: Step) -> list[Scene]:
        """What the step runs on, one chunk after another."""
        method, scene = METHODS[step.method], self.scene()
        used = set(method.sets(step.options).values())
        sizes = {len(self.sets[name]) for name in used}
        if not method.chunked(step.options) or len(sizes) != 1:
            return [scene]
        (size,), chunk = sizes, self.config.engine.chunk
        starts = range(0, size, chunk)
        return [
            replace(scene, pairs={name: Part(self.sets[name], at, chunk) for name in used})
            for at in starts
        ]

    def _show(self, step: Step) -> None:
        """The table and the figures of a step."""
        found = self._result(step.name)
        table = found.to_dataframe()
        write_whole(
            self.out / RESULTS / f"{step.name}.csv",
            table.to_csv(index=table.index.name is not None, lineterminator="\n").encode(),
        )
        try:
            drawn = figures(found)
        except ValueError as error:  # numbers that cannot be drawn are no reason to lose the rest
            note = f"step {step.name!r} has no figures: {error}"
            self._note(notes=sorted({*Run.open(self.out).manifest.get("notes", ()), note}))
            return
        for key, figure in drawn.items():
            path = self.out / FIGURES / f"{step.name}.{key}.json"
            write_whole(path, figure.to_json().encode())

    # Ending ----------------------------------------------------------------------------------

    def _finish(self) -> Run:
        from mechmm.runs import page  # plotly takes long to load

        if (self.out / STEPS).exists():
            shutil.rmtree(self.out / STEPS)
        asked = self.config.headlines
        read = {
            step: tables.read_each(self._result(step), (h.table for h in asked if h.step == step))
            for step in {headline.step for headline in asked}
        }
        found = heads.all_measured(asked, read, self.out)
        _write(self.out / HEADLINES, found)
        self._note(headlines=found, verdict=heads.verdict(found))
        page.write(self.out)
        self._note(state=FINISHED, outputs=manifest.outputs(self.out))
        return Run.open(self.out)

    def _note(self, **changes: Any) -> None:
        """Bring the manifest up to date."""
        known = dict(Run.open(self.out).manifest)
        peak = max(known["peak_memory_bytes"], manifest.peak_memory())
        seconds = round(time.monotonic() - self.start, 1)
        _write(
            self.out / MANIFEST,
            {**known, "seconds": seconds, "peak_memory_bytes": peak, **changes},
        )

    def _fail(self, error: Exception) -> None:
        """A new run that has finished nothing leaves nothing behind; a resumed one stays."""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(
                f"the disk is full; finished chunks are intact: make room, then go on with "
                f"mechmm run --resume {self.out}"
            ) from error
        if self.new and not any((self.out / name).exists() for name in (STEPS, RESULTS)):
            shutil.rmtree(self.out)


def checkpoints(config: Config) -> dict[str, dict[str, str]]:
    """Of every checkpoint of a step, the SHA-256 of its files by name; none where none are here."""
    named = [name for step in config.steps for name in step.options.get("checkpoints", ())]
    return {name: manifest.model_files(name, config.base) for name in named}


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


def _made(one: PairSet, model: HookedMultimodal, config: Config) -> PairDataset:
    """A set of pairs."""
    try:
        if one.folder is not None:
            pairs = makers.loaded(config.base / one.folder, model)
        else:
            pairs = makers.made(str(one.make), one.options, model)
        scene = Scene(model, {}, _nothing, config.base)
        if one.clean is not None:
            pairs = makers.distorted(pairs, one.clean, scene)
        if one.corrupt is not None:
            pairs = makers.corrupted(pairs, one.corrupt, scene)
        pairs = makers.kept(pairs, one.keep, one.name)
    except PairError as error:
        raise PairError(f"pairs.{one.name}: {error}") from error
    if one.sha256 not in (None, pairs.content_hash()):
        raise RunError(
            f"pairs.{one.name} have the digest {pairs.content_hash()}, not {one.sha256} as the "
            "config says"
        )
    return pairs


def _pinned(config: Config, facts: Mapping[str, Any]) -> Config:
    """The config with the commit of a hub model, so that all that follows uses its files."""
    return replace(config, model=replace(config.model, revision=facts["revision"]))


def _nothing(step: str) -> Result:
    raise KeyError(step)


def _refers(value: Any) -> bool:
    """Whether a value is made of an earlier step's result."""
    if isinstance(value, list):
        return any(_refers(each) for each in value)
    return isinstance(value, Mapping) and "step" in value


def _resolved(config: Config) -> dict[str, Any]:
    return {**config.to_dict(), "overrides": list(config.overrides)}


def _write(path: Path, value: Any) -> None:
    write_whole(path, as_json(value))


def _check_unchanged(found: Run) -> None:
    """Refuse to go on with another config, other libraries or another number of threads."""
    known = found.manifest
    for name in (GIVEN, RESOLVED):
        path = found.folder / name
        digests = [known["outputs"].get(name), known.get(MENDED) if name == RESOLVED else None]
        if not path.is_file() or file_digest(path) not in digests:
            raise RunError(
                f"{path} changed since the run began; put it back, or begin anew in another folder"
            )
    now = {"mechmm": mechmm.__version__, **manifest.packages()}
    before = {"mechmm": known["mechmm"], **known["packages"]}
    for name in ("mechmm", *SAME):
        if now.get(name) != before.get(name):
            raise RunError(
                f"the run began with {name} {before.get(name)}, this is {now.get(name)}: its "
                "numbers would not belong together; install that version, or begin anew"
            )
    threads = torch.get_num_threads()
    if known.get("threads", threads) != threads:
        raise RunError(
            f"the run began with {known['threads']} threads, this process has {threads}, and sums "
            f"depend on it; set OMP_NUM_THREADS={known['threads']}, or begin anew"
        )


def _said(step: Step, results: Iterator[tuple[int, Result]]) -> Iterator[tuple[int, Result]]:
    """The same, with errors that say in which step they are."""
    with _about(step):
        yield from results


@contextmanager
def _about(step: Step) -> Iterator[None]:
    """Say of an error in which step it is."""
    try:
        yield
    except (ValueError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise RunError(f"step {step.name!r} ({step.method}): {text}") from error


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

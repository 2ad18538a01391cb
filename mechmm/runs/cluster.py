"""`[engine] name = "ray"`: the chunks of a step over Ray workers, each with a replica of the model.

A worker is an actor that loads the model once, checks that its files are those of the run, and
then runs chunk after chunk as one process would: with the same pairs, spans, random numbers,
token budget and number of threads. So on equal hardware results are those of one process, bit for
bit. The process that began the run writes them, as they come; only pairs, options and results
travel, so workers need no shared disk, but mechmm and the model's files where their config says.

A chunk whose worker dies is run again by another one, at most `retries` times; chunks that are
finished are on disk. A step that needs all pairs at once is one chunk, on one worker.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mechmm.data.part import Message, Sent
from mechmm.engine.sweep import Report
from mechmm.results.result import Result
from mechmm.runs.arguments import Scene
from mechmm.runs.config import Config, Engine, Model, Step
from mechmm.runs.engines import check_ray
from mechmm.runs.methods import METHODS
from mechmm.runs.models import differing, load_model
from mechmm.runs.paths import RunError

EVERY = 0.5
"""Seconds between two looks at the progress."""
PATIENCE = 900.0
"""Seconds that a run waits for a first worker."""
_STATISTICS = "RAY_USAGE_STATS_ENABLED"
_HINT = "; a cluster that asks for tokens (`ray start` says so) needs RAY_AUTH_MODE=token set here"


def _ray() -> Any:
    """Ray, which is no dependency."""
    return import_module("ray")


@dataclass(frozen=True)
class Task:
    """A chunk of a step, as it travels."""

    step: Step
    pairs: Mapping[str, Message]
    number: int
    tokens: int


class Worker:
    """Runs in a process of its own, with a replica of the model."""

    def __init__(
        self, model: Model, facts: Mapping[str, Any], base: Path, threads: int, board: Any
    ) -> None:
        self.config, self.facts, self.base = model, facts, base
        self.threads, self.board = threads, board

    def load(self) -> int:
        """Load the model; the id of the process.

        Raises:
            RunError: its files are not those of the run.
        """
        torch.set_num_threads(self.threads)  # sums depend on it; this process is a worker's alone
        self.model, now = load_model(self.config, self.base)
        if odd := differing(self.facts, now):
            raise RunError(
                f"a worker has other files of the model {self.config.name} than the run began "
                f"with: {', '.join(odd)}"
            )
        return os.getpid()

    def run(self, task: Task, earlier: Mapping[str, Any]) -> Result:
        """The result of one chunk."""
        ray = _ray()
        sets = {name: Sent(message, self.model) for name, message in task.pairs.items()}
        scene = Scene(self.model, sets, lambda step: ray.get(earlier[step]), self.base)
        told = _Told(self.board, task.number)
        method = METHODS[task.step.method]
        return method.run(task.step.options, scene, tokens=task.tokens, report=told)


@dataclass
class _Told:
    """Tells the board how far a chunk is, not too often."""

    board: Any
    number: int
    last: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > EVERY:
            self.last = now
            self.board.tell.remote(self.number, done / max(total, 1))


class Board:
    """How far every chunk is, for the process that shows it."""

    def __init__(self) -> None:
        self.shares: dict[int, float] = {}

    def tell(self, number: int, share: float) -> None:
        self.shares[number] = share

    def read(self) -> dict[int, float]:
        return self.shares

    def clear(self) -> None:
        self.shares = {}


@dataclass
class Workers:
    """The workers of a run.

    Attributes:
        facts: what the manifest says of the model.
        idle: that are ready. busy: what each reference belongs to. lost: how many died while they
            loaded the model.
    """

    config: Config
    facts: Mapping[str, Any]
    board: Any
    idle: deque[Any] = field(default_factory=deque)
    busy: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    lost: int = 0

    @property
    def engine(self) -> Engine:
        return self.config.engine

    def begin(self) -> None:
        """Ask for all workers."""
        for _ in range(self.engine.workers):
            self._start()

    def _start(self) -> None:
        """Ask for a worker, which is used as soon as it has its model."""
        ray = _ray()
        engine = self.engine
        model = replace(self.config.model, sha256=None)  # compared file by file
        made = ray.remote(num_cpus=engine.cpus, num_gpus=engine.gpus)(Worker)
        place = (self.config.base, torch.get_num_threads(), self.board)
        worker = made.remote(model, self.facts, *place)
        self.busy[worker.load.remote()] = worker, None

    def results(
        self, step: Step, parts: Sequence[Scene], missing: Sequence[int], report: Report
    ) -> Iterator[tuple[int, Result]]:
        """The missing chunks of a step, as they are finished.

        Raises:
            RunError: a chunk whose workers died more than `retries` times; no worker can be had.
            Exception: what a method raises.
        """
        ray = _ray()
        ray.get(self.board.clear.remote())
        waiting, tries = deque(missing), dict.fromkeys(missing, 0)
        earlier = {name: self._earlier(name, parts[0]) for name in referred(step.options)}
        count, finished, since = len(parts), len(parts) - len(missing), time.monotonic()
        while finished < count:
            while waiting and self.idle:
                number, worker = waiting.popleft(), self.idle.popleft()
                task = Task(step, _messages(parts[number]), number, self.engine.tokens)
                self.busy[worker.run.remote(task, earlier)] = worker, number
            done, _ = ray.wait(list(self.busy), timeout=EVERY)
            self._tell(report, count, finished)
            for reference in done:
                worker, number = self.busy.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    self._replace(worker, step, number, tries, error)
                    if number is not None:
                        waiting.appendleft(number)
                    continue
                self.idle.append(worker)
                if number is not None:
                    finished += 1
                    yield number, found
                since = time.monotonic()
            if not any(n is not None for _, n in self.busy.values()) and not self.idle:
                self._check_patience(since)
        report(1000 * count, 1000 * count)

    def _earlier(self, name: str, scene: Scene) -> Any:
        """An earlier step's result, once in Ray's store."""
        ray = _ray()
        if name not in self.kept:
            self.kept[name] = ray.put(scene.result(name))
        return self.kept[name]

    def _replace(
        self, worker: Any, step: Step, number: int | None, tries: dict[int, int], error: Exception
    ) -> None:
        """Another worker for one that died.

        Raises:
            RunError: that happened too often.
        """
        ray = _ray()
        with suppress(Exception):
            ray.kill(worker)
        if number is None:
            self.lost += 1
            often, what = self.lost, "workers died while they loaded the model"
        else:
            tries[number] += 1
            what = f"step {step.name!r}: the worker of chunk {number} died {tries[number]} times"
            often = tries[number]
        if often > self.engine.retries:
            cause = str(error).strip().splitlines()[0]
            raise RunError(
                f"{what} ({cause}); finished chunks are kept: see the worker's log, give workers "
                "more memory or smaller chunks, and go on with mechmm run --resume"
            ) from error
        self._start()

    def _check_patience(self, since: float) -> None:
        if time.monotonic() - since > PATIENCE:
            engine = self.engine
            raise RunError(
                f"no worker could be had in {PATIENCE:.0f} s: each asks for {engine.cpus:g} CPUs "
                f"and {engine.gpus:g} GPUs, which the cluster does not have free"
            )

    def _tell(self, report: Report, count: int, finished: int) -> None:
        """Show how far all chunks are together."""
        ray = _ray()
        running = [number for _, number in self.busy.values() if number is not None]
        with suppress(ray.exceptions.RayError):
            shares = ray.get(self.board.read.remote())
            done = finished + sum(shares.get(number, 0.0) for number in running)
            report(round(1000 * min(done, count)), 1000 * count)

    def end(self) -> None:
        """Let all workers go."""
        ray = _ray()
        for worker in (*self.idle, *(worker for worker, _ in self.busy.values()), self.board):
            with suppress(Exception):
                ray.kill(worker)


def referred(value: Any) -> set[str]:
    """Names of the earlier steps that options are made of."""
    if isinstance(value, list):
        return {name for each in value for name in referred(each)}
    if not isinstance(value, Mapping):
        return set()
    own = {value["step"]} if isinstance(value.get("step"), str) else set()
    return own | {name for each in value.values() for name in referred(each)}


def _messages(part: Scene) -> dict[str, Message]:
    return {name: Message.of(pairs) for name, pairs in part.pairs.items()}


@contextmanager
def workers(config: Config, facts: Mapping[str, Any]) -> Iterator[Workers]:
    """The workers of a run, on the cluster at `address`, on the one that this process is connected
    to already, or on this machine alone.

    Raises:
        RunError: Ray is not installed, or there is no cluster at the address.
    """
    check_ray()
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _connect(config.engine)
    made = Workers(config, facts, ray.remote(num_cpus=0)(Board).remote())
    try:
        made.begin()
        yield made
    finally:
        made.end()
        if own:
            ray.shutdown()


def _connect(engine: Engine) -> None:
    """Ray, with none of its usage reports where this process starts it."""
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if engine.address is not None:
        options["address"] = engine.address
    else:
        cpus = max(1, round(engine.workers * engine.cpus + 0.5))
        options |= {"num_cpus": cpus, "include_dashboard": False}
        if engine.gpus:
            options["num_gpus"] = round(engine.workers * engine.gpus + 0.499)
    before = os.environ.get(_STATISTICS)
    os.environ.setdefault(_STATISTICS, "0")
    try:
        _ray().init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "on this machine" if engine.address is None else f"at {engine.address}"
        hint = "" if engine.address is None else _HINT
        raise RunError(f"Ray cannot be reached {where}: {error}{hint}") from error
    finally:
        if before is None:
            os.environ.pop(_STATISTICS, None)

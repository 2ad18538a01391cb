"""One patching run from folders: pairs in, numbers and a report out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from mechmm.data.metrics import METRICS
from mechmm.data.pairs import PairDataset
from mechmm.engine import sites as places
from mechmm.engine.checks import check_choice
from mechmm.engine.located import random_like
from mechmm.engine.plan import Plan
from mechmm.engine.shelf import Keep
from mechmm.engine.sites import Sites
from mechmm.methods.patching import N_NULL, SOURCES, Patching, patch, sweep_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs.terminal import print_table, progress

SITES = ("residual", "attention", "mlps", "heads", "patches", "projector")
SHOWN = ["label", "effect", "low", "high", "null_low", "null_high"]
BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Job:
    """What to patch, as the command line says it.

    Attributes:
        pairs: folder written by `PairDataset.save`.
        sites: names of `SITES`; spans: for those that take spans.
        metric, direction: names.
        screen: share of sites that attribution patching keeps; None: no screen.
        seed, tokens, budget, state: as for `patch`; budget as text, for example `2GB`.
    """

    pairs: Path
    sites: Sequence[str] = ("residual", "heads")
    spans: Sequence[str] = ("image", "question", "last")
    metric: str = "logit_diff"
    direction: str = "denoise"
    seed: int = 0
    screen: float | None = None
    tokens: int | None = None
    budget: str | None = None
    state: str = "device"

    def check(self) -> None:
        """Refuse unknown names; `patch` refuses the rest.

        Raises:
            ValueError: an unknown metric, direction or state; a budget that is no number of bytes.
        """
        check_choice("metric", self.metric, METRICS)
        check_choice("direction", self.direction, SOURCES)
        if self.budget is not None:
            bytes_of(self.budget)
        check_choice("state", self.state, get_args(Keep))

    @property
    def limits(self) -> dict[str, Any]:
        """Options of a sweep."""
        budget = None if self.budget is None else bytes_of(self.budget)
        state = cast("Keep", self.state)
        return {"seed": self.seed, "tokens": self.tokens, "budget": budget, "state": state}


def bytes_of(text: str) -> int:
    """A number of bytes such as `2GB`, `1.5 GiB` or `800000000`.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in BYTES.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{text!r} is no number of bytes; write for example 800MB, 2GB or 1.5GiB")
    return int(float(found[1]) * units[found[2].lower()])


def make_sites(model: HookedMultimodal, names: Sequence[str], spans: Sequence[str]) -> Sites:
    """The table of sites for names of `SITES`.

    Raises:
        ValueError: for an unknown name, with those there are.
    """
    unknown = [name for name in names if name not in SITES]
    if unknown or not names:
        raise ValueError(f"unknown sites {unknown or 'none'}; use {', '.join(SITES)}")
    with_spans = {"residual": places.residual, "attention": places.attention, "mlps": places.mlps}
    whole = {"heads": places.heads, "patches": places.patches, "projector": places.projector}
    found = [with_spans[n](model, spans) if n in with_spans else whole[n](model) for n in names]
    return sum(found[1:], found[0])


def plan_folder(model: HookedMultimodal, job: Job) -> Plan:
    """What patching the pairs of a folder would run, the null included and without a screen.

    Raises:
        ValueError: as `patch_folder`.
    """
    job.check()
    table = make_sites(model, job.sites, job.spans)
    pairs = PairDataset.load(job.pairs, model)
    sweep = sweep_of(model, pairs, table, METRICS[job.metric], job.direction, **job.limits)
    layout = next(iter(pairs.batches(1))).clean.layout
    return replace(sweep, sites=table + random_like(table, layout, N_NULL, job.seed)).plan()


def facts_of(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan, for JSON."""
    names = ("equal", "passes", "naive_flops", "state_bytes", "batch_size", "tokens", "reads")
    facts = {name: getattr(plan, name) for name in names}
    counts = {"cells": plan.changes.size, "flops": float(plan.flops.sum())}
    return {**counts, **facts, "notes": list(plan.notes)}


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder before the work whose result it is for, which goes again if it stays empty.

    Raises:
        ValueError: the folder is not empty, or is a file.
        OSError: it cannot be made.
    """
    made = not folder.exists()
    if not made and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is not empty or is a file; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def patch_folder(model: HookedMultimodal, job: Job, out: Path, quiet: bool = False) -> Patching:
    """Patch the pairs of a folder and write `out/result` and `out/report.html`; of an interrupted
    run what is finished.

    Raises:
        ValueError: as `Job.check` and `patch`; an unknown site; an output folder that is not empty.
    """
    job.check()
    table = make_sites(model, job.sites, job.spans)
    pairs = PairDataset.load(job.pairs, model)
    screen = {} if job.screen is None else {"screen": "attribution", "keep": job.screen}
    options = {**job.limits, **screen}
    with new_folder(out):
        with progress("patching") as report:
            found = patch(
                model, pairs, table, METRICS[job.metric], job.direction, report=report, **options
            )
        found.save(out / "result")
        found.page(f"Patching {job.pairs.name}").save(out / "report.html")
    if not quiet:
        shown = SHOWN if found.exact.all() else [*SHOWN, "exact"]
        print_table(found.strongest(10)[shown], "Strongest sites")
        print(f"result: {out / 'result'}\nreport: {out / 'report.html'}")
    return found

"""Many interventions over many pairs: planned first, then run by the engine batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import Answers, Metric, Reading, logit_diff, prepared, readings
from mechmm.data.pairs import PairDataset
from mechmm.engine.calibrate import DEFAULT
from mechmm.engine.checks import (
    check_choices,
    check_function,
    check_limits,
    check_metric,
    check_model,
    check_pairs,
    check_places,
    check_seed,
    check_sites,
)
from mechmm.engine.compile import compiled
from mechmm.engine.engine import Engine
from mechmm.engine.located import located
from mechmm.engine.places import Places, Values, halves, index
from mechmm.engine.plan import Plan
from mechmm.engine.shelf import Keep, Shelf, pick
from mechmm.engine.sites import Sites
from mechmm.engine.source import Donor, Source
from mechmm.model.hooked import HookedMultimodal

Report = Callable[[int, int], None]
"""Called with (work done, work in all)."""
TOGETHER = 4096
"""Places that are compared at once."""
UNMATCHED = "final norm and unembedding do not give the model's logits: trials run whole prompts"

UNLIKE = "norms, projections and MLP alone do not give what blocks give: these run as written"


@dataclass(frozen=True, eq=False)
class Swept:
    """What a sweep found.

    Attributes:
        values: the metric with a site changed [site, example], NaN where it was not reached.
        base: the metric of the unchanged prompts [example].
        complete: whether every cell was reached.
        run: cells that took a run; the others hold exactly the baseline.
        plan: what was planned, with a note where a run had to be another.
    """

    values: Float[Tensor, "site example"]
    base: Float[Tensor, " example"]
    complete: bool
    run: int
    plan: Plan


@dataclass(frozen=True, eq=False)
class Sweep:
    """The metric of every pair with every site set to new values, one site at a time.

    Attributes:
        base: which of a pair's prompts runs.
        source: where the new values come from: a name, or a function of what is there.
        seed: of `resample` and of random sites.
        batch_size: pairs that run together, at most.
        tokens: of one forward pass, at most; None: found by a short trial on the model. The last
            digits of results depend on it.
        budget: bytes of recorded activations that may be kept at once; None: no limit.
        state: where they are kept: `"device"`, `"cpu"` or `"disk"`.

    Raises:
        ValueError: no sites; a site outside the model; an unknown source; a limit below 1; a metric
            that does not give one number per example; an intervention that gives another shape or
            dtype; one pair alone to resample.
    """

    model: HookedMultimodal
    pairs: PairDataset
    sites: Sites
    metric: Metric = logit_diff
    base: Literal["clean", "corrupt"] = "corrupt"
    source: Source = "clean"
    seed: int = 0
    batch_size: int = 16
    tokens: int | None = None
    budget: int | None = None
    state: Keep = "device"

    def __post_init__(self) -> None:
        check_model(self.model)
        check_pairs(self.pairs, self.source)
        check_choices(self.base, self.source, self.state)
        check_limits(tokens=self.tokens, budget=self.budget)
        check_seed(self.seed)
        check_sites(self.model, self.sites)
        check_function(self.model, self.sites, self.source)
        check_metric(self.model, self.pairs, self.metric)

    def plan(self) -> Plan:
        """What will run, found without running anything.

        Raises:
            SpanError: a site's span that the pairs do not have.
            ValueError: a position outside a prompt.
        """
        return compiled(self, self.tokens or DEFAULT)[0]

    @torch.no_grad()
    def run(self, report: Report | None = None) -> Swept:
        """Run the plan. An interrupt from the keyboard ends it with what is finished.

        Raises:
            SpanError: a site's span that the pairs do not have.
            ValueError: a position outside a prompt; spans of unequal size in the two prompts.
            InterventionError: as `source.applied`.
        """
        run = _Run(self, report)
        try:
            run.all()
        except KeyboardInterrupt:
            return Swept(run.values, run.base, False, run.count, run.plan)
        return Swept(run.values, run.base, True, run.count, run.plan)


class _Run:
    """A sweep in progress."""

    def __init__(self, sweep: Sweep, report: Report | None) -> None:
        self.sweep, self.report = sweep, report
        self.plan, self.reuse = compiled(sweep, sweep.tokens or DEFAULT)
        self.values = torch.full((len(sweep.sites), len(sweep.pairs)), torch.nan)
        self.base = torch.full((len(sweep.pairs),), torch.nan)
        self.shelf, self.tokens = Shelf(sweep.state), sweep.tokens
        self.count, self.done, self.work = 0, 0.0, float(self.plan.flops.sum())

    def all(self) -> None:
        """Every batch."""
        sweep, size = self.sweep, self.plan.batch_size
        what = (sweep.model, sweep.pairs, sweep.sites, sweep.source, sweep.seed)
        donor = Donor(*what, size, sweep.state)
        for batch in sweep.pairs.batches(size):
            base = getattr(batch, sweep.base)
            places = located(sweep.sites, base.layout, sweep.seed, batch.numbers)
            check_places(sweep.sites, batch, sweep.seed)
            answers = prepared(sweep.model, batch.clean, batch.answers, sweep.metric)
            parts = readings(base, answers, sweep.metric)
            self.batch(batch.indices, places, donor.values(batch, places), parts, answers)
        self._progress(self.work - self.done)

    def batch(
        self,
        indices: tuple[int, ...],
        places: Places,
        values: Values,
        parts: list[Reading],
        answers: Answers,
    ) -> None:
        """All cells of one batch; the metric is a sum over its readings."""
        columns, sites = torch.tensor(indices), len(self.sweep.sites)
        weights = self.plan.flops[:, list(indices)].flatten() / len(parts)
        sums, base = torch.zeros(sites * len(indices)), torch.zeros(len(indices))
        for number, part in enumerate(parts):
            engine = self._engine(part, places)
            if number == 0:
                places, values = pruned(engine, places, values)
            alone = part.reduce(engine.base, answers).float().cpu()
            base += alone
            before, sums = sums, sums + alone.repeat(sites)
            last = number == len(parts) - 1
            if last:
                self._note(columns, places, sums, base)
            for trials, logits in engine.run(places, values):
                own = torch.as_tensor(trials)
                prompts = torch.as_tensor(places.prompts[trials], device=logits.device)
                found = part.reduce(logits, answers[prompts]).float().cpu()
                sums[own] = before[own] + found
                if last:
                    self.values[own // len(indices), columns[own % len(indices)]] = sums[own]
                self._progress(weights[trials].sum())
            self.tokens = engine.tokens  # fewer where memory ran out
            if engine.plains.refused and UNLIKE not in self.plan.notes:
                self.plan = replace(self.plan, notes=(*self.plan.notes, UNLIKE))
            del engine  # before another records: two would take twice the state
        skipped = np.setdiff1d(np.arange(len(weights)), places.trial)
        self._progress(weights[skipped].sum() * len(parts))

    def _engine(self, part: Reading, places: Places) -> Engine:
        self.shelf.clear()
        engine = Engine(
            self.sweep.model,
            part.batch,
            places.hooks,
            part.places,
            part.rows,
            tokens=self.tokens,
            shelf=self.shelf,
            reuse=self.reuse,
        )
        if engine.recording.blocks and engine.head is None and UNMATCHED not in self.plan.notes:
            self.plan = replace(self.plan, notes=(*self.plan.notes, UNMATCHED))
        return engine

    def _note(self, columns: Tensor, places: Places, sums: Tensor, base: Tensor) -> None:
        """Fill in the baseline, and the cells that take no run: they hold exactly that."""
        self.base[columns] = base
        known = torch.ones(len(sums), dtype=torch.bool)
        known[torch.as_tensor(places.trial)] = False
        self.count += int((~known).sum())
        known = known.view(-1, len(columns))
        sites, prompts = known.nonzero(as_tuple=True)
        self.values[sites, columns[prompts]] = sums.view(known.shape)[known]

    def _progress(self, work: float) -> None:
        self.done += work
        if self.report is not None:
            self.report(round(self.done / 1e6), max(1, round(self.work / 1e6)))


def pruned(engine: Engine, places: Places, values: Values) -> tuple[Places, Values]:
    """The places that are given another value than they have, and their values."""
    kept = np.flatnonzero(unlike(engine, places, values))
    return places.chosen(kept), lambda hook, at, now: values(hook, kept[at], now)


def unlike(engine: Engine, places: Places, values: Values) -> np.ndarray:
    """Which places are given another value than they have [place]; all where none is recorded."""
    keep = np.ones(len(places), dtype=bool)
    device = engine.model.device
    for number, hook in enumerate(places.hooks):
        base = engine.recording.hooks.get(hook)
        if base is None:
            continue
        at = np.flatnonzero(places.hook == number)
        for half in halves(places.part[at]):
            own = at[half]
            for part in np.split(own, range(TOGETHER, len(own), TOGETHER)):
                there = places.chosen(part)
                where = index(hook, there.row, there.position, there.part, base)
                now = pick(base, *where, device=device)
                new = values(hook, part, now).to(now)
                keep[part] = (new != now).reshape(len(part), -1).any(1).cpu().numpy()
    return keep

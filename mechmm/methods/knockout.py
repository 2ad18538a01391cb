"""Attention knockout: which way does the answer take through the positions?

A route source->reader is closed in some layers: in every head, the score of every key of the source
for every query of the reader is set to -inf before the softmax, so that its weight is exactly 0 and
the others share its part. With m the metric of the clean prompt,

    effect = (m_clean - m_closed) / (m_clean - m_corrupt):

1 where closing the route takes all that separates the clean prompt from the corrupt one.

Layers are closed all at once, in windows that slide over the model, or as they are given. A
distractor as the source is the sharpest null; beside every cell stand random routes of as many
pairs of query and key (`mechmm.engine.decoys`).

Text may carry what a picture shows: image -> question -> last. Closing image->last alone (direct),
image->question alone (mediated by text) and both tells the two apart; see `mediation` and
`Knockout.paths`.

Geva et al. 2304.14767 (knockout, windows); Zhang et al. 2411.18620 (in vision-language models);
Salazar et al. 2607.03358 (direct and text-mediated).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of, prepared, score
from mechmm.data.pairs import PairDataset
from mechmm.engine.cells import Cells
from mechmm.engine.checks import check_seed
from mechmm.engine.closing import Closing, Layers
from mechmm.engine.located import Located, tower_rows
from mechmm.engine.routes import (
    Hiding,
    Route,
    check_left,
    has_attention,
    scores_hook,
)
from mechmm.engine.sites import SEEING
from mechmm.engine.sweep import Report
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

N_NULL = 5
"""Random routes beside every cell."""
Hook = tuple[str, Hiding]


@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """What closing every route in every window did to every pair.

    Attributes:
        values: the metric of the clean prompt with a route closed [cell, example]; NaN where an
            interrupted run did not come.
        clean, corrupt: the metric of both prompts [example].
        null: the metric with random routes closed [random, example].
        cells: what the rows of `values` are: route, tower, first and last layer, centre, their
            number (`layers`) and how many pairs of query and key are closed on average (`pairs`).
        null_cells: what the rows of `null` are: `cell` that it stands beside, and `kind` of null.
        metric: its name.
    """

    values: Float[Tensor, "cell example"] = field(metadata={"axis": 1})
    clean: Float[Tensor, " example"] = field(metadata={"axis": 0})
    corrupt: Float[Tensor, " example"] = field(metadata={"axis": 0})
    null: Float[Tensor, "random example"] = field(metadata={"axis": 1})
    cells: pd.DataFrame
    null_cells: pd.DataFrame
    metric: str

    def effects(self) -> Float[Tensor, "cell example"]:
        """Normalised effect of every cell on every example."""
        return (self.clean - self.values) / (self.clean - self.corrupt)

    def _shares(self, values: Tensor) -> Float[Tensor, "cell example"]:
        """Change of the metric over the mean clean-corrupt difference: its mean is a ratio of
        means, so that pairs with a small difference cannot dominate."""
        return (self.clean - values) / (self.clean - self.corrupt).mean()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the mean metric, its change relative to the clean prompt's
        (`relative`), the effect with its 95 % interval over examples, and the range of its null."""
        shares, null = self._shares(self.values), self._shares(self.null).nanmean(1).numpy()
        table = self.cells.copy()
        table["value"] = self.values.nanmean(1).numpy()
        table["relative"] = table["value"] / float(self.clean.mean()) - 1
        table["effect"] = shares.nanmean(1).numpy()
        table["low"], table["high"] = (bound.numpy() for bound in bootstrap_interval(shares))
        of = self.null_cells["cell"].to_numpy()
        beside = [null[of == cell] for cell in range(len(table))]
        for name, share in (("null_low", 0.025), ("null_high", 0.975)):
            table[name] = [np.nanquantile(n, share) if len(n) else np.nan for n in beside]
        return table

    def paths(self, source: str = "image") -> pd.DataFrame:
        """The effect of closing the direct way of a source, the one through the question, and
        both, by window: columns direct, mediated, both, and `joint` = both - direct - mediated
        (what only closing both takes; negative where the two overlap).

        Raises:
            ValueError: where the routes of `mediation(source)` were not all closed.
        """
        names = mediation(source)
        table = self.to_dataframe()
        if missing := [name for name in names if name not in set(table["route"])]:
            raise ValueError(
                f"route {missing[0]!r} was not closed; run knockout(..., mediation({source!r}))"
            )
        table = table[table["route"].isin(names)]
        wide = table.pivot(index=["first", "last"], columns="route", values="effect")
        wide = wide[list(names)].set_axis(["direct", "mediated", "both"], axis=1)
        return wide.assign(joint=wide["both"] - wide["direct"] - wide["mediated"]).reset_index()

    def plot(self) -> dict[str, Figure]:
        """Figures by name: for every tower with several windows, effect over the middle of the
        window, a line for every route (by the tower's name); routes as bars where they are closed
        in one window alone (`routes`)."""
        table, figures = self.to_dataframe(), {}
        counts = table.groupby("route", sort=False)["route"].transform("size")
        for tower, group in table[counts > 1].groupby("tower", sort=False):
            figures[str(tower)] = self._lines(group, str(tower))
        single = table[counts == 1]
        if len(single):
            figures["routes"] = self._bars(single)
        return figures

    def _lines(self, table: pd.DataFrame, tower: str) -> Figure:
        series = {
            str(route): group.assign(x=group["centre"], value=group["effect"], name=_named(group))
            for route, group in table.groupby("route", sort=False)
        }
        null = table.groupby("centre").agg(low=("null_low", "min"), high=("null_high", "max"))
        sizes = sorted(set(table["layers"]))
        return plots.lines(
            series,
            f"knockout in the {tower} tower: {self.metric}",
            f"{len(self.clean)} pairs; windows of {', '.join(map(str, sizes))} layer(s); an effect "
            "of 1 takes all that separates clean from corrupt",
            x_title="middle of the window",
            null=null.rename_axis("x").reset_index(),
            null_title="random routes",
        )

    def _bars(self, table: pd.DataFrame) -> Figure:
        names = [f"{r}, layers {w}" for r, w in zip(table["route"], _named(table), strict=True)]
        known = table[table["null_low"].notna()]
        null = None
        if len(known):
            null = float(known["null_low"].min()), float(known["null_high"].max())
        effect, low, high = (table[name].to_numpy(float) for name in ("effect", "low", "high"))
        title = f"knockout: {self.metric}, {len(self.clean)} pairs"
        return plots.bars(names, effect, low, high, title, null=null, null_title="random routes")

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: every figure, and the table of cells."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Routes", contents)], facts or {})

    def summary(self) -> str:
        """What was closed, and the metric of both prompts, in words."""
        missing = int(self.values.isnan().sum() + self.null.isnan().sum())
        gaps = f" {missing} cells are missing: the run was interrupted." if missing else ""
        return (
            f"{self.cells['route'].nunique()} routes, {len(self.cells)} cells, {len(self.clean)} "
            f"pairs; {self.metric} is {float(self.clean.mean()):.2f} on the clean prompts and "
            f"{float(self.corrupt.mean()):.2f} on the corrupt ones. An effect of 1 takes the whole "
            f"difference.{gaps}"
        )


def _named(table: pd.DataFrame) -> list[str]:
    """The layers of every cell."""
    ends = zip(table["first"], table["last"], strict=True)
    return [str(first) if first == last else f"{first}-{last}" for first, last in ends]


def mediation(source: str = "image") -> tuple[str, str, str]:
    """The routes that tell the direct way of a source from the one through the question: direct,
    mediated, both."""
    direct, mediated = f"{source}->last", f"{source}->question - last"
    return direct, mediated, f"{direct} + {mediated}"


def knockout(
    model: HookedMultimodal,
    pairs: PairDataset,
    routes: str | Sequence[str],
    *,
    layers: Layers | None = None,
    window: int | None = None,
    metric: Metric = logit_diff,
    n_null: int = N_NULL,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Knockout:
    """Close routes through attention, one at a time, in windows of layers.

    An interrupt from the keyboard ends the run with what is finished; the rest is NaN.

    Args:
        routes: source->reader, for example `"image->last"`: the keys of the span `image` are
            hidden from the queries of the span `last`. `"question - last"` is a span less another,
            `"image->last + object->question"` several routes at once, `"vision.object->image"` one
            in a tower of its own. Generated tokens, and those of an answer of several tokens, read
            as the last position does.
        layers: of the routes' tower; lists of them are windows. Default: all that have scores.
        window: how many layers close at once, at every place; None: all of them.
        metric: larger = more the clean answer.
        n_null: random routes beside every cell.
        seed: of these.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        RouteError: a route that cannot be read, or that leaves a position nothing to attend to.
        SpanError: a span that no pair has.
        ValueError: no routes, a layer outside the tower or without scores, a window larger than
            there are layers, a number below 0; as `patch`.
    """
    names = [routes] if isinstance(routes, str) else list(routes)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"routes are {names}; give one or more, each once")
    if n_null < 0:
        raise ValueError(f"n_null is {n_null}; give 0 or more random routes")
    check_seed(seed)
    plan = Closing(model, [Route.of(name, model) for name in names], layers, window, n_null, seed)
    cells = Cells(model, pairs, plan.count, plan.changes, metric, batch_size, tokens)
    kinds, sizes = plan.checked(pairs, batch_size)
    corrupt = _corrupt(model, pairs, metric, batch_size)
    found = cells.run(report)
    own = len(plan.cells)
    return Knockout(
        values=found.values[:own],
        clean=found.base,
        corrupt=corrupt,
        null=found.values[own:],
        cells=plan.table(sizes),
        null_cells=plan.null_table(kinds),
        metric=name_of(metric),
    )


def knockout_hooks(
    model: HookedMultimodal, batch: Batch, route: str, layers: Sequence[int] | None = None
) -> list[Hook]:
    """Hooks that close a route for one batch of prompts, in full runs and in cached generation:

        with model.hooks(fwd_hooks=knockout_hooks(model, batch, "image->last")):
            tokens = model.generate(batch, max_new_tokens=5)

    Raises:
        RouteError, SpanError, ValueError: as `knockout`.
    """
    found = Route.of(route, model)
    finder = Located(batch.layout)
    rows: dict[int, dict[int, np.ndarray]] = {}
    for prompt in range(len(batch)):
        hidden = found.hidden(finder, prompt)
        check_left(hidden, found, model, batch.layout, (prompt, prompt))
        for number, row in enumerate(hidden.row.tolist()):
            rows.setdefault(row, {})[int(hidden.query[number])] = hidden.keys[number]
    if not rows:
        raise SpanError(f"route {route!r}: no prompt has positions at both of its ends")
    ours = found.tower not in SEEING
    count = len(batch) if ours else tower_rows(batch.layout)
    width, last = batch.input_ids.shape[1], batch.layout.last.tolist() if ours else None
    every = [rows.get(row, {}) for row in range(count)]
    return [
        (scores_hook(model, found.tower, layer), Hiding(every, width, last, route))
        for layer in has_attention(model, found.tower, layers)
    ]


@torch.no_grad()
def _corrupt(
    model: HookedMultimodal, pairs: PairDataset, metric: Metric, batch_size: int
) -> Float[Tensor, " example"]:
    """The metric of every pair's corrupt prompt."""
    found = []
    for batch in pairs.batches(batch_size):
        answers = prepared(model, batch.clean, batch.answers, metric)
        found.append(score(model, batch.corrupt, answers, metric).float().cpu())
    return torch.cat(found)

"""Back-patching: would the model do better if later states came earlier?

The clean prompt runs twice. The second time, what enters block t (and the w - 1 blocks behind it)
at the positions of a span is set to what entered block s > t (and those behind it) in the first:

    gain(s, t, w) = m(second run) - m(first run).

A gain says that the states of the later layer are of more use to the earlier one than its own:
that the computation at these positions came too late. With many combinations some gain by chance,
so the one with the largest mean gain is chosen on one part of the pairs, and its gain reported on
the others. Beside it stand two nulls at the same layers: the states of another pair's image, and
the prompt's own states with positions exchanged.

Biran et al. 2406.12775 (back-patching); Nikankin et al. 2506.09047 (of image tokens, held-out
choice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, accuracy, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.carried import Carried, Carry, spans_of
from mechmm.engine.cells import Cells
from mechmm.engine.checks import check_seed
from mechmm.engine.split import chosen_on
from mechmm.engine.sweep import Report
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

NULLS = ("another image", "shuffled positions")
N_NULL = 3
"""Random draws of every null."""


@dataclass(frozen=True, eq=False)
class BackPatching(Result):
    """The metric after every back-patch.

    Attributes:
        values: [cell, example]; NaN where an interrupted run did not come.
        base: of the clean prompts as they are [example].
        train: which examples the best cell was chosen on [example].
        null: the best cell with other states [random, example].
        cells: what the rows of `values` are: source, target, window.
        null_cells: what the rows of `null` are: `kind` and `draw`.
        best: row of the cell with the largest mean gain on the training examples.
        span, metric: names.
    """

    values: Float[Tensor, "cell example"]
    base: Float[Tensor, " example"]
    train: Bool[Tensor, " example"]
    null: Float[Tensor, "random example"]
    cells: pd.DataFrame
    null_cells: pd.DataFrame
    best: int
    span: str
    metric: str

    def gains(self) -> Float[Tensor, "cell example"]:
        """What every back-patch adds to the metric of every example."""
        return self.values - self.base

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: mean gain on the training examples and on the others (`held_out`), with
        the 95 % interval of the latter; `best` is the one that the training examples chose."""
        gains = self.gains()
        held_out = gains[:, ~self.train]
        low, high = bootstrap_interval(held_out)
        return self.cells.assign(
            train=gains[:, self.train].nanmean(1).numpy(),
            held_out=held_out.nanmean(1).numpy(),
            low=low.numpy(),
            high=high.numpy(),
            best=np.arange(len(self.cells)) == self.best,
        )

    def verdict(self) -> pd.DataFrame:
        """The chosen cell on the held-out examples beside its nulls: mean gain (a mean over draws,
        too), its 95 % interval over examples."""
        gains = {"chosen": self.gains()[self.best]}
        for kind, group in self.null_cells.groupby("kind", sort=False):
            gains[str(kind)] = (self.null[group.index.tolist()] - self.base).mean(0)
        held_out = torch.stack(list(gains.values()))[:, ~self.train]
        low, high = bootstrap_interval(held_out)
        return pd.DataFrame(
            {"states": list(gains), "gain": held_out.mean(1), "low": low, "high": high}
        )

    def plot(self) -> dict[str, Figure]:
        """Figures by name: gain on the training examples by target and source (`window 1`, ...),
        and the chosen cell on the others beside its nulls (`held out`)."""
        table, figures = self.to_dataframe(), {}
        for window, group in table.groupby("window", sort=False):
            wide = group.pivot(index="source", columns="target", values="train")
            wide = wide.sort_index(ascending=False)
            figures[f"window {window}"] = plots.heat_map(
                wide.to_numpy(float),
                [str(layer) for layer in wide.index],
                [str(layer) for layer in wide.columns],
                f"back-patching {self.span}, window {window}, training pairs: {self.metric}",
                x_title="written into layer",
                y_title="from layer",
                n=int(self.train.sum()),
                value_title="gain",
            )
        figures["held out"] = self._bars()
        return figures

    def _bars(self) -> Figure:
        table, cell = self.verdict(), self.cells.iloc[self.best]
        title = (
            f"back-patching {self.span} from layer {cell['source']} into {cell['target']}, window "
            f"{cell['window']}, {int((~self.train).sum())} held-out pairs: {self.metric}"
        )
        gain, low, high = (table[name].to_numpy(float) for name in ("gain", "low", "high"))
        return plots.bars(table["states"].tolist(), gain, low, high, title, value_title="gain")

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: every figure, the held-out gains, and the table of cells."""
        contents = [*self.plot().values(), self.verdict(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Back-patching", contents)], facts or {})

    def summary(self) -> str:
        """What was tried, and what held, in words."""
        own, cell = self.verdict().iloc[0], self.cells.iloc[self.best]
        missing = int(self.values.isnan().sum())
        gaps = f" {missing} cells are missing: the run was interrupted." if missing else ""
        return (
            f"{len(self.cells)} back-patches of {self.span}, {len(self.base)} pairs; {self.metric} "
            f"is {float(self.base.mean()):.2f} without. The best on {int(self.train.sum())} "
            f"training pairs, layer {cell['source']} into {cell['target']} (window "
            f"{cell['window']}), adds {own['gain']:.2f} ({own['low']:.2f} to {own['high']:.2f}) on "
            f"the {int((~self.train).sum())} held-out ones.{gaps}"
        )


def back_patch(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    span: str = "image",
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    windows: Sequence[int] = (1,),
    metric: Metric = accuracy,
    train: float = 0.5,
    n_null: int = N_NULL,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> BackPatching:
    """Write states of later layers into earlier ones, choose on some pairs, report on the others.

    An interrupt from the keyboard ends the run with what is finished; the rest is NaN, and the best
    cell is chosen among what was reached.

    Args:
        span: whose positions are back-patched, in the language model.
        sources, targets: layers; every target takes every later source. Default: all.
        windows: how many layers at once, one grid for each.
        metric: larger = more the clean answer.
        train: share of pairs that choose the cell.
        n_null: random draws of every null.
        seed: of the split and of the draws.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        ValueError: fewer than two pairs on either side; a layer or window outside the model; no
            source behind a target; as `patch`.
        SpanError: a span that no pair has.
    """
    check_seed(seed)
    cells = _cells(model, sources, targets, windows)
    chosen = chosen_on(len(pairs), train, seed)
    if n_null < 0:
        raise ValueError(f"n_null is {n_null}; give 0 or more draws")
    rest = (metric, batch_size, tokens)
    grid = Carried(model, pairs, cells, span, seed)
    every = Cells(model, pairs, len(cells), grid.changes, *rest)
    if not any(len(at) for b in pairs.batches(batch_size) for at in spans_of(b.clean, span)):
        raise SpanError(f"no pair has a position in span {span!r}")
    found = every.run(report)
    gains = (found.values - found.base)[:, chosen].nanmean(1)
    best = int(gains.nan_to_num(-torch.inf).argmax())
    draws = [
        Carry(c.source, c.target, c.window, kind, draw)  # type: ignore[arg-type]
        for c in cells[best : best + 1]
        for kind in NULLS
        for draw in range(1, n_null + 1)
    ]
    null = torch.zeros(0, len(pairs))
    if draws:
        others = Carried(model, pairs, draws, span, seed)
        null = Cells(model, pairs, len(draws), others.changes, *rest).run().values
    columns = [{"source": c.source, "target": c.target, "window": c.window} for c in cells]
    kinds = [{"kind": cell.whose, "draw": cell.draw} for cell in draws]
    return BackPatching(
        values=found.values,
        base=found.base,
        train=chosen,
        null=null,
        cells=pd.DataFrame(columns),
        null_cells=pd.DataFrame(kinds, columns=["kind", "draw"]),
        best=best,
        span=span,
        metric=name_of(metric),
    )


def _cells(
    model: HookedMultimodal,
    sources: Sequence[int] | None,
    targets: Sequence[int] | None,
    windows: Sequence[int],
) -> list[Carry]:
    """Every later source for every target, in every window that fits."""
    if LANGUAGE not in model.towers:
        raise ValueError(f"{model.family.architecture} has no language model to back-patch")
    count = len(model.towers[LANGUAGE].blocks)
    for what, given in (("source", sources), ("target", targets)):
        for layer in given or ():
            if not 0 <= layer < count:
                raise ValueError(
                    f"{what} {layer} is outside the model, whose layers are 0..{count - 1}"
                )
    for window in windows:
        if not 1 <= window < count:
            raise ValueError(f"a window of {window} layers does not fit; give 1 to {count - 1}")
    cells = [
        Carry(source, target, window)
        for window in windows
        for source in (range(count) if sources is None else sources)
        for target in (range(count) if targets is None else targets)
        if target < source and source + window <= count
    ]
    if not cells:
        raise ValueError("no source lies behind a target; give later sources or earlier targets")
    return cells

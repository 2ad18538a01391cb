"""Many interventions over many pairs that no table of sites names.

A cell is one intervention: any values at any places of any hooks, many at once. Cells run as those
of a sweep do, each from the first block that it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import Answers, Metric, Reading, prepared, readings
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.checks import check_limits, check_metric, check_model, check_pairs
from mechmm.engine.engine import Engine
from mechmm.engine.places import Places, Values
from mechmm.engine.shelf import Shelf
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal

Changes = Callable[[PairBatch, Reading], tuple[Places, Values]]
"""What the cells change in one reading of a batch of pairs; trial = cell * pairs + pair."""


@dataclass(frozen=True, eq=False)
class Filled:
    """What cells gave.

    Attributes:
        values: the metric of every cell [cell, example], NaN where it was not reached.
        base: the metric of the unchanged prompts [example].
        complete: whether every cell was reached.
    """

    values: Float[Tensor, "cell example"]
    base: Float[Tensor, " example"]
    complete: bool


@dataclass(frozen=True, eq=False)
class Cells:
    """The metric of every pair's clean prompt under every one of some interventions.

    Attributes:
        count: of interventions.
        changes: what they change. A cell that changes nothing in a prompt holds the baseline.
        batch_size: pairs that run together.
        tokens: of one forward pass, at most; None: found by a short trial.

    Raises:
        ValueError: a model without logits after a prompt; no pairs; a limit below 1; a metric that
            does not give one number per example.
    """

    model: HookedMultimodal
    pairs: PairDataset
    count: int
    changes: Changes
    metric: Metric
    batch_size: int = 16
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_model(self.model)
        check_pairs(self.pairs, "clean")
        check_limits(tokens=self.tokens, batch_size=self.batch_size)
        check_metric(self.model, self.pairs, self.metric)

    @torch.no_grad()
    def run(self, report: Report | None = None) -> Filled:
        """Fill the cells. An interrupt from the keyboard ends the run with what is finished.

        Args:
            report: called with (cells done, cells in all), cells counted once for every pair.
        """
        values = torch.full((self.count, len(self.pairs)), torch.nan)
        base, tokens = torch.full((len(self.pairs),), torch.nan), self.tokens
        try:
            for batch in self.pairs.batches(self.batch_size):
                at = list(batch.indices)
                values[:, at], base[at], tokens = self._batch(batch, tokens)
                if report is not None:
                    report(self.count * (at[-1] + 1), values.numel())
        except KeyboardInterrupt:
            return Filled(values, base, False)
        return Filled(values, base, True)

    def _batch(self, batch: PairBatch, tokens: int | None) -> tuple[Tensor, Tensor, int | None]:
        """The cells of one batch [cell, pair], its baseline, and how large passes were."""
        answers = prepared(self.model, batch.clean, batch.answers, self.metric)
        total, base = torch.zeros(self.count * len(batch)), torch.zeros(len(batch))
        for part in readings(batch.clean, answers, self.metric):
            found, alone, tokens = self._reading(batch, part, answers, tokens)
            total, base = total + found, base + alone
        return total.view(self.count, -1), base, tokens

    def _reading(
        self, batch: PairBatch, part: Reading, answers: Answers, tokens: int | None
    ) -> tuple[Tensor, Tensor, int | None]:
        """What one reading adds to every trial and to the baseline."""
        places, values = self.changes(batch, part)
        what = (self.model, part.batch, places.hooks, part.places, part.rows)
        engine = Engine(*what, tokens=tokens, shelf=Shelf(), kept=())
        alone = part.reduce(engine.base, answers).float().cpu()
        found = alone.repeat(self.count)
        for trials, logits in engine.run(places, values):
            prompts = torch.as_tensor(places.prompts[trials], device=logits.device)
            found[torch.as_tensor(trials)] = part.reduce(logits, answers[prompts]).float().cpu()
        return found, alone, engine.tokens


def concatenated(hooks: tuple[str, ...], prompts: int, cells: int, rows: list[Places]) -> Places:
    """The places of many cells as one table; trial = cell * prompts + prompt."""
    names = ("trial", "hook", "row", "position", "part")
    empty = np.zeros(0, dtype=np.int64)
    columns = (np.concatenate([empty, *(getattr(p, name) for p in rows)]) for name in names)
    return Places(hooks, np.tile(np.arange(prompts), cells), *columns)

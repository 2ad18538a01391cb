"""Steps of a run that are a method on something made by another public function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from plotly.graph_objects import Figure

from mechmm.data.metrics import Metric, logit_diff
from mechmm.data.pairs import PairDataset
from mechmm.engine.closing import Layers
from mechmm.engine.sweep import Report
from mechmm.methods.knockout import N_NULL, Knockout, knockout
from mechmm.methods.knockout import mediation as routes_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.result import Result


def mediation(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    source: str = "image",
    layers: Layers | None = None,
    window: int | None = None,
    metric: Metric = logit_diff,
    n_null: int = N_NULL,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Knockout:
    """`knockout` of the routes of `mm.mediation(source)`; arguments and errors as there."""
    rest: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "tokens": tokens}
    rest |= {"layers": layers, "window": window, "metric": metric, "n_null": n_null}
    return knockout(model, pairs, routes_of(source), report=report, **rest)


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """How far two circuits are the same.

    Attributes:
        table: of `Circuit.overlap`: per span the size of both, their intersection over union, and
            the mean and 95 % quantile of that of random circuits of the same sizes.
    """

    table: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per span, `all` first."""
        return self.table

    def plot(self) -> dict[str, Figure]:
        """Every span as a bar, and its random circuits as the bar below it (its interval: up to
        the 95 % quantile)."""
        names, rows = [], []
        for row in self.table.to_dict("records"):
            names += [row["span"], "random of the same sizes"]
            rows += [[row["iou"]] * 3, [row["random_mean"], row["random_mean"], row["random_high"]]]
        value, low, high = zip(*rows, strict=True)
        title = "overlap of two circuits"
        return {"overlap": plots.bars(names, value, low, high, title, value_title="IoU")}


def overlap(
    model: HookedMultimodal,
    circuit: Circuit,
    other_circuit: Circuit,
    *,
    n_random: int = 100,
    seed: int = 0,
) -> Overlap:
    """`Circuit.overlap` as a step: intersection over union of two circuits, beside random ones."""
    return Overlap(circuit.overlap(other_circuit, n_random, seed))

"""Steered runs beside runs that are pushed as hard in random ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import beside_draws


@dataclass(frozen=True, eq=False)
class Steered(Result):
    """The metric of every pair's clean prompt, steered.

    Attributes:
        values: [cell, example]. random: pushed as hard in random ways [cell, draw, example].
        base: without [example].
        cells: what the rows are: a `label`, how strongly (`scale`), and what else tells them apart.
        metric: its name. what: was done, and what the random pushes are, in words.
    """

    values: Float[Tensor, "cell example"] = field(metadata={"axis": 1})
    random: Float[Tensor, "cell draw example"] = field(metadata={"axis": 2})
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    cells: pd.DataFrame
    metric: str
    what: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the mean metric and its 95 % interval over examples, and the mean,
        smallest and largest mean of the random pushes."""
        return self.cells.assign(**beside_draws(self.values, self.random, self.base))

    def plot(self) -> dict[str, Figure]:
        """Every cell as a bar, over the range of the random pushes."""
        table = self.to_dataframe()
        several = table["scale"].nunique() > 1
        names = [r.label + f", scale {r.scale:g}" * several for r in table.itertuples()]
        value, low, high = (table[name].to_numpy(float) for name in ("value", "low", "high"))
        null = float(table["random_low"].min()), float(table["random_high"].max())
        title = f"steered: {self.metric}, {len(self.base)} pairs"
        extra = {"value_title": self.metric, "null_title": "random pushes"}
        return {"steering": plots.bars(names, value, low, high, title, null=null, **extra)}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Steering", contents)], facts or {})

    def summary(self) -> str:
        """What was done, and what came of it, in words."""
        table = self.to_dataframe()
        best = table.loc[(table["value"] - table["base"]).abs().idxmax()]
        return (
            f"{self.what} {len(self.base)} pairs; {self.metric} is {best['base']:.2f} without, "
            f"{best['value']:.2f} at {best['label']} with scale {best['scale']:g}, and "
            f"{best['random_low']:.2f} to {best['random_high']:.2f} with random pushes."
        )

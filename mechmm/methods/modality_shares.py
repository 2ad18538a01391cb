"""Modality shares (MM-SHAP): how much of an answer comes from the text, how much from the picture?

With phi the Shapley values of the patches and words of a prompt (`mechmm.engine.shapley`),

    T-SHAP = sum over words |phi| / sum over words and patches |phi|,     V-SHAP = 1 - T-SHAP.

A share says how much a modality moves the metric, in whatever direction, and not whether it helps:
a model that is misled by a picture has a large V-SHAP. So beside it stand the same prompts with the
pictures of other pairs; the share that words would have if all features moved the metric alike
(their number over that of all features); and, if given, questions that the text alone answers.

The picture is cut into few blocks, so that both modalities have about as many features: the share
depends on how many there are. Parcalabescu & Frank 2212.08158.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.exchanged import exchanged
from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_limits, check_seed
from mechmm.engine.features import features_of
from mechmm.engine.presence import Presence, check_game
from mechmm.engine.shapley import Shapley, shapley
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import IMAGE, SpanError
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SIDE = 4
"""Blocks along a side of the picture."""
N_ORDERS = 10
OWN, EXCHANGED, CONTROL = "pairs", "other pictures", "control"
ALIKE = "all features alike"


@dataclass(frozen=True, eq=False)
class ModalityShares(Result):
    """Shapley values of the patches and words of every pair's clean prompt.

    Attributes:
        values: of the pairs [example, feature], in units of the metric.
        exchanged: of the same prompts with other pairs' pictures [example, feature].
        control: of the control's prompts [control example, feature], or None.
        where, exchanged_where, control_where: position, modality, medium, view, row and column of
            every feature, -1 for none [example, feature, six].
        names: of the features of the pairs.
        full, empty: the metric with all features, and with none, of pairs [example].
        exchanged_full: the same with other pictures. control_full: of the control.
        baseline, metric: names. side, n_orders: as asked.
    """

    values: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    exchanged: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    control: Float[Tensor, "control_example feature3"] | None = field(metadata={"axis": 0})
    where: Int[Tensor, "example feature six"] = field(metadata={"axis": 0})
    exchanged_where: Int[Tensor, "example feature2 six"] = field(metadata={"axis": 0})
    control_where: Int[Tensor, "control_example feature3 six"] | None = field(metadata={"axis": 0})
    names: tuple[tuple[str, ...], ...] = field(metadata={"axis": 0})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    exchanged_full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    control_full: Float[Tensor, " control_example"] | None = field(metadata={"axis": 0})
    baseline: str
    metric: str
    side: int
    n_orders: int

    def _runs(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By name: Shapley values, features and the metric."""
        found = {
            OWN: (self.values, self.where, self.full),
            EXCHANGED: (self.exchanged, self.exchanged_where, self.exchanged_full),
        }
        if self.control is not None:
            assert self.control_where is not None
            assert self.control_full is not None
            found[CONTROL] = (self.control, self.control_where, self.control_full)
        return found

    def text_shares(self) -> dict[str, Float[Tensor, " example"]]:
        """T-SHAP of every example, by run; NaN where no feature moves the metric."""
        return {run: _share(phi.abs(), where) for run, (phi, where, _) in self._runs().items()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run: the mean metric, mean T-SHAP and its 95 % interval over examples, mean
        V-SHAP, the mean share of words among features (`alike`), and how many examples count (those
        in which some feature moves the metric)."""
        rows = []
        for run, share in self.text_shares().items():
            _, where, full = self._runs()[run]
            alike = _share((where[..., 1] >= 0).float(), where)
            known = ~share.isnan()
            ends = bootstrap_interval(share[known]) if known.any() else (torch.nan, torch.nan)
            text = float(share[known].mean()) if known.any() else float("nan")
            row = (run, float(full.mean()), text, *map(float, ends), 1 - text)
            rows.append((*row, float(alike.mean()), int(known.sum())))
        columns = ["run", "metric", "text", "low", "high", "image", "alike", "examples"]
        return pd.DataFrame(rows, columns=columns)

    def features(self) -> pd.DataFrame:
        """One row per example and feature of the pairs: name, kind and Shapley value."""
        rows = [
            (e, name, "image" if int(self.where[e, f, 1]) == IMAGE else "text", float(phi))
            for e, names in enumerate(self.names)
            for f, (name, phi) in enumerate(zip(names, self.values[e], strict=True))
            if int(self.where[e, f, 1]) >= 0
        ]
        return pd.DataFrame(rows, columns=["example", "name", "kind", "value"])

    def plot(self) -> dict[str, Figure]:
        """T-SHAP of every run, and the share that words have among features."""
        table = self.to_dataframe()
        names = [*table["run"], ALIKE]
        text, low, high = (table[name].tolist() for name in ("text", "low", "high"))
        nothing = float("nan")
        ends = (names, [*text, table["alike"][0]], [*low, nothing], [*high, nothing])
        title = f"share of the text in |Shapley values| of {self.metric}, {len(self.full)} pairs"
        return {"shares": plots.bars(*ends, title, value_title="T-SHAP (V-SHAP is the rest)")}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Shares", contents)], facts or {})

    def summary(self) -> str:
        """The shares of the text, in words."""
        table = self.to_dataframe()
        parts = ", ".join(
            f"{row['text']:.2f} [{row['low']:.2f}, {row['high']:.2f}] ({row['run']}, "
            f"{self.metric} {row['metric']:.2f})"
            for row in table.to_dict("records")
        )
        return (
            f"T-SHAP over {len(self.full)} pairs, against the baseline {self.baseline}: {parts}; "
            f"{table['alike'][0]:.2f} if all features moved the metric alike. V-SHAP is the rest."
        )


def _share(
    size: Float[Tensor, "example feature"], where: Int[Tensor, "example feature six"]
) -> Float[Tensor, " example"]:
    """Which share of some sizes lies on words."""
    there = where[..., 1] >= 0
    text = there & (where[..., 1] != IMAGE)
    return (size * text).sum(1) / (size * there).sum(1)


def modality_shares(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    control: PairDataset | None = None,
    side: int | None = SIDE,
    n_orders: int = N_ORDERS,
    baseline: str = "mean",
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> ModalityShares:
    """How much of the metric of every pair's clean prompt is owed to its words and its picture.

    Args:
        control: other pairs to compare with, pictures and all: questions that the text answers.
        side: blocks along a side of the picture; None: each patch is a feature.
        n_orders: sampled orders of the features, rounded up to an even number; exact where features
            are so few that all coalitions are no more work.
        baseline: what absent patches are: the picture's mean colour (`"mean"`), `"black"`, a
            blurred picture (`"blur"`), or the pair's `"corrupt"` prompt; absent words are the mean
            word of all pairs, or the corrupt prompt's.
        metric: of the clean prompt.
        seed: of orders, and of who takes whose picture.
        batch_size, tokens: as for `patch`.
        report: called with (orders done, orders in all) of each run.

    Raises:
        ValueError: an unknown baseline; a number below 1; as `patch`.
        PairError: one pair alone; pictures of different sizes, which cannot be exchanged.
        SpanError: a prompt without a picture, or without words.
    """
    check_limits(n_orders=n_orders, batch_size=batch_size)
    check_seed(seed)
    check_game(model, pairs, metric, baseline)
    runs = {OWN: pairs, EXCHANGED: exchanged(pairs, seed)}
    if control is not None:
        check_game(model, control, metric, baseline)
        runs[CONTROL] = control
    games = {}
    for run, some in runs.items():
        features = features_of(model, some, side=side, batch_size=batch_size)
        silent = (features.present == features.image).all(1).nonzero().flatten().tolist()
        if silent:
            raise SpanError(f"pair {silent[0]} of {run}: the clean prompt has no words")
        games[run] = Presence(model, some, features, metric, baseline, batch_size, tokens)
    found: dict[str, Shapley] = {n: shapley(g, n_orders, seed, report) for n, g in games.items()}
    own, other, beside = found[OWN], found[EXCHANGED], found.get(CONTROL)
    return ModalityShares(
        values=own.values,
        exchanged=other.values,
        control=None if beside is None else beside.values,
        where=games[OWN].features.where,
        exchanged_where=games[EXCHANGED].features.where,
        control_where=None if beside is None else games[CONTROL].features.where,
        names=games[OWN].features.names,
        full=own.full,
        empty=own.empty,
        exchanged_full=other.full,
        control_full=None if beside is None else beside.full,
        baseline=baseline,
        metric=name_of(metric),
        side=side if side is not None else 0,
        n_orders=n_orders,
    )

"""Deletion and insertion: does an attribution rank the patches that the answer needs?

Patches are ordered by any scores, the largest first. Deletion takes the first share of them away
from the clean prompt; insertion puts the first share into a prompt whose patches all are as in a
baseline:

    deletion(s) = v(all but the first s),     insertion(s) = v(the first s alone),

v the metric with patches present or absent (`mechmm.engine.presence`; words stay as they are).
Good scores make the deletion curve fall early and the insertion curve rise early: the area under
the first is small, under the second large, as compared with random orders of the same patches. The
area is the integral over shares from 0 to 1 by trapezoids, in units of the metric.

Petsiuk et al. 1806.07421 (RISE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_limits, check_seed
from mechmm.engine.features import Features, features_of
from mechmm.engine.presence import Presence, check_game
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.lines import lines
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
N_RANDOM = 5
"""Random orders of the patches."""
CURVES = ("deletion", "insertion")


@dataclass(frozen=True, eq=False)
class DeletionInsertion(Result):
    """The metric of every pair's clean prompt with shares of its patches away, or there alone.

    Attributes:
        deletion, insertion: by the scores [share, example].
        random_deletion, random_insertion: in random orders [share, draw, example].
        shares: from 0 to 1.
        baseline, metric: names. side: blocks along a side of the picture, 0: patches.
    """

    deletion: Float[Tensor, "share example"] = field(metadata={"axis": 1})
    insertion: Float[Tensor, "share example"] = field(metadata={"axis": 1})
    random_deletion: Float[Tensor, "share draw example"] = field(metadata={"axis": 2})
    random_insertion: Float[Tensor, "share draw example"] = field(metadata={"axis": 2})
    shares: tuple[float, ...]
    baseline: str
    metric: str
    side: int

    def area(self, curve: str) -> Float[Tensor, " example"]:
        """The area under `"deletion"` or `"insertion"`."""
        return self._area(getattr(self, curve))

    def random_area(self, curve: str) -> Float[Tensor, "draw example"]:
        """The area under the curves of random orders."""
        return self._area(getattr(self, f"random_{curve}"))

    def _area(self, values: Float[Tensor, "share *cell"]) -> Float[Tensor, "*cell"]:
        return torch.trapezoid(values, torch.tensor(self.shares), dim=0)

    def areas(self) -> pd.DataFrame:
        """One row per curve: the mean area and its 95 % interval over examples, the mean, smallest
        and largest mean of random orders, and the mean difference from random orders with its
        interval (`gain`: deletion random - scores, insertion scores - random; positive: better)."""
        rows = []
        for curve in CURVES:
            own, random = self.area(curve), self.random_area(curve)
            gain = own - random.mean(0) if curve == "insertion" else random.mean(0) - own
            draws = random.mean(1)
            columns = [own.mean(), *bootstrap_interval(own), draws.mean(), draws.min()]
            columns += [draws.max(), gain.mean(), *bootstrap_interval(gain)]
            rows.append([curve, *map(float, columns)])
        names = ["curve", "area", "low", "high", "random_mean", "random_low", "random_high"]
        return pd.DataFrame(rows, columns=[*names, "gain", "gain_low", "gain_high"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per curve and share: the mean metric and its 95 % interval over examples, and the
        mean, smallest and largest mean of random orders."""
        tables = []
        for curve in CURVES:
            own, random = getattr(self, curve), getattr(self, f"random_{curve}").mean(2)
            low, high = bootstrap_interval(own)
            columns = {
                "curve": curve,
                "share": self.shares,
                "value": own.mean(1).numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
                "random_mean": random.mean(1).numpy(),
                "random_low": random.amin(1).numpy(),
                "random_high": random.amax(1).numpy(),
            }
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def plot(self) -> dict[str, Figure]:
        """Each curve with its interval, and the range of random orders as a band."""
        table = self.to_dataframe()
        return {curve: self._curve(table[table["curve"] == curve], curve) for curve in CURVES}

    def _curve(self, table: pd.DataFrame, curve: str) -> Figure:
        table = table.assign(x=100 * table["share"])
        null = table[["x"]].assign(low=table["random_low"], high=table["random_high"])
        drawn = table[["x"]].assign(value=table["random_mean"], low=np.nan, high=np.nan)
        return lines(
            {"by the scores": table, "random, mean": drawn},
            f"{curve}: {self.metric}, {self.deletion.shape[1]} pairs",
            f"absent patches as in the baseline {self.baseline}; words stay",
            x_title="patches deleted, %" if curve == "deletion" else "patches inserted, %",
            y_title=self.metric,
            null=null,
            null_title="random orders",
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the tables."""
        contents = [*self.plot().values(), self.areas(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Curves", contents)], facts or {})

    def summary(self) -> str:
        """The areas, beside those of random orders, in words."""
        parts = ", ".join(
            f"{row['area']:.2f} under {row['curve']} (random orders {row['random_mean']:.2f}, "
            f"gain {row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}])"
            for row in self.areas().to_dict("records")
        )
        full, empty = float(self.deletion[0].mean()), float(self.deletion[-1].mean())
        return (
            f"{self.deletion.shape[1]} pairs; {self.metric} is {full:.2f} with all patches and "
            f"{empty:.2f} with none ({self.baseline}); areas: {parts}."
        )


def deletion_insertion(
    model: HookedMultimodal,
    pairs: PairDataset,
    scores: Shaped[Tensor, "example patch"] | np.ndarray,
    *,
    side: int | None = None,
    shares: Sequence[float] = SHARES,
    baseline: str = "mean",
    metric: Metric = logit_diff,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> DeletionInsertion:
    """Delete and insert patches in the order of their scores, the largest first.

    Args:
        scores: of every patch, in the order of pictures, views, rows and columns, which is that of
            image tokens where each stands for one place; of any kind: `image_scores()` of
            `mm.input_attribution`, effects of patching single image tokens, attention. Columns that
            a prompt has no patch for are not read. Equal scores keep the order of the patches.
        side: scores are of side x side blocks of the picture instead of patches.
        shares: of the patches, strictly between 0 and 1; 0 and 1 are added.
        baseline: what absent patches are, as for `mm.input_attribution`.
        metric: of the clean prompt.
        n_random: random orders; an example's do not depend on the others.
        seed: of these.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        ValueError: scores of another shape, or not finite; shares outside (0, 1), or one twice; an
            unknown baseline; a number below 1; as `patch`.
        SpanError: a prompt without a picture.
    """
    within = sorted(map(float, shares))
    if not within or len(set(within)) < len(within) or not all(0 < s < 1 for s in within):
        raise ValueError(f"shares are {within}; give shares between 0 and 1, each once")
    check_limits(n_random=n_random, batch_size=batch_size)
    check_seed(seed)
    check_game(model, pairs, metric, baseline)
    features = features_of(model, pairs, side=side, text=False, batch_size=batch_size)
    ranks = [_ranked(_checked(scores, features), features), *_random(features, n_random, seed)]
    ends = [0.0, *within, 1.0]
    absent = _absent(torch.stack(ranks), features.present, ends)
    game = Presence(model, pairs, features, metric, baseline, batch_size, tokens)
    found = game.values(absent.flatten(0, 2), report).values.unflatten(0, absent.shape[:3])
    return DeletionInsertion(
        deletion=found[0, 0],
        insertion=found[1, 0],
        random_deletion=found[0, 1:].transpose(0, 1).contiguous(),
        random_insertion=found[1, 1:].transpose(0, 1).contiguous(),
        shares=tuple(ends),
        baseline=baseline,
        metric=name_of(metric),
        side=side if side is not None else 0,
    )


def _checked(scores: Tensor | np.ndarray, features: Features) -> Float[Tensor, "example patch"]:
    found = torch.as_tensor(scores).detach().cpu().double()
    wanted = tuple(features.present.shape)
    if tuple(found.shape) != wanted:
        raise ValueError(
            f"scores are of shape {list(found.shape)}, the pairs have {list(wanted)} (examples, "
            "patches); give one score for each patch, or side= where they are of blocks"
        )
    odd = (~found.isfinite() & features.present).nonzero().tolist()
    if odd:
        raise ValueError(
            f"the score of pair {odd[0][0]}, patch {odd[0][1]} is {found[tuple(odd[0])]}; give "
            "finite scores"
        )
    return found


def _ranked(
    scores: Float[Tensor, "example patch"], features: Features
) -> Int[Tensor, "example patch"]:
    """The place of every patch in the order; patches that are not there come last."""
    known = scores.masked_fill(~features.present, -torch.inf)
    return known.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _random(features: Features, n: int, seed: int) -> list[Int[Tensor, "example patch"]]:
    found = []
    for draw in range(n):
        rows = [
            np.random.default_rng([seed, draw, example]).random(features.count)
            for example in range(len(features.own))
        ]
        found.append(_ranked(torch.from_numpy(np.stack(rows)), features))
    return found


def _absent(
    ranks: Int[Tensor, "order example patch"],
    present: Bool[Tensor, "example patch"],
    shares: Sequence[float],
) -> Bool[Tensor, "two order share example patch"]:
    """What is absent in deletion and in insertion."""
    sizes = (torch.tensor(shares)[:, None] * present.sum(1)).round()  # [share, example]
    first = ranks[:, None] < sizes[None, :, :, None]
    return torch.stack([first, ~first]) & present

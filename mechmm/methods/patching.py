"""Activation patching: which activations carry the answer?

A pair has a clean prompt, on which the model answers, and a corrupt one. With m the metric,

- denoising: the corrupt prompt runs, one site set to its clean value; effect
  (m_patched - m_corrupt) / (m_clean - m_corrupt): 1 where the site alone restores the answer;
- noising: the clean prompt runs, one site set to its corrupt value; effect
  (m_clean - m_patched) / (m_clean - m_corrupt): 1 where the answer cannot do without it;
- ablation (`"zero"`, `"mean"`, `"resample"`): as noising, with zeros, the mean over the pairs'
  clean runs, or another pair's clean value.

Meng et al. 2202.05262 (causal tracing); Zhang & Nanda 2309.16042 (best practices); Heimersheim &
Nanda 2404.15255 (denoising and noising).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, prepared, score
from mechmm.data.pairs import PairDataset
from mechmm.engine.located import random_like
from mechmm.engine.sites import RANDOM, Sites
from mechmm.engine.source import Source
from mechmm.engine.sweep import Report, Sweep
from mechmm.model.grids import Medium, sources
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SOURCES: Mapping[str, Source] = {
    "denoise": "clean",
    "noise": "corrupt",
    "zero": "zero",
    "mean": "mean",
    "resample": "resample",
}
"""Where the new values come from, by direction."""


@dataclass(frozen=True, eq=False)
class Patching(Result):
    """What patching every site did to every pair.

    Attributes:
        values: the metric with a site patched [site, example].
        clean, corrupt: the metric of the two prompts [example].
        null: the metric with random sites patched [random site, example].
        sites, null_sites: what the rows of `values` and `null` are.
        direction, metric: names.
        picture: the first clean picture, for overlays.
        grid: (rows, columns) of its patches, and positions of the tower before the first.
    """

    values: Float[Tensor, "site example"] = field(metadata={"axis": 1})
    clean: Float[Tensor, " example"] = field(metadata={"axis": 0})
    corrupt: Float[Tensor, " example"] = field(metadata={"axis": 0})
    null: Float[Tensor, "random example"] = field(metadata={"axis": 1})
    sites: pd.DataFrame
    null_sites: pd.DataFrame
    direction: str
    metric: str
    picture: Image.Image | None = field(default=None, metadata={"keep": "first"})
    grid: tuple[int, ...] = ()

    def effects(self) -> Float[Tensor, "site example"]:
        """Normalised effect of every site on every example."""
        return self._change(self.values) / (self.clean - self.corrupt)

    def null_effects(self) -> Float[Tensor, "random example"]:
        """Normalised effect of every random site on every example."""
        return self._change(self.null) / (self.clean - self.corrupt)

    def mean_effects(self) -> Float[Tensor, " site"]:
        """Change of the mean metric as a share of the mean clean-corrupt difference.

        A ratio of means, so that pairs with a small difference cannot dominate.
        """
        return self._mean(self.values)

    def _change(self, values: Tensor) -> Tensor:
        """How far the metric moved, positive towards clean (denoising) or away from it."""
        if self.direction == "denoise":
            return values - self.corrupt
        return self.clean - values

    def _mean(self, values: Tensor) -> Tensor:
        return self._change(values).mean(-1) / (self.clean - self.corrupt).mean()

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples of every site's mean effect: (low, high)."""
        low, high = bootstrap_interval(self._change(self.values))
        scale = float((self.clean - self.corrupt).mean())
        ends = np.stack([np.asarray(low), np.asarray(high)]) / scale
        return ends.min(0), ends.max(0)  # the scale is negative where the model prefers the foil

    def null_range(self) -> dict[tuple[str, str, str], tuple[float, float]]:
        """(tower, kind, span) -> where 95 % of random sites of that size have their mean effect."""
        effects = self._mean(self.null).numpy()
        spans = self.null_sites["span"].str.removeprefix(RANDOM)
        keys = list(zip(self.null_sites["tower"], self.null_sites["kind"], spans, strict=True))
        return {
            key: tuple(np.quantile(effects[[k == key for k in keys]], (0.025, 0.975)).tolist())
            for key in dict.fromkeys(keys)
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: where it is, raw mean, effect, its interval and the null range."""
        low, high = self.interval()
        null = self.null_range()
        table = self.sites.copy()
        table["label"] = Sites(self.sites).labels()
        table["value"] = self.values.mean(-1).numpy()
        table["effect"] = self.mean_effects().numpy()
        table["low"], table["high"] = low, high
        keys = list(zip(table["tower"], table["kind"], table["span"], strict=True))
        table["null_low"] = [null.get(key, (np.nan, np.nan))[0] for key in keys]
        table["null_high"] = [null.get(key, (np.nan, np.nan))[1] for key in keys]
        return table

    def strongest(self, n: int = 10, kinds: Sequence[str] | None = None) -> pd.DataFrame:
        """The `n` sites (of some kinds) with the largest absolute effect, as in `to_dataframe`."""
        table = self.to_dataframe()
        if kinds is not None:
            table = table[table["kind"].isin(kinds)]
        return table.loc[table["effect"].abs().sort_values(ascending=False).index[:n]]

    def plot(self) -> dict[str, Figure]:
        """Figures by name: layers x spans per kind, layers x heads, the strongest sites, and the
        patches of the first example over its picture."""
        table = self.to_dataframe()
        spans = table[table["layer"].notna() & table["head"].isna() & (table["span"] != "")]
        figures = {
            str(kind): self._by_layer(group, "span")
            for kind, group in spans.groupby("kind", sort=False)
        }
        heads = table[table["head"].notna()]
        if len(heads):
            figures["heads"] = self._by_layer(heads, "head")
        patches = (self.sites["tower"] == "vision") & self.sites["position"].notna()
        if patches.any() and self.picture is not None and self.grid:
            figures["patches"] = self.overlay(0)
        figures["strongest"] = self._bars()
        return figures

    def overlay(self, example: int = 0) -> Figure:
        """Every single patch of the vision tower's residual stream, for one example alone, over
        the first clean picture: means over different pictures would mean nothing.

        Raises:
            ValueError: no picture, no `sites.patches` in the table, or a picture seen in tiles.
        """
        chosen = (self.sites["tower"] == "vision") & self.sites["position"].notna()
        if self.picture is None or not chosen.any():
            raise ValueError("an overlay needs a picture and sites.patches in the table of sites")
        if not self.grid:
            raise ValueError("the first picture is seen in tiles: an overlay shows one grid alone")
        table = self.sites[chosen].assign(
            effect=self.effects()[:, example].numpy()[chosen.to_numpy()]
        )
        wide = table.pivot_table(index="layer", columns="position", values="effect")
        rows, columns, before = self.grid
        grids = wide.to_numpy(float)[:, before:].reshape(-1, rows, columns)
        layers = [f"vision layer {layer}" for layer in wide.index]
        title = f"single patches, {self.direction}, pair {example}"
        return plots.patch_overlay(self.picture, grids, title, layers=layers)

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: baselines, every figure, and the strongest sites."""
        contents = [*self.plot().values(), self.strongest(20).drop(columns="hook")]
        return Page(title, self.summary(), [Section("Sites", contents)], facts or {})

    def summary(self) -> str:
        """What was patched, and the metric of both prompts, in words."""
        return (
            f"{len(self.sites)} sites, {len(self.clean)} pairs, {self.direction}; {self.metric} is "
            f"{float(self.clean.mean()):.2f} on the clean prompts and "
            f"{float(self.corrupt.mean()):.2f} on the corrupt ones. An effect of 1 carries the "
            "whole difference."
        )

    def _by_layer(self, table: pd.DataFrame, column: str) -> Figure:
        """Heat maps of effects, the last layer at the top, spans or heads across, a tower each."""
        kind, maps = str(table["kind"].iloc[0]), {}
        for tower, group in table.groupby("tower", sort=False):
            wide = group.pivot_table(index="layer", columns=column, values="effect", sort=False)
            wide = wide.sort_index(ascending=False)
            maps[str(tower)] = (
                wide.to_numpy(float),
                [str(layer) for layer in wide.index],
                [str(name) for name in wide.columns],
            )
        ranges = self.null_range().items()
        whole = {t: r for (t, k, span), r in ranges if k == kind and t in maps and span == "all"}
        nulls = whole if column == "head" else None  # spans have a null each: see the table
        title = f"{kind}: {self.direction}, {self.metric}"
        n = len(self.clean)
        return plots.tower_maps(maps, title, x_title=column, n=n, nulls=nulls)

    def _bars(self) -> Figure:
        """Heads, attention and MLPs if there are any, else all sites; their null if it is one."""
        parts = [kind for kind in ("head", "attn", "mlp") if (self.sites["kind"] == kind).any()]
        top = self.strongest(15, parts or None)
        nulls = set(zip(top["null_low"], top["null_high"], strict=True))
        null = nulls.pop() if len(nulls) == 1 and top["null_low"].notna().all() else None
        effect, low, high = (top[name].to_numpy(float) for name in ("effect", "low", "high"))
        title = f"strongest {'components' if parts else 'sites'}: {self.direction}, {self.metric}"
        return plots.bars(top["label"].tolist(), effect, low, high, title, null=null)


def patch(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric = logit_diff,
    direction: str = "denoise",
    *,
    n_null: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Patching:
    """Patch every site of every pair, one at a time.

    Args:
        sites: from `mechmm.sites`; both towers may be in one table.
        metric: larger = more the clean answer.
        direction: `"denoise"`, `"noise"`, or an ablation: `"zero"`, `"mean"`, `"resample"`.
        n_null: random sites per tower, kind and span for the null.
        seed: of the null and of `resample`.
        batch_size: pairs that run together.
        tokens: prompts times positions of one forward pass, at most.
        report: called with (forward passes done, in all) of the sweep.

    Raises:
        ValueError: no pairs, no sites, or an unknown direction.
        SpanError: a site's span that the pairs do not have.
    """
    if direction not in SOURCES:
        raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(SOURCES)}")
    if not len(pairs) or not len(sites):
        raise ValueError(f"nothing to patch: {len(pairs)} pairs, {len(sites)} sites")
    first = next(iter(pairs.batches(1))).clean
    null_sites = random_like(sites, first.layout, n_null, seed)
    clean, corrupt = baselines(model, pairs, metric, batch_size)
    together = (
        Sweep(
            model,
            pairs,
            sites + null_sites,
            metric,
            base="corrupt" if direction == "denoise" else "clean",
            source=SOURCES[direction],
            seed=seed,
            batch_size=batch_size,
            tokens=tokens,
        )
        .run(report)
        .values
    )
    media = first.layout.media[0]
    return Patching(
        values=together[: len(sites)],
        clean=clean,
        corrupt=corrupt,
        null=together[len(sites) :],
        sites=sites.table,
        null_sites=null_sites.table,
        direction=direction,
        metric=metric.__name__,
        picture=first.images[0][0] if first.images and first.images[0] else None,
        grid=_grid(media[0]) if media else (),
    )


def _grid(medium: Medium) -> tuple[int, ...]:
    """Rows and columns of the tower's own patches, and its positions before the first of them;
    empty where the medium is seen in several views or its patches do not lie row by row."""
    if len(medium.views) != 1:
        return ()
    view = medium.views[0]
    merge, first = math.isqrt(view.sources.shape[1]), int(view.sources[..., 1].min())
    plain = sources(view.rows, view.columns, merge=merge, first=first)
    in_rows = np.array_equal(view.sources, plain)
    return (view.rows * merge, view.columns * merge, first) if in_rows else ()


@torch.no_grad()
def baselines(
    model: HookedMultimodal, pairs: PairDataset, metric: Metric, batch_size: int = 16
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """The metric of every pair's clean and corrupt prompt."""
    both = []
    for batch in pairs.batches(batch_size):
        answers = prepared(model, batch.clean, batch.answers, metric)
        runs = (score(model, run, answers, metric) for run in (batch.clean, batch.corrupt))
        both.append([values.float().cpu() for values in runs])
    return torch.cat([clean for clean, _ in both]), torch.cat([corrupt for _, corrupt in both])

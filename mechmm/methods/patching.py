"""Activation patching: which activations carry the answer?

A pair has a clean prompt, on which the model answers, and a corrupt one. With m the metric,

- denoising: the corrupt prompt runs, one site set to its clean value; effect
  (m_patched - m_corrupt) / (m_clean - m_corrupt): 1 where the site alone restores the answer;
- noising: the clean prompt runs, one site set to its corrupt value; effect
  (m_clean - m_patched) / (m_clean - m_corrupt): 1 where the answer cannot do without it;
- ablation (`"zero"`, `"mean"`, `"resample"`): as noising, with zeros, the mean over the pairs'
  clean runs, or another pair's clean value;
- any function of the clean value, or `Steer`, which adds a direction: as noising.

A screen ranks all sites by a first-order estimate of their effect, m_base + sum (new - base) dm/dx,
and only the first of them are patched; how far the estimate agrees with patching is measured on
random others.

Meng et al. 2202.05262 (causal tracing); Zhang & Nanda 2309.16042 (best practices); Heimersheim &
Nanda 2404.15255 (denoising and noising); Nanda 2023 and Syed et al. 2310.10348 (attribution
patching).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of, prepared, score
from mechmm.data.pairs import PairDataset
from mechmm.engine.estimate import Base, check_gradient, estimated
from mechmm.engine.located import random_like
from mechmm.engine.shelf import Keep
from mechmm.engine.sites import RANDOM, Sites
from mechmm.engine.source import Function, Source, Steer
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
N_NULL = 20
"""Random sites per tower, kind and span."""
SCREENS = ("attribution",)
"""Ways to rank sites without patching them."""
CHECKED = 20
"""Sites that a screen left out and that are patched all the same, to see how well it ranks."""
BY_HEAD = {"head": "heads", "pattern": "patterns"}
"""Names of the figures of layers x heads, by kind."""
COMPONENTS = ("head", "pattern", "neuron", "attn", "mlp")
"""Kinds that are shown as bars, where there are any."""


@dataclass(frozen=True, eq=False)
class Patching(Result):
    """What patching every site did to every pair.

    Attributes:
        values: the metric with a site patched [site, example]; NaN where an interrupted run did
            not come. Means are over the examples that were finished.
        clean, corrupt: the metric of the two prompts [example].
        null: the metric with random sites patched [random site, example].
        sites, null_sites: what the rows of `values` and `null` are. The column `exact` of `sites`
            says which were patched, `checked` which of them at random, to check a screen; the
            values of all others are estimates.
        direction, metric: names.
        picture: the first clean picture, for overlays.
        grid: (rows, columns) of its patches, and positions of the tower before the first.
        estimates: the change of the metric that a screen estimated, or None [site, example].
        finished: whether all cells of an example were reached, or None for all [example].
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
    estimates: Float[Tensor, "site example"] | None = field(default=None, metadata={"axis": 1})
    finished: Bool[Tensor, " example"] | None = field(default=None, metadata={"axis": 0})

    @property
    def exact(self) -> np.ndarray:
        """Which sites were patched; all without a screen [site]."""
        if "exact" not in self.sites:  # a result of earlier days
            return np.ones(len(self.sites), dtype=bool)
        return self.sites["exact"].to_numpy(dtype=bool)

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of estimated and exact mean change, over random sites that
        the screen left out; NaN without a screen, and where it left out fewer than two."""
        if self.estimates is None or self.sites["checked"].sum() < 2:
            return math.nan
        checked = torch.tensor(self.sites["checked"].to_numpy(dtype=bool))
        change = (self.values - self._base)[checked]
        guess = self.estimates[checked].where(~change.isnan(), torch.nan)
        ranks = [pd.Series(each.nanmean(1).numpy()).rank() for each in (change, guess)]
        return float(ranks[0].corr(ranks[1]))

    @property
    def missing(self) -> int:
        """Cells without a value, those of random sites included."""
        return int(self.values.isnan().sum() + self.null.isnan().sum())

    @property
    def interrupted(self) -> bool:
        """Whether the run ended before every cell was reached."""
        return self.finished is not None and not bool(self.finished.all())

    @property
    def _base(self) -> Tensor:
        return self.corrupt if self.direction == "denoise" else self.clean

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
            return values - self._base
        return self._base - values

    def _mean(self, values: Tensor) -> Tensor:
        change = self._change(values)
        known = ~change.isnan()
        difference = (self.clean - self.corrupt).where(known, 0)
        return change.where(known, 0).sum(-1) / difference.sum(-1)

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples of every site's mean effect: (low, high)."""
        change, difference = self._change(self.values), self.clean - self.corrupt
        known = ~change.isnan()
        ends = np.full((2, len(change)), np.nan, dtype=np.float32)
        for finished in known.unique(dim=0):
            if finished.any():
                alike = (known == finished).all(1)
                bounds = torch.stack(bootstrap_interval(change[alike][:, finished]))
                ends[:, alike.numpy()] = bounds / difference[finished].mean()
        return ends.min(0), ends.max(0)  # the scale is negative where the model prefers the foil

    def null_range(self) -> dict[tuple[str, str, str], tuple[float, float]]:
        """(tower, kind, span) -> where 95 % of random sites of that size have their mean effect."""
        effects = self._mean(self.null).numpy()
        finished = ~np.isnan(effects)
        table, effects = self.null_sites[finished], effects[finished]
        spans = table["span"].str.removeprefix(RANDOM)
        keys = list(zip(table["tower"], table["kind"], spans, strict=True))
        return {
            key: tuple(np.quantile(effects[[k == key for k in keys]], (0.025, 0.975)).tolist())
            for key in dict.fromkeys(keys)
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: where it is, whether its values are exact or estimated, raw mean,
        effect, its interval and the null range."""
        low, high = self.interval()
        null = self.null_range()
        table = self.sites.copy()
        table["label"] = Sites(self.sites).labels()
        table["exact"] = self.exact
        table["value"] = self.values.nanmean(-1).numpy()
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
        """Figures by name: layers x spans per kind, layers x heads per kind (and span, if there are
        several), the strongest sites, and the patches of the first example over its picture."""
        table = self.to_dataframe()
        apart = table["head"].isna() & table["neuron"].isna()
        spans = table[table["layer"].notna() & apart & (table["span"] != "")]
        figures = {
            str(kind): self._by_layer(group, "span", str(kind))
            for kind, group in spans.groupby("kind", sort=False)
        }
        heads = table[table["head"].notna() & table["layer"].notna()]
        for kind, group in heads.groupby("kind", sort=False):
            figures |= self._by_head(group, BY_HEAD.get(str(kind), f"{kind} by head"))
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
        wide = table.pivot_table(index="layer", columns="position", values="effect", dropna=False)
        rows, columns, before = self.grid
        grids = wide.to_numpy(float)[:, before:].reshape(-1, rows, columns)
        layers = [f"vision layer {layer}" for layer in wide.index]
        title = self._title(f"single patches, {self.direction}, pair {example}", chosen.to_numpy())
        return plots.patch_overlay(self.picture, grids, title, layers=layers)

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: baselines, every figure, and the strongest sites."""
        hidden = ["hook", "checked"] if self.estimates is not None else ["hook", "exact"]
        contents = [*self.plot().values(), self.strongest(20).drop(columns=hidden)]
        return Page(title, self.summary(), [Section("Sites", contents)], facts or {})

    def summary(self) -> str:
        """What was patched, and the metric of both prompts, in words."""
        known = ~(self.clean + self.corrupt).isnan()
        clean, corrupt = float(self.clean[known].mean()), float(self.corrupt[known].mean())
        return (
            f"{len(self.sites)} sites, {len(self.clean)} pairs, {self.direction}; {self.metric} is "
            f"{clean:.2f} on the clean prompts and {corrupt:.2f} on the corrupt ones. An effect of "
            f"1 carries the whole difference.{self._screening()}{self._absence()}"
        )

    def _screening(self) -> str:
        """What was screened, in words."""
        if self.estimates is None:
            return ""
        patched, checked = int(self.exact.sum()), int(self.sites["checked"].sum())
        known = "" if math.isnan(self.agreement) else f" (rank correlation {self.agreement:.2f})"
        return (
            f" Attribution patching chose {patched - checked} sites, which were patched, as were "
            f"{checked} random others to check its estimates{known}; the values of the other "
            f"{len(self.sites) - patched} sites are estimates."
        )

    def _absence(self) -> str:
        """What is missing, in words."""
        if not self.missing:
            return ""
        cells = self.values.numel() + self.null.numel()
        why = "the run was interrupted" if self.interrupted else "their metric is not a number"
        return f" {self.missing} of {cells} cells are missing: {why}. Means are over the others."

    def _title(self, text: str, rows: np.ndarray | None = None) -> str:
        """A title that says so if some of its sites are estimated; rows: of `sites`."""
        exact = self.exact if rows is None else self.exact[rows]
        if exact.all():
            return text
        return f"{text} ({exact.sum()} of {len(exact)} sites exact, the others estimated)"

    def _by_head(self, table: pd.DataFrame, name: str) -> dict[str, Figure]:
        """Layers by heads, one figure for every span."""
        groups = list(table.groupby("span", sort=False))
        if len(groups) == 1:
            return {name: self._by_layer(table, "head", name)}
        names = [f"{name}, {span}" for span, _ in groups]
        return {n: self._by_layer(g, "head", n) for n, (_, g) in zip(names, groups, strict=True)}

    def _by_layer(self, table: pd.DataFrame, column: str, name: str) -> Figure:
        """Heat maps of effects, the last layer at the top, spans or heads across, a tower each."""
        maps = {}
        for tower, group in table.groupby("tower", sort=False):
            wide = group.pivot_table(
                index="layer", columns=column, values="effect", sort=False, dropna=False
            ).sort_index(ascending=False)
            maps[str(tower)] = (
                wide.to_numpy(float),
                [str(layer) for layer in wide.index],
                [str(name) for name in wide.columns],
            )
        first, nulls = table.iloc[0], None
        if column == "head":  # spans have a null each: see the table
            ranges = self.null_range().items()
            own = (first["kind"], first["span"])
            nulls = {t: r for (t, *of), r in ranges if tuple(of) == own and t in maps}
        title = self._title(f"{name}: {self.direction}, {self.metric}", table.index.to_numpy())
        n = None if self.missing else len(self.clean)
        return plots.tower_maps(maps, title, x_title=column, n=n, nulls=nulls)

    def _bars(self) -> Figure:
        """Components if there are any, else all sites; their null if it is one."""
        parts = [kind for kind in COMPONENTS if (self.sites["kind"] == kind).any()]
        top = self.strongest(15, parts or None)
        nulls = set(zip(top["null_low"], top["null_high"], strict=True))
        null = nulls.pop() if len(nulls) == 1 and top["null_low"].notna().all() else None
        effect, low, high = (top[name].to_numpy(float) for name in ("effect", "low", "high"))
        labels = top["label"].where(top["exact"], top["label"] + " (estimated)").tolist()
        title = f"strongest {'components' if parts else 'sites'}: {self.direction}, {self.metric}"
        return plots.bars(labels, effect, low, high, title, null=null)


def patch(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric = logit_diff,
    direction: str | Function = "denoise",
    *,
    screen: str | None = None,
    keep: float = 0.05,
    n_null: int = N_NULL,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    budget: int | None = None,
    state: Keep = "device",
    report: Report | None = None,
) -> Patching:
    """Patch every site of every pair, one at a time.

    An interrupt from the keyboard ends the run with what is finished; the rest is NaN.

    Args:
        sites: from `mechmm.sites`; both towers may be in one table.
        metric: larger = more the clean answer.
        direction: `"denoise"`, `"noise"`, an ablation (`"zero"`, `"mean"`, `"resample"`), `Steer`,
            or a function of the clean values at some places [place, d] that gives new ones.
        screen: `"attribution"`: estimate all sites with one forward and backward pass for a batch
            of pairs, and patch only the share `keep` of them with the largest mean change, random
            others to see how well ranks agree, and the null. None: patch all sites.
        keep: share of sites that a screen keeps, in (0, 1].
        n_null: random sites per tower, kind and span for the null.
        seed: of the null, of `resample` and of the sites that check a screen.
        batch_size: pairs that are recorded together, at most; more of them take more memory.
        tokens: of one forward pass, at most; None: as many as a short trial finds fastest.
        budget: bytes of recorded activations that may be kept at once; fewer pairs are recorded
            together where they take more, and nothing is where one pair does. None: no limit.
        state: where recorded activations are kept: on the `"device"`, in main memory (`"cpu"`) or
            on `"disk"`; the further away, the slower.
        report: called with (work done, work in all) of the sweep, in millions of floating-point
            operations.

    Raises:
        ValueError: no pairs, no sites, an unknown direction, screen or state, a share outside
            (0, 1], or a metric that has no gradient to screen with.
        SpanError: a site's span that the pairs do not have.
    """
    _check_screen(screen, keep)
    if n_null < 0:
        raise ValueError(f"n_null is {n_null}; give 0 or more random sites")
    sweep = sweep_of(
        model, pairs, sites, metric, direction, seed, batch_size, tokens, budget, state
    )
    if screen is not None:
        check_gradient(model, pairs, metric, sweep.base)
    first = pairs.first.clean
    null_sites = random_like(sites, first.layout, n_null, seed)
    unpatched: Base = "clean" if sweep.base == "corrupt" else "corrupt"
    other = baseline(model, pairs, metric, unpatched, batch_size)
    estimates, chosen = None, sites.table.assign(exact=True)
    if screen is not None and keep < 1:
        estimates = _estimates(sweep)
        chosen = _chosen(sites, estimates, keep, seed)
    exact = chosen["exact"].to_numpy()
    patched = Sites(sites.table[exact].reset_index(drop=True))
    swept = replace(sweep, sites=patched + null_sites).run(report)
    values = swept.base + (torch.zeros(len(sites), 1) if estimates is None else estimates)
    values[torch.tensor(exact)] = swept.values[: len(patched)]
    media = first.layout.media[0]
    both = {sweep.base: swept.base, unpatched: other}
    return Patching(
        values=values,
        clean=both["clean"],
        corrupt=both["corrupt"],
        null=swept.values[len(patched) :],
        sites=chosen,
        null_sites=null_sites.table,
        direction=_name(direction),
        metric=name_of(metric),
        picture=first.images[0][0] if first.images and first.images[0] else None,
        grid=_grid(media[0]) if media else (),
        estimates=estimates,
        finished=~swept.values.isnan().any(0) | swept.complete,
    )


def sweep_of(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric = logit_diff,
    direction: str | Function = "denoise",
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    budget: int | None = None,
    state: Keep = "device",
) -> Sweep:
    """The sweep that `patch` runs, without the null; arguments and errors as there."""
    if not callable(direction) and direction not in SOURCES:
        raise ValueError(
            f"unknown direction {direction!r}; use one of {', '.join(SOURCES)}, a function or Steer"
        )
    if callable(direction) and _name(direction) in SOURCES:
        raise ValueError(f"{_name(direction)!r} is a direction already; name your function another")
    source = direction if callable(direction) else SOURCES[direction]
    base: Base = "corrupt" if direction == "denoise" else "clean"
    limits = (seed, batch_size, tokens, budget, state)
    return Sweep(model, pairs, sites, metric, base, source, *limits)


def _name(direction: str | Function) -> str:
    """What a direction is called in a result."""
    if isinstance(direction, str):
        return direction
    if isinstance(direction, Steer):
        return "steer"
    return getattr(direction, "__name__", type(direction).__name__)


def _check_screen(screen: str | None, keep: float) -> None:
    if screen is not None and screen not in SCREENS:
        raise ValueError(f"unknown screen {screen!r}; use {', '.join(SCREENS)}, or None for none")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, but a screen keeps a share of sites in (0, 1]")


def _estimates(sweep: Sweep) -> Float[Tensor, "site example"]:
    """Every cell's change of the metric by attribution patching, of as many pairs at once as the
    budget leaves the sweep."""
    what = (sweep.model, sweep.pairs, sweep.sites, sweep.metric, sweep.base, sweep.source)
    size = sweep.batch_size if sweep.budget is None else sweep.plan().batch_size
    return estimated(*what, sweep.seed, size, sweep.state)


def _chosen(sites: Sites, estimates: Tensor, keep: float, seed: int) -> pd.DataFrame:
    """The table of sites with those to patch (`exact`): the ones with the largest estimated mean
    change, and of the others some at random (`checked`)."""
    size = estimates.mean(1).abs().nan_to_num(torch.inf)
    order = size.argsort(descending=True, stable=True).numpy()
    kept = max(1, round(keep * len(order)))
    rest = order[kept:]
    drawn = np.random.default_rng(seed).choice(rest, min(CHECKED, len(rest)), replace=False)
    numbers = np.arange(len(order))
    exact = np.isin(numbers, [*order[:kept], *drawn])
    return sites.table.assign(exact=exact, checked=np.isin(numbers, drawn))


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


def baselines(
    model: HookedMultimodal, pairs: PairDataset, metric: Metric, batch_size: int = 16
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """The metric of every pair's clean and corrupt prompt."""
    clean, corrupt = (baseline(model, pairs, metric, p, batch_size) for p in ("clean", "corrupt"))
    return clean, corrupt


@torch.no_grad()
def baseline(
    model: HookedMultimodal,
    pairs: PairDataset,
    metric: Metric,
    prompt: Base,
    batch_size: int = 16,
) -> Float[Tensor, " example"]:
    """The metric of one of every pair's prompts."""
    found = []
    for batch in pairs.batches(batch_size):
        answers = prepared(model, batch.clean, batch.answers, metric)
        found.append(score(model, getattr(batch, prompt), answers, metric).float().cpu())
    return torch.cat(found)

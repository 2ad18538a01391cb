"""Linear probes: what can be read at a place, and does the model use it?

A probe is multinomial logistic regression on the state x of one place (the mean over a span's
positions), standardised feature by feature,

    p(class | x) = softmax(W (x - mean) / std + b),   min_W  -C sum log p(class | x) + |W|^2 / 2,

and its accuracy is cross-validated, in folds that keep the two prompts of a pair together. Beside
it stand the accuracies of probes of permuted labels (pairs exchange theirs), and of the same probe
on the same architecture untrained (Hewitt & Liang 1909.03368; Alain & Bengio 1610.01644).

What a probe reads need not be used. So the same directions are erased in the model: with c_1..c_K
the class means, m their example mean, and P the projection onto the span of c_k - m,

    x <- x - P (x - m),

after which all class means agree, and no linear probe of these examples beats a constant (Belrose
et al. 2306.03819). Two nulls stand beside the change of the metric: random shifts of equal norm,

    x <- x + |P (x - m)| u,   u a random unit vector,

and the same erasure with permuted labels: means of few examples differ by chance, most where states
vary most, so that erasing any label takes something of what the states are mostly about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.sites import Sites
from mechmm.engine.source import BySite
from mechmm.engine.states import SIDES, Data, check_data, count, means
from mechmm.engine.sweep import Sweep
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.untrained import untrained as make_untrained
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

N_PERMUTED = 20
"""Probes of permuted labels per site."""
N_RANDOM = 10
"""Random shifts per site beside what is erased."""
ROUNDING = 1e-5
"""Class means that differ by less, of the largest number in them, are one."""
SHOWN = 30
"""Sites that are shown as bars."""
Labels = str | Sequence[Any] | np.ndarray


@dataclass(frozen=True, eq=False)
class Probe(Result):
    """What probes read at every site, and what the model does without it.

    Attributes:
        correct: whether the held-out prediction is right [site, example].
        permuted: the same of probes of permuted labels [site, permutation, example].
        untrained: the same of the untrained model [site, example], or None.
        labels: of the examples. group: the number of each example's pair.
        classes: the labels there are, in the order of `directions`.
        directions: of each site, what the probe of all examples reads of each class, in units of
            the state [class, d].
        clean: the metric of the clean prompts [pair]; erased: with the classes erased at a site
            [site, pair]; random: with random shifts, shuffled: with permuted classes erased
            [site, draw, pair]. None where not asked for.
        sites: what the rows are. folds, metric: of the run.
    """

    correct: Bool[Tensor, "site example"] = field(metadata={"axis": 1})
    permuted: Bool[Tensor, "site permutation example"] = field(metadata={"axis": 2})
    untrained: Bool[Tensor, "site example"] | None = field(metadata={"axis": 1})
    labels: tuple[str, ...] = field(metadata={"axis": 0})
    group: Int[Tensor, " example"] = field(metadata={"axis": 0})
    classes: tuple[str, ...]
    directions: tuple[Float[Tensor, "class d"], ...]
    clean: Float[Tensor, " pair"] | None = field(metadata={"axis": 0})
    erased: Float[Tensor, "site pair"] | None = field(metadata={"axis": 1})
    random: Float[Tensor, "site draw pair"] | None = field(metadata={"axis": 2})
    shuffled: Float[Tensor, "site draw pair"] | None = field(metadata={"axis": 2})
    sites: pd.DataFrame
    folds: int
    metric: str

    @property
    def chance(self) -> float:
        """The share of the most frequent label."""
        return max(self.labels.count(name) for name in self.classes) / len(self.labels)

    def accuracy(self) -> Float[Tensor, " site"]:
        """Held-out accuracy at every site."""
        return self.correct.float().mean(-1)

    def permuted_accuracy(self) -> Float[Tensor, "site permutation"]:
        """Held-out accuracy of every probe of permuted labels."""
        return self.permuted.float().mean(-1)

    def change(self) -> Float[Tensor, "site pair"]:
        """How the metric of every pair changes where the classes are erased.

        Raises:
            ValueError: where nothing was erased.
        """
        if self.erased is None or self.clean is None:
            raise ValueError("nothing was erased; call probe with pairs and erase=True")
        return self.erased - self.clean

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: accuracy with its interval over pairs, that of permuted labels (mean,
        low, high), of the untrained model, and the change of the metric where the classes are
        erased, with its interval and the ranges of random shifts and of permuted classes."""
        low, high = bootstrap_interval(self._by_group(self.correct.float()))
        permuted = self.permuted_accuracy().numpy()
        ends = np.quantile(permuted, (0.025, 0.975), axis=1)
        table = self.sites.assign(
            label=Sites(self.sites).labels(),
            accuracy=self.accuracy().numpy(),
            low=low.numpy(),
            high=high.numpy(),
            permuted=permuted.mean(1),
            permuted_low=ends[0],
            permuted_high=ends[1],
        )
        if self.untrained is not None:
            table["untrained"] = self.untrained.float().mean(-1).numpy()
        return table if self.erased is None else self._with_changes(table)

    def _with_changes(self, table: pd.DataFrame) -> pd.DataFrame:
        low, high = bootstrap_interval(self.change())
        table = table.assign(
            change=self.change().mean(-1).numpy(),
            change_low=low.numpy(),
            change_high=high.numpy(),
        )
        for name in ("random", "shuffled"):
            changes = (getattr(self, name) - self.clean).mean(-1)
            table[f"{name}_low"], table[f"{name}_high"] = changes.amin(1), changes.amax(1)
        return table

    def _by_group(self, values: Tensor) -> Float[Tensor, "site group"]:
        """The mean of every pair: its prompts are no independent examples."""
        names, own = self.group.unique(return_inverse=True)
        sums = torch.zeros(len(values), len(names)).index_add_(1, own, values)
        return sums / torch.bincount(own)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `accuracy` by layer and place, of the model and of the untrained one,
        with the range of permuted labels; `erased`: what the metric loses at each site."""
        figures = {"accuracy": self._maps()}
        if self.erased is not None:
            figures["erased"] = self._bars()
        return figures

    def _maps(self) -> Figure:
        table = self.to_dataframe()
        table["place"] = [_place(row, table["kind"].nunique() > 1) for row in table.itertuples()]
        maps, nulls = {}, {}
        for tower, group in table.groupby("tower", sort=False):
            ends = (float(group["permuted_low"].min()), float(group["permuted_high"].max()))
            for column in ("accuracy", "untrained"):
                if column in group:
                    name = str(tower) if column == "accuracy" else f"{tower}, untrained"
                    maps[name], nulls[name] = _map(group, column), ends
        title = (
            f"accuracy of linear probes of {len(self.classes)} classes, chance {self.chance:.2f}"
        )
        n = len(self.labels)
        return plots.tower_maps(maps, title, value_title="accuracy", n=n, nulls=nulls)

    def _bars(self) -> Figure:
        table = self.to_dataframe()
        top = table.loc[table["accuracy"].sort_values(ascending=False, kind="stable").index[:SHOWN]]
        names = [f"{row.label} ({row.accuracy:.2f})" for row in top.itertuples()]
        low, high = (top[["random_" + end, "shuffled_" + end]] for end in ("low", "high"))
        null = (float(low.min(axis=None)), float(high.max(axis=None)))
        columns = ("change", "change_low", "change_high")
        value, low, high = (top[column].to_numpy(float) for column in columns)
        title = f"change of {self.metric} where what the probe reads (its accuracy) is erased"
        extra = {"value_title": "change", "null_title": "random shifts, permuted labels"}
        return plots.bars(names, value, low, high, title, null=null, **extra)

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: both figures and the table."""
        contents = [*self.plot().values(), self.to_dataframe().drop(columns="hook")]
        return Page(title, self.summary(), [Section("Sites", contents)], facts or {})

    def summary(self) -> str:
        """What was read where, beside chance, and what erasing it does, in words."""
        table = self.to_dataframe()
        best = table.loc[table["accuracy"].idxmax()]
        text = (
            f"{len(table)} sites, {len(self.labels)} examples of {len(self.classes)} classes, "
            f"{self.folds} folds. Best: {best['accuracy']:.2f} at {best['label']}; chance "
            f"{self.chance:.2f}, permuted labels {best['permuted']:.2f}"
        )
        if "untrained" in table:
            text += f", untrained {best['untrained']:.2f}"
        if self.erased is None:
            return text + ". Whether the model uses it was not tested."
        return text + (
            f". Erasing it there changes {self.metric} by {best['change']:.2f}; random shifts of "
            f"equal norm by {best['random_low']:.2f} to {best['random_high']:.2f}, erasing "
            f"permuted labels by {best['shuffled_low']:.2f} to {best['shuffled_high']:.2f}."
        )


def _place(row: Any, several: bool) -> str:
    """A site without its layer: the kind where there are several, the part, the span."""
    part = "".join(f" {number}" for number in (row.head, row.neuron) if not pd.isna(number))
    where = row.span or f"position {row.position}"
    return f"{row.kind}{part}, {where}" if several or part else where


def _map(table: pd.DataFrame, column: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Layers (the last at the top) by places."""
    layers = table["layer"].astype("float").fillna(-1)
    wide = (
        table.assign(layer=layers)
        .pivot_table(index="layer", columns="place", values=column, sort=False, dropna=False)
        .sort_index(ascending=False)
    )
    rows = ["out" if layer < 0 else f"{layer:.0f}" for layer in wide.index]
    return wide.to_numpy(float), rows, [str(name) for name in wide.columns]


@dataclass(frozen=True, eq=False)
class Erase:
    """Takes the classes out of a state, or shifts it as far in a random direction.

    Attributes:
        mean: of all examples [d]. basis: orthonormal, of the differences of class means [d, r].
        away: a unit vector [d], or None to erase.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d r"]
    away: Float[Tensor, " d"] | None = None

    def __call__(self, now: Tensor) -> Tensor:
        """What is there [place, ...], changed."""
        x = now.reshape(len(now), -1).to(torch.float32)
        mean, basis = self.mean.to(x), self.basis.to(x)
        found = (x - mean) @ basis @ basis.T
        if self.away is None:
            new = x - found
        else:
            new = x + found.norm(dim=-1, keepdim=True) * self.away.to(x)
        return new.reshape(now.shape).to(now.dtype)


def probe(
    model: HookedMultimodal,
    data: Data,
    labels: Labels,
    sites: Sites,
    *,
    folds: int = 5,
    strength: float = 0.1,
    n_permuted: int = N_PERMUTED,
    untrained: bool = True,
    erase: bool = True,
    n_random: int = N_RANDOM,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
) -> Probe:
    """Read a label from every site with a linear probe, and erase what it reads.

    Args:
        data: pairs, or batches of prompts (then with `erase=False`: they have no answers).
        labels: one per prompt of the batches; of pairs one per pair (the clean prompt's) or two,
            [pair, 2] (the clean and the corrupt prompt's); `"answer"` for answer and foil; or the
            name of a label in the pairs' `meta`, for the clean prompts.
        sites: where to read: hooks by layer and span or position, from `mechmm.sites`.
        folds: of cross-validation; a pair's two prompts stay in one.
        strength: C of the regression: smaller is more regularised.
        n_permuted: probes of permuted labels per site.
        untrained: whether to probe the untrained architecture, too; it takes as much memory.
        erase: whether to erase the classes at every site of the clean prompts.
        n_random: random shifts, and permuted labels erased, per site beside that.
        metric: larger = more the clean answer.
        seed: of folds, permutations, the untrained weights and random shifts.
        batch_size: pairs that run together.

    Raises:
        ValueError: other labels than examples, labels of one class, fewer groups than folds, a
            fold without which one class is left, erasing without pairs, a position outside a
            prompt.
        SpanError: a span that some example does not have.
        SiteError, UnknownHookError: a site that the model does not have.
    """
    check_data(model, data, sites)
    _check_numbers(folds=(folds, 2), n_permuted=(n_permuted, 1), n_random=(n_random, 1))
    pairs = data if erase and isinstance(data, PairDataset) else None
    if erase and pairs is None:
        raise ValueError("batches have no answers to lose; pass pairs, or erase=False")
    if pairs is not None:  # what a sweep refuses is refused now
        Sweep(model, pairs, sites, metric, "clean", "zero")
    table = _labels(data, labels)
    sides = SIDES[: table.shape[1]]
    names, inverse = np.unique(table, return_inverse=True)
    wide = inverse.reshape(len(table), -1)
    y, group = wide.T.ravel(), np.tile(np.arange(len(wide)), len(sides))
    rng = np.random.default_rng(seed)
    fold = _folds(y, group, names, folds, rng)
    others = [rng.permutation(wide).T.ravel() for _ in range(n_permuted)]
    read = {"sides": sides, "batch_size": batch_size, "seed": seed}
    found = means(model, data, sites, **read)
    control = None
    if untrained:
        control = means(make_untrained(model, seed), data, sites, **read)
    swept = (None, None, None, None)
    if pairs is not None:
        null = [others[i % n_permuted] for i in range(n_random)]
        swept = _swept(model, pairs, sites, metric, found, y, null, seed, batch_size)
    return Probe(
        correct=torch.stack([_correct(x, y, fold, strength) for x in found]),
        permuted=torch.stack(
            [torch.stack([_correct(x, p, fold, strength) for p in others]) for x in found]
        ),
        untrained=None
        if control is None
        else torch.stack([_correct(x, y, fold, strength) for x in control]),
        labels=tuple(table.T.ravel().tolist()),
        group=torch.as_tensor(group),
        classes=tuple(names.tolist()),
        directions=tuple(_directions(x, y, strength) for x in found),
        clean=swept[0],
        erased=swept[1],
        random=swept[2],
        shuffled=swept[3],
        sites=sites.table,
        folds=folds,
        metric=name_of(metric),
    )


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")


def _labels(data: Data, labels: Labels) -> np.ndarray:
    """Labels as text [group, side]."""
    if isinstance(labels, str):
        if not isinstance(data, PairDataset):
            raise ValueError(f"labels {labels!r} is looked up in pairs; pass one label per prompt")
        labels = _of_pairs(data, labels)
    table = np.asarray(labels).astype(str)
    table = table[:, None] if table.ndim == 1 else table
    most = len(SIDES) if isinstance(data, PairDataset) else 1
    if table.ndim != 2 or len(table) != count(data) or table.shape[1] not in range(1, most + 1):
        what = f"[{count(data)}]" + (f" or [{count(data)}, 2]" if most > 1 else "")
        raise ValueError(
            f"labels of shape {list(np.shape(labels))} for {count(data)} examples; give {what}"
        )
    return table


def _of_pairs(pairs: PairDataset, name: str) -> list[Any]:
    if name == "answer":
        return [[pair.answer, pair.foil] for pair in pairs]
    missing = [number for number, pair in enumerate(pairs) if name not in pair.meta]
    if missing:
        raise ValueError(f"pair {missing[0]} has no label {name!r} in its meta; drop the pair")
    return [pair.meta[name] for pair in pairs]


def _folds(
    y: np.ndarray, group: np.ndarray, names: np.ndarray, folds: int, rng: np.random.Generator
) -> np.ndarray:
    """The fold of every example."""
    if len(names) < 2:
        raise ValueError(f"all labels are {str(names[0])!r}; a probe needs two classes or more")
    groups = int(group.max()) + 1
    if groups < folds:
        raise ValueError(
            f"{groups} examples or pairs cannot be dealt out to {folds} folds; give more of them, "
            "or fewer folds"
        )
    fold = (rng.permutation(groups) % folds)[group]
    for number in range(folds):
        left = np.unique(y[fold != number])
        if len(left) < 2:
            raise ValueError(
                f"without fold {number} all labels are {str(names[left[0]])!r}; give more examples "
                "of the other classes"
            )
    return fold


def _fitted(x: Tensor, y: np.ndarray, strength: float) -> Any:
    # Imported here because scikit-learn takes a second to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    regression = LogisticRegression(C=strength, max_iter=5000, tol=1e-3)
    # Fits are small: threads wait for each other longer than they work.
    with threadpool_limits(1):
        return make_pipeline(StandardScaler(), regression).fit(x.numpy().astype(np.float64), y)


def _correct(
    x: Float[Tensor, "example d"], y: np.ndarray, fold: np.ndarray, strength: float
) -> Bool[Tensor, " example"]:
    """Whether each example is predicted rightly by the probe of the other folds."""
    right = np.zeros(len(y), dtype=bool)
    for number in np.unique(fold):
        held = fold == number
        fitted = _fitted(x[~held], y[~held], strength)
        right[held] = fitted.predict(x[held].numpy().astype(np.float64)) == y[held]
    return torch.as_tensor(right)


def _directions(x: Tensor, y: np.ndarray, strength: float) -> Float[Tensor, "class d"]:
    """What the probe of all examples reads, in units of the state; of two classes, the second's
    direction and its opposite."""
    scaler, regression = (step for _, step in _fitted(x, y, strength).steps)
    weights = torch.as_tensor(regression.coef_ / scaler.scale_).float()
    return torch.cat([-weights, weights]) if len(weights) == 1 else weights


def _erasing(x: Float[Tensor, "example d"], y: np.ndarray) -> Erase:
    """What erases the classes of these examples."""
    mean = x.mean(0)
    centred = torch.stack([x[torch.as_tensor(y == k)].mean(0) for k in np.unique(y)]) - mean
    _, sizes, basis = torch.linalg.svd(centred, full_matrices=False)
    return Erase(mean, basis[sizes > ROUNDING * x.abs().max()].T)


def _swept(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric,
    found: Sequence[Tensor],
    y: np.ndarray,
    others: Sequence[np.ndarray],
    seed: int,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The metric: unchanged, with the classes erased, with random shifts, and with permuted
    classes erased."""
    random = torch.Generator().manual_seed(seed)
    every: list[Erase] = []
    for x in found:
        own = _erasing(x, y)
        units = torch.randn(len(others), x.shape[1], generator=random)
        units /= units.norm(dim=-1, keepdim=True)
        every += [own, *(Erase(own.mean, own.basis, u) for u in units)]
        every += [_erasing(x, labels) for labels in others]
    each = 1 + 2 * len(others)
    repeated = sites.table.loc[sites.table.index.repeat(each)].reset_index(drop=True)
    source = BySite(tuple(every))
    swept = Sweep(model, pairs, Sites(repeated), metric, "clean", source, seed, batch_size).run()
    values = swept.values.view(len(sites), each, len(pairs))
    away, permuted = values[:, 1:].split(len(others), dim=1)
    return swept.base, values[:, 0], away, permuted

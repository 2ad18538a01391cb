"""Centred kernel alignment: how alike are two layers, towers or models in what they tell apart?

For n examples with states X [n, d] and Y [n, d'] and the linear kernels K = X X^T, L = Y Y^T with
zeros put on their diagonals, the unbiased estimator of the Hilbert-Schmidt independence criterion:

    HSIC(K, L) = (tr K L + 1^T K 1 1^T L 1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K L 1) / (n (n - 3))

(Song et al. 2012, JMLR 13, equation 5), averaged over minibatches of examples; and

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

(Kornblith et al. 1905.00414; minibatches: Nguyen et al. 2010.15327). 1: the same up to rotation and
scale; 0: independent, with noise on both sides of 0. The biased estimator is far above 0 where
there are fewer examples than dimensions. Null: one side's examples permuted in every minibatch.

Being alike is no evidence of being used alike: nothing is intervened on here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.engine.sites import Sites
from mechmm.engine.states import Data, check_data, count, means
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

FEWEST = 4
"""Examples without which the estimator is not defined."""


@dataclass(frozen=True, eq=False)
class CKA(Result):
    """The likeness of every site of one side to every site of the other.

    Attributes:
        cross: HSIC of every two sites, by minibatch [site, other, batch].
        own, others: HSIC of each site with itself [site, batch], [other, batch].
        null: CKA with the other side's examples permuted [permutation, site, other].
        sites, other_sites: what rows and columns are.
        names: of the two models.
        size: examples of a minibatch.
    """

    cross: Float[Tensor, "site other batch"] = field(metadata={"axis": 2})
    own: Float[Tensor, "site batch"] = field(metadata={"axis": 1})
    others: Float[Tensor, "other batch"] = field(metadata={"axis": 1})
    null: Float[Tensor, "permutation site other"]
    sites: pd.DataFrame
    other_sites: pd.DataFrame
    names: tuple[str, str]
    size: int

    def values(self) -> Float[Tensor, "site other"]:
        """CKA of every two sites; NaN where all states of a site are one."""
        return _ratio(self.cross.mean(-1), self.own.mean(-1), self.others.mean(-1))

    def null_range(self) -> tuple[float, float]:
        """Where 95 % of all CKA with permuted examples lie."""
        known = self.null[~self.null.isnan()].numpy()
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
        return float(low), float(high)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per two sites: CKA, the interval over minibatches of the cross term (NaN with
        one minibatch alone), and the range with permuted examples."""
        rows, columns = (Sites(table).labels() for table in (self.sites, self.other_sites))
        scale = (self.own.mean(-1)[:, None] * self.others.mean(-1)).sqrt()
        low, high = (end / scale for end in bootstrap_interval(self.cross))
        ends = np.quantile(self.null.numpy(), (0.025, 0.975), axis=0)
        return pd.DataFrame(
            {
                "site": np.repeat(rows, len(columns)),
                "other": np.tile(columns, len(rows)),
                "cka": self.values().flatten().numpy(),
                "low": low.flatten().numpy(),
                "high": high.flatten().numpy(),
                "null_low": ends[0].ravel(),
                "null_high": ends[1].ravel(),
            }
        )

    def plot(self) -> Figure:
        """A heat map of all pairs of sites; bold outside the null."""
        rows, columns = (Sites(table).labels() for table in (self.sites, self.other_sites))
        low, high = self.null_range()
        title = f"unbiased linear CKA: {self.names[0]} and {self.names[1]}"
        return plots.heat_map(
            self.values().flip(0),
            rows[::-1],
            columns,
            title,
            x_title=self.names[1],
            y_title=self.names[0],
            null=None if np.isnan(low) else (low, high),
            value_title="CKA",
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the map and the table."""
        contents = [self.plot(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Sites", contents)], facts or {})

    def summary(self) -> str:
        """How many sites and examples, and the range of the null, in words."""
        low, high = self.null_range()
        return (
            f"{len(self.sites)} sites of {self.names[0]} and {len(self.other_sites)} of "
            f"{self.names[1]}, {self.own.shape[1]} minibatch(es) of {self.size} examples. With "
            f"permuted examples 95 % of CKA lie in {low:.2f} to {high:.2f}."
        )


def hsic(
    k: Float[Tensor, "*#kernel n n"], m: Float[Tensor, "*#kernel n n"]
) -> Float[Tensor, "..."]:
    """The unbiased estimator for kernels [n, n], of which diagonals are not read.

    Raises:
        ValueError: fewer than 4 examples.
    """
    n = k.shape[-1]
    if n < FEWEST:
        raise ValueError(f"{n} examples; the unbiased estimator needs {FEWEST} or more")
    off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, m = k * off, m * off
    trace = (k * m).sum((-2, -1))
    both = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
    rows = (k.sum(-1) * m.sum(-1)).sum(-1) * 2 / (n - 2)
    return (trace + both - rows) / (n * (n - 3))


def cka(
    model: HookedMultimodal,
    data: Data,
    sites: Sites,
    *,
    other: HookedMultimodal | None = None,
    other_data: Data | None = None,
    other_sites: Sites | None = None,
    size: int = 256,
    n_permuted: int = 20,
    seed: int = 0,
    batch_size: int = 16,
) -> CKA:
    """Compare sites with one another, or with sites of another model, by unbiased linear CKA.

    The state of an example at a site is the mean over the site's positions. Sites may lie in any
    towers and have any widths.

    Args:
        data: pairs (the clean prompts are read), or batches.
        other: a model to compare with; default: the same.
        other_data: what that model reads, example by example the same; default: `data`. Pairs are
            aligned for one model: give another one its own.
        other_sites: of the other side; default: `sites`.
        size: examples of a minibatch, at most; 4 or more. More weigh less on memory than on time.
        n_permuted: permutations of the other side's examples.
        seed: of permutations.
        batch_size: pairs that run together.

    Raises:
        ValueError: fewer than 4 examples, or another number on the other side.
        SpanError: a span that some example does not have.
        SiteError, UnknownHookError: a site that a model does not have.
    """
    second = other if other is not None else model
    theirs = other_data if other_data is not None else data
    columns = other_sites if other_sites is not None else sites
    check_data(model, data, sites)
    check_data(second, theirs, columns)
    n = count(data)
    if count(theirs) != n:
        raise ValueError(f"{n} examples beside {count(theirs)}; give both sides the same")
    if min(n, size) < FEWEST or n_permuted < 1:
        raise ValueError(
            f"{n} examples in minibatches of {size} with {n_permuted} permutations; give "
            f"{FEWEST} or more examples and 1 or more permutations"
        )
    same = second is model and theirs is data
    if same:
        found = means(model, data, sites + columns, batch_size=batch_size, seed=seed)
        x, y = found[: len(sites)], found[len(sites) :]
    else:
        x = means(model, data, sites, batch_size=batch_size, seed=seed)
        y = means(second, theirs, columns, batch_size=batch_size, seed=seed)
    cross, own, others, null = _compared(x, y, size, n_permuted, seed)
    first, last = (one.family.architecture for one in (model, second))
    names = (first, f"another {last}" if first == last and second is not model else last)
    return CKA(cross, own, others, null, sites.table, columns.table, names, min(n, size))


def _compared(
    x: list[Tensor], y: list[Tensor], size: int, n_permuted: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HSIC by minibatch, across and within sides, and CKA with permuted examples."""
    rng = np.random.default_rng(seed)
    cross, own, others, permuted = [], [], [], []
    for part in _minibatches(len(x[0]), size):
        k, m = (torch.stack([_kernel(one[part]) for one in side]) for side in (x, y))
        cross.append(hsic(k[:, None], m[None]))
        own.append(hsic(k, k))
        others.append(hsic(m, m))
        orders = [torch.as_tensor(rng.permutation(k.shape[-1])) for _ in range(n_permuted)]
        permuted.append(torch.stack([hsic(k[:, None], m[None][..., o, :][..., o]) for o in orders]))
    of_x, of_y = torch.stack(own, -1), torch.stack(others, -1)
    null = _ratio(torch.stack(permuted).mean(0), of_x.mean(-1), of_y.mean(-1))
    return torch.stack(cross, -1), of_x, of_y, null


def _minibatches(n: int, size: int) -> list[slice]:
    """Slices of `size` examples; what is left over at the end is left out."""
    size = min(n, size)
    return [slice(start, start + size) for start in range(0, n - size + 1, size)]


def _kernel(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The linear kernel; centring first changes nothing but rounding."""
    x = x.double() - x.double().mean(0)
    return x @ x.T


def _ratio(
    cross: Float[Tensor, "*more site other"],
    own: Float[Tensor, " site"],
    others: Float[Tensor, " other"],
) -> Float[Tensor, "*more site other"]:
    """CKA from HSIC; NaN where a side does not vary."""
    scale = (own.clamp(min=0)[:, None] * others.clamp(min=0)).sqrt()
    return torch.where(scale > 0, cross / scale, torch.nan)

"""Shapley values of features, from permutations.

The Shapley value of a feature is the mean, over all orders of the features, of what v gains when
the feature joins those before it:

    phi_i = mean over orders of v(before i and i) - v(before i),     sum_i phi_i = v(1) - v(0).

Orders are drawn, each beside its reverse (antithetic, Mitchell et al. 2104.12199); the sum holds
for every single order. Where an example has so few features that all coalitions are no more work,
each is run once and phi is exact.

Shapley 1953; Castro et al. 2009 (sampling).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmm.engine.presence import Presence
from mechmm.engine.sweep import Report


@dataclass(frozen=True, eq=False)
class Shapley:
    """Shapley values.

    Attributes:
        values: [example, feature]; 0 where a prompt has fewer features.
        error: standard error of each over orders; 0 where exact, NaN of a single pair of orders.
        full, empty: v with all features, and with none [example].
    """

    values: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    error: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})


def shapley(
    presence: Presence, n_orders: int = 10, seed: int = 0, report: Report | None = None
) -> Shapley:
    """Shapley values of the features of all pairs.

    Args:
        n_orders: orders of every example's features, rounded up to an even number.
        seed: of these; an example's orders do not depend on the others.
        report: called with (orders done, orders in all).
    """
    count = presence.features.count
    pairs_of_orders = (n_orders + 1) // 2
    if 2**count <= 2 * pairs_of_orders * count:
        return _exact(presence)
    gains: list[Tensor] = []
    empty = full = torch.zeros(())
    for number in range(pairs_of_orders):
        rank = _ranks(presence.features.present, seed, number)
        both = []
        for own in (rank, _reversed(rank, presence.features.present)):
            found = presence.values(_absent(own, count))
            full, empty = found.base, found.values[0]
            both.append(_gains(found.values, full, own))
        gains.append(torch.stack(both).mean(0))
        if report is not None:
            report(2 * (number + 1), 2 * pairs_of_orders)
    drawn = torch.stack(gains)
    error = drawn.std(0) / len(drawn) ** 0.5 if len(drawn) > 1 else drawn[0] * torch.nan
    return Shapley(drawn.mean(0), error, full, empty)


def _ranks(
    present: Bool[Tensor, "example feature"], seed: int, number: int
) -> Int[Tensor, "example feature"]:
    """The place of every feature in an order; features that are not there come last."""
    found = torch.full(present.shape, present.shape[1])
    for example, there in enumerate(present):
        rng = np.random.default_rng([seed, number, example])
        found[example, there] = torch.from_numpy(rng.permutation(int(there.sum())))
    return found


def _reversed(
    rank: Int[Tensor, "example feature"], present: Bool[Tensor, "example feature"]
) -> Int[Tensor, "example feature"]:
    last = present.sum(1, keepdim=True) - 1
    return torch.where(present, last - rank, rank)


def _absent(rank: Int[Tensor, "example feature"], count: int) -> Bool[Tensor, "cell example f"]:
    """Cell k has the first k features of the order."""
    return rank[None] >= torch.arange(count)[:, None, None]


def _gains(
    values: Float[Tensor, "cell example"],
    full: Float[Tensor, " example"],
    rank: Int[Tensor, "example feature"],
) -> Float[Tensor, "example feature"]:
    """What every feature gains when it joins those before it."""
    steps = torch.cat([values, full[None]]).diff(dim=0).T  # [example, place in the order]
    padded = torch.cat([steps, torch.zeros(len(steps), 1)], dim=1)
    return padded.gather(1, rank)


def _exact(presence: Presence) -> Shapley:
    """From all coalitions."""
    present, count = presence.features.present, presence.features.count
    has = torch.arange(2**count)[:, None] >> torch.arange(count) & 1 == 1  # [coalition, feature]
    absent = ~has[:, None] & present
    found = presence.values(absent)
    values = torch.zeros(present.shape)
    for example, there in enumerate(present):
        v, n = found.values[:, example], int(there.sum())
        size = has.sum(1)
        for feature in there.nonzero().flatten().tolist():
            before = ~(has & ~there).any(1) & ~has[:, feature]
            at = before.nonzero().flatten()
            weight = torch.tensor([1 / (n * comb(n - 1, int(s))) for s in size[at]])
            values[example, feature] = (weight * (v[at + 2**feature] - v[at])).sum()
    return Shapley(values, torch.zeros_like(values), found.base, found.values[0])

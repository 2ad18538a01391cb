"""Steering: does adding a direction to what is there change the answer, and only that direction?

For two answers a and b the direction at a site is the difference of the class means of its state x
over training prompts (the mean over the site's positions, in clean and corrupt prompts alike),

    v = mean(x | b) - mean(x | a),

and in the clean prompts of the other pairs, whose answer is a and whose foil is b,

    x <- x + scale * v      at every position of the site.

Beside it stand random directions of the same norm: what they do is done by the size of the push,
not by its direction. Turner et al. 2308.10248; Rimsky et al. 2312.06681 (difference of means).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import Metric, Reading, flipped, name_of
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.cells import Cells, concatenated
from mechmm.engine.checks import check_limits, check_seed, check_sites
from mechmm.engine.located import located
from mechmm.engine.places import Ints, Places, Values
from mechmm.engine.sites import Sites
from mechmm.engine.split import chosen_on
from mechmm.engine.states import means
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.steered import Steered

N_RANDOM = 5
"""Random directions beside every site and scale."""


def steering(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    *,
    scales: Sequence[float] = (1.0,),
    metric: Metric = flipped,
    train: float = 0.5,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Steered:
    """Steer clean prompts from their answer to their foil, with directions of other pairs.

    Args:
        sites: residual streams, from `mechmm.sites`, for example
            `mm.sites.residual(model, ("last",), towers=["language"], layers=[4])`.
        scales: how much of the direction; 1 moves one class mean onto the other.
        metric: of the clean prompt; default: whether the foil is said.
        train: share of pairs that directions are made from; the others are steered.
        n_random: random directions of the same norm per site and scale.
        seed: of the split and the random directions.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        ValueError: no scales; a share that leaves either side empty; an answer of a steered pair
            that no training pair has; as `patch`.
        SpanError: a span that some pair does not have.
        SiteError: a site that the model does not have, or of single heads or neurons.
    """
    check_seed(seed)
    check_sites(model, sites)
    check_limits(n_random=n_random)
    _check(sites, scales)
    chosen = chosen_on(len(pairs), train, seed, least=1)
    fit, rest = (pairs[keep] for keep in (chosen, ~chosen))
    rng = np.random.default_rng([seed, 1])
    vectors = _directions(model, fit, rest, sites, batch_size)
    every = [(site, scale) for site in range(len(sites)) for scale in scales]
    cells = [_Cell(site, scale * vectors[site]) for site, scale in every]
    draws = [_Cell(cell.site, _alike(cell.vectors, rng)) for cell in cells for _ in range(n_random)]
    steered = _Steered(sites, [*cells, *draws], seed)
    count = len(cells) + len(draws)
    found = Cells(model, rest, count, steered.changes, metric, batch_size, tokens).run(report)
    labels = sites.labels()
    rows = [sites.table.iloc[s].to_dict() | {"label": labels[s], "scale": k} for s, k in every]
    return Steered(
        values=found.values[: len(cells)],
        random=found.values[len(cells) :].unflatten(0, (len(cells), n_random)),
        base=found.base,
        cells=pd.DataFrame(rows)[["label", "tower", "layer", "span", "position", "scale"]].assign(
            norm=[float(cell.vectors.norm(dim=1).mean()) for cell in cells]
        ),
        metric=name_of(metric),
        what=f"Directions from answer to foil of {len(fit)} other pairs, beside random ones.",
    )


def _check(sites: Sites, scales: Sequence[float]) -> None:
    if not len(scales) or not np.isfinite(scales).all():
        raise ValueError(f"scales are {list(scales)}; give one number or more")
    parts = sites.table[["head", "neuron"]].notna().any(axis=1)
    if parts.any():
        label = sites.labels()[int(parts.to_numpy().argmax())]
        raise ValueError(f"{label} is a part of a component; steer residual streams")


def _directions(
    model: HookedMultimodal, fit: PairDataset, rest: PairDataset, sites: Sites, batch_size: int
) -> list[Float[Tensor, "example d"]]:
    """For every site the direction from answer to foil of every pair to steer."""
    said = np.array([pair.answer for pair in fit] + [pair.foil for pair in fit])
    for pair in rest:
        for word in (pair.answer, pair.foil):
            if word not in said:
                raise ValueError(
                    f"no training pair has the answer or foil {word!r}, so that nothing points to "
                    "it; give more pairs, a larger share train, or drop those with it"
                )
    found = []
    for states in means(model, fit, sites, sides=("clean", "corrupt"), batch_size=batch_size):
        centre = {word: states[torch.as_tensor(said == word)].mean(0) for word in np.unique(said)}
        found.append(torch.stack([centre[p.foil] - centre[p.answer] for p in rest]))
    return found


def _alike(
    vectors: Float[Tensor, "example d"], rng: np.random.Generator
) -> Float[Tensor, "example d"]:
    """One random direction for all examples, each with the norm of its own vector."""
    away = torch.as_tensor(rng.standard_normal(vectors.shape[1]), dtype=vectors.dtype)
    return vectors.norm(dim=1, keepdim=True) * away / away.norm()


@dataclass(frozen=True, eq=False)
class _Cell:
    """Vectors that are added at one site, one for each example."""

    site: int
    vectors: Float[Tensor, "example d"]


@dataclass(frozen=True, eq=False)
class _Steered:
    """What cells add in a batch of pairs."""

    sites: Sites
    cells: Sequence[_Cell]
    seed: int

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """Every cell's places, and what is put there."""
        own = located(self.sites, batch.clean.layout, self.seed, batch.indices)
        prompts = len(batch)
        found, cell_of = [], []
        for number, cell in enumerate(self.cells):
            there = own.chosen(own.trial // prompts == cell.site)
            found.append(replace(there, trial=number * prompts + there.trial % prompts))
            cell_of.append(np.full(len(there), number))
        places = concatenated(own.hooks, prompts, len(self.cells), found)
        return places, self._values(places, np.concatenate(cell_of), list(batch.indices))

    def _values(self, places: Places, cell: Ints, pairs: list[int]) -> Values:
        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            prompt = places.trial[at] % len(pairs)
            rows = zip(cell[at].tolist(), prompt.tolist(), strict=True)
            added = torch.stack([self.cells[c].vectors[pairs[p]] for c, p in rows])
            return now + added.to(now)

        return give

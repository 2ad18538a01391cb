"""Where the values come from that sites are set to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.located import located
from mechmm.engine.places import Ints, Places, Values, halves, index
from mechmm.engine.record import values
from mechmm.engine.shelf import Keep, Shelf, pick
from mechmm.engine.sites import Sites
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

Named = Literal["clean", "corrupt", "zero", "mean", "resample"]
"""The pair's own clean or corrupt run; zero; the mean over all pairs and the site's positions in
their clean runs; another pair's clean run."""
Function = Callable[[Tensor], Tensor]
"""(what is at some places [place, d] or, of single neurons, [place]) -> what to put there."""


@dataclass(frozen=True, eq=False)
class BySite:
    """A function of its own for every site, in the order of their table."""

    functions: tuple[Function, ...]

    def values(self, places: Places) -> Values:
        """What every site's function makes of what is there."""
        site = places.trial // (int(places.prompts.max()) + 1)
        gives = [applied(function) for function in self.functions]

        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            new = torch.empty_like(now)
            for number in np.unique(site[at]).tolist():
                own = np.flatnonzero(site[at] == number)
                new[own] = gives[number](hook, at[own], now[own])
            return new

        return give


Source = Named | Function | BySite


@dataclass(frozen=True, eq=False)
class Steer:
    """Adds a direction to what is there (Turner et al. 2308.10248; Rimsky et al. 2312.06681).

    Attributes:
        vector: of the site's size, for the residual stream [d_model].
        scale: how much of it.
    """

    vector: Float[Tensor, " d"]
    scale: float = 1.0

    def __call__(self, now: Tensor) -> Tensor:
        """What is there, steered."""
        size = now.shape[-1] if now.ndim > 1 else 1
        if self.vector.shape != (size,):
            raise InterventionError(
                f"a direction of shape {list(self.vector.shape)} cannot be added to {size} "
                "number(s) at each place; steer sites of one size at a time"
            )
        return now + self.scale * self.vector.to(now)


def source_name(source: Source) -> str:
    """What a source is called in a result."""
    if isinstance(source, str):
        return source
    return getattr(source, "__name__", type(source).__name__)


class InterventionError(ValueError):
    """A function cannot be used as an intervention."""


class Donor:
    """Gives the values for the places of one batch of pairs after another.

    Args:
        state: where what other prompts' runs have is kept; that of one batch at a time.
    """

    def __init__(
        self,
        model: HookedMultimodal,
        pairs: PairDataset,
        sites: Sites,
        source: Source,
        seed: int,
        batch_size: int,
        state: Keep = "device",
    ) -> None:
        self.model, self.pairs, self.sites, self.source = model, pairs, sites, source
        self.seed, self.shelf = seed, Shelf(state)
        self.hooks = sites.table["hook"].unique().tolist()
        self.means = self._means(batch_size) if source == "mean" else {}
        others = np.random.default_rng(seed).permutation(len(pairs))
        # A cycle through a random order: every pair gives once, to another pair.
        self.other = dict(zip(others.tolist(), np.roll(others, 1).tolist(), strict=True))
        if source == "resample":  # what a pair cannot give is said before the first run
            for batch in pairs.batches(batch_size):
                self._theirs(batch, located(sites, batch.clean.layout, seed, batch.indices))

    def values(self, batch: PairBatch, places: Places) -> Values:
        """The values for the places that the sites have in a batch."""
        if callable(self.source):
            return applied(self.source)
        if isinstance(self.source, BySite):
            return self.source.values(places)
        if self.source == "zero":
            return lambda hook, at, now: torch.zeros_like(now)
        if self.source == "mean":
            return self._mean(places)
        if self.source == "resample":
            return self._others(batch, places)
        return self._of(getattr(batch, self.source), places)

    def _of(self, batch: Batch, places: Places) -> Values:
        """The values that the same places have in a run of other prompts."""
        self.shelf.clear()
        found = self.shelf.put(values(self.model, batch, self.hooks))

        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            there = places.chosen(at)
            tensor = found[hook]
            where = index(hook, there.row, there.position, there.part, tensor)
            new = pick(tensor, *where, device=now.device)
            _check_alike(hook, new, now)
            return new

        return give

    def _others(self, batch: PairBatch, places: Places) -> Values:
        """The values of another pair's clean run."""
        return self._of(*self._theirs(batch, places))

    def _theirs(self, batch: PairBatch, places: Places) -> tuple[Batch, Places]:
        """The clean prompts of other pairs, and the places there: of two spans of unequal size,
        position `i` of `n` takes the value of the place as far along in the other."""
        chosen = [self.other[pair] for pair in batch.indices]
        donors = self.pairs.batch(chosen).clean
        theirs = located(self.sites, donors.layout, self.seed, batch.indices)
        counts = np.bincount(places.trial, minlength=len(places.prompts))
        given = np.bincount(theirs.trial, minlength=len(places.prompts))
        missing = np.flatnonzero((counts > 0) & (given == 0))
        if len(missing):
            site, prompt = divmod(int(missing[0]), len(donors))
            raise ValueError(
                f"pair {chosen[prompt]} has no position in span "
                f"{self.sites.table['span'].iloc[site]!r} to resample from; use another ablation "
                "or drop the pair"
            )
        rank = np.arange(len(places)) - (counts.cumsum() - counts)[places.trial]
        first = (given.cumsum() - given)[places.trial]
        there = first + rank * given[places.trial] // counts[places.trial]
        return donors, theirs.chosen(there)

    def _mean(self, places: Places) -> Values:
        prompts = int(places.prompts.max()) + 1

        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            means = self.means[hook, bool(places.part[at[0]] >= 0)]
            _check_alike(hook, means, now)
            return means[torch.as_tensor(places.trial[at] // prompts)].to(now)

        return give

    def _means(self, batch_size: int) -> dict[tuple[str, bool], Tensor]:
        """By hook, and whether of parts: the mean of every site over its positions in the clean
        runs of all pairs."""
        sums: dict[tuple[str, bool], Tensor] = {}
        counts = np.zeros(len(self.sites))
        for batch in self.pairs.batches(batch_size):
            found = values(self.model, batch.clean, self.hooks)
            places = located(self.sites, batch.clean.layout, self.seed, batch.indices)
            site = places.trial // len(batch)
            counts += np.bincount(site, minlength=len(self.sites))
            for number, hook in enumerate(places.hooks):
                at = np.flatnonzero(places.hook == number)
                for half in halves(places.part[at]):
                    own, tensor = places.chosen(at[half]), found[hook]
                    value = tensor[index(hook, own.row, own.position, own.part, tensor)]
                    key = (hook, bool(own.part[0] >= 0))
                    if key not in sums:
                        shape = (len(self.sites), *value.shape[1:])
                        sums[key] = torch.zeros(shape, dtype=torch.float64)
                    _check_alike(hook, sums[key], value)
                    sums[key].index_add_(0, torch.as_tensor(site[at[half]]), value.double().cpu())
        return {key: _divided(total, counts) for key, total in sums.items()}


def _check_alike(hook: str, new: Tensor, now: Tensor) -> None:
    """Refuse patterns over another number of keys."""
    if new.shape[1:] != now.shape[1:]:
        raise ValueError(
            f"{hook}: prompts of unequal length have patterns of unequal size, which cannot stand "
            "for each other; use pairs of one length"
        )


def _divided(total: Tensor, counts: np.ndarray) -> Tensor:
    count = torch.as_tensor(counts).clamp(min=1)
    return total / count.view(-1, *[1] * (total.ndim - 1))


def applied(function: Function) -> Values:
    """A function of values as a source; what it gives is checked.

    Raises:
        InterventionError: another shape or dtype, a NaN, or a need for gradients.
    """

    def give(hook: str, at: Ints, now: Tensor) -> Tensor:
        try:
            new = function(now.clone())
        except RuntimeError as error:
            if "requires grad" not in str(error) and "require grad" not in str(error):
                raise
            raise InterventionError(
                f"the intervention at {hook} needs gradients, but sweeps run without them; compute "
                "its direction beforehand and give a function that uses it"
            ) from error
        if not isinstance(new, Tensor) or new.shape != now.shape or new.dtype != now.dtype:
            what = (
                f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            )
            raise InterventionError(
                f"the intervention at {hook} was given {now.dtype} {list(now.shape)} and returned "
                f"{what}; it must return one new value for each"
            )
        if bool(new.isnan().any()):
            raise InterventionError(f"the intervention at {hook} returned NaN")
        return new

    return give

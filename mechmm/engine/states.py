"""What is at the places of sites, prompt by prompt, for methods that read and do not patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_sites
from mechmm.engine.located import located
from mechmm.engine.places import Ints, index
from mechmm.engine.record import values
from mechmm.engine.sites import Sites
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import SpanError

Data = PairDataset | Sequence[Batch]
"""Pairs, of which the clean prompts are read unless both are asked for, or batches of prompts."""
SIDES = ("clean", "corrupt")


@dataclass(frozen=True, eq=False)
class States:
    """What one site has in one batch.

    Attributes:
        values: in single precision at least [place, d]; of a hook with heads, all of them in a row.
        prompt, row, position: of every place: the prompt of the batch, and where in the hook's
            tensor [place].
    """

    values: Float[Tensor, "place d"]
    prompt: Ints
    row: Ints
    position: Ints

    def means(self, prompts: int) -> Float[Tensor, "prompt d"]:
        """The mean over the places of every prompt; NaN where it has none."""
        at = torch.as_tensor(self.prompt)
        sums = self.values.new_zeros(prompts, self.values.shape[1]).index_add_(0, at, self.values)
        return sums / torch.bincount(at, minlength=prompts)[:, None]


def check_data(model: HookedMultimodal, data: Data, sites: Sites) -> None:
    """Refuse what cannot be read.

    Raises:
        SiteError, UnknownHookError: sites outside the model, or none.
        ValueError: no prompts, or something else than pairs or batches.
    """
    check_sites(model, sites)
    if isinstance(data, PairDataset):
        return
    if not isinstance(data, Sequence) or not all(isinstance(batch, Batch) for batch in data):
        raise ValueError(
            f"expected a PairDataset or a list of batches, not {type(data).__name__}; make batches "
            "with model.encode(text, images)"
        )
    if not len(data):
        raise ValueError("there are no batches; give at least one")


def prompts_of(
    data: Data, batch_size: int, sides: Sequence[str] = ("clean",)
) -> Iterator[tuple[Batch, tuple[int, ...]]]:
    """Batches in order, each with the numbers of its examples; of pairs, all clean prompts come
    before the corrupt ones, and a pair's two prompts have one number. Batches stay as they are."""
    if isinstance(data, PairDataset):
        for side in sides:
            for batch in data.batches(batch_size):
                yield getattr(batch, side), batch.indices
        return
    first = 0
    for batch in data:
        yield batch, tuple(range(first, first + len(batch)))
        first += len(batch)


def count(data: Data, sides: Sequence[str] = ("clean",)) -> int:
    """How many prompts `prompts_of` gives."""
    if isinstance(data, PairDataset):
        return len(data) * len(sides)
    return sum(len(batch) for batch in data)


@torch.no_grad()
def states(
    model: HookedMultimodal, batch: Batch, sites: Sites, indices: Sequence[int], seed: int = 0
) -> list[States]:
    """What every site has in one batch, on the CPU, from one run.

    Args:
        indices: numbers of the examples, for errors and random positions.

    Raises:
        SpanError: a span that the layout has not, or that a prompt has no position of.
        ValueError: a position outside a prompt.
    """
    places = located(sites, batch.layout, seed, indices)
    numbers = np.bincount(places.trial, minlength=len(places.prompts))
    if not numbers.all():
        site, prompt = divmod(int(numbers.argmin()), len(batch))
        raise SpanError(
            f"example {indices[prompt]} has no position in span {sites.table['span'].iloc[site]!r} "
            f"at {sites.table['hook'].iloc[site]}; choose another span or drop the example"
        )
    found = values(model, batch, places.hooks)
    every = []
    for site in range(len(sites)):
        own = places.chosen(places.trial // len(batch) == site)
        hook = places.hooks[own.hook[0]]
        tensor = found[hook]
        value = tensor[index(hook, own.row, own.position, own.part, tensor)]
        wide = value.to("cpu", torch.promote_types(value.dtype, torch.float32)).reshape(
            len(own), -1
        )
        every.append(States(wide, own.trial % len(batch), own.row, own.position))
    return every


def means(
    model: HookedMultimodal,
    data: Data,
    sites: Sites,
    *,
    sides: Sequence[str] = ("clean",),
    batch_size: int = 16,
    seed: int = 0,
) -> list[Float[Tensor, "example d"]]:
    """For every site its mean over the site's places, example by example (errors as `states`)."""
    rows: list[list[Tensor]] = [[] for _ in range(len(sites))]
    for batch, indices in prompts_of(data, batch_size, sides):
        for own, found in zip(rows, states(model, batch, sites, indices, seed), strict=True):
            own.append(found.means(len(batch)))
    return [torch.cat(own) for own in rows]

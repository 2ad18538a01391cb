"""What a lens reads of prompts: which positions of every prompt, and what these are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.streams import chosen_places, first_real, read_layout
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import BUILT_IN, IMAGE, TEXT, TokenLayout

COMMON = ("image", "last")
"""Built-in spans that every table has, where they are read."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The positions that are read of some prompts.

    Attributes:
        places: in the batch's own sequence, -1 where a prompt has fewer [prompt, place].
        where: as `mechmm.results.observed.Observed.where`.
        inside: which of them every span covers [span, prompt, place].
        tokens: at the places.
    """

    places: Int[Tensor, "prompt place"]
    where: Int[Tensor, "prompt place six"]
    inside: Bool[Tensor, "span prompt place"]
    tokens: tuple[tuple[str, ...], ...]


def prompts_of(
    model: HookedMultimodal, prompts: PairDataset | Batch, size: int
) -> Iterator[tuple[Batch, PairBatch | None, tuple[int, ...]]]:
    """(clean prompts, their pairs or None, their numbers) until all have come.

    Raises:
        ValueError: pairs that are aligned for another model.
        TypeError: neither pairs nor a batch.
    """
    if isinstance(prompts, Batch):
        yield prompts, None, tuple(range(len(prompts)))
        return
    if not isinstance(prompts, PairDataset):
        raise TypeError(
            f"a lens reads a PairDataset or a Batch, not {type(prompts).__name__}; make one with "
            "PairDataset(pairs, model) or model.encode(text, images)"
        )
    if prompts.model is not model:
        raise ValueError(
            "the pairs are aligned for another model; align them for this one: "
            "PairDataset(pairs, model)"
        )
    for batch in prompts.batches(size):
        yield batch.clean, batch, batch.indices


def sample_of(
    model: HookedMultimodal, prompts: PairDataset | Batch
) -> tuple[Batch, PairBatch | None]:
    """A first prompt (of a batch: all of it): one that has something to see or hear, if there is
    one; and its pair. Errors as `prompts_of`."""
    if isinstance(prompts, PairDataset) and prompts.model is model:
        shown = (number for number, pair in enumerate(prompts) if pair.clean.images)
        pair = prompts.batch([next(shown, 0)])
        return pair.clean, pair
    first, pair, _ = next(prompts_of(model, prompts, 1))
    return first, pair


def span_names(layout: TokenLayout, spans: Sequence[str] | None) -> tuple[str, ...]:
    """The spans of a result: those that were asked for, the user's own, and common ones."""
    own = [name for name in layout.spans if name not in BUILT_IN or name in COMMON]
    return tuple(dict.fromkeys([*(spans or ()), *own]))


def chosen(
    model: HookedMultimodal,
    batch: Batch,
    spans: Sequence[str] | None,
    positions: Sequence[int] | None,
    numbers: Sequence[int],
    seed: int,
) -> Chosen:
    """What is read of some prompts (arguments and errors as `streams.chosen_places`)."""
    layout = read_layout(model, batch)
    found = chosen_places(layout, spans, positions, numbers, seed)
    width = max(map(len, found))
    places = torch.tensor([[*own, *[-1] * (width - len(own))] for own in found]).view(-1, width)
    there, rows = places >= 0, torch.arange(len(places))[:, None]
    at = places.clamp(min=0)
    columns = [places - first_real(layout)[:, None]]
    columns += [
        getattr(layout, n)[rows, at] for n in ("modality", "image", "view", "row", "column")
    ]
    where = torch.stack(columns, -1).masked_fill(~there[..., None], -1)
    masks = [layout.mask(name)[rows, at] & there for name in span_names(layout, spans)]
    tokens = tuple(
        tuple(layout.tokens[n][p] if p >= 0 else "" for p in own)
        for n, own in enumerate(places.tolist())
    )
    return Chosen(places, where, torch.stack(masks), tokens)


def candidates(where: Int[Tensor, "example place six"], spans: dict[str, Tensor]) -> Tensor:
    """Which places may seem to hold the answer: those of the picture (or video, or sound) of a
    prompt that has one, else all of its text but the last position [example, place]."""
    media = where[..., 1] >= IMAGE
    text = (where[..., 1] == TEXT) & ~spans["last"]
    return torch.where(media.any(1, keepdim=True), media, text)


def joined(parts: Sequence[dict[str, Tensor]], axes: dict[str, int]) -> dict[str, Tensor]:
    """Arrays of several batches as one, their places padded to the widest.

    Args:
        axes: by name, the axis of the examples, behind which comes that of the places.
    """
    found = {}
    for name, axis in axes.items():
        values = [part[name] for part in parts]
        width = max(value.shape[axis + 1] for value in values)
        found[name] = torch.cat([_widened(v, axis + 1, width) for v in values], axis)
    return found


def _widened(value: Tensor, axis: int, width: int) -> Tensor:
    missing = list(value.shape)
    missing[axis] = width - value.shape[axis]
    blank = False if value.dtype == torch.bool else torch.nan if value.is_floating_point() else -1
    return torch.cat([value, value.new_full(missing, blank)], axis)


def first_picture(batch: Batch) -> Image.Image | None:
    """The first picture of the first prompt, if it has one as given."""
    return batch.images[0][0] if batch.images and batch.images[0] else None


def widened_tokens(tokens: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Tokens of every prompt, padded to the widest."""
    width = max(map(len, tokens))
    return tuple((*own, *[""] * (width - len(own))) for own in tokens)

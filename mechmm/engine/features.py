"""Features of prompts: what attributions score, the patches of pictures and the words of texts.

A patch is a cell of a view of a picture, that is, what one image token stands for; with `side`, the
cells whose centres lie in one block of side x side blocks of the picture, of all of its views. A
word is a token with those that go on without a space; special tokens are no features. A patch that
two cells are made of (interpolated mosaics of tiles) belongs to the first of them, so that features
have no place in common.

Where a cell is in the model: at the embedding of the vision tower, where every cell has its
patches, or, in a model without one (Chameleon, Emu3), at its position in the language model. A word
is at its positions in the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmm.data.pairs import PairDataset
from mechmm.engine.located import tower_rows
from mechmm.model.grids import Grid
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import IMAGE, TEXT, SpanError, TokenLayout

SEEN = "vision.hook_embed"
"""Where patches are."""
READ = "blocks.0.hook_resid_pre"
"""Where words are, and patches in a model without a vision tower."""
Key = tuple[int, int, int, int]
"""Medium, view, row, column."""


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of one prompt.

    Attributes:
        where: position (of its first token, from the prompt's first; -1: none), modality, medium,
            view, row and column, as in `mechmm.results.observed`.
        name: the word, or the row and column.
        seen: (row of the prompt's own in the tower, position) of its patches there [place, two].
        read: its positions in the prompt, from the first token that is not padding.
        placed: where it is changed: at `seen`, or at `read` in a model without a tower.
    """

    where: tuple[int, ...]
    name: str
    seen: Int[np.ndarray, "place two"]
    read: tuple[int, ...]
    placed: bool = False


@dataclass(frozen=True, eq=False)
class Features:
    """The features of every pair's clean prompt, the patches first.

    Attributes:
        own: by example.
        where: as in `Feature`, -1 where a prompt has fewer features [example, feature, six].
        inside: which share of a feature's tokens is in a span [span, example, feature].
        spans: their names.
        side: blocks along a side of the picture, or None.
    """

    own: tuple[tuple[Feature, ...], ...]
    where: Int[Tensor, "example feature six"]
    inside: Float[Tensor, "span example feature"]
    spans: tuple[str, ...]
    side: int | None

    @property
    def count(self) -> int:
        """Features of the prompt that has most."""
        return self.where.shape[1]

    @property
    def present(self) -> Bool[Tensor, "example feature"]:
        """Which features a prompt has."""
        return self.where[..., 1] >= 0

    @property
    def image(self) -> Bool[Tensor, "example feature"]:
        """Which of them are patches."""
        return self.where[..., 1] == IMAGE

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """What they are called, "" where a prompt has fewer."""
        return tuple((*(f.name for f in own), *[""] * (self.count - len(own))) for own in self.own)


def features_of(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    side: int | None = None,
    text: bool = True,
    spans: Sequence[str] = (),
    batch_size: int = 16,
) -> Features:
    """The features of every pair's clean prompt.

    Args:
        side: blocks along a side of the picture; None: each cell is a feature.
        text: whether words are features, too.
        spans: whose share in every feature is wanted.

    Raises:
        ValueError: a side below 1.
        SpanError: a prompt without a picture; a span that no pair has.
    """
    if side is not None and (not isinstance(side, int) or side < 1):
        raise ValueError(f"side is {side!r}; give a whole number of blocks, or None for patches")
    own: list[tuple[Feature, ...]] = []
    shares: list[list[np.ndarray]] = []
    for batch in pairs.batches(batch_size):
        layout, special = batch.clean.layout, _special(model, batch.clean.input_ids)
        for prompt, pair in enumerate(batch.indices):
            found = [*_patches(model, layout, prompt, pair, side)]
            found += _words(layout, prompt, special[prompt]) if text else []
            own.append(tuple(found))
            shares.append([_share(layout, found, span, prompt) for span in spans])
    count = max(map(len, own))
    where = torch.full((len(own), count, 6), -1)
    inside = torch.zeros(len(spans), len(own), count)
    for example, found in enumerate(own):
        where[example, : len(found)] = torch.tensor([f.where for f in found])
        for number, share in enumerate(shares[example]):
            inside[number, example, : len(found)] = torch.from_numpy(share).float()
    return Features(tuple(own), where, inside, tuple(spans), side)


def _special(model: HookedMultimodal, ids: Int[Tensor, "batch pos"]) -> Bool[np.ndarray, "b p"]:
    known = torch.tensor(getattr(model.tokenizer, "all_special_ids", []), dtype=torch.long)
    return torch.isin(ids.cpu(), known).numpy()


# Patches -------------------------------------------------------------------------------------


def _patches(
    model: HookedMultimodal, layout: TokenLayout, prompt: int, pair: int, side: int | None
) -> Iterator[Feature]:
    """The patches of one prompt, in the order of its pictures, views, rows and columns."""
    media = layout.media[prompt]
    if not media or any(medium.kind != "image" for medium in media):
        raise SpanError(f"pair {pair}: the clean prompt has no picture alone; drop the pair")
    placed, start, taken = SEEN in model.hook_dict, 0, set()
    at, first = _positions(layout, prompt), _first(layout, prompt)
    groups: dict[Key, list[tuple[list[tuple[int, int]], int]]] = {}
    for number, medium in enumerate(media):
        for seen, view in enumerate(medium.views):
            for cell in range(view.rows * view.columns):
                row, column = divmod(cell, view.columns)
                key = _key(number, seen, row, column, view, side)
                where = [(start + r, p) for r, p in view.sources[cell].tolist()]
                where = [place for place in where if place not in taken]
                taken |= set(where) if placed else set()
                position = at.get((number, seen, row, column), -1)
                groups.setdefault(key, []).append((where, position))
        start += medium.tower_rows
    for key, parts in groups.items():
        read = tuple(position - first for _, position in parts if position >= 0)
        seen = np.array([place for some, _ in parts for place in some]).reshape(-1, 2)
        name = f"row {key[2]}, column {key[3]}"
        where = (read[0] if len(parts) == 1 and read else -1, IMAGE, *key)
        if len(seen if placed else read):
            yield Feature(where, name, seen, read, placed)


def _key(medium: int, seen: int, row: int, column: int, view: Grid, side: int | None) -> Key:
    """The cell itself, or the block that its centre lies in."""
    if side is None:
        return medium, seen, row, column
    x, y = (column + 0.5) / view.columns, (row + 0.5) / view.rows
    left, top, right, bottom = view.window
    if np.isnan(view.window).any():
        return medium, seen, int(y * side), int(x * side)
    x, y = left + x * (right - left), top + y * (bottom - top)
    return medium, 0, min(int(y * side), side - 1), min(int(x * side), side - 1)


def _positions(layout: TokenLayout, prompt: int) -> dict[Key, int]:
    """The position in the batch of every cell that has one."""
    found = {}
    for position in (layout.row[prompt] >= 0).nonzero().flatten().tolist():
        parts = (layout.image, layout.view, layout.row, layout.column)
        medium, view, row, column = (int(part[prompt, position]) for part in parts)
        found[medium, view, row, column] = position
    return found


def _first(layout: TokenLayout, prompt: int) -> int:
    return int(layout.mask("all")[prompt].long().argmax())


# Words ---------------------------------------------------------------------------------------


def _words(
    layout: TokenLayout, prompt: int, special: Bool[np.ndarray, " pos"]
) -> Iterator[Feature]:
    first, tokens = _first(layout, prompt), layout.tokens[prompt]
    text = (layout.modality[prompt] == TEXT).numpy() & ~special
    positions = np.flatnonzero(text).tolist()
    joins = [_joins(tokens, before, after) for before, after in pairwise(positions)]
    starts = [i for i in range(len(positions)) if i == 0 or not joins[i - 1]]
    for start, stop in pairwise([*starts, len(positions)]):
        own = [p - first for p in positions[start:stop]]
        name = "".join(tokens[p] for p in positions[start:stop]).strip()
        where = (own[0], TEXT, -1, -1, -1, -1)
        yield Feature(where, name, np.zeros((0, 2), dtype=np.int64), tuple(own))


def _joins(tokens: Sequence[str], before: int, after: int) -> bool:
    """Whether a token goes on with the word of the one before it."""
    start, end = tokens[after][:1], tokens[before][-1:]
    return after == before + 1 and start.isascii() and start.isalnum() and end.isalnum()


def _share(
    layout: TokenLayout, found: Sequence[Feature], span: str, prompt: int
) -> Float[np.ndarray, " feature"]:
    """Which share of the tokens of every feature is in a span."""
    mask, first = layout.mask(span)[prompt].numpy(), _first(layout, prompt)
    return np.array([mask[[first + p for p in f.read]].mean() if f.read else 0.0 for f in found])


# Places --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spread:
    """Where the features of one prompt of a batch are in hooks' tensors.

    Attributes:
        feature: number of the feature of every place [place].
        hook: 0: `SEEN`, 1: `READ`. row, position: in its tensor [place].
    """

    feature: Int[np.ndarray, " place"]
    hook: Int[np.ndarray, " place"]
    row: Int[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]


def spread(layout: TokenLayout, prompt: int, own: Sequence[Feature]) -> Spread:
    """Where the features of a prompt are in the tensors of its batch."""
    start, first = tower_rows(layout, prompt), _first(layout, prompt)
    rows = [np.zeros((0, 4), dtype=np.int64)]
    for number, feature in enumerate(own):
        at = feature.seen + np.array((start, 0))
        if not feature.placed:
            at = np.array([(prompt, first + p) for p in feature.read]).reshape(-1, 2)
        heads = np.tile((number, int(not feature.placed)), (len(at), 1))
        rows.append(np.concatenate([heads, at], axis=1))
    return Spread(*np.concatenate(rows).T)

"""What every sequence position is: text, or a row and column of a named image, in named spans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechmm.model.grids import NOWHERE, Grid, Medium

PADDING, TEXT, IMAGE, VIDEO, AUDIO = range(5)
MODALITIES = ("padding", "text", "image", "video", "audio")
BUILT_IN = ("all", "text", "image", "before_image", "question", "last")
MEDIA_SPANS = ("video", "audio")
"""Built in too, where a layout has such positions."""


class SpanError(ValueError):
    """A span is unknown, empty, out of range or overlaps another."""


@dataclass(frozen=True)
class Box:
    """A rectangle of an image in pixels of the picture as it was given, right and bottom excluded.

    Attributes:
        left, top, right, bottom: in pixels.
        image: which image of the prompt, from 0.
    """

    left: float
    top: float
    right: float
    bottom: float
    image: int = 0


@dataclass(frozen=True)
class Words:
    """The `nth` occurrence (from 0) of some text in a prompt; image tokens do not count as text."""

    text: str
    nth: int = 0


@dataclass(frozen=True)
class Patches:
    """Cells of one view of an image: (row, column) pairs.

    Attributes:
        cells: of the view's grid.
        image: which medium of the prompt, from 0.
        view: which of its views: the whole picture or a tile, a frame of a video.
    """

    cells: tuple[tuple[int, int], ...]
    image: int = 0
    view: int = 0


Window = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

Where = Box | Words | Patches
"""Anything that names positions of one prompt."""


@dataclass(frozen=True)
class TokenLayout:
    """Modality, place and spans of every position of a batch.

    Attributes:
        modality: [batch, pos], an index into `MODALITIES`.
        image: [batch, pos], which medium of its own prompt a position belongs to, or -1.
        view: [batch, pos], which view of that medium, or -1.
        row, column: [batch, pos], place in that view's grid of cells, or -1.
        tokens: the token of every position, as text with its leading space, per prompt.
        media: per prompt, its images, videos and clips, each with its views.
        windows: per prompt, the part (left, top, right, bottom) of each picture, in pixels of the
            picture as it was given, that the grid of patches lies on; empty where it is unknown.
        text_only: whether the call was made without images on purpose.
        defined: user-defined spans: name -> mask [batch, pos].
    """

    modality: Int[Tensor, "batch pos"]
    image: Int[Tensor, "batch pos"]
    view: Int[Tensor, "batch pos"]
    row: Int[Tensor, "batch pos"]
    column: Int[Tensor, "batch pos"]
    tokens: tuple[tuple[str, ...], ...]
    media: tuple[tuple[Medium, ...], ...]
    windows: tuple[tuple[Window, ...], ...] = ()
    text_only: bool = False
    defined: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        return self.modality.shape[0], self.modality.shape[1]

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of all spans, built in and user-defined."""
        there = [name for name in MEDIA_SPANS if bool(self._is(name).any())]
        return (*BUILT_IN, *there, *self.defined)

    def _is(self, modality: str) -> Bool[Tensor, "batch pos"]:
        return self.modality == MODALITIES.index(modality)

    def mask(self, span: str) -> Bool[Tensor, "batch pos"]:
        """Which positions a span covers.

        `all`: everything but padding; `text`, `image`, `video`, `audio`; `before_image`: text
        before the first medium; `question`: text after the last one (all text where there is none);
        `last`: the last position.

        Raises:
            SpanError: for an unknown name, with the names there are.
        """
        if span in self.defined:
            return self.defined[span]
        real, text = self.modality != PADDING, self.modality == TEXT
        seen = (self.modality >= IMAGE).long().cumsum(-1)
        total = seen[:, -1:]
        if span == "all":
            return real
        if span == "text":
            return text
        if span == "image" or (span in self.spans and span in MEDIA_SPANS):
            return self._is(span)
        if span == "before_image":
            return text & (seen == 0) & (total > 0)
        if span == "question":
            return text & (seen == total)
        if span == "last":
            order = torch.arange(self.shape[1]).expand(self.shape)
            return order == self.last[:, None]
        raise SpanError(f"unknown span {span!r}; this layout has {', '.join(self.spans)}")

    def refuse_two_kinds(self) -> None:
        """Refuse a batch in which rows of a tower would not be those of one run of it.

        Raises:
            SpanError: for media of two kinds.
        """
        kinds = sorted({medium.kind for media in self.media for medium in media})
        if len(kinds) > 1:
            both = " and ".join(f"{kind}s" for kind in kinds)
            raise SpanError(
                f"the batch has {both}, and the tower runs once for each kind, so its rows and "
                "cached values would be mixed up; use one kind per batch"
            )

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """The last position of every prompt that is not padding."""
        order = torch.arange(self.shape[1]).expand(self.shape)
        return order.where(self.modality != PADDING, -1).amax(-1)

    def positions(self, span: str, prompt: int = 0) -> list[int]:
        """Positions of one prompt that a span covers."""
        return self.mask(span)[prompt].nonzero().flatten().tolist()

    def patches(self, box: Box, prompt: int = 0) -> tuple[Patches, ...]:
        """The cells that a pixel box touches, in every view of its image that shows part of it.
        Tiles of which the inputs do not tell how they lie are passed over.

        Raises:
            SpanError: where the prompt has no such image, or the box leaves the picture.
        """
        medium, (left, top, right, bottom) = self._image(box.image, prompt)
        if not (left <= box.left < box.right <= right and top <= box.top < box.bottom <= bottom):
            raise SpanError(
                f"prompt {prompt}: {box} is not inside what the model sees of the picture, from "
                f"({left:g}, {top:g}) to ({right:g}, {bottom:g}); give left < right and "
                "top < bottom within it"
            )
        wide, high = right - left, bottom - top
        across = (box.left - left) / wide, (box.right - left) / wide
        down = (box.top - top) / high, (box.bottom - top) / high
        found = []
        for number, view in enumerate(medium.views):
            if np.isnan(view.window).any():
                continue
            rows = _touched(*down, view.window[1], view.window[3], view.rows)
            columns = _touched(*across, view.window[0], view.window[2], view.columns)
            cells = tuple((r, c) for r in rows for c in columns)
            if cells:
                found.append(Patches(cells, box.image, number))
        return tuple(found)

    def cells(self, box: Box, prompt: int = 0) -> set[tuple[int, int, int]]:
        """(view, row, column) of every cell that a pixel box touches (errors as `patches`)."""
        return {(p.view, *cell) for p in self.patches(box, prompt) for cell in p.cells}

    def box(self, position: int, prompt: int = 0) -> Box:
        """The pixel box of the cell that a position stands for.

        Raises:
            SpanError: where the position has no place in an image, or none that is known.
        """
        row, column = int(self.row[prompt, position]), int(self.column[prompt, position])
        if row < 0:
            what = MODALITIES[int(self.modality[prompt, position])]
            raise SpanError(f"prompt {prompt}: position {position} is {what}, not a patch")
        image = int(self.image[prompt, position])
        medium, (left, top, right, bottom) = self._image(image, prompt)
        view = medium.views[int(self.view[prompt, position])]
        if np.isnan(view.window).any():
            raise SpanError(
                f"prompt {prompt}: position {position} is in a tile of image {image}, and the "
                "inputs do not tell how its tiles lie; use Patches with a view instead of boxes"
            )
        wide, high = right - left, bottom - top
        x = (view.window[2] - view.window[0]) / view.columns
        y = (view.window[3] - view.window[1]) / view.rows
        start = view.window[0] + column * x, view.window[1] + row * y
        return Box(
            left + start[0] * wide,
            top + start[1] * high,
            left + (start[0] + x) * wide,
            top + (start[1] + y) * high,
            image,
        )

    def find(self, where: Where, prompt: int = 0) -> list[int]:
        """Positions of one prompt that a box, some patches or some words stand at.

        Raises:
            SpanError: where there is no such image, patch or text.
        """
        if isinstance(where, Words):
            return self._find_words(where, prompt)
        if isinstance(where, Box):
            there = [p for some in self.patches(where, prompt) for p in self._places(some, prompt)]
            found = [position for position in there if position is not None]
            if not found:
                raise SpanError(
                    f"prompt {prompt}: no position of the prompt stands for {where}; its image "
                    "reaches the language model without places"
                )
            return sorted(found)
        return [self._position(row, column, where, prompt) for row, column in where.cells]

    def with_span(self, name: str, where: Where | Sequence[Where]) -> TokenLayout:
        """A layout with one more span: one place for all prompts, or one per prompt.

        Raises:
            SpanError: where the name is taken, the place does not exist, or it overlaps another
                user-defined span.
        """
        if name in self.spans:
            raise SpanError(f"span {name!r} exists already; choose another name")
        places = where if isinstance(where, Sequence) else [where] * self.shape[0]
        if len(places) != self.shape[0]:
            raise SpanError(f"span {name!r}: {len(places)} places for {self.shape[0]} prompts")
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for prompt, place in enumerate(places):
            mask[prompt, self.find(place, prompt)] = True
        for other, taken in self.defined.items():
            both = (mask & taken).nonzero().tolist()
            if both:
                prompt, position = both[0]
                raise SpanError(
                    f"span {name!r} overlaps span {other!r}: prompt {prompt}, position {position} "
                    f"({self.tokens[prompt][position]!r}); spans of one layout must be disjoint"
                )
        return replace(self, defined={**self.defined, name: mask})

    def vision_positions(self, span: str, prompt: int = 0) -> list[tuple[int, int]]:
        """(row, position) in the vision tower of every patch that a span covers, rows counted from
        the first one of the prompt's own media.

        `all` covers every position of the tower, a class token included. Where positions stand for
        the whole picture (the queries of a Q-Former), they cover all of its patches, and so does
        `image` where no position stands for a picture at all.
        """
        media = self.media[prompt]
        starts = np.cumsum([0, *(medium.tower_rows for medium in media)]).tolist()
        if span == "all":
            return [
                (row, position)
                for start, medium in zip(starts, media, strict=False)
                for row in range(start, start + medium.tower_rows)
                for position in range(medium.tower_positions)
            ]
        found = []
        if span == "image":
            silent = ((i, v) for i, m in enumerate(media) if not m.tokens for v in m.views)
            found = [(starts[i] + r, p) for i, v in silent for r, p in _patches(v)]
        for position in self.positions(span, prompt):
            found += self.made_of(position, prompt)
        return list(dict.fromkeys(found))

    def made_of(self, position: int, prompt: int = 0) -> list[tuple[int, int]]:
        """(row, position) in the vision tower of every patch that one position was made of, as
        `vision_positions` counts them."""
        media, image = self.media[prompt], int(self.image[prompt, position])
        if image < 0:
            return []
        view = media[image].views[int(self.view[prompt, position])]
        row, column = int(self.row[prompt, position]), int(self.column[prompt, position])
        if row >= 0:
            found = view.sources[row * view.columns + column].tolist()
        elif all(cell == NOWHERE for cell in view.cells):
            found = _patches(view)
        else:
            return []
        start = sum(medium.tower_rows for medium in media[:image])
        return [(start + r, p) for r, p in found]

    def __str__(self) -> str:
        """A table of runs of positions: prompt, positions, modality, place, spans, tokens."""
        heads = ("prompt", "positions", "what", "spans", "tokens")
        lines = [heads, *(line for prompt in range(self.shape[0]) for line in self._runs(prompt))]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        note = "text only, on purpose: no image was given\n" if self.text_only else ""
        return note + "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]])
            for line in lines
        )

    def _runs(self, prompt: int) -> list[tuple[str, str, str, str, str]]:
        names = [name for name in self.spans if name not in ("all", "text", "image")]
        masks = np.stack([self.mask(name)[prompt].numpy() for name in names])
        keys = [
            (
                int(self.modality[prompt, p]),
                (int(self.image[prompt, p]), int(self.view[prompt, p])),
                tuple(masks[:, p]),
            )
            for p in range(self.shape[1])
        ]
        starts = [p for p, key in enumerate(keys) if p == 0 or key != keys[p - 1]]
        runs = []
        for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
            modality, image, inside = keys[start]
            what = MODALITIES[modality]
            if modality >= IMAGE:
                medium = self.media[prompt][image[0]]
                grid = medium.views[image[1]]
                part = f" view {image[1]}" if len(medium.views) > 1 else ""
                what = f"{what} {image[0]}{part}, {grid.rows} x {grid.columns} patches"
            spans = ", ".join(name for name, is_in in zip(names, inside, strict=True) if is_in)
            where = f"{start}" if stop == start + 1 else f"{start}..{stop - 1}"
            text = self.tokens[prompt][start:stop]
            shown = "".join(text) if modality == TEXT else text[0]
            runs.append((str(prompt), where, what, spans, shown.strip()))
        return runs

    def _image(self, image: int, prompt: int) -> tuple[Medium, Window]:
        count = len(self.media[prompt])
        if not 0 <= image < count:
            raise SpanError(f"prompt {prompt} has {count} image(s); there is no image {image}")
        if not self.windows:
            raise SpanError(
                "it is unknown which part of each picture the model sees; make the batch with "
                "model.encode, or name patches instead of pixels"
            )
        return self.media[prompt][image], self.windows[prompt][image]

    def _places(self, patches: Patches, prompt: int) -> list[int | None]:
        """The position of each of some cells, None where no position stands for it."""
        here = (self.image[prompt] == patches.image) & (self.view[prompt] == patches.view)
        found = []
        for row, column in patches.cells:
            at = here & (self.row[prompt] == row) & (self.column[prompt] == column)
            found.append(next(iter(at.nonzero().flatten().tolist()), None))
        return found

    def _position(self, row: int, column: int, where: Patches, prompt: int) -> int:
        (found,) = self._places(replace(where, cells=((row, column),)), prompt)
        if found is None:
            views = [view for medium in self.media[prompt] for view in medium.views]
            sizes = [f"{view.rows} x {view.columns}" for view in views]
            raise SpanError(
                f"prompt {prompt}: no position for row {row}, column {column} of image "
                f"{where.image}, view {where.view}; its images have "
                f"{', '.join(sizes) or 'no'} patches"
            )
        return found

    def _find_words(self, words: Words, prompt: int) -> list[int]:
        """Positions whose tokens overlap the wanted occurrence in the text of the prompt."""
        positions = (self.modality[prompt] == TEXT).nonzero().flatten().tolist()
        pieces = [self.tokens[prompt][position] for position in positions]
        owners = [p for p, piece in zip(positions, pieces, strict=True) for _ in piece]
        wanted = r"\s*".join(re.escape(word) for word in words.text.split())
        # A word ends where it does in the text; punctuation may touch the word beside it.
        bounded = rf"(?:(?<!\w)|(?=\W)){wanted}(?:(?!\w)|(?<=\W))"
        pattern = bounded if wanted else r"(?!)"
        text = "".join(pieces)
        found = list(re.finditer(pattern, text, re.IGNORECASE))
        if not 0 <= words.nth < len(found):
            raise SpanError(
                f"prompt {prompt}: occurrence {words.nth} of {words.text!r} is not in its "
                f"text (found {len(found)}): {text.strip()!r}"
            )
        match = found[words.nth]
        return sorted({owners[i] for i in range(match.start(), match.end())})


def _patches(view: Grid) -> list[tuple[int, int]]:
    """(row, position) of every patch of a view."""
    return [(row, position) for row, position in view.sources.reshape(-1, 2).tolist()]


def _touched(low: float, high: float, start: float, stop: float, cells: int) -> range:
    """Cells of a row of `cells` from `start` to `stop` that the interval [low, high) touches."""
    first, last = ((edge - start) / (stop - start) * cells for edge in (low, high))
    slack = 1e-9 * cells  # the edge of a cell is not exactly its number times its size
    return range(max(0, int(np.floor(first + slack))), min(cells, int(np.ceil(last - slack))))

"""What every sequence position is: text, or a row and column of a named image, in named spans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechmm.model.grids import Grid

PADDING, TEXT, IMAGE = 0, 1, 2
MODALITIES = ("padding", "text", "image")
BUILT_IN = ("all", "text", "image", "before_image", "question", "last")


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
    """Cells of an image's grid: (row, column) pairs."""

    cells: tuple[tuple[int, int], ...]
    image: int = 0


Window = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

Where = Box | Words | Patches
"""Anything that names positions of one prompt."""


@dataclass(frozen=True)
class TokenLayout:
    """Modality, place and spans of every position of a batch.

    Attributes:
        modality: [batch, pos], an index into `MODALITIES`.
        image: [batch, pos], which image of its own prompt a position belongs to, or -1.
        row, column: [batch, pos], place in that image's grid of tokens, or -1.
        tokens: the token of every position, as text with its leading space, per prompt.
        grids: per prompt, the grid of each of its images.
        windows: per prompt, the part (left, top, right, bottom) of each picture, in pixels of the
            picture as it was given, that the grid of patches lies on; empty where it is unknown.
        text_only: whether the call was made without images on purpose.
        defined: user-defined spans: name -> mask [batch, pos].
    """

    modality: Int[Tensor, "batch pos"]
    image: Int[Tensor, "batch pos"]
    row: Int[Tensor, "batch pos"]
    column: Int[Tensor, "batch pos"]
    tokens: tuple[tuple[str, ...], ...]
    grids: tuple[tuple[Grid, ...], ...]
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
        return (*BUILT_IN, *self.defined)

    def mask(self, span: str) -> Bool[Tensor, "batch pos"]:
        """Which positions a span covers.

        `all`: everything but padding; `text`, `image`; `before_image`: text before the first
        image; `question`: text after the last image (all text where there is no image); `last`:
        the last position.

        Raises:
            SpanError: for an unknown name, with the names there are.
        """
        if span in self.defined:
            return self.defined[span]
        real, text = self.modality != PADDING, self.modality == TEXT
        picture = self.modality == IMAGE
        seen = picture.long().cumsum(-1)
        total = seen[:, -1:]
        if span == "all":
            return real
        if span == "text":
            return text
        if span == "image":
            return picture
        if span == "before_image":
            return text & (seen == 0) & (total > 0)
        if span == "question":
            return text & (seen == total)
        if span == "last":
            order = torch.arange(self.shape[1]).expand(self.shape)
            return order == self.last[:, None]
        raise SpanError(f"unknown span {span!r}; this layout has {', '.join(self.spans)}")

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """The last position of every prompt that is not padding."""
        order = torch.arange(self.shape[1]).expand(self.shape)
        return order.where(self.modality != PADDING, -1).amax(-1)

    def positions(self, span: str, prompt: int = 0) -> list[int]:
        """Positions of one prompt that a span covers."""
        return self.mask(span)[prompt].nonzero().flatten().tolist()

    def patches(self, box: Box, prompt: int = 0) -> Patches:
        """The cells of an image's grid that a pixel box touches.

        Raises:
            SpanError: where the prompt has no such image, or the box leaves the picture.
        """
        grid, (left, top, right, bottom) = self._image(box.image, prompt)
        if not (left <= box.left < box.right <= right and top <= box.top < box.bottom <= bottom):
            raise SpanError(
                f"prompt {prompt}: {box} is not inside what the model sees of the picture, from "
                f"({left:g}, {top:g}) to ({right:g}, {bottom:g}); give left < right and "
                "top < bottom within it"
            )
        rows = _touched(box.top - top, box.bottom - top, bottom - top, grid.rows)
        columns = _touched(box.left - left, box.right - left, right - left, grid.columns)
        return Patches(tuple((r, c) for r in rows for c in columns), box.image)

    def box(self, position: int, prompt: int = 0) -> Box:
        """The pixel box of the patch that a position stands for.

        Raises:
            SpanError: where the position is no patch of an image.
        """
        row, column = int(self.row[prompt, position]), int(self.column[prompt, position])
        if row < 0:
            what = MODALITIES[int(self.modality[prompt, position])]
            raise SpanError(f"prompt {prompt}: position {position} is {what}, not a patch")
        image = int(self.image[prompt, position])
        grid, (left, top, right, bottom) = self._image(image, prompt)
        x, y = (right - left) / grid.columns, (bottom - top) / grid.rows
        ends = (left + (column + 1) * x, top + (row + 1) * y)
        return Box(left + column * x, top + row * y, *ends, image)

    def find(self, where: Where, prompt: int = 0) -> list[int]:
        """Positions of one prompt that a box, some patches or some words stand at.

        Raises:
            SpanError: where there is no such image, patch or text.
        """
        if isinstance(where, Words):
            return self._find_words(where, prompt)
        if isinstance(where, Box):
            where = self.patches(where, prompt)
        return [self._position(row, column, where.image, prompt) for row, column in where.cells]

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
        """(image, position in the vision tower) of every patch that a span covers.

        `all` covers every position of the tower, a class token included.
        """
        if span == "all":
            grids = enumerate(self.grids[prompt])
            return [(i, p) for i, g in grids for p in range(g.tower_extra + g.rows * g.columns)]
        found = []
        for position in self.positions(span, prompt):
            row, column = int(self.row[prompt, position]), int(self.column[prompt, position])
            if row >= 0:
                image = int(self.image[prompt, position])
                grid = self.grids[prompt][image]
                found.append((image, grid.tower_extra + row * grid.columns + column))
        return found

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
            (int(self.modality[prompt, p]), int(self.image[prompt, p]), tuple(masks[:, p]))
            for p in range(self.shape[1])
        ]
        starts = [p for p, key in enumerate(keys) if p == 0 or key != keys[p - 1]]
        runs = []
        for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
            modality, image, inside = keys[start]
            what = MODALITIES[modality]
            if modality == IMAGE:
                grid = self.grids[prompt][image]
                what = f"image {image}, {grid.rows} x {grid.columns} patches"
            spans = ", ".join(name for name, is_in in zip(names, inside, strict=True) if is_in)
            where = f"{start}" if stop == start + 1 else f"{start}..{stop - 1}"
            text = self.tokens[prompt][start:stop]
            shown = "".join(text) if modality == TEXT else text[0]
            runs.append((str(prompt), where, what, spans, shown.strip()))
        return runs

    def _image(self, image: int, prompt: int) -> tuple[Grid, Window]:
        count = len(self.grids[prompt])
        if not 0 <= image < count:
            raise SpanError(f"prompt {prompt} has {count} image(s); there is no image {image}")
        if not self.windows:
            raise SpanError(
                "it is unknown which part of each picture the model sees; make the batch with "
                "model.encode, or name patches instead of pixels"
            )
        return self.grids[prompt][image], self.windows[prompt][image]

    def _position(self, row: int, column: int, image: int, prompt: int) -> int:
        here = (self.row[prompt] == row) & (self.column[prompt] == column)
        found = (here & (self.image[prompt] == image)).nonzero().flatten().tolist()
        if not found:
            sizes = [f"{grid.rows} x {grid.columns}" for grid in self.grids[prompt]]
            raise SpanError(
                f"prompt {prompt}: no position for row {row}, column {column} of image {image}; "
                f"its images have {', '.join(sizes) or 'no'} patches"
            )
        return found[0]

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


def _touched(low: float, high: float, pixels: float, cells: int) -> range:
    """Cells of a row of `cells` over `pixels` that the interval [low, high) touches."""
    first, last = (edge * cells / pixels for edge in (low, high))
    slack = 1e-9 * cells  # the edge of a cell is not exactly its number times its size
    return range(int(first + slack), min(cells, int(np.ceil(last - slack))))

"""Where the spans of a graph lie in the streams of one batch.

Every place belongs to the first span that covers it. A name that is a plain number is a position of
the prompt, padding not counted; in a tower that sees it is what that position was made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechmm.data.pairs import PairDataset
from mechmm.engine.hidden import PROJECTOR
from mechmm.engine.located import Located, tower_rows
from mechmm.engine.sites import READING
from mechmm.model.layout import PADDING, SpanError, TokenLayout
from mechmm.results.graph import REST

Places = dict[str, list[list[np.ndarray]]]
"""By tower: for every example and span, (row, position) of every place."""

POSITIONS = "positions"
"""In place of names: every position is a span of its own."""


def span_names(
    spans: Sequence[str] | str, pairs: PairDataset, batch_size: int = 16
) -> tuple[str, ...]:
    """Names of spans; those of all positions for `"positions"`.

    Raises:
        SpanError: another single word; pairs of different lengths for `"positions"`.
    """
    if not isinstance(spans, str):
        return tuple(spans)
    if spans != POSITIONS:
        raise SpanError(
            f"spans is the word {spans!r}; give a list of names, or {POSITIONS!r} for every "
            "position on its own"
        )
    real = (batch.clean.layout.modality != PADDING for batch in pairs.batches(batch_size))
    lengths = [length for mask in real for length in mask.sum(-1).tolist()]
    for pair, length in enumerate(lengths):
        if length != lengths[0]:
            raise SpanError(
                f"pair {pair} has {length} positions, pair 0 has {lengths[0]}: positions are spans "
                "of their own only for pairs of one length; select these, or name spans"
            )
    return tuple(map(str, range(lengths[0])))


def places_of(layout: TokenLayout, towers: Sequence[str], spans: Sequence[str]) -> Places:
    """Where the positions of every span lie in some towers; each is in the first that covers it.

    Raises:
        SpanError: for a span that the layout has not.
    """
    finder, found = Located(layout), {}
    for tower in towers:
        kind = tower if tower in (*READING, PROJECTOR) else "vision"
        found[tower] = [_split(finder, kind, spans, prompt) for prompt in range(layout.shape[0])]
    return found


def _split(finder: Located, tower: str, spans: Sequence[str], prompt: int) -> list[np.ndarray]:
    left = dict.fromkeys(map(tuple, finder.covered(tower, "all", prompt).tolist()))
    parts = []
    for span in spans:
        covered = left if span in ("", REST) else _covered(finder, tower, span, prompt)
        chosen = [place for place in covered if place in left]
        for place in chosen:
            del left[place]
        parts.append(np.array(chosen, dtype=np.int64).reshape(-1, 2))
    return parts


def _covered(finder: Located, tower: str, span: str, prompt: int) -> list[tuple[int, int]]:
    layout = finder.layout
    if not span.isdecimal() or span in layout.defined:
        return [(row, position) for row, position in finder.covered(tower, span, prompt).tolist()]
    start = int((layout.modality[prompt] == PADDING).long().argmin())
    position = start + int(span)
    if position > layout.last[prompt]:
        count = int(layout.last[prompt]) + 1 - start
        raise SpanError(f"prompt {prompt} has {count} positions, and none with the number {span}")
    if tower in READING:
        return [(prompt, position)]
    first = tower_rows(layout, prompt)
    return [(first + row, patch) for row, patch in layout.made_of(position, prompt)]

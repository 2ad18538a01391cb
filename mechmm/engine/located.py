"""Where sites lie in the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from mechmm.engine.places import Places
from mechmm.engine.sites import RANDOM, READING, SEEING, Sites, table_of
from mechmm.model.layout import PADDING, TokenLayout

Where = Int[np.ndarray, "place two"]
"""(row, position) in a hook's tensor. The row is the prompt for the language model, and the image,
counted over the whole batch, for the other towers."""


class Located:
    """Finds the places of sites in one batch.

    Args:
        seed: of random positions.
        pairs: the number of every prompt's pair, which chooses random positions together with the
            seed, so that they do not depend on how pairs are batched; default: by place.

    Raises:
        SpanError: for a batch with images and videos.
    """

    def __init__(
        self, layout: TokenLayout, seed: int = 0, pairs: Sequence[int] | None = None
    ) -> None:
        layout.refuse_two_kinds()
        self.layout, self.seed = layout, seed
        self.pairs = range(len(layout.tokens)) if pairs is None else pairs
        self._every, self._span = cache(self._everything), cache(self.covered)

    def places(self, site: Any, number: int, prompt: int) -> Where:
        """The places of a site.

        Args:
            site: a row of `Sites.table`, by column.
            number: of the site among random ones, which chooses its positions.

        Raises:
            SpanError: for a span that the layout has not.
            ValueError: for a position outside the sequence.
        """
        if site["span"].startswith(RANDOM):
            every = self._every(site["tower"], prompt)
            rng = np.random.default_rng([self.seed, number, self.pairs[prompt]])
            chosen = rng.choice(len(every), min(int(site["count"]), len(every)), replace=False)
            return every[np.sort(chosen)]
        if pd.isna(site["position"]):
            return self._span(site["tower"], site["span"], prompt)
        every, at = self._every(site["tower"], prompt), int(site["position"])
        if not -len(every) <= at < len(every):
            raise ValueError(
                f"position {at} is outside prompt {prompt}, which has {len(every)} positions in "
                f"{site['hook']}"
            )
        return every[at][None]

    def covered(self, tower: str, span: str, prompt: int) -> Where:
        """The places of a span."""
        layout = self.layout
        if tower in READING:
            return _where([(prompt, position) for position in layout.positions(span, prompt)])
        first = tower_rows(layout, prompt)
        if tower in SEEING:
            return _where([(first + i, p) for i, p in layout.vision_positions(span, prompt)])
        tokens = projected(layout, prompt)
        covered = {p for p, _ in tokens} if span == "all" else layout.positions(span, prompt)
        return _where([place for position, place in tokens if position in set(covered)])

    def _everything(self, tower: str, prompt: int) -> Where:
        """Every place of a prompt in a tower or projector."""
        if tower in READING:
            real = (self.layout.modality[prompt] != PADDING).nonzero().flatten().tolist()
            return _where([(prompt, position) for position in real])
        if tower in SEEING:
            return self.covered(tower, "all", prompt)
        return _where([place for _, place in projected(self.layout, prompt)])


def _where(places: list[tuple[int, int]]) -> Where:
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def projected(layout: TokenLayout, prompt: int) -> list[tuple[int, tuple[int, int]]]:
    """(position, (row, index)) of every projected token of a prompt."""
    found, first = [], tower_rows(layout, prompt)
    for number, medium in enumerate(layout.media[prompt]):
        positions = (layout.image[prompt] == number).nonzero().flatten().tolist()
        for position, place in zip(positions, medium.projected, strict=True):
            if place is not None:
                found.append((position, (first + place[0], place[1])))
        first += medium.tower_rows
    return found


def tower_rows(layout: TokenLayout, prompts: int | None = None) -> int:
    """Rows of the vision tower's batch that the first prompts take; default: all of them."""
    return sum(medium.tower_rows for media in layout.media[:prompts] for medium in media)


def located(
    sites: Sites, layout: TokenLayout, seed: int = 0, pairs: Sequence[int] | None = None
) -> Places:
    """The places of every site in every prompt; trial = site * prompts + prompt.

    Args:
        seed, pairs: as for `Located`.

    Raises:
        SpanError, ValueError: as `Located.places`.
    """
    finder, prompts = Located(layout, seed, pairs), len(layout.tokens)
    hooks = tuple(sites.table["hook"].unique())
    numbers = {hook: number for number, hook in enumerate(hooks)}
    wheres, trials, kinds, parts = [], [], [], []
    # By their own count, so that they do not depend on what else is in the table.
    drawn = sites.table["span"].str.startswith(RANDOM).cumsum().tolist()
    for number, site in enumerate(sites.table.to_dict("records")):
        part = [int(p) for p in (site["head"], site["neuron"]) if not pd.isna(p)] or [-1]
        for prompt in range(prompts):
            where = finder.places(site, drawn[number], prompt)
            wheres.append(where)
            trials.append(np.full(len(where), number * prompts + prompt))
            kinds.append(np.full(len(where), numbers[site["hook"]]))
            parts.append(np.full(len(where), part[0]))
    row, position = np.concatenate([_where([]), *wheres]).T
    columns = (np.concatenate([np.zeros(0, np.int64), *c]) for c in (trials, kinds, parts))
    trial, hook, part = columns
    of = np.tile(np.arange(prompts), len(sites))
    return Places(hooks, of, trial, hook, row, position, part)


def random_like(sites: Sites, layout: TokenLayout, n: int, seed: int = 0) -> Sites:
    """The null: for each tower, kind and span, `n` sites with a random layer and head of that group
    and random positions, as many as the span covers in the first prompt.

    Their span reads `random object`, where `object` is the span that they stand beside.
    """
    rng, finder = np.random.default_rng(seed), Located(layout)
    rows = []
    for (_, _, span), group in sites.table.groupby(["tower", "kind", "span"], sort=False):
        count = len(finder.places(group.iloc[0], 0, 0))
        place = {"span": f"{RANDOM}{span}", "position": None, "count": count}
        chosen = rng.integers(len(group), size=n) if count else []
        rows += [{**group.iloc[int(index)].to_dict(), **place} for index in chosen]
    return table_of(rows)


def places(
    site: pd.Series, layout: TokenLayout, prompt: int, seed: int = 0
) -> list[tuple[int, int]]:
    """(row, position) of one site of a table, for one prompt (as `Located.places`)."""
    found = Located(layout, seed).places(site, int(site.name or 0), prompt)
    return [(int(row), int(position)) for row, position in found]

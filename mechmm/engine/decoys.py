"""The null of a route: as many hidden pairs of query and key, elsewhere.

Where enough other positions of the same kind (patches, or words) are seen by the same readers, as
many of those are hidden instead of the source (`"positions"`). Where there are too few, as many
pairs of any query and any key that it sees, itself excepted, are hidden as the route has
(`"pairs"`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from mechmm.data.pairs import PairBatch
from mechmm.engine.located import Located, tower_rows
from mechmm.engine.routes import FORWARD, Hidden, Route, seen_by
from mechmm.engine.sites import READING
from mechmm.model.hooked import HookedMultimodal

Seen = dict[int, Bool[np.ndarray, "query key"]]
"""By row of the tower: which positions every position sees."""


def with_decoys(
    model: HookedMultimodal, route: Route, batch: PairBatch, n: int, seed: tuple[int, ...]
) -> dict[tuple[int, int], tuple[Hidden, str]]:
    """By draw (0: the route's own) and prompt: what a route hides, and what random ones like it do,
    with their kind ("" of its own). Draws of a pair do not depend on the batch it is in."""
    finder, causal = Located(batch.clean.layout), model.family.resume in FORWARD
    found = {}
    for prompt, pair in enumerate(batch.indices):
        own = route.hidden(finder, prompt)
        found[0, prompt] = own, ""
        for draw in range(1, 1 + n):
            rng = np.random.default_rng([*seed, draw, pair])
            found[draw, prompt] = decoy(route, own, finder, prompt, causal, rng)
    return found


def decoy(
    route: Route,
    hidden: Hidden,
    finder: Located,
    prompt: int,
    causal: bool,
    rng: np.random.Generator,
) -> tuple[Hidden, str]:
    """A random route like one that hides `hidden` from a prompt, and which kind it is."""
    seen, width = _seen(route, finder, prompt, causal), hidden.keys.shape[1]
    rows = {int(row): seen[int(row)] for row in np.unique(hidden.row)}
    pool = _pool(route, hidden, finder, prompt, rows)
    keys = np.flatnonzero(hidden.keys.any(0))
    if len(route.parts) == 1 and len(pool) >= len(keys) > 0:
        new = np.zeros(width, dtype=bool)
        new[rng.choice(pool, len(keys), replace=False)] = True
        (sees,) = rows.values()
        if (sees & ~new[: len(sees)])[hidden.query].any(1).all():
            others = np.broadcast_to(new, hidden.keys.shape).copy()
            return Hidden(hidden.row, hidden.query, others), "positions"
    return _pairs(hidden, seen, width, rng), "pairs"


def _seen(route: Route, finder: Located, prompt: int, causal: bool) -> Seen:
    layout = finder.layout
    if route.tower in READING:
        return {prompt: seen_by(layout, prompt, causal)}
    first, found = tower_rows(layout, prompt), {}
    for medium in layout.media[prompt]:
        sees = np.ones((medium.tower_positions, medium.tower_positions), dtype=bool)
        found |= {first + row: sees for row in range(medium.tower_rows)}
        first += medium.tower_rows
    return found


def _pool(route: Route, hidden: Hidden, finder: Located, prompt: int, seen: Seen) -> np.ndarray:
    """Positions of the source's kind that every reader sees and that are not the source."""
    if len(seen) != 1 or not len(hidden.query):
        return np.zeros(0, dtype=np.int64)
    (sees,) = seen.values()
    own = np.asarray(hidden.keys.any(0))
    free = sees[hidden.query].all(0) & ~own[: len(sees)]
    if route.tower in READING:
        kind = finder.layout.modality[prompt].numpy()
        free &= np.isin(kind, kind[np.flatnonzero(own)])
    return np.flatnonzero(free)


def _pairs(hidden: Hidden, seen: Seen, width: int, rng: np.random.Generator) -> Hidden:
    """As many random pairs as are hidden, among those that are seen and not hidden."""
    free, count = [], 0
    for row, sees in seen.items():
        other = sees & ~np.eye(len(sees), dtype=bool)
        at = np.flatnonzero(hidden.row == row)
        taken = hidden.keys[at][:, : len(sees)]
        count += int((taken & sees[hidden.query[at]]).sum())
        other[hidden.query[at]] &= ~taken
        query, key = other.nonzero()
        free.append(np.stack([np.full(len(query), row), query, key], axis=1))
    every = np.concatenate([np.zeros((0, 3), dtype=np.int64), *free])
    chosen = rng.choice(len(every), min(count, len(every)), replace=False, shuffle=False)
    return Hidden.of([every[np.sort(chosen)]], width)

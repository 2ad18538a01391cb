"""Which routes close in which layers of a dataset, and the random routes beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mechmm.data.metrics import Reading
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.decoys import with_decoys
from mechmm.engine.places import Places, Values
from mechmm.engine.routes import (
    Blocked,
    Hidden,
    Route,
    check_left,
    has_attention,
    lengthened,
    scores_hook,
)
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import SpanError

Layers = Sequence[int] | Sequence[Sequence[int]]
"""Layers, or windows of layers."""


class Closing:
    """Cells that close a route in a window each, those of the null behind all others.

    Args:
        layers, window: as for `knockout`.
        n_null: random routes beside every cell. seed: of these.

    Attributes:
        cells: (number of the route, layers) of every cell without the null.
    """

    def __init__(
        self,
        model: HookedMultimodal,
        routes: Sequence[Route],
        layers: Layers | None,
        window: int | None,
        n_null: int,
        seed: int,
    ) -> None:
        self.model, self.routes, self.n_null, self.seed = model, routes, n_null, seed
        towers = dict.fromkeys(route.tower for route in routes)
        windows = {tower: windows_of(model, tower, layers, window) for tower in towers}
        self.cells = [(number, own) for number, r in enumerate(routes) for own in windows[r.tower]]

    @property
    def count(self) -> int:
        """Cells, those of the null included."""
        return len(self.cells) * (1 + self.n_null)

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """What all cells hide in one reading of a batch."""
        hidden, _ = self._hidden(batch)
        for (number, prompt), one in hidden.items():
            where = (self._route(number), batch.clean, part.batch, prompt)
            hidden[number, prompt] = lengthened(one, *where)
        names = [self._route(number).name for number in range(len(self.routes) * (1 + self.n_null))]
        cells = [
            (draw * len(self.routes) + number, self._hooks(number, layers))
            for draw in range(1 + self.n_null)
            for number, layers in self.cells
        ]
        return Blocked(hidden, cells, names).changes(len(batch), self.model.device)

    def _hooks(self, number: int, layers: Sequence[int]) -> tuple[str, ...]:
        tower = self.routes[number].tower
        return tuple(scores_hook(self.model, tower, layer) for layer in layers)

    def _route(self, number: int) -> Route:
        """The route of a number; those of the null come behind all."""
        return self.routes[number % len(self.routes)]

    def _hidden(self, batch: PairBatch) -> tuple[dict[tuple[int, int], Hidden], dict[int, str]]:
        """What every route and every random one hides from every prompt, and kinds of null."""
        found, kinds = {}, {}
        for number, route in enumerate(self.routes):
            each = with_decoys(self.model, route, batch, self.n_null, (self.seed, number))
            for (draw, prompt), (hidden, kind) in each.items():
                found[draw * len(self.routes) + number, prompt] = hidden
                if draw and each[0, prompt][0].count:
                    kinds.setdefault(number, kind)
        return found, kinds

    def checked(self, pairs: PairDataset, batch_size: int) -> tuple[dict[int, str], list[float]]:
        """Kinds of null and mean number of closed pairs of every route, found before any run.

        Raises:
            SpanError: a route that closes nothing in any pair.
            RouteError: one that leaves a position nothing to attend to.
        """
        kinds: dict[int, str] = {}
        counts: list[list[int]] = [[] for _ in self.routes]
        for batch in pairs.batches(batch_size):
            hidden, found = self._hidden(batch)
            kinds = found | kinds
            for number, route in enumerate(self.routes):
                for prompt, pair in enumerate(batch.indices):
                    one = hidden[number, prompt]
                    check_left(one, route, self.model, batch.clean.layout, (prompt, pair))
                    counts[number].append(one.count)
        for route, count in zip(self.routes, counts, strict=True):
            if not sum(count):
                raise SpanError(f"route {route.name!r}: no pair has positions at both of its ends")
        return kinds, [float(np.mean(count)) for count in counts]

    def table(self, sizes: Sequence[float]) -> pd.DataFrame:
        """The cells, without those of the null."""
        return pd.DataFrame(
            {
                "route": self.routes[number].name,
                "tower": self.routes[number].tower,
                "first": layers[0],
                "last": layers[-1],
                "centre": (layers[0] + layers[-1]) / 2,
                "layers": len(layers),
                "pairs": sizes[number],
            }
            for number, layers in self.cells
        )

    def null_table(self, kinds: Mapping[int, str]) -> pd.DataFrame:
        """The cells of the null."""
        rows = [
            {"cell": cell, "kind": kinds.get(number, "pairs")}
            for _ in range(self.n_null)
            for cell, (number, _) in enumerate(self.cells)
        ]
        return pd.DataFrame(rows, columns=["cell", "kind"])


def windows_of(
    model: HookedMultimodal, tower: str, layers: Layers | None, window: int | None
) -> list[list[int]]:
    """The windows of one tower.

    Raises:
        ValueError: as `knockout`.
    """
    given = None if layers is None else list(layers)
    if given is not None and not given:
        raise ValueError("layers is empty; name some, or leave it out for all")
    if given is not None and isinstance(given[0], Sequence):
        if window is not None:
            raise ValueError("layers holds windows already; leave window out, or give plain layers")
        own = [list(some) for some in given]  # type: ignore[arg-type]
        if not all(own):
            raise ValueError("one of the windows in layers is empty; leave it out")
        return [has_attention(model, tower, some) for some in own]
    there = has_attention(model, tower, given)  # type: ignore[arg-type]
    size = len(there) if window is None else window
    if not 1 <= size <= len(there):
        raise ValueError(
            f"window is {window}, but tower {tower!r} has {len(there)} layers to choose from; give "
            f"1 to {len(there)}"
        )
    return [there[i : i + size] for i in range(len(there) - size + 1)]

"""Attention raised towards a source: scores of its keys, plus a constant before the softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mechmm.data.metrics import Reading
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.decoys import with_decoys
from mechmm.engine.located import Located
from mechmm.engine.places import Places, Values
from mechmm.engine.routes import (
    Blocked,
    Hidden,
    Route,
    has_attention,
    lengthened,
    scores_hook,
)
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import SpanError


class Raised:
    """Attention of a route, and of random ones like it, raised by several scales.

    A cell is one scale of the route's own keys, then of those of each random draw.

    Attributes:
        count: of cells.

    Raises:
        RouteError: a route that cannot be read.
        ValueError: a layer outside the tower.
    """

    def __init__(
        self,
        model: HookedMultimodal,
        route: str,
        layers: Sequence[int] | None,
        scales: Sequence[float],
        n_random: int,
        seed: int,
    ) -> None:
        self.model, self.route, self.seed = model, Route.of(route, model), seed
        tower = self.route.tower
        self.layers = has_attention(model, tower, layers)
        self.hooks = tuple(scores_hook(model, tower, layer) for layer in self.layers)
        self.each = [(draw, s) for draw in range(1 + n_random) for s in map(math.log, scales)]
        self.draws, self.count = n_random, len(self.each)

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """What all cells raise in one reading of a batch."""
        cells = [(draw, self.hooks) for draw, _ in self.each]
        names = [self.route.name] * (1 + self.draws)
        raised = Blocked(self._keys(batch, part), cells, names, [amount for _, amount in self.each])
        return raised.changes(len(batch), self.model.device)

    def check(self, pairs: PairDataset, batch_size: int) -> None:
        """Refuse a route that no pair has.

        Raises:
            SpanError: with the route.
        """
        for batch in pairs.batches(batch_size):
            finder = Located(batch.clean.layout)
            if any(self.route.hidden(finder, prompt).count for prompt in range(len(batch))):
                return
        raise SpanError(f"route {self.route.name!r}: no pair has positions at both of its ends")

    def _keys(self, batch: PairBatch, part: Reading) -> dict[tuple[int, int], Hidden]:
        """By draw (0: the route's own) and prompt: which keys are raised for which queries."""
        found = with_decoys(self.model, self.route, batch, self.draws, (self.seed,))
        where = (self.route, batch.clean, part.batch)
        return {key: lengthened(one, *where, key[1]) for key, (one, _) in found.items()}

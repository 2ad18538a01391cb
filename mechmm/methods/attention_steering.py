"""Attention steering: what if a reader looked harder at a source?

For a route source->reader, such as `"image->last"`, the scores of the source's keys for the
reader's queries are raised in every head of some layers before the softmax,

    s_ij <- s_ij + log(scale),      so that each of these weights counts scale times as much

against the others of its row, which keep their proportions. scale = 1 changes nothing, below 1
looks away; 0 would be `mm.knockout`. Beside it, as many other keys of the same kind are raised for
the same readers (`mechmm.engine.decoys`): attention that is merely disturbed is the null.

Zhang et al. 2311.02262 (scaling attention to chosen tokens); Liu et al. 2407.21771 (to the picture,
against hallucination).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mechmm.data.metrics import Metric, flipped, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.cells import Cells
from mechmm.engine.checks import check_limits, check_seed
from mechmm.engine.raised import Raised
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.steered import Steered

N_RANDOM = 5
"""Random sources beside every strength."""


def attention_steering(
    model: HookedMultimodal,
    pairs: PairDataset,
    route: str,
    *,
    scales: Sequence[float] = (2.0, 4.0),
    layers: Sequence[int] | None = None,
    metric: Metric = flipped,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Steered:
    """Raise a reader's attention to a source in clean prompts.

    Args:
        route: source->reader, as for `knockout`.
        scales: what each weight of the source is multiplied by before rows are normalised again.
        layers: of the route's tower, all at once. Default: all that have scores.
        metric: of the clean prompt; default: whether the foil is said.
        n_random: random sources beside every scale.
        seed: of these.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        RouteError: a route that cannot be read.
        SpanError: a span that no pair has.
        ValueError: no scales or one of 0 or less; a layer outside the tower; as `patch`.
    """
    check_seed(seed)
    if not len(scales) or min(scales) <= 0 or not np.isfinite(scales).all():
        raise ValueError(f"scales are {list(scales)}; give numbers above 0 (0 is mm.knockout)")
    check_limits(n_random=n_random)
    raised = Raised(model, route, layers, scales, n_random, seed)
    raised.check(pairs, batch_size)
    cells = Cells(model, pairs, raised.count, raised.changes, metric, batch_size, tokens)
    filled = cells.run(report)
    values = filled.values.unflatten(0, (1 + n_random, len(scales)))
    own, tower = raised.layers, raised.route.tower
    rows = [{"label": route, "tower": tower, "scale": scale} for scale in scales]
    return Steered(
        values=values[0],
        random=values[1:].transpose(0, 1),
        base=filled.base,
        cells=pd.DataFrame(rows).assign(first=own[0], last=own[-1], layers=len(own)),
        metric=name_of(metric),
        what=f"Attention of {route} raised in {len(own)} layers; random: to as many other keys.",
    )

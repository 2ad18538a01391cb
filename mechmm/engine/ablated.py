"""Does the model need what an observation points at? Chosen positions ablated beside random ones.

An observation (a lens, nearest neighbours) names, for every state of the stream and every pair,
some positions that seem to hold the answer. Here these are ablated at that very state, and in other
runs as many random positions out of the same candidates. Only a larger loss than with random
positions says that the model uses what was observed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmm.data.marked import MarkedPairs
from mechmm.data.metrics import Metric, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.lensed import candidates
from mechmm.engine.sites import COLUMNS, table_of
from mechmm.engine.source import Source, source_name
from mechmm.engine.sweep import Report, Sweep
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.observed import POSITION, Observed

Seen = TypeVar("Seen", bound=Observed)


@dataclass(frozen=True, eq=False)
class Ablated:
    """The metric of the clean prompts.

    Attributes:
        clean: unchanged [example].
        held: with the positions ablated that seem to hold the answer [state, example].
        random: with as many random ones ablated [state, draw, example].
    """

    clean: Float[Tensor, " example"]
    held: Float[Tensor, "state example"]
    random: Float[Tensor, "state draw example"]


def strongest(
    evidence: Float[Tensor, "state example place"],
    positions: Int[Tensor, "example place"],
    allowed: Tensor,
    n: int,
) -> Int[Tensor, "state example n"]:
    """The positions with the largest evidence, -1 where there are fewer than n.

    Args:
        evidence: NaN where a state has none.
        positions: of every place.
        allowed: which places may be chosen [example, place].
    """
    known = allowed & ~evidence.isnan()
    size = min(n, evidence.shape[-1])
    best = evidence.masked_fill(~known, -torch.inf).topk(size, dim=-1).indices
    chosen = positions.expand_as(known).gather(-1, best)
    return chosen.masked_fill(~known.gather(-1, best), -1)


def with_ablation(
    model: HookedMultimodal,
    pairs: PairDataset,
    seen: Seen,
    evidence: Float[Tensor, "state example place"],
    n: int,
    *,
    source: Source,
    metric: Metric,
    **options: Any,
) -> Seen:
    """An observation with what ablating the positions of largest evidence does.

    Args:
        n: positions that are ablated together.
        options: of `ablated`.
    """
    allowed = candidates(seen.where, dict(zip(seen.spans, seen.inside, strict=True)))
    positions = seen.where[..., POSITION]
    held = strongest(evidence, positions, allowed, n)
    others = [own[mask].tolist() for own, mask in zip(positions, allowed, strict=True)]
    options |= {"source": source, "metric": metric}
    found = ablated(model, pairs, seen.states, held, others, **options)
    return replace(
        seen,
        clean=found.clean,
        held=held,
        held_values=found.held,
        random_values=found.random,
        ablation=source_name(source),
        metric=name_of(metric),
    )


def ablated(
    model: HookedMultimodal,
    pairs: PairDataset,
    states: pd.DataFrame,
    held: Int[Tensor, "state example n"],
    candidates: Sequence[Sequence[int]],
    *,
    metric: Metric,
    source: Source = "mean",
    n_random: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Ablated:
    """Ablate, state by state, the positions that seem to hold the answer, and random ones.

    Args:
        states: with the columns tower, layer, point and hook.
        held: positions, counted from the first token of a prompt that is not padding; -1: none.
        candidates: the positions of every pair that random ones are drawn from, the held ones left
            out.
        source: what stands in their place (`"mean"`, `"zero"`, `"resample"`, `"corrupt"`).

    Raises:
        ValueError: as `Sweep`.
    """
    marks = {}
    for state, chosen in enumerate(held.tolist()):
        own = [[p for p in row if p >= 0] for row in chosen]
        marks[f"held {state}"] = own
        for draw in range(n_random):
            rng = np.random.default_rng([seed, state, draw])
            others = [_drawn(rng, some, left) for some, left in zip(own, candidates, strict=True)]
            marks[f"other {state}.{draw}"] = others
    rows = [
        _site(state, span)
        for number, state in enumerate(states.to_dict("records"))
        for span in (f"held {number}", *(f"other {number}.{draw}" for draw in range(n_random)))
    ]
    marked, sites = MarkedPairs(pairs, marks), table_of(rows)
    what = (model, marked, sites, metric, "clean", source)
    found = Sweep(*what, seed, batch_size, tokens).run(report)
    values = found.values.unflatten(0, (len(states), 1 + n_random))
    return Ablated(found.base, values[:, 0], values[:, 1:])


def _drawn(rng: np.random.Generator, own: Sequence[int], candidates: Sequence[int]) -> list[int]:
    """As many other positions, fewer where there are not enough."""
    others = [position for position in candidates if position not in set(own)]
    return sorted(rng.choice(others, min(len(own), len(others)), replace=False).tolist())


def _site(state: dict, span: str) -> dict:
    values = (
        *(state["hook"], state["tower"], max(0, state["layer"]), state["point"]),
        *(None, None, span, None, None),
    )
    return dict(zip(COLUMNS, values, strict=True))

"""Pruning of image tokens: how many does the answer need, and does attention tell which?

At layer k the image tokens of a prompt are ranked by the attention that the last position pays
them, the mean over heads. A share of them is kept; the others are dropped behind layer k: in all
later layers their keys are hidden from every position that is left (score -inf before the softmax),
so that nothing reads them any more. Positions stay as they are.

Beside the most attended tokens, random ones and the least attended ones are kept. Attention tells
which tokens matter only so far as its curve lies above the random one.

Chen et al. 2403.06764 (FastV).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, Reading, accuracy, name_of
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.attending import attending
from mechmm.engine.cells import Cells
from mechmm.engine.checks import check_limits, check_pairs, check_seed
from mechmm.engine.places import Places, Values
from mechmm.engine.routes import (
    FORWARD,
    Blocked,
    Hidden,
    Route,
    has_attention,
    lengthened,
    scores_hook,
    seen_by,
)
from mechmm.engine.sweep import Report
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results.curves import curves
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
N_RANDOM = 3
"""Random orders of the tokens."""
MOST, LEAST, RANDOM = "most attended", "least attended", "random"


@dataclass(frozen=True, eq=False)
class PruningCurve(Result):
    """The metric of every pair's clean prompt with some image tokens kept.

    Attributes:
        most, least: with the tokens kept that the last position attends most, or least, to
            [fraction, example].
        random: with random ones kept [fraction, draw, example].
        base: with all tokens [example].
        kept: how many are kept [fraction, example].
        fractions: shares that are kept. layer: whose attention ranks them.
        metric: its name.
    """

    most: Float[Tensor, "fraction example"] = field(metadata={"axis": 1})
    least: Float[Tensor, "fraction example"] = field(metadata={"axis": 1})
    random: Float[Tensor, "fraction draw example"] = field(metadata={"axis": 2})
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    kept: Int[Tensor, "fraction example"] = field(metadata={"axis": 1})
    fractions: tuple[float, ...]
    layer: int
    metric: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per way of keeping (`keep`) and `share`: mean number of tokens, the mean metric
        and its 95 % interval over examples (of random ones after the mean over draws)."""
        ways = {MOST: self.most, RANDOM: self.random.mean(1), LEAST: self.least}
        tables = []
        for name, found in ways.items():
            low, high = bootstrap_interval(found)
            columns = {
                "keep": name,
                "share": self.fractions,
                "tokens": self.kept.float().mean(1).numpy(),
                "value": found.mean(1).numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
            }
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True).assign(base=float(self.base.mean()))

    def plot(self) -> dict[str, Figure]:
        """The metric over the share that is kept, a curve for each way of keeping; those of the
        least attended tokens have their own figure, beside random ones as well."""
        table = {str(name): rows for name, rows in self.to_dataframe().groupby("keep")}
        below = f"{len(self.base)} pairs; ranked by the last position's attention in the layer"
        title = f"image tokens dropped behind layer {self.layer}: {self.metric}"
        axes = {"x_title": "share of image tokens kept", "y_title": self.metric, "null": RANDOM}
        return {
            name.split()[0]: curves(
                {name: table[name], RANDOM: table[RANDOM]}, title, below, **axes
            )
            for name in (MOST, LEAST)
        }

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Pruning", contents)], facts or {})

    def summary(self) -> str:
        """What was kept, and what came of it, in words."""
        table = self.to_dataframe().set_index(["keep", "share"])["value"]
        least = min(self.fractions)
        parts = ", ".join(f"{table[name, least]:.2f} {name}" for name in (MOST, RANDOM, LEAST))
        return (
            f"{len(self.base)} pairs, image tokens dropped behind layer {self.layer}; "
            f"{self.metric} is {float(self.base.mean()):.2f} with all, and with {100 * least:g} % "
            f"of them kept: {parts}."
        )


def pruning_curve(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    layer: int,
    fractions: Sequence[float] = FRACTIONS,
    metric: Metric = accuracy,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> PruningCurve:
    """Keep shares of the image tokens: those most attended to, least, and random ones.

    Args:
        layer: of the language model, whose attention ranks the tokens; they are dropped in all
            later layers.
        fractions: shares to keep, above 0 and at most 1; one token at least is kept.
        metric: of the clean prompt.
        n_random: random orders; the tokens of a smaller share are among those of a larger one.
        seed: of these.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        ValueError: no fractions, one twice or outside (0, 1]; a layer without attention scores, or
            none behind it; as `patch`.
        RouteError: pictures that are not in the sequence.
        SpanError: a prompt without image tokens.
    """
    shares = tuple(map(float, fractions))
    if not shares or len(set(shares)) < len(shares) or not all(0 < s <= 1 for s in shares):
        raise ValueError(f"fractions are {list(shares)}; give shares above 0, at most 1, each once")
    check_pairs(pairs, "clean")
    check_limits(n_random=n_random, batch_size=batch_size)
    check_seed(seed)
    Route.of("image->all", model)
    pruned = _Pruned(model, _later(model, layer), layer, shares, n_random, seed)
    kept = _kept(pairs, shares, batch_size)
    what = (model, pairs, pruned.count, pruned.changes, metric, batch_size, tokens)
    found = Cells(*what).run(report)
    values = found.values.unflatten(0, (2 + n_random, len(shares)))
    return PruningCurve(
        most=values[0],
        least=values[1],
        random=values[2:].transpose(0, 1).contiguous(),
        base=found.base,
        kept=kept,
        fractions=shares,
        layer=layer,
        metric=name_of(metric),
    )


def _later(model: HookedMultimodal, layer: int) -> list[int]:
    """Layers behind the one that ranks, whose attention has scores."""
    has_attention(model, LANGUAGE, [layer])
    later = [number for number in has_attention(model, LANGUAGE, None) if number > layer]
    if not later:
        raise ValueError(
            f"no layer behind layer {layer} reads the tokens, so that dropping them changes "
            "nothing; choose an earlier layer"
        )
    return later


def _kept(
    pairs: PairDataset, shares: Sequence[float], batch_size: int
) -> Int[Tensor, "fraction example"]:
    """How many tokens every share keeps of every pair."""
    counts = []
    for batch in pairs.batches(batch_size):
        counts += batch.clean.layout.mask("image").sum(1).tolist()
    if 0 in counts:
        raise SpanError(f"pair {counts.index(0)}: the prompt has no image tokens; drop the pair")
    return torch.tensor([[_size(share, count) for count in counts] for share in shares])


def _size(share: float, count: int) -> int:
    return max(1, round(share * count))


@dataclass(frozen=True, eq=False)
class _Pruned:
    """What cells drop: for the most attended, least attended and each random order, every share."""

    model: HookedMultimodal
    later: Sequence[int]
    layer: int
    shares: Sequence[float]
    n_random: int
    seed: int

    @property
    def count(self) -> int:
        return (2 + self.n_random) * len(self.shares)

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """What all cells hide in one reading of a batch."""
        hidden: dict[tuple[int, int], Hidden] = {}
        route = Route.of("image->all", self.model)
        _, weights = attending(self.model, batch.clean, [self.layer])
        attended = weights[0].cpu().numpy()
        for prompt, pair in enumerate(batch.numbers):
            for cell, dropped in enumerate(self._dropped(batch, attended[prompt], prompt, pair)):
                own = self._hidden(batch, dropped, prompt)
                hidden[cell, prompt] = lengthened(own, route, batch.clean, part.batch, prompt)
        hooks = tuple(scores_hook(self.model, LANGUAGE, layer) for layer in self.later)
        cells = [(cell, hooks) for cell in range(self.count)]
        blocked = Blocked(hidden, cells, ["dropped image tokens"] * self.count)
        return blocked.changes(len(batch), self.model.device)

    def _dropped(
        self, batch: PairBatch, attended: np.ndarray, prompt: int, pair: int
    ) -> list[np.ndarray]:
        """The positions that every cell drops."""
        image = np.array(batch.clean.layout.positions("image", prompt))
        ranked = image[np.argsort(-attended[image], kind="stable")]
        draws = [np.random.default_rng([self.seed, d, pair]) for d in range(self.n_random)]
        orders = [ranked, ranked[::-1], *(rng.permutation(image) for rng in draws)]
        sizes = [_size(share, len(image)) for share in self.shares]
        return [order[size:] for order in orders for size in sizes]

    def _hidden(self, batch: PairBatch, dropped: np.ndarray, prompt: int) -> Hidden:
        """Dropped keys, hidden from every position that is left and would see one."""
        layout = batch.clean.layout
        keys: Bool[np.ndarray, " key"] = np.zeros(layout.shape[1], dtype=bool)
        keys[dropped] = True
        seen = seen_by(layout, prompt, self.model.family.resume in FORWARD) & keys
        reads = seen.any(1) & ~keys
        query = np.flatnonzero(reads)
        return Hidden(np.full(len(query), prompt), query, seen[query])

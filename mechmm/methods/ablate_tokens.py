"""Ablation of image tokens: does the answer need the tokens of one place in the picture?

The tokens of a span of the picture enter a layer of the language model (the first: what the
projector gave) as something that says nothing of this picture,

    x_i <- mean of x over all image tokens of all pairs (or 0, or the corrupt prompt's x_i)

for every token i of the span, in the clean prompt. The background is the picture less all spans
that were named. Beside every span stand draws of as many random image tokens that are not of it;
only a larger loss than theirs says that it is this place that matters, and not the number of
tokens. Where too few others are left (a background is most of the picture) they are drawn from the
whole picture.

Neo et al. 2410.07149.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.marked import MarkedPairs
from mechmm.data.metrics import Metric, accuracy, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import (
    check_choice,
    check_limits,
    check_model,
    check_pairs,
    check_seed,
    check_sites,
)
from mechmm.engine.sites import Sites, residual
from mechmm.engine.source import Source
from mechmm.engine.states import means
from mechmm.engine.sweep import Report, Sweep
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import beside_draws

N_RANDOM = 5
"""Random sets of tokens beside every span."""
BACKGROUND = "background"
Sets = list[list[int]]
"""Some positions of every pair, counted from the first token of its prompt."""


@dataclass(frozen=True, eq=False)
class TokenAblation(Result):
    """The metric of every pair's clean prompt without some image tokens.

    Attributes:
        values: without the tokens of every span [cell, example].
        random: without as many random image tokens [cell, draw, example].
        base: with all tokens [example].
        tokens: how many were ablated [cell, example].
        cells: `span`, and where its random tokens are from (`control`): `elsewhere` in the picture
            or, where too few others are left in some pair, `anywhere`.
        metric: its name. by: what stood in the tokens' place. layer: that they entered.
    """

    values: Float[Tensor, "cell example"] = field(metadata={"axis": 1})
    random: Float[Tensor, "cell draw example"] = field(metadata={"axis": 2})
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    tokens: Int[Tensor, "cell example"] = field(metadata={"axis": 1})
    cells: pd.DataFrame
    metric: str
    by: str
    layer: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per span: mean number of tokens, the mean metric and its 95 % interval over
        examples, and the mean, smallest and largest mean of the random draws."""
        table = self.cells.assign(tokens=self.tokens.float().mean(1).numpy())
        return table.assign(**beside_draws(self.values, self.random, self.base))

    def plot(self) -> dict[str, Figure]:
        """Every span as a bar, and its random draws as the bar below it (its interval: the
        smallest and largest draw)."""
        table = self.to_dataframe()
        names, rows = [], []
        for row in table.to_dict("records"):
            names += [f"{row['span']} ({row['tokens']:.0f} tokens)", f"as many {row['control']}"]
            rows += [[row[name] for name in ("value", "low", "high")]]
            rows += [[row[f"random_{name}"] for name in ("mean", "low", "high")]]
        value, low, high = np.array(rows, dtype=float).T
        title = f"image tokens ablated: {self.metric}, {len(self.base)} pairs"
        return {"tokens": plots.bars(names, value, low, high, title, value_title=self.metric)}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Tokens", contents)], facts or {})

    def summary(self) -> str:
        """What was ablated, and what came of it, in words."""
        table = self.to_dataframe()
        parts = [
            f"{row['value']:.2f} without the {row['tokens']:.0f} tokens of {row['span']} "
            f"({row['random_mean']:.2f} without as many {row['control']})"
            for row in table.to_dict("records")
        ]
        return (
            f"{len(self.base)} pairs, image tokens set to {self.by} before layer {self.layer}; "
            f"{self.metric} is {float(self.base.mean()):.2f} with all, {', '.join(parts)}."
        )


def ablate_tokens(
    model: HookedMultimodal,
    pairs: PairDataset,
    spans: Sequence[str] = ("object", "distractor"),
    *,
    by: str = "mean",
    layer: int = 0,
    metric: Metric = accuracy,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> TokenAblation:
    """Ablate the image tokens of spans, of the background, and as many random ones.

    Args:
        spans: of the pairs; of each, the tokens in the picture count.
        by: what stands in the tokens' place: the mean over all image tokens of all pairs, zero, or
            what the pair's corrupt prompt has there.
        layer: of the language model, that the tokens enter.
        metric: of the clean prompt.
        n_random: draws of as many random image tokens beside every span.
        seed: of these.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all).

    Raises:
        ValueError: no spans, one twice, an unknown `by`, a number below 1; as `patch`.
        SpanError: a span that some pair does not have in its picture.
        SiteError: a layer that the model does not have.
    """
    names = _names(spans)
    check_model(model)
    check_pairs(pairs, "corrupt" if by == "corrupt" else "clean")
    check_choice("by", by, ("mean", "zero", "corrupt"))
    check_limits(batch_size=batch_size, n_random=n_random)
    check_seed(seed)
    entering = residual(model, ("image",), towers=[LANGUAGE], layers=[layer])
    check_sites(model, entering)
    own, image = _sets(pairs, names, batch_size)
    marks, elsewhere = _marks(own, image, n_random, seed)
    sites = residual(model, tuple(marks), towers=[LANGUAGE], layers=[layer])
    source = _source(model, pairs, entering, by, batch_size)
    what = (model, MarkedPairs(pairs, marks), sites, metric, "clean", source)
    found = Sweep(*what, seed, batch_size, tokens).run(report)
    values = found.values.unflatten(0, (len(own), 1 + n_random))
    return TokenAblation(
        values=values[:, 0],
        random=values[:, 1:],
        base=found.base,
        tokens=torch.tensor([[len(some) for some in each] for each in own.values()]),
        cells=pd.DataFrame(
            {"span": list(own), "control": ["elsewhere" if e else "anywhere" for e in elsewhere]}
        ),
        metric=name_of(metric),
        by=by,
        layer=layer,
    )


def _names(spans: Sequence[str]) -> list[str]:
    names = [spans] if isinstance(spans, str) else list(spans)
    if not names or len(set(names)) < len(names) or BACKGROUND in names:
        raise ValueError(
            f"spans are {names}; give one or more, each once (the background is what they leave)"
        )
    return names


def _sets(
    pairs: PairDataset, names: Sequence[str], batch_size: int
) -> tuple[dict[str, Sets], Sets]:
    """The image tokens of every span and of the background, and all, by pair."""
    own: dict[str, Sets] = {name: [] for name in (*names, BACKGROUND)}
    image: Sets = []
    for batch in pairs.batches(batch_size):
        layout = batch.clean.layout
        first = layout.mask("all").long().argmax(1).tolist()
        masks = {name: layout.mask(name) & layout.mask("image") for name in names}
        rest = layout.mask("image").clone()
        for mask in masks.values():
            rest &= ~mask
        for prompt, pair in enumerate(batch.indices):
            for name, mask in (*masks.items(), (BACKGROUND, rest)):
                at = mask[prompt].nonzero().flatten() - first[prompt]
                if not len(at):
                    raise SpanError(
                        f"pair {pair}: span {name!r} has no token in the picture; name another "
                        "span or drop the pair"
                    )
                own[name].append(at.tolist())
            image.append([p - first[prompt] for p in layout.positions("image", prompt)])
    return own, image


def _marks(
    own: Mapping[str, Sets], image: Sets, n_random: int, seed: int
) -> tuple[dict[str, Sets], list[bool]]:
    """Spans to mark, every cell's before its random draws, and whether these are from elsewhere."""
    marks: dict[str, Sets] = {}
    apart = []
    for number, (name, each) in enumerate(own.items()):
        others = [sorted(set(every) - set(some)) for some, every in zip(each, image, strict=True)]
        enough = all(len(o) >= len(some) for some, o in zip(each, others, strict=True))
        marks[f"ablated {name}"] = each
        apart.append(enough)
        for draw in range(n_random):
            rng = np.random.default_rng([seed, number, draw])
            marks[f"beside {name} {draw}"] = [
                sorted(rng.choice(pool, len(some), replace=False).tolist())
                for some, pool in zip(each, others if enough else image, strict=True)
            ]
    return marks, apart


def _source(
    model: HookedMultimodal, pairs: PairDataset, entering: Sites, by: str, batch_size: int
) -> Source:
    """What is put there. One mean serves all spans, so that it says nothing of any of them."""
    if by != "mean":
        return "zero" if by == "zero" else "corrupt"
    centre = means(model, pairs, entering, batch_size=batch_size)[0].mean(0)
    return lambda now: centre.to(now).expand_as(now)

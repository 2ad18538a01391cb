"""The modality gap: how far apart image and text states lie by layer, and whether it matters.

With mu_I and mu_T the mean states of image and text positions (of every example the mean over its
positions, then over examples) and s_I^2, s_T^2 the mean squared distances of states from them,

    distance  |mu_I - mu_T|
    cosine    1 - cos(mu_I, mu_T)
    spread    |mu_I - mu_T| / sqrt((s_I^2 + s_T^2) / 2)

Null: the same with the modalities of each example's positions shuffled. Of a dual encoder the
states are the normalised embeddings of pictures and texts (Liang et al. 2203.02053).

Control: the gap is closed,

    x <- x + mu_T - mu_I   at the image positions,

and the change of the metric stands beside that of random shifts of equal norm. Of a dual encoder
the metric is 1 where a picture is nearest to its own text, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.embeddings import embeddings, is_dual
from mechmm.engine.places import Ints
from mechmm.engine.sites import Sites, residual, table_of
from mechmm.engine.source import BySite, Steer
from mechmm.engine.states import Data, check_data, prompts_of, states
from mechmm.engine.sweep import Sweep
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

MEASURES = ("distance", "cosine", "spread")
RESAMPLES = 400
"""Bootstrap samples of examples behind an interval."""
OUTPUT = "embeddings"
"""What the one row of a dual encoder is called."""


@dataclass(frozen=True, eq=False)
class ModalityGap(Result):
    """The gap at every layer.

    Attributes:
        centroids: mean state by layer, modality (image, text) and example [layer, two, example, d].
        squares: mean squared norm of the states, likewise [layer, two, example].
        null: the measures with shuffled modalities [layer, shuffle, measure].
        clean: the metric [example]; closed: with the gap closed at a layer [layer, example];
            random: with random shifts of equal norm [layer, draw, example]. None without answers.
        sites: of the image states, one row per layer. spans: of image and text. metric: its name.
    """

    centroids: Float[Tensor, "layer two example d"] = field(metadata={"axis": 2})
    squares: Float[Tensor, "layer two example"] = field(metadata={"axis": 2})
    null: Float[Tensor, "layer shuffle measure"]
    clean: Float[Tensor, " example"] | None = field(metadata={"axis": 0})
    closed: Float[Tensor, "layer example"] | None = field(metadata={"axis": 1})
    random: Float[Tensor, "layer draw example"] | None = field(metadata={"axis": 2})
    sites: pd.DataFrame
    spans: tuple[str, str]
    metric: str

    def gap(self) -> Float[Tensor, "layer measure"]:
        """The three measures at every layer, in the order of `MEASURES`."""
        return measures(self.centroids.mean(2), self.squares.mean(2))

    def interval(self, seed: int = 0) -> Float[Tensor, "two layer measure"]:
        """95 % bootstrap interval over examples: (low, high)."""
        n = self.centroids.shape[2]
        drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
        found = torch.stack(
            [
                measures(self.centroids[:, :, i].mean(2), self.squares[:, :, i].mean(2))
                for i in drawn
            ]
        )
        return found.quantile(torch.tensor((0.025, 0.975)), dim=0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and measure: value, interval, and the largest value with shuffled
        modalities; per layer the change of the metric with the gap closed, and its null."""
        gap, (low, high), null = self.gap(), self.interval(), self.null.amax(1)
        rows = []
        for layer, site in enumerate(self.sites.itertuples()):
            for i, name in enumerate(MEASURES):
                ends = (low[layer, i], high[layer, i], null[layer, i])
                row = dict(zip(("low", "high", "null_high"), map(float, ends), strict=True))
                where = {"layer": site.layer, "hook": site.hook, "measure": name}
                rows.append({**where, "value": float(gap[layer, i]), **row})
        table = pd.DataFrame(rows)
        if self.closed is None or self.clean is None or self.random is None:
            return table
        change, draws = self.change(), (self.random - self.clean).mean(-1)
        columns = {
            "change": change.mean(-1),
            "change_low": bootstrap_interval(change)[0],
            "change_high": bootstrap_interval(change)[1],
            "random_low": draws.amin(1),
            "random_high": draws.amax(1),
        }
        return table.assign(
            **{name: np.repeat(value.numpy(), len(MEASURES)) for name, value in columns.items()}
        )

    def change(self) -> Float[Tensor, "layer example"]:
        """How the metric of every example changes where the gap is closed.

        Raises:
            ValueError: where it was not closed.
        """
        if self.closed is None or self.clean is None:
            raise ValueError("the gap was not closed; call modality_gap with pairs and close=True")
        return self.closed - self.clean

    def plot(self) -> dict[str, Figure]:
        """Figures by name: each measure by layer over its null, and `closed`: the change of the
        metric with the gap closed, over random shifts."""
        table = self.to_dataframe()
        figures = {}
        for name, group in table.groupby("measure", sort=False):
            value, low, high = (group[c].to_numpy(float) for c in ("value", "low", "high"))
            null = (0.0, float(group["null_high"].max()))
            title = f"modality gap by layer: {name} of {self.spans[0]} and {self.spans[1]}"
            extra = {"value_title": str(name), "null_title": "shuffled modalities"}
            names = _names(group)
            figures[str(name)] = plots.bars(names, value, low, high, title, null=null, **extra)
        if self.closed is not None:
            group = table[table["measure"] == MEASURES[0]]
            columns = ("change", "change_low", "change_high")
            value, low, high = (group[column].to_numpy(float) for column in columns)
            null = (float(group["random_low"].min()), float(group["random_high"].max()))
            title = f"change of {self.metric} where the gap is closed"
            extra = {"value_title": "change", "null_title": "random shifts of equal norm"}
            names = _names(group)
            figures["closed"] = plots.bars(names, value, low, high, title, null=null, **extra)
        return figures

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the table."""
        contents = [*self.plot().values(), self.to_dataframe().drop(columns="hook")]
        return Page(title, self.summary(), [Section("Layers", contents)], facts or {})

    def summary(self) -> str:
        """Where the gap is widest, and what closing it does, in words."""
        table = self.to_dataframe()
        spread = table[table["measure"] == "spread"]
        top = spread.loc[spread["value"].idxmax()]
        text = (
            f"{len(spread)} layers, {self.centroids.shape[2]} examples. The gap is widest at "
            f"{top['hook']}: {top['value']:.2f} spreads, with shuffled modalities at most "
            f"{top['null_high']:.2f}."
        )
        if self.closed is None:
            return text + " Whether it matters was not tested."
        return text + (
            f" Closing it there changes {self.metric} by {top['change']:.2f}; random shifts of "
            f"equal norm by {top['random_low']:.2f} to {top['random_high']:.2f}."
        )


def _names(table: pd.DataFrame) -> list[str]:
    rows = zip(table["hook"], table["layer"], strict=True)
    return [str(hook) if pd.isna(layer) else f"layer {layer:.0f}" for hook, layer in rows]


def measures(
    centroids: Float[Tensor, "*layer two d"], squares: Float[Tensor, "*layer two"]
) -> Float[Tensor, "*layer measure"]:
    """Distance, cosine distance and distance in spreads, from the mean states of both modalities
    and their mean squared norms."""
    image, text = centroids.unbind(-2)
    distance = (image - text).norm(dim=-1)
    cosine = 1 - torch.nn.functional.cosine_similarity(image, text, dim=-1)
    spread = (squares - centroids.square().sum(-1)).clamp(min=0).mean(-1).sqrt()
    return torch.stack([distance, cosine, distance / spread], dim=-1)


def modality_gap(
    model: HookedMultimodal,
    data: Data,
    *,
    layers: Sequence[int] | None = None,
    spans: tuple[str, str] = ("image", "text"),
    tower: str = LANGUAGE,
    n_shuffled: int = 20,
    close: bool = True,
    n_random: int = 10,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
) -> ModalityGap:
    """The gap between image and text states in the residual stream of a tower, layer by layer; of a
    dual encoder, between its embeddings of pictures and texts.

    Args:
        data: pairs (the clean prompts are read), or batches; of a dual encoder batches in which
            text i belongs to picture i.
        layers: default: all that the model reads; ignored of a dual encoder.
        spans: of the image states and the text states.
        tower: whose positions are those of the prompt.
        n_shuffled: shuffles of modalities.
        close: whether to close the gap and measure; needs pairs or a dual encoder.
        n_random: random shifts per layer beside that.
        metric: larger = more the clean answer.
        seed: of shuffles and random shifts.

    Raises:
        ValueError: closing without answers; a dual encoder with another number of texts than
            pictures; a layer or tower that the model does not have.
        SpanError: a span that some example does not have.
    """
    if n_shuffled < 1 or n_random < 1:
        raise ValueError(f"n_shuffled is {n_shuffled}, n_random {n_random}; give 1 or more")
    if is_dual(model):
        return _of_dual(model, data, n_shuffled, close, n_random, seed)
    both = [residual(model, [span], towers=[tower], layers=layers) for span in spans]
    if any(not len(sites) for sites in both):
        raise ValueError(f"tower {tower!r} has no positions of both {spans[0]!r} and {spans[1]!r}")
    for sites in both:
        check_data(model, data, sites)
    if close and not isinstance(data, PairDataset):
        raise ValueError("batches have no answers to change; pass pairs, or close=False")
    sweep = None
    if close:
        assert isinstance(data, PairDataset)
        sweep = Sweep(model, data, both[0], metric, "clean", "zero", seed, batch_size)
    moments = _Moments(n_shuffled, seed)
    for batch, indices in prompts_of(data, batch_size):
        found = states(model, batch, both[0] + both[1], indices, seed)
        image, text = found[: len(both[0])], found[len(both[0]) :]
        values = torch.stack(
            [torch.cat([i.values, t.values]) for i, t in zip(image, text, strict=True)]
        )
        moments.add(values, image[0].prompt, text[0].prompt)
    centroids, squares, null = moments.found()
    closed = (None, None, None)
    if sweep is not None:
        closed = _closed(sweep, _moves(centroids, n_random, seed))
    table = both[0].table
    return ModalityGap(centroids, squares, null, *closed, table, spans, name_of(metric))


def _of_dual(
    model: HookedMultimodal, data: Data, n_shuffled: int, close: bool, n_random: int, seed: int
) -> ModalityGap:
    """The gap between the embeddings of pictures and texts."""
    if isinstance(data, PairDataset):
        raise ValueError("a dual encoder reads batches of pictures and their texts, not pairs")
    found = [embeddings(model, batch) for batch in data]
    for number, (image, text) in enumerate(found):
        if len(image) != len(text):
            raise ValueError(
                f"batch {number} has {len(image)} pictures and {len(text)} texts; give one each"
            )
    image, text = (torch.cat(column) for column in zip(*found, strict=True))
    moments, own = _Moments(n_shuffled, seed), np.arange(len(image))
    moments.add(torch.cat([image, text])[None], own, own)
    centroids, squares, null = moments.found()
    closed = (None, None, None)
    if close:
        moves = _moves(centroids, n_random, seed)[0]
        values = torch.stack([_nearest(image + move, text) for move in (0 * moves[0], *moves)])
        closed = (values[0], values[1:2], values[None, 2:])
    row = {"hook": OUTPUT, "tower": "", "layer": None, "kind": OUTPUT, "span": "image"}
    spans = ("image", "text")
    return ModalityGap(centroids, squares, null, *closed, table_of([row]).table, spans, "nearest")


def _nearest(image: Float[Tensor, "example d"], text: Float[Tensor, "example d"]) -> Tensor:
    """1 where a picture is nearest to its own text [example]."""
    image = image / image.norm(dim=-1, keepdim=True)
    return ((image @ text.T).argmax(-1) == torch.arange(len(text))).float()


def _moves(
    centroids: Float[Tensor, "layer two example d"], n_random: int, seed: int
) -> Float[Tensor, "layer move d"]:
    """At every layer, what moves the image states onto the text states, and random shifts as
    long."""
    image, text = centroids.mean(2).unbind(1)
    move = (text - image)[:, None]
    random = torch.Generator().manual_seed(seed)
    away = torch.randn(len(move), n_random, move.shape[-1], generator=random)
    away *= move.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
    return torch.cat([move, away], dim=1)


def _closed(sweep: Sweep, moves: Float[Tensor, "layer move d"]) -> tuple[Tensor, Tensor, Tensor]:
    """The metric: unchanged, with the gap closed, with random shifts."""
    layers, each = moves.shape[:2]
    table = sweep.sites.table
    repeated = Sites(table.loc[table.index.repeat(each)].reset_index(drop=True))
    source = BySite(tuple(Steer(move) for move in moves.flatten(0, 1)))
    swept = replace(sweep, sites=repeated, source=source).run()
    values = swept.values.view(layers, each, -1)
    return swept.base, values[:, 0], values[:, 1:]


class _Moments:
    """Mean states and squared norms by modality and example, and with shuffled modalities."""

    def __init__(self, shuffles: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.shuffled: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(shuffles)]

    def add(self, values: Float[Tensor, "layer place d"], image: Ints, text: Ints) -> None:
        """The states of one batch, those of images first, and the prompt of each."""
        prompt = np.concatenate([image, text])
        modality = np.repeat([0, 1], [len(image), len(text)])
        self.rows.append(_moments(values, prompt, modality))
        for own in self.shuffled:
            mixed = np.empty_like(modality)
            by_prompt = np.lexsort((self.rng.random(len(prompt)), prompt))
            mixed[np.argsort(prompt, kind="stable")] = modality[by_prompt]
            means = _moments(values, prompt, mixed)
            own.append((means[0].sum(2), means[1].sum(2)))

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids, squares, and the measures of every shuffle [layer, shuffle, measure]."""
        centroids, squares = (torch.cat(column, 2) for column in zip(*self.rows, strict=True))
        count = centroids.shape[2]
        null = []
        for own in self.shuffled:
            sums = [torch.stack(column).sum(0) / count for column in zip(*own, strict=True)]
            null.append(measures(*sums))
        return centroids, squares, torch.stack(null, dim=1)


def _moments(
    values: Float[Tensor, "layer place d"], prompt: Ints, modality: Ints
) -> tuple[Float[Tensor, "layer two prompt d"], Float[Tensor, "layer two prompt"]]:
    prompts = int(prompt.max()) + 1
    cell = torch.as_tensor(modality * prompts + prompt)
    shape = (len(values), 2 * prompts, values.shape[2])
    counts = torch.bincount(cell, minlength=2 * prompts)
    sums = values.new_zeros(shape).index_add_(1, cell, values) / counts[:, None]
    squares = values.new_zeros(shape[:2]).index_add_(1, cell, values.square().sum(-1)) / counts
    return sums.unflatten(1, (2, prompts)), squares.unflatten(1, (2, prompts))

"""Results of reading the stream position by position, with what the reading is to be held against.

An observation gives every state of the stream and every position a number, its evidence. Beside it
stand the corrupt prompt, random other positions, and what ablating the positions with the largest
evidence does to the model's metric.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.results import plots
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval
from mechmm.results.tokens import layer_slider

N_NULL = 200
"""Random sets of positions for the null of every span."""
POSITION, MODALITY, MEDIUM, VIEW, ROW, COLUMN = range(6)
"""Columns of `Observed.where`."""
TEXT = 1
"""The modality of text, as in a layout."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Observed(Result):
    """What was seen at every state and position of some prompts.

    Attributes:
        states: tower, layer (-1: what enters the first block), point, hook and label of each.
        where: position (from the first token that is not padding; -1: none), modality, medium,
            view, row and column of every place [example, place, six].
        tokens: of the prompts, at these places.
        spans: names of spans.
        inside: whether a place is in a span [span, example, place].
        clean: the metric of every example, None without pairs or without ablation.
        held: the positions that were ablated at every state [state, example, n], -1: fewer.
        held_values: the metric with these ablated [state, example].
        random_values: with as many random ones ablated [state, draw, example].
        ablation, metric: names; "" where nothing was ablated.
        seed: of the null.
        picture, corrupt_picture: of the first example.
    """

    states: pd.DataFrame
    where: Int[Tensor, "example place six"] = field(metadata={"axis": 0})
    tokens: tuple[tuple[str, ...], ...] = field(metadata={"axis": 0})
    spans: tuple[str, ...]
    inside: Bool[Tensor, "span example place"] = field(metadata={"axis": 1})
    clean: Float[Tensor, " example"] | None = field(default=None, metadata={"axis": 0})
    held: Int[Tensor, "state example n"] | None = field(default=None, metadata={"axis": 1})
    held_values: Float[Tensor, "state example"] | None = field(default=None, metadata={"axis": 1})
    random_values: Float[Tensor, "state draw example"] | None = field(
        default=None, metadata={"axis": 2}
    )
    ablation: str = ""
    metric: str = ""
    seed: int = 0
    picture: Image.Image | None = field(default=None, metadata={"keep": "first"})
    corrupt_picture: Image.Image | None = field(default=None, metadata={"keep": "first"})

    @abstractmethod
    def evidence(self) -> Float[Tensor, "state example place"]:
        """What the observation says for the answer; NaN where nothing was read."""

    def corrupt_evidence(self) -> Float[Tensor, "state example place"] | None:
        """The same on the corrupt prompts, or None without pairs."""
        return None

    @property
    @abstractmethod
    def measure(self) -> str:
        """What the evidence is called in figures."""

    @abstractmethod
    def notes(self, example: int) -> np.ndarray:
        """What is shown on hover, for every state and place of an example [state, place]."""

    # Spans -----------------------------------------------------------------------------------

    def at_span(self, span: str, corrupt: bool = False) -> Float[Tensor, "state example"]:
        """Mean evidence over the positions of a span; NaN for an example without them.

        Raises:
            ValueError: an unknown span, or no corrupt prompts.
        """
        values = self.corrupt_evidence() if corrupt else self.evidence()
        if values is None:
            raise ValueError("there are no corrupt prompts: read pairs instead of a batch")
        return _mean(values, self._inside(span))

    def null(self, span: str, n: int = N_NULL) -> Float[Tensor, "state draw"]:
        """Mean evidence over examples at as many random positions of the same modality outside of a
        span as it has, drawn `n` times; NaN where there are none."""
        values = self.evidence()
        masks = self._drawn(span, n)
        means = torch.stack([_mean(values, mask).nanmean(1) for mask in masks], 1)
        return means

    def _inside(self, span: str) -> Bool[Tensor, "example place"]:
        if span not in self.spans:
            raise ValueError(f"unknown span {span!r}; there are {', '.join(self.spans)}")
        return self.inside[self.spans.index(span)]

    def _drawn(self, span: str, n: int) -> Bool[Tensor, "draw example place"]:
        inside, kinds = self._inside(span), self.where[..., MODALITY]
        found = torch.zeros(n, *inside.shape, dtype=torch.bool)
        rng = np.random.default_rng(self.seed)
        for example, own in enumerate(inside):
            alike = torch.isin(kinds[example], kinds[example][own].unique())
            spare = (alike & ~own & (self.where[example, :, POSITION] >= 0)).nonzero().flatten()
            size = min(int(own.sum()), len(spare))
            order = rng.random((n, len(spare))).argsort(1)[:, :size]
            found[torch.arange(n)[:, None], example, spare[torch.from_numpy(order)]] = True
        return found

    def span_table(self) -> pd.DataFrame:
        """One row per state and span: mean evidence with its 95 % interval over examples, that of
        the corrupt prompts, the range of 95 % of random positions; and what ablating the positions
        with the largest evidence, or random ones, takes from the metric (for all spans alike)."""
        drops = self.drops()
        tables = []
        for span in self.spans:
            own = self.at_span(span)
            there = ~own.isnan().all(0)
            if not there.any():
                continue
            low, high = bootstrap_interval(own[:, there])
            ends = self.null(span).quantile(torch.tensor([0.025, 0.975]), dim=1)
            table = self.states[["tower", "layer", "point", "label"]].assign(span=span)
            table["value"] = own.nanmean(1).numpy()
            table["low"], table["high"] = low.numpy(), high.numpy()
            if self.corrupt_evidence() is not None:
                table["corrupt"] = self.at_span(span, corrupt=True).nanmean(1).numpy()
            table["null_low"], table["null_high"] = ends.numpy()
            tables.append(pd.concat([table, drops], axis=1))
        if not tables:
            return self.states.assign(span="", value=np.nan)
        return pd.concat(tables, ignore_index=True)

    def drops(self) -> pd.DataFrame:
        """One row per state: the mean loss of the metric with the positions of largest evidence
        ablated (`drop`), and the range of random draws (`drop_null_low`, `drop_null_high`), over
        the examples that have such positions; no columns where nothing was ablated."""
        if not self._ablated():
            return pd.DataFrame(index=self.states.index)
        held, random = self._losses()
        return pd.DataFrame(
            {
                "drop": held.numpy(),
                "drop_null_low": random.amin(1).numpy(),
                "drop_null_high": random.amax(1).numpy(),
            }
        )

    def _ablated(self) -> bool:
        """Whether any position was ablated."""
        return self.held is not None and bool((self.held >= 0).any())

    def _losses(self) -> tuple[Float[Tensor, " state"], Float[Tensor, "state draw"]]:
        """Mean losses of the metric with positions of largest evidence ablated, and random ones;
        NaN where no example has any."""
        assert self.clean is not None
        assert self.held is not None
        assert self.held_values is not None
        assert self.random_values is not None
        known = (self.held >= 0).any(-1)
        held = (self.clean - self.held_values).where(known, torch.nan)
        random = (self.clean - self.random_values).where(known[:, None], torch.nan)
        return held.nanmean(1), random.nanmean(2)

    # Figures ---------------------------------------------------------------------------------

    def shared_figures(self) -> dict[str, Figure]:
        """`picture`, `spans` and `ablation`, as far as there is something to show."""
        figures = {}
        if self.picture is not None and len(self._cells(0)):
            figures["picture"] = self.picture_figure()
        if self._spanned():
            figures["spans"] = self.span_figure()
        if self._ablated():
            figures["ablation"] = self.ablation_figure()
        return figures

    def ablation_summary(self, where: str) -> str:
        """What ablating did, in words.

        Args:
            where: `"With the positions ablated (...) where the answer is read best"`.
        """
        if self.clean is None:
            return "Nothing was ablated, so this is observation alone: give pairs for that."
        if not self._ablated():
            return (
                "Nothing was ablated, so this is observation alone: none of the positions that "
                "were read could hold the answer before it is given."
            )
        drops = self.drops()
        worst = drops["drop"].idxmax()
        low, high = drops["drop_null_low"][worst], drops["drop_null_high"][worst]
        return (
            f"{where}, {self.metric} falls most at {self.states['label'][worst]}: by "
            f"{drops['drop'][worst]:.2f}; with as many random ones, by {low:.2f} to {high:.2f}."
        )

    def span_figure(self) -> Figure:
        """Layers by spans, each beside the corrupt prompt and random positions, and beside what
        ablation takes; a tower each."""
        maps, columns = {}, {}
        for span in self.spans:
            columns[span] = self.at_span(span).nanmean(1)
            if self.corrupt_evidence() is not None:
                columns[f"{span}, corrupt"] = self.at_span(span, corrupt=True).nanmean(1)
            columns[f"{span}, random"] = self.null(span).nanmean(1)
        for tower, rows in self._towers():
            own = {name: v[rows] for name, v in columns.items() if not v[rows].isnan().all()}
            if own:
                values = torch.stack(list(own.values()), 1).flip(0)
                maps[tower] = (values, self._labels(rows)[::-1], list(own))
        title = f"{self.measure}: spans, corrupt prompts, random positions"
        known = int((~self.evidence().isnan()).any(0).any(1).sum())
        return plots.tower_maps(maps, title, x_title="span", value_title="mean", n=known)

    def ablation_figure(self) -> Figure:
        """What the metric loses with the positions ablated where the evidence is largest, and with
        as many random ones; a tower each."""
        (held, random), maps = self._losses(), {}
        for tower, rows in self._towers():
            values = torch.stack([held[rows], random[rows].mean(1)], 1).flip(0)
            maps[tower] = (values, self._labels(rows)[::-1], ["largest evidence", "random"])
        title = f"loss of {self.metric} with positions ablated ({self.ablation})"
        return plots.tower_maps(
            maps, title, x_title="positions", value_title="loss", n=len(self.where)
        )

    def picture_figure(self) -> Figure:
        """Evidence at the patches of the first example's first picture, layer by layer with a
        slider; the corrupt picture beside it.

        Raises:
            ValueError: no picture, or none of its patches was read.
        """
        cells = self._cells(0)
        if self.picture is None or not len(cells):
            raise ValueError("there is no picture, or none of its patches was read")
        panels = [("clean", self.picture, *self._grids(self.evidence(), cells))]
        other = self.corrupt_evidence()
        if other is not None and self.corrupt_picture is not None:
            grids, _ = self._grids(other, cells)
            notes = np.full(grids.shape, "", object)
            panels.append(("corrupt", self.corrupt_picture, grids, notes))
        title = f"{self.measure}, patch by patch, example 0"
        return layer_slider(panels, title, self.states["label"].tolist(), value_title=self.measure)

    def _cells(self, example: int) -> Int[Tensor, " place"]:
        """Places of the first view of the first picture that have a row and column."""
        where = self.where[example]
        first = (where[:, MEDIUM] == 0) & (where[:, VIEW] == 0)
        return (first & (where[:, ROW] >= 0)).nonzero().flatten()

    def _grids(self, values: Tensor, cells: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Values and notes of the first example as grids [state, row, column]."""
        row, column = self.where[0, cells][:, [ROW, COLUMN]].T.numpy()
        shape = (len(self.states), row.max() + 1, column.max() + 1)
        grids, notes = np.full(shape, np.nan), np.full(shape, "", object)
        grids[:, row, column] = values[:, 0, cells].numpy()
        notes[:, row, column] = self.notes(0)[:, cells.numpy()]
        return grids, notes

    def _towers(self) -> list[tuple[str, list[int]]]:
        groups = self.states.groupby("tower", sort=False).indices
        return [(str(tower), rows.tolist()) for tower, rows in groups.items()]

    def _labels(self, rows: list[int]) -> list[str]:
        labels, towers = self.states["label"], self.states["tower"]
        return [labels[row].removeprefix(f"{towers[row]} ") for row in rows]

    def _spanned(self) -> bool:
        """Whether any span has evidence anywhere."""
        return bool((self.inside.any(0) & ~self.evidence().isnan()).any())

    def words_table(self, example: int) -> pd.DataFrame:
        """The places of an example: position, token, row, column, spans."""
        where = self.where[example]
        own = (where[:, POSITION] >= 0).nonzero().flatten().tolist()
        names = [
            ", ".join(
                s for s, mask in zip(self.spans, self.inside, strict=True) if mask[example, p]
            )
            for p in own
        ]
        table = pd.DataFrame(where[own][:, [POSITION, ROW, COLUMN]].numpy())
        table.columns = ["position", "row", "column"]
        texts = [self.tokens[example][p] for p in own]
        return table.assign(token=texts, spans=names, place=own)


def _mean(values: Tensor, mask: Tensor) -> Float[Tensor, "state example"]:
    """Mean over the places of a mask [example, place] where there are values."""
    known = mask & ~values.isnan()
    return values.where(known, 0).sum(-1) / known.sum(-1)

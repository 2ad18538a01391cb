"""Do two forms of one task use interchangeable parts of their circuits?

The same questions are asked with a picture and with its description in words. Each form has a
circuit of its own, and both are divided by the spans of the graph: where the data is, where the
question is, the last position. In each form, a part of its circuit is replaced by that part of the
other form's circuit, and the faithfulness f (`mechmm.methods.circuits`) of the whole is compared
with f of the form's own circuit, of the circuit without the part, and with random edges in its
place. Nikankin et al. 2506.09047.

Only edges that both forms have are exchanged: those of the vision tower, which prompts in words do
not run, stay as they are. What enters the language model from the projector in one form are tokens
in the other, so that an edge out of `projector` in one stands for the same edge out of `input`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff, name_of
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablate import Keep, Trials, wired_as
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import share_interval

FORMS = ("image", "text")
EVERY = "all"
"""All spans at once."""
KINDS = {
    "own": "own circuit",
    "other": "the other form's part",
    "without": "no part",
    "random": "random edges",
}
"""What stands in the place of a part."""
ENTRIES = ("projector", "input")
"""What enters the language model's stream."""


@dataclass(frozen=True, eq=False)
class Interchange(Result):
    """The metric of every example with parts of circuits exchanged.

    Attributes:
        runs: a table with one row per run: form, span, kind (see `KINDS`) and edges.
        values: [run, example]; examples of both forms are the same scenes.
        full, empty: with all edges and with none [form, example].
        overlap: of both circuits' edges, by span (`Circuit.overlap`), `projector` and `input` taken
            as one.
        metric, target: names.
    """

    runs: pd.DataFrame
    values: Float[Tensor, "run example"] = field(metadata={"axis": 1})
    full: Float[Tensor, "form example"] = field(metadata={"axis": 1})
    empty: Float[Tensor, "form example"] = field(metadata={"axis": 1})
    overlap: pd.DataFrame
    metric: str
    target: str

    def faithfulness(self) -> Float[Tensor, " run"]:
        """f of every run, in its own form."""
        return self._changes().mean(1) / self._scales()

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap interval over examples of every f: (low, high)."""
        return share_interval(self._changes(), self._scales())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run: form, span, kind, edges, f and its interval."""
        table = self.runs.assign(faithfulness=self.faithfulness().numpy())
        table["low"], table["high"] = self.interval()
        return table

    def table(self) -> pd.DataFrame:
        """One row per form and span, f of every kind in columns; of random edges the mean."""
        wide = self.to_dataframe().pivot_table(
            index=["form", "span"], columns="kind", values="faithfulness", sort=False
        )
        wide["own"] = wide.groupby(level="form")["own"].transform("max")
        kinds = [kind for kind in KINDS if kind in wide.columns]
        return wide.drop(index="", level="span")[kinds]

    def _form(self) -> Int[Tensor, " run"]:
        return torch.tensor([FORMS.index(form) for form in self.runs["form"]])

    def _changes(self) -> Float[Tensor, "run example"]:
        return self.values - self.empty[self._form()]

    def _scales(self) -> Float[Tensor, " run"]:
        return (self.full - self.empty).mean(1)[self._form()]

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name, one per form: f with every part exchanged, left out or random."""
        return {form: self._bars(form) for form in FORMS}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures, the table, and what both circuits share."""
        contents = [*self.plot().values(), self.table().reset_index()]
        sections = [Section("Exchanged parts", contents), Section("Shared edges", [self.overlap])]
        return Page(title, self.summary(), sections, facts or {})

    def summary(self) -> str:
        """What was exchanged, in words."""
        row = self.overlap.iloc[0]
        return (
            f"{self.values.shape[1]} scenes in both forms, {self.metric}, {self.target}. The "
            f"circuits share {row['iou']:.0%} of their edges (random ones "
            f"{row['random_mean']:.0%}). A part is interchangeable where the other form's part "
            "keeps the faithfulness that no part and random edges lose."
        )

    def _bars(self, form: str) -> Figure:
        kinds = self.runs["kind"].to_numpy()
        own = (self.runs["form"] == form).to_numpy()
        names, rows = [], []
        for span in dict.fromkeys(self.runs["span"][own]):
            here = own & (self.runs["span"] == span).to_numpy()
            for kind in dict.fromkeys(kinds[here]):
                names.append(f"{span}: {KINDS[kind]}" if span else KINDS[kind])
                rows.append(self._changes()[here & (kinds == kind)].mean(0))
        scale = float(self._scales()[own.argmax()])
        stacked = torch.stack(rows)
        return plots.bars(
            names,
            stacked.mean(1) / scale,
            *share_interval(stacked, scale),
            f"asked in {'pictures' if form == 'image' else 'words'}: {self.metric}, {self.target}",
            value_title="faithfulness",
        )


def interchange(
    model: HookedMultimodal,
    image_pairs: PairDataset,
    text_pairs: PairDataset,
    image_circuit: Circuit,
    text_circuit: Circuit,
    *,
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_random: int = 10,
    batch_size: int = 16,
    seed: int = 0,
) -> Interchange:
    """Exchange parts of the circuits of two forms of one task, span by span.

    Args:
        image_pairs, text_pairs: the same scenes in the same order, with spans of the same names
            (`mechmm.data.shapes.pairs(..., form=..., spans="data")`).
        image_circuit, text_circuit: found on each form, with the same `spans` of the graph.
        target: what takes the place of what is cut off: the corrupt run, `mean` or `zero`.
        n_random: random parts of the same size, by span.
        batch_size: pairs that run together. seed: of the random parts.

    Raises:
        ValueError: circuits of another model, of different graphs, without spans, or that lead
            from no input to the logits; another number of scenes in one form than in the other; an
            unknown target; `n_random` below 0.
        SpanError: a span of the graph that the pairs do not have.
    """
    if n_random < 0:
        raise ValueError(f"n_random is {n_random}; give 0 or more")
    if len(image_pairs) != len(text_pairs):
        raise ValueError(
            f"{len(image_pairs)} pairs in pictures but {len(text_pairs)} in words; give the same "
            "scenes in both forms"
        )
    circuits = (image_circuit, text_circuit)
    wiring = wired_as(model, circuits, connected=True)
    graph = wiring.graph
    if graph.spans == ("",):
        raise ValueError(
            "the circuits tell no positions apart, so that they have no parts to exchange; find "
            "them with spans=, for example ('data', 'last', 'question')"
        )
    rest = (wiring, metric, target, batch_size)
    trials = [Trials(model, pairs, *rest) for pairs in (image_pairs, text_pairs)]
    shared = trials[0].ran & trials[1].ran
    columns, rows = [], []
    for number, form in enumerate(FORMS):
        own, other = circuits[number], circuits[1 - number]
        made = list(_exchanged(graph, own, other, shared, n_random, seed))
        rows += [(form, *names, int(keep.sum())) for names, keep in made]
        ones = np.ones_like(shared)
        keeps = [~ones, *(keep for _, keep in made)]
        full = trials[number].near(ones, [ones])
        columns.append(torch.cat([full, trials[number].near(own.keep, keeps)]))
    full, empty = (torch.stack([column[i] for column in columns]) for i in (0, 1))
    values = torch.cat([column[2:] for column in columns])
    runs = pd.DataFrame(rows, columns=["form", "span", "kind", "edges"])
    overlap = _overlap(graph, circuits, shared, seed)
    return Interchange(runs, values, full, empty, overlap, name_of(metric), target)


def _exchanged(
    graph: Graph, own: Circuit, other: Circuit, shared: Keep, n_random: int, seed: int
) -> Iterator[tuple[tuple[str, str], Keep]]:
    """((span, kind), edges) of every run of one form."""
    rng = np.random.default_rng(seed)
    yield ("", "own"), own.keep
    for span in (*graph.spans, EVERY):
        there = shared & ((graph.span == graph.spans.index(span)) if span != EVERY else True)
        part = other.keep & there
        if not (part | (own.keep & there)).any():
            continue
        left = own.keep & ~there
        yield (span, "other"), left | _either(graph, part)
        yield (span, "without"), left
        for _ in range(n_random):
            chosen = rng.choice(np.flatnonzero(there), int(part.sum()), replace=False)
            random = np.zeros_like(part)
            random[chosen] = True
            yield (span, "random"), left | _either(graph, random)


def _either(graph: Graph, keep: Keep) -> Keep:
    """The same edges, those out of `projector` and `input` for each other, too."""
    return keep | keep[_twins(graph)]


def _twins(graph: Graph) -> Int[np.ndarray, " edge"]:
    """The number of every edge, of those out of `projector` and `input` that of the other one."""
    twins = np.arange(len(graph))
    for block, start in zip(graph.blocks, graph.starts, strict=False):
        kinds = graph.writers["kind"].iloc[slice(*block.writers)].tolist()
        if all(kind in kinds for kind in ENTRIES):
            part = twins[start : start + block.size].reshape(block.shape)
            one, two = (kinds.index(kind) for kind in ENTRIES)
            part[:, [one, two]] = part[:, [two, one]]
    return twins


def _overlap(graph: Graph, circuits: Sequence[Circuit], shared: Keep, seed: int) -> pd.DataFrame:
    """What both circuits share of the edges that both forms have."""
    one, two = (Circuit(graph, _either(graph, c.keep & shared), c.scores) for c in circuits)
    return one.overlap(two, seed=seed)

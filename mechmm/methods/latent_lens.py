"""Latent lens: which words in which contexts have states like that of an image position?

A bank holds the states h_j of the language model at every word of some texts, at every layer. The
state x of a position (of the picture, say) is described by its nearest neighbours there,

    sim(x, h_j) = x . h_j / (|x| |h_j|),

among the states of all layers or of its own. Unlike the logit lens this asks for no word that comes
next, and it needs no state of the last layer.

High similarity alone says little: states of a model point in much the same direction. So the
result has the nulls: random vectors with the mean and spread of each coordinate, and states of
other layers looked up in the place of the layer's own. For pairs the evidence is the largest
similarity with a state of the answer's word, less that with the foil's, beside the corrupt prompt
and random positions; and the positions with the states most like the answer's word are ablated,
beside as many random ones.

LatentLens: 2602.00462.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff
from mechmm.data.pairs import PairDataset
from mechmm.engine.ablated import with_ablation
from mechmm.engine.lensed import (
    Chosen,
    chosen,
    first_picture,
    joined,
    prompts_of,
    sample_of,
    span_names,
    widened_tokens,
)
from mechmm.engine.readout import nearest
from mechmm.engine.source import Source
from mechmm.engine.streams import read_states, states
from mechmm.engine.sweep import Report
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import TEXT
from mechmm.results import plots
from mechmm.results.observed import POSITION, Observed
from mechmm.results.report import Page, Section
from mechmm.results.result import Result

AXES = {
    **dict.fromkeys(("neighbours", "similarity", "own", "corrupt", "inside"), 1),
    "where": 0,
}
"""The axis of the examples, by array; that of the places is the next."""
N_DRAWS = 64
"""Random vectors, and states of other layers, for every state."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentBank(Result):
    """States of words in their contexts.

    Attributes:
        states: tower, layer, point, hook and label of every state.
        vectors: of length one [state, word, d_model].
        ids: token of every word [word].
        words: as text.
        context: number of the text that a word is from, and its position there [word, two].
        texts: the texts.
        architecture: of the model.
    """

    states: pd.DataFrame
    vectors: Float[Tensor, "state word d_model"]
    ids: Int[Tensor, " word"]
    words: tuple[str, ...]
    context: Int[Tensor, "word two"]
    texts: tuple[str, ...]
    architecture: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per word: its text, its token and where it stands."""
        columns = {"word": self.words, "token": self.ids.tolist()}
        context, position = self.context.T.tolist()
        return pd.DataFrame({**columns, "context": context, "position": position})

    def check(self, model: HookedMultimodal) -> None:
        """Refuse a model with other states.

        Raises:
            ValueError: with both.
        """
        d, count = self.vectors.shape[2], len(self.states)
        if (model.family.architecture, model.cfg.d_model, model.cfg.n_layers + 1) != (
            *(self.architecture, d, count),
        ):
            raise ValueError(
                f"the bank is of another model ({self.architecture}, {count - 1} layers, d_model "
                f"{d}) than {model.family.architecture}, {model.cfg.n_layers} layers, d_model "
                f"{model.cfg.d_model}; make one with mm.latent_bank(model, texts)"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentLens(Observed):
    """The words whose states are nearest to those of some positions.

    Attributes:
        neighbours: numbers of words of the bank, nearest first, -1: none [state, example, place,
            k].
        similarity: their cosine [state, example, place, k].
        same_layer: whether states were looked up among those of their own layer alone; otherwise a
            neighbour's number is state * words + word.
        own: largest cosine with a state of the answer's and of the foil's word [state, example,
            place, two]; NaN without pairs, and where the bank has not got the word.
        corrupt: the same on the corrupt prompts, or None.
        random: largest cosine of random vectors with the bank's states of that layer [state,
            vector].
        shuffled: of states of other layers [state, other].
        words, texts, context: as the bank's.
    """

    neighbours: Int[Tensor, "state example place k"] = field(metadata={"axis": 1})
    similarity: Float[Tensor, "state example place k"] = field(metadata={"axis": 1})
    own: Float[Tensor, "state example place two"] = field(metadata={"axis": 1})
    corrupt: Float[Tensor, "state example place two"] | None = field(
        default=None, metadata={"axis": 1}
    )
    random: Float[Tensor, "state vector"] = field(metadata={"axis": 1})
    shuffled: Float[Tensor, "state other"] = field(metadata={"axis": 1})
    words: tuple[str, ...]
    texts: tuple[str, ...]
    context: Int[Tensor, "word two"]
    same_layer: bool

    def evidence(self) -> Float[Tensor, "state example place"]:
        """Largest cosine with the answer's word less that with the foil's; without pairs the
        largest cosine of all."""
        if self.corrupt is None:
            return self.similarity[..., 0]
        return self.own[..., 0] - self.own[..., 1]

    def corrupt_evidence(self) -> Float[Tensor, "state example place"] | None:
        """The same on the corrupt prompts."""
        return None if self.corrupt is None else self.corrupt[..., 0] - self.corrupt[..., 1]

    @property
    def measure(self) -> str:
        """What the evidence is called in figures."""
        return "latent lens: " + ("cosine" if self.corrupt is None else "answer − foil, cosine")

    def notes(self, example: int) -> np.ndarray:
        """The nearest words [state, place]."""
        ids, near = self.neighbours[:, example].tolist(), self.similarity[:, example].tolist()

        def note(numbers: Sequence[int], cosines: Sequence[float]) -> str:
            pairs = zip(numbers, cosines, strict=True)
            return ", ".join(f"{self._word(n)} {c:.2f}" for n, c in pairs if n >= 0)

        found = [list(map(note, *rows)) for rows in zip(ids, near, strict=True)]
        shape = (self.neighbours.shape[0], self.neighbours.shape[2])
        return np.array(found, dtype=object).reshape(shape)

    def _word(self, neighbour: int) -> str:
        return self.words[neighbour % len(self.words)].strip()

    def to_dataframe(self) -> pd.DataFrame:
        """`span_table`, without states that have nothing in a span."""
        table = self.span_table()
        return table[table["value"].notna()].reset_index(drop=True)

    def top(self, example: int = 0) -> pd.DataFrame:
        """One row per state and position of an example: the nearest words, their cosines, and the
        texts that they stand in."""
        places, tables = self.words_table(example), []
        for state, label in enumerate(self.states["label"]):
            read = self.neighbours[state, example, places["place"].tolist(), 0] >= 0
            table = places.assign(state=label)[read.numpy()]
            own = table["place"].tolist()
            for k in range(self.neighbours.shape[-1]):
                column = self.neighbours[state, example, own, k].tolist()
                table[f"word_{k}"] = [self._word(number) for number in column]
                table[f"cosine_{k}"] = self.similarity[state, example, own, k].numpy()
                if not self.same_layer:
                    at = [number // len(self.words) for number in column]
                    table[f"layer_{k}"] = self.states["layer"].to_numpy()[at]
            first = self.neighbours[state, example, own, 0] % len(self.words)
            table["text"] = [self.texts[context] for context in self.context[first, 0].tolist()]
            tables.append(table.drop(columns="place"))
        return pd.concat(tables, ignore_index=True)

    def null_table(self) -> pd.DataFrame:
        """One row per state: mean largest cosine at positions of the picture (of text, without
        one), of random vectors and of states of other layers."""
        media = self.where[..., 1] > TEXT
        there = media if media.any() else self.where[..., POSITION] >= 0
        near = torch.where(there, self.similarity[..., 0], torch.nan)
        return self.states[["label"]].assign(
            cosine=near.flatten(1).nanmean(1).numpy(),
            random=self.random.mean(1).numpy(),
            shuffled=self.shuffled.mean(1).numpy(),
        )

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `cosines` (beside random vectors and other layers), `picture` (the first
        example's patches, with a slider), `spans` and `ablation`, as far as there is something to
        show."""
        return {"cosines": self._cosines(), **self.shared_figures()}

    def _cosines(self) -> Figure:
        table = self.null_table()[::-1]
        names = {"cosine": "positions", "random": "random vectors", "shuffled": "other layers"}
        return plots.heat_map(
            table[list(names)].to_numpy(float),
            table["label"].tolist(),
            list(names.values()),
            "latent lens: mean largest cosine",
            x_title="what is looked up",
            y_title="state",
            value_title="cosine",
        )

    def page(self, title: str, facts: dict[str, Any] | None = None) -> Page:
        """A report: every figure, and the tables."""
        contents = [*self.plot().values(), self.null_table(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Neighbours", contents)], facts or {})

    def summary(self) -> str:
        """What was looked up, and what it is held against, in words."""
        table = self.null_table()
        best = table["cosine"].idxmax()
        text = (
            f"Nearest of {len(self.words)} words in {len(self.texts)} texts to "
            f"{len(self.states)} states of {len(self.where)} prompts. The mean largest cosine is "
            f"highest at {table['label'][best]}: {table['cosine'][best]:.2f}; of random vectors "
            f"{table['random'][best]:.2f}, of states of other layers {table['shuffled'][best]:.2f}."
        )
        where = f"With the positions ablated ({self.ablation}) that are most like the answer's word"
        return f"{text}{self._missing()} {self.ablation_summary(where)}"

    def _missing(self) -> str:
        """How many pairs have no evidence, in words."""
        missing = int(self.evidence().isnan().all(0).all(1).sum())
        if self.corrupt is None or not missing:
            return ""
        return (
            f" {missing} of {len(self.where)} pairs have no evidence: the bank lacks their answer "
            "or their foil."
        )


def latent_bank(
    model: HookedMultimodal,
    texts: Sequence[str] | Batch,
    *,
    skip: int = 1,
    batch_size: int = 32,
) -> LatentBank:
    """The states of every word of some texts, in the language model.

    Args:
        texts: without pictures; or a ready batch, of which the words of the text are taken.
        skip: words at the beginning of a text that are left out: the first has no context.

    Raises:
        ValueError: no texts, or none longer than what is skipped; a model without unembedding or
            with a decoder of its own.
    """
    if not isinstance(texts, Batch) and (isinstance(texts, str) or not len(texts)):
        raise ValueError("a bank is made of a list of texts; give one text at least: ['a red car']")
    _refuse_encoders(model)
    batches = [texts] if isinstance(texts, Batch) else _encoded(model, texts, batch_size)
    table = states(model, batches[0].layout, [LANGUAGE])
    vectors: list[list[Tensor]] = [[] for _ in table.index]
    ids, words, context, first = [], [], [], 0
    for batch in batches:
        at = chosen(model, batch, None, None, range(len(batch)), 0)
        keep = (at.where[..., POSITION] >= skip) & (at.where[..., 1] == TEXT)
        places = at.places.masked_fill(~keep, -1)

        def read(number: int, there: Tensor, rows: Tensor) -> None:
            vectors[number].append(_unit(rows).cpu())

        read_states(model, batch, table, places, read)
        prompt, place = keep.nonzero(as_tuple=True)
        ids.append(batch.input_ids.cpu()[prompt, places[prompt, place]])
        words += [at.tokens[p][q] for p, q in zip(prompt.tolist(), place.tolist(), strict=True)]
        context.append(torch.stack([prompt + first, at.where[prompt, place, POSITION]], 1))
        first += len(batch)
    if not words:
        raise ValueError(f"no text is longer than the {skip} word(s) that are skipped")
    shown = [" ".join("".join(own).split()) for batch in batches for own in batch.layout.tokens]
    return LatentBank(
        states=table,
        vectors=torch.stack([torch.cat(each) for each in vectors]),
        ids=torch.cat(ids),
        words=tuple(words),
        context=torch.cat(context),
        texts=tuple(shown if isinstance(texts, Batch) else texts),
        architecture=model.family.architecture,
    )


def latent_lens(
    model: HookedMultimodal,
    prompts: PairDataset | Batch,
    bank: LatentBank,
    *,
    spans: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    same_layer: bool = False,
    ablation: Source | None = "mean",
    n_held: int = 4,
    n_random: int = 5,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> LatentLens:
    """Nearest words, in their contexts, of every state of the language model.

    Args:
        prompts: pairs, or prompts alone, which are only looked up.
        bank: from `latent_bank`.
        same_layer: look a state up among those of its own layer alone.
        spans, positions, ablation, n_held, n_random, metric, seed, batch_size, tokens, report: as
            for `mm.logit_lens`.

    Raises:
        ValueError: a bank or pairs of another model; a position outside a prompt; more neighbours
            than words; answers of several tokens; a bank without any of the pairs' answers.
        SpanError: a span that the prompts do not have.
    """
    _refuse_encoders(model)
    bank.check(model)
    if not 1 <= top_k <= len(bank.words) or min(n_held, n_random) < 1:
        raise ValueError(
            f"top_k is {top_k}, n_held {n_held}, n_random {n_random}; give top_k from 1 to the "
            f"{len(bank.words)} words of the bank, and at least 1 of the others"
        )
    if spans is not None and positions is not None:
        raise ValueError("give either spans or positions, not both")
    first, pair = sample_of(model, prompts)
    finder = _Finder(model, bank, top_k, same_layer)
    parts, tokens_at, pictures = [], [], []
    for batch, pairs, numbers in prompts_of(model, prompts, batch_size):
        at = chosen(model, batch, spans, positions, numbers, seed)
        ids = None if pairs is None else _answers(pairs, numbers)
        part = {**finder.find(batch, at, ids), "where": at.where, "inside": at.inside}
        if pairs is not None:
            part["corrupt"] = finder.find(pairs.corrupt, at, ids)["own"]
        pictures += [first_picture(one) for one in (batch, *([pairs.corrupt] if pairs else ()))]
        parts.append(part)
        tokens_at += at.tokens
    found: dict[str, Any] = joined(parts, {n: a for n, a in AXES.items() if n in parts[0]})
    if pair is not None and found["own"].isnan().all():
        raise ValueError(
            "no text of the bank has the answer or foil of any pair; make the bank with texts in "
            "which they stand"
        )
    found |= finder.nulls(seed)
    result = LatentLens(
        **found,
        states=bank.states,
        tokens=widened_tokens(tokens_at),
        spans=span_names(first.layout, spans),
        words=bank.words,
        texts=bank.texts,
        context=bank.context,
        same_layer=same_layer,
        seed=seed,
        picture=pictures[0],
        corrupt_picture=None if pair is None else pictures[1],
    )
    if pair is None or ablation is None:
        return result
    assert isinstance(prompts, PairDataset)
    options = {"n_random": n_random, "seed": seed, "batch_size": batch_size, "tokens": tokens}
    options |= {"metric": metric, "source": ablation, "report": report}
    return with_ablation(model, prompts, result, result.own[..., 0], n_held, **options)


def _refuse_encoders(model: HookedMultimodal) -> None:
    if model.family.unembed is None or model.config.is_encoder_decoder:
        raise ValueError(
            f"{model.family.architecture} has no language model in which pictures and words stand "
            "side by side; use a model that reads both in one sequence"
        )


def _encoded(model: HookedMultimodal, texts: Sequence[str], size: int) -> list[Batch]:
    parts = (texts[i : i + size] for i in range(0, len(texts), size))
    return [model.encode(list(part), []) for part in parts]


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _answers(pairs: Any, numbers: Sequence[int]) -> Int[Tensor, "prompt two"]:
    """Token ids of answer and foil."""
    answers = pairs.answers
    if not answers.single:
        raise ValueError(
            f"pairs {numbers[0]} to {numbers[-1]}: an answer or foil is several tokens, but a "
            "state is that of one; choose answers of one token"
        )
    return torch.cat([answers.answer_ids, answers.foil_ids], 1).cpu()


class _Finder:
    """Looks states up in a bank."""

    def __init__(self, model: HookedMultimodal, bank: LatentBank, k: int, same: bool) -> None:
        self.model, self.bank, self.k, self.same = model, bank, k, same
        self.vectors = bank.vectors.to(model.device)
        self.sums = torch.zeros(2, *bank.vectors.shape[::2], dtype=torch.float64)
        self.count = torch.zeros(len(bank.states), 1, dtype=torch.float64)
        self.seen: list[list[Tensor]] = [[] for _ in bank.states.index]

    def _table(self, state: int) -> Float[Tensor, "entry d_model"]:
        """What a state is looked up in."""
        return self.vectors[state] if self.same else self.vectors.flatten(0, 1)

    def find(
        self, batch: Batch, at: Chosen, answers: Int[Tensor, "prompt two"] | None
    ) -> dict[str, Tensor]:
        """Arrays by name [state, prompt, place, ...]."""
        shape = (len(self.bank.states), *at.places.shape)
        found = {
            "neighbours": torch.full((*shape, self.k), -1),
            "similarity": torch.full((*shape, self.k), torch.nan),
            "own": torch.full((*shape, 2), torch.nan),
        }

        def read(number: int, there: Bool[Tensor, "prompt place"], rows: Tensor) -> None:
            unit = _unit(rows)
            cosines, ids = nearest(unit, self._table(number), self.k)
            found["neighbours"][number][there] = ids.cpu()
            found["similarity"][number][there] = cosines.cpu()
            if answers is not None:
                found["own"][number][there] = self._own(number, unit, answers, there)
            self._note(number, unit)

        read_states(self.model, batch, self.bank.states, at.places, read)
        return found

    def _own(
        self, state: int, unit: Tensor, answers: Tensor, there: Tensor
    ) -> Float[Tensor, "row two"]:
        """Largest cosine with the words of every row's answer and foil."""
        prompt = there.nonzero()[:, 0]
        own = torch.full((len(unit), 2), torch.nan)
        table = self.vectors[state][None] if self.same else self.vectors
        for number, side in ((n, s) for n in prompt.unique().tolist() for s in (0, 1)):
            like = table[:, (self.bank.ids == answers[number, side]).to(table.device)]
            rows = prompt == number
            if like.shape[1]:
                cosines = unit[rows.to(unit.device)] @ like.flatten(0, 1).T
                own[rows, side] = cosines.amax(1).cpu()
        return own

    def _note(self, state: int, unit: Tensor) -> None:
        """Sums for the null, and some of the states themselves."""
        wide = unit.double().cpu()
        self.sums[0, state] += wide.sum(0)
        self.sums[1, state] += (wide**2).sum(0)
        self.count[state] += len(unit)
        kept = sum(map(len, self.seen[state]))
        self.seen[state].append(unit[: max(0, N_DRAWS - kept)])

    def nulls(self, seed: int) -> dict[str, Tensor]:
        """Largest cosines of random vectors, and of states of other layers [state, draw]."""
        random = torch.Generator().manual_seed(seed)
        mean = self.sums[0] / self.count
        spread = (self.sums[1] / self.count - mean**2).clamp(min=0).sqrt()
        names: dict[str, list[Tensor]] = {"random": [], "shuffled": []}
        kept = [torch.cat(own) for own in self.seen]
        count = len(kept)
        for state in range(count):
            noise = torch.randn(N_DRAWS, mean.shape[1], generator=random, dtype=torch.float64)
            drawn = _unit(mean[state] + spread[state] * noise).to(self.vectors)
            size = len(kept[state])
            step = torch.randint(1, count, (size,), generator=random)
            other = [kept[(state + int(s)) % count][i] for i, s in enumerate(step)]
            table = self.vectors[state]
            for name, rows in (("random", drawn), ("shuffled", torch.stack(other))):
                names[name].append(nearest(rows, table, 1)[0][:, 0].cpu())
        return {name: torch.stack(each) for name, each in names.items()}

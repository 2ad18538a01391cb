"""Logit lens: what would the model say if the residual stream ended here?

A state x of the stream is read as the model reads its last one,

    logits(x) = bend(W_U . norm(x) + b),    p(x) = softmax(logits(x)),

with the model's own final norm, unembedding, scale and softcap, so that the last layer gives the
model's logits. States of the vision tower are read through everything behind it: as if its later
blocks added nothing, the state goes through what the family has between tower and language model,
and then through norm and unembedding (`mechmm.engine.streams`). What enters the first block of the
language model is, at the positions of the picture, the projector's output.

That a word can be read somewhere does not say that the model uses it there. So the result has, too:

- the same lens on the corrupt prompt, where the answer is another one;
- the null of every span: as many random other positions of the same modality;
- the intervention: at every state, the positions where the lens gives the answer its largest
  log-probability are ablated, and in other runs as many random ones.

nostalgebraist 2020, "interpreting GPT: the logit lens"; on image tokens: Neo et al. 2410.07149.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, logit_diff
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.ablated import with_ablation
from mechmm.engine.checks import check_limits
from mechmm.engine.head import Head, head_for
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
from mechmm.engine.readout import read_out
from mechmm.engine.source import Source
from mechmm.engine.streams import read_layout, read_states, states
from mechmm.engine.sweep import Report
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results.observed import MODALITY, POSITION, TEXT, Observed
from mechmm.results.report import Page, Section
from mechmm.results.tokens import token_table

ANSWER, FOIL = "answer", "foil"
"""The names of a pair's own targets."""
AXES = {
    **dict.fromkeys(("ids", "logits", "normaliser", "targets", "ranks", "entropy"), 1),
    **dict.fromkeys(("corrupt_normaliser", "corrupt_targets", "corrupt_ranks", "inside"), 1),
    "where": 0,
}
"""The axis of the examples, by array; that of the places is the next."""
TOGETHER = 256
"""Rows of the stream, of one state or several, that are read together, at least."""


@runtime_checkable
class Translator(Protocol):
    """A lens that changes states before they are read, as `mm.tuned_lens` gives one."""

    def check(self, model: HookedMultimodal) -> None:
        """Refuse a model that it was not fitted for."""

    def translated(
        self, hook: str, stream: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """The states of a hook as states of the last layer."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitLens(Observed):
    """What every state says at every position, read as words.

    Attributes:
        ids, logits: the words with the largest logits, in order [state, example, place, k]; -1 and
            NaN where a state has no such place.
        normaliser: log sum exp of the logits of all words [state, example, place].
        targets, ranks: logit of every chosen word, and how many words have a larger one (-1: not
            read) [state, example, place, target].
        entropy: of the distribution over words, in nats [state, example, place], or None.
        corrupt_targets, corrupt_normaliser, corrupt_ranks: the same on the corrupt prompts.
        target_ids: token ids of the chosen words [example, target].
        target_names: `answer` and `foil` of pairs, then the words that were given.
        words: (token id, text) of every word that appears.
        lens: `"logit lens"` or `"tuned lens"`.
    """

    ids: Int[Tensor, "state example place k"] = field(metadata={"axis": 1})
    logits: Float[Tensor, "state example place k"] = field(metadata={"axis": 1})
    normaliser: Float[Tensor, "state example place"] = field(metadata={"axis": 1})
    targets: Float[Tensor, "state example place target"] = field(metadata={"axis": 1})
    ranks: Int[Tensor, "state example place target"] = field(metadata={"axis": 1})
    entropy: Float[Tensor, "state example place"] | None = field(default=None, metadata={"axis": 1})
    corrupt_targets: Float[Tensor, "state example place target"] | None = field(
        default=None, metadata={"axis": 1}
    )
    corrupt_normaliser: Float[Tensor, "state example place"] | None = field(
        default=None, metadata={"axis": 1}
    )
    corrupt_ranks: Int[Tensor, "state example place target"] | None = field(
        default=None, metadata={"axis": 1}
    )
    target_ids: Int[Tensor, "example target"] = field(metadata={"axis": 0})
    target_names: tuple[str, ...]
    words: tuple[tuple[int, str], ...] = field(metadata={"axis": 0})
    lens: str = "logit lens"

    # What was read ---------------------------------------------------------------------------

    def probs(self) -> Float[Tensor, "state example place k"]:
        """Probabilities of the words of `ids`."""
        return (self.logits - self.normaliser[..., None]).exp()

    def log_probs(self) -> Float[Tensor, "state example place target"]:
        """Log-probabilities of the chosen words, in nats."""
        return self.targets - self.normaliser[..., None]

    def evidence(self) -> Float[Tensor, "state example place"]:
        """Logit of the answer less that of the foil; without pairs the log-probability of the first
        chosen word; without any, that of the likeliest word."""
        if self._paired:
            return self.targets[..., 0] - self.targets[..., 1]
        return self.log_probs()[..., 0] if self.target_names else self.probs()[..., 0].log()

    def corrupt_evidence(self) -> Float[Tensor, "state example place"] | None:
        """The same of the corrupt prompts: negative where the foil is read, their own answer."""
        if self.corrupt_targets is None:
            return None
        return self.corrupt_targets[..., 0] - self.corrupt_targets[..., 1]

    @property
    def _paired(self) -> bool:
        return self.target_names[:2] == (ANSWER, FOIL)

    @property
    def measure(self) -> str:
        """What the evidence is called in figures."""
        if self._paired:
            return f"{self.lens}: answer − foil"
        name = self.target_names[0] if self.target_names else "the likeliest word"
        return f"{self.lens}: log p({name})"

    def text(self, token: int) -> str:
        """A token as text."""
        return self._texts.get(token, "")

    @property
    def _texts(self) -> dict[int, str]:
        return dict(self.words)

    # Tables ----------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """`span_table`, with the median rank of the first chosen word on the clean and the corrupt
        prompts, and its mean log-probability."""
        table = self.span_table()
        if not self.target_names or (table["span"] == "").all():
            return table[table["value"].notna()].reset_index(drop=True)
        rows = len(self.states)
        for number, span in enumerate(dict.fromkeys(table["span"])):
            own = slice(number * rows, (number + 1) * rows)
            inside, at = self._inside(span), table.index[own]
            table.loc[at, "rank"] = _median(self.ranks[..., 0], inside)
            if self.corrupt_ranks is not None:
                table.loc[at, "corrupt_rank"] = _median(self.corrupt_ranks[..., 0], inside)
            known = torch.where(inside, self.log_probs()[..., 0], torch.nan)
            table.loc[at, "log_prob"] = known.flatten(1).nanmean(1).numpy()
        return table[table["value"].notna()].reset_index(drop=True)

    def top(self, example: int = 0) -> pd.DataFrame:
        """One row per state and position of an example: the k likeliest words with their
        probabilities, and rank and log-probability of every chosen word."""
        places, texts = self.words_table(example), self._texts
        probs, log_probs, tables = self.probs(), self.log_probs(), []
        for state, label in enumerate(self.states["label"]):
            read = ~self.normaliser[state, example, places["place"].tolist()].isnan()
            table = places.assign(state=label)[read.numpy()]
            own = table["place"].tolist()
            for k in range(self.ids.shape[-1]):
                column = self.ids[state, example, own, k].tolist()
                table[f"word_{k}"] = [texts[token] for token in column]
                table[f"prob_{k}"] = probs[state, example, own, k].numpy()
            for number, name in enumerate(self.target_names):
                table[f"rank_{name}"] = self.ranks[state, example, own, number].numpy()
                table[f"log_prob_{name}"] = log_probs[state, example, own, number].numpy()
            tables.append(table.drop(columns="place"))
        return pd.concat(tables, ignore_index=True)

    def notes(self, example: int) -> np.ndarray:
        """The likeliest words with their probabilities [state, place]."""
        texts, ids = self._texts, self.ids[:, example].tolist()
        probs = self.probs()[:, example].tolist()

        def note(tokens: Sequence[int], shares: Sequence[float]) -> str:
            if not tokens or tokens[0] < 0:
                return ""
            words = (texts[token].strip() or texts[token] for token in tokens)
            return ", ".join(f"{w} {p:.2f}" for w, p in zip(words, shares, strict=True))

        found = [list(map(note, *rows)) for rows in zip(ids, probs, strict=True)]
        return np.array(found, dtype=object).reshape(self.ids.shape[0], self.ids.shape[2])

    # Figures ---------------------------------------------------------------------------------

    def plot(self, example: int = 0) -> dict[str, Figure]:
        """Figures by name: `tokens` (the likeliest word, layers by text positions of an example),
        `picture` (the first example's patches, with a slider over states), `spans` (beside corrupt
        prompts and random positions) and `ablation`, as far as there is something to show."""
        figures = {}
        if self._text_places(example):
            figures["tokens"] = self.token_figure(example)
        return figures | self.shared_figures()

    def token_figure(self, example: int = 0) -> Figure:
        """The likeliest word of every state of the language model, at the text of an example.

        Raises:
            ValueError: no text of it was read.
        """
        places = self._text_places(example)
        if not places:
            raise ValueError(f"no text of example {example} was read")
        rows = self.states.index[self.states["tower"] == LANGUAGE].to_numpy()[::-1]
        at = np.ix_(rows.copy(), places)
        texts = self._texts
        likeliest = self.ids[:, example, :, 0].numpy()[at]
        words = [[texts.get(token, "") for token in row] for row in likeliest.tolist()]
        return token_table(
            np.array(words, dtype=object),
            self.probs()[:, example, :, 0].numpy()[at],
            [self.states["label"][row] for row in rows],
            [self.tokens[example][place] for place in places],
            f"{self.lens}: likeliest next word, example {example}",
            notes=self.notes(example)[at],
            y_title="",
        )

    def _text_places(self, example: int) -> list[int]:
        if not (self.states["tower"] == LANGUAGE).any() or not self.ids.shape[-1]:
            return []
        where = self.where[example]
        text = (where[:, MODALITY] == TEXT) & (where[:, POSITION] >= 0)
        return text.nonzero().flatten().tolist()

    def page(self, title: str, facts: dict[str, Any] | None = None) -> Page:
        """A report: every figure, and the table of spans."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Words at states", contents)], facts or {})

    def summary(self) -> str:
        """What was read, and what it is held against, in words."""
        chosen = ", ".join(self.target_names) or "no chosen words"
        text = (
            f"{self.lens} at {len(self.states)} states of {len(self.where)} prompts; {chosen}. "
            "A word that can be read is not thereby used."
        )
        where = f"With the positions ablated ({self.ablation}) where the answer is read best"
        return f"{text} {self.ablation_summary(where)}"


def _median(ranks: Tensor, inside: Tensor) -> np.ndarray:
    """Median rank over all places of a span [state]."""
    known = torch.where(inside & (ranks >= 0), ranks.float(), torch.nan)
    return known.flatten(1).nanmedian(1).values.numpy()


def logit_lens(
    model: HookedMultimodal,
    prompts: PairDataset | Batch,
    *,
    spans: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    towers: Sequence[str] | None = None,
    middle: bool = False,
    top_k: int = 5,
    targets: Sequence[str | int] | None = None,
    entropy: bool = False,
    lens: Translator | None = None,
    ablation: Source | None = "mean",
    n_held: int = 4,
    n_random: int = 5,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
    chunk: int | None = None,
    tokens: int | None = None,
    report: Report | None = None,
) -> LogitLens:
    """Read the states of the stream as words, at every position and layer.

    Of pairs, the clean and the corrupt prompts are read, and positions are ablated; a batch is only
    read. The logits of all words never exist at once: they take up to 34 MB on a CPU.

    Args:
        prompts: pairs, or prompts alone.
        spans: where to read; as many others of the same modality are read, too, for the null.
            Default: all positions. Spans of the pairs' own are in the tables where they are read.
        positions: single ones instead, counted from a prompt's first token, negative from its end.
        towers: names of `model.towers`; default: all that reach the language model at positions of
            their own; with a `lens` the language model alone.
        middle: read between attention and MLP, too.
        top_k: how many of the likeliest words to keep; 0: none.
        targets: further words (of one token each) or token ids, whose logits and ranks are wanted.
        entropy: of the distribution over words, too.
        lens: from `mm.tuned_lens`; changes the states before they are read.
        ablation: what ablated positions are set to: `"mean"`, `"zero"`, `"resample"`, `"corrupt"`;
            None: ablate nothing. Those of the picture are ablated, where a prompt has one.
        n_held: how many positions are ablated together.
        n_random: draws of as many random ones, at every state.
        metric: of the ablation.
        chunk: rows of the stream that go through the unembedding together (default: 256 on a CPU).
        tokens, report: of the sweep that ablates, as for `mm.patch`.

    Raises:
        ValueError: a model without unembedding; an unknown tower or one that cannot be read; a
            position outside a prompt; a word that is not one token; more words than there are;
            a chunk below 1; pairs or a lens of another model.
        SpanError: a span that the prompts do not have.
    """
    check_limits(chunk=chunk)
    if spans is not None and positions is not None:
        raise ValueError("give either spans or positions, not both")
    if min(top_k, n_held - 1, n_random - 1) < 0 or top_k > max(model.cfg.d_vocab, 0) > 0:
        raise ValueError(
            f"top_k is {top_k}, n_held {n_held}, n_random {n_random}; give top_k from 0 to the "
            f"{model.cfg.d_vocab} words there are, and at least 1 of the others"
        )
    if lens is not None:
        lens.check(model)
        towers = _tuned_towers(towers)
    first, pair = sample_of(model, prompts)
    head = head_for(model, first)
    table = states(model, first.layout, towers, middle)
    words = _Words(model, targets or ())
    reader = _Reader(model, head, table, lens, top_k, entropy, chunk)
    parts, tokens_at, pictures = [], [], []
    for batch, pairs, numbers in prompts_of(model, prompts, batch_size):
        at = chosen(model, batch, spans, positions, numbers, seed)
        ids = words.of(batch, pairs, numbers)
        part = {**reader.read(batch, at, ids), "where": at.where, "inside": at.inside}
        if pairs is not None:
            part |= reader.corrupt(pairs.corrupt, at, ids)
        pictures += [first_picture(one) for one in (batch, *([pairs.corrupt] if pairs else ()))]
        parts.append({**part, "target_ids": ids})
        tokens_at += at.tokens
    axes = {name: axis for name, axis in AXES.items() if name in parts[0]}
    found: dict[str, Any] = joined(parts, axes)
    result = LogitLens(
        **found,
        states=table,
        tokens=widened_tokens(tokens_at),
        spans=span_names(read_layout(model, first), spans),
        target_ids=torch.cat([part["target_ids"] for part in parts]),
        target_names=words.names(pair is not None),
        words=_texts(model, found["ids"]),
        lens="logit lens" if lens is None else "tuned lens",
        seed=seed,
        picture=pictures[0],
        corrupt_picture=None if pair is None else pictures[1],
    )
    if pair is None or ablation is None:
        return result
    assert isinstance(prompts, PairDataset)
    options = {"metric": metric, "source": ablation, "n_random": n_random, "seed": seed}
    options |= {"batch_size": batch_size, "tokens": tokens, "report": report}
    best = result.log_probs()[..., 0]
    return with_ablation(model, prompts, result, best, n_held, **options)


def _tuned_towers(towers: Sequence[str] | None) -> Sequence[str]:
    if towers is not None and set(towers) != {LANGUAGE}:
        other = next(name for name in towers if name != LANGUAGE)
        raise ValueError(
            f"a tuned lens is fitted for the language model, not for tower {other!r}; leave towers "
            "away, or read that tower without lens"
        )
    return (LANGUAGE,)


class _Reader:
    """Reads batches into arrays."""

    def __init__(
        self,
        model: HookedMultimodal,
        head: Head,
        table: pd.DataFrame,
        lens: Translator | None,
        k: int,
        entropy: bool,
        chunk: int | None,
    ) -> None:
        self.model, self.head, self.table, self.lens = model, head, table, lens
        self.k, self.entropy, self.chunk = k, entropy, chunk

    def read(self, batch: Batch, at: Chosen, targets: Tensor, k: int | None = None) -> dict:
        """Arrays by name, for all states [state, prompt, place, ...]."""
        k = self.k if k is None else k
        shape = (len(self.table), *at.places.shape)
        nothing = torch.full(shape, torch.nan)
        found = {
            "ids": torch.full((*shape, k), -1),
            "logits": torch.full((*shape, k), torch.nan),
            "normaliser": nothing,
            "targets": torch.full((*shape, targets.shape[1]), torch.nan),
            "ranks": torch.full((*shape, targets.shape[1]), -1),
        }
        found |= {"entropy": nothing.clone()} if self.entropy and k else {}
        hooks, waiting = self.table["hook"].tolist(), []

        def read(number: int, there: Bool[Tensor, "prompt place"], rows: Tensor) -> None:
            if self.lens is not None:
                rows = self.lens.translated(hooks[number], rows)
            waiting.append((number, there, rows))
            if sum(len(rows) for _, _, rows in waiting) >= TOGETHER:
                self._write(found, waiting, targets, k)

        read_states(self.model, batch, self.table, at.places, read)
        self._write(found, waiting, targets, k)
        return found

    def _write(self, found: dict, waiting: list, targets: Tensor, k: int) -> None:
        """Read what several states gave together, for products of few rows are slow."""
        if not waiting:
            return
        stream = torch.cat([rows.to(self.head.unembed.weight) for _, _, rows in waiting])
        own = torch.cat([targets[there.nonzero()[:, 0]] for _, there, _ in waiting])
        options = {"entropy": "entropy" in found, "rows": self.chunk}
        out = read_out(self.head, stream, k, own, **options)
        sizes = [len(rows) for _, _, rows in waiting]
        for name, values in found.items():
            parts = getattr(out, name).split(sizes)
            for (number, there, _), part in zip(waiting, parts, strict=True):
                values[number][there] = part.to(values)
        waiting.clear()

    def corrupt(self, batch: Batch, at: Chosen, targets: Tensor) -> dict:
        """Logits and ranks of the chosen words on corrupt prompts."""
        found = self.read(batch, at, targets, k=0)
        return {f"corrupt_{name}": found[name] for name in ("targets", "normaliser", "ranks")}


class _Words:
    """The words whose logits and ranks are wanted."""

    def __init__(self, model: HookedMultimodal, targets: Sequence[str | int]) -> None:
        if isinstance(targets, str):
            raise ValueError(f"targets are a list of words, not one text: [{targets!r}]")
        self.model = model
        self.given = [self._id(target) for target in targets]
        self.texts = [str(t) if isinstance(t, str) else self._text(t) for t in targets]

    def names(self, paired: bool) -> tuple[str, ...]:
        """Of all targets, in order."""
        return (*((ANSWER, FOIL) if paired else ()), *self.texts)

    def of(
        self, batch: Batch, pairs: PairBatch | None, numbers: Sequence[int]
    ) -> Int[Tensor, "prompt target"]:
        """Token ids for every prompt."""
        given = torch.tensor([self.given] * len(batch), dtype=torch.long).view(len(batch), -1)
        if pairs is None:
            return given
        answers = pairs.answers
        for name, ids in ((ANSWER, answers.answer_ids), (FOIL, answers.foil_ids)):
            long = ((ids >= 0).sum(1) != 1).nonzero().flatten().tolist()
            if long:
                pair = pairs.pairs[long[0]]
                raise ValueError(
                    f"pair {numbers[long[0]]}: the {name} {getattr(pair, name)!r} is "
                    f"{int((ids[long[0]] >= 0).sum())} tokens, but a lens reads one; choose "
                    "answers of one token, or read the clean prompts alone with targets=[...]"
                )
        own = torch.stack([answers.answer_ids[:, 0], answers.foil_ids[:, 0]], 1).cpu()
        return torch.cat([own, given], 1)

    def _id(self, target: str | int) -> int:
        if isinstance(target, str):
            try:
                return self.model.to_single_token(target)
            except ValueError as error:
                raise ValueError(
                    f"target {target!r}: {error}; choose a word of one token, or give a token id"
                ) from error
        if not 0 <= target < self.model.cfg.d_vocab:
            raise ValueError(f"token {target} is not one of 0..{self.model.cfg.d_vocab - 1}")
        return int(target)

    def _text(self, token: int) -> str:
        return self.model.token_texts(torch.tensor([[token]]))[0][0]


def _texts(model: HookedMultimodal, ids: Tensor) -> tuple[tuple[int, str], ...]:
    """(token id, text) of all words that appear."""
    there = ids.unique()
    there = there[there >= 0]
    if not len(there):
        return ()
    return tuple(zip(there.tolist(), model.token_texts(there[None])[0], strict=True))

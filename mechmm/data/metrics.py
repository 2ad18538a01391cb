"""Metrics: logits at the answer's position in, one number per example out.

One convention: larger = more the clean answer. With `p` the model's distribution over the token
after the prompt, `a` the answer and `f` the foil,

    logit_diff = logit(a) - logit(f)        log_prob = log p(a)        prob = p(a)
    kl = -KL(p_clean || p)                  accuracy = 1 where a = argmax p, else 0

so `kl` is never positive and is 0 where the run is the clean run.

A metric is any `metric(logits, answers)` of that kind. For answers of several tokens `score` writes
the answer after the prompt (teacher forcing) and takes

    log p(a) = sum_t log p(a_t | prompt, a_<t).

`logit_diff` is then `log p(a) - log p(f)`, which for single tokens is the same number, because both
share one normaliser. `prob` is `exp(log p(a))`; `accuracy` asks every token to be the likeliest;
`kl` reads the position after the prompt only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import PADDING, TEXT, TokenLayout


@dataclass(frozen=True)
class Answers:
    """What the metrics need to know about the examples of one batch.

    Attributes:
        answer_ids: [batch, answer], token ids of each answer, -1 after its end.
        foil_ids: [batch, foil], likewise.
        reference: [batch, vocab], the clean run's log-probabilities, which `kl` compares with.
    """

    answer_ids: Int[Tensor, "batch answer"]
    foil_ids: Int[Tensor, "batch foil"]
    reference: Float[Tensor, "batch vocab"] | None = None

    @classmethod
    def of(cls, model: HookedMultimodal, answers: Sequence[str], foils: Sequence[str]) -> Answers:
        """Answers and foils as the model's tokenizer writes them, on the model's device.

        Raises:
            ValueError: another number of foils than answers; a text that cannot be tokenized.
        """
        if len(answers) != len(foils):
            raise ValueError(f"{len(answers)} answers but {len(foils)} foils; give one foil each")
        return cls(_padded(model, answers), _padded(model, foils))

    def __len__(self) -> int:
        return self.answer_ids.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " rows"]) -> Answers:
        """The answers of some examples, or of examples repeated."""
        reference = None if self.reference is None else self.reference[rows]
        return Answers(self.answer_ids[rows], self.foil_ids[rows], reference)

    def repeat(self, times: int) -> Answers:
        """All examples `times` times, every example before the first repeats."""
        return self[torch.arange(len(self), device=self.answer_ids.device).repeat(times)]

    @property
    def single(self) -> bool:
        """Whether every answer and every foil is one token."""
        return self.answer_ids.shape[1] == self.foil_ids.shape[1] == 1

    @property
    def swapped(self) -> Answers:
        """The foils as answers and the answers as foils."""
        return replace(self, answer_ids=self.foil_ids, foil_ids=self.answer_ids)

    def with_reference(self, clean_logits: Float[Tensor, "batch vocab"]) -> Answers:
        """The same answers with the clean run's logits for `kl` to compare with."""
        return replace(self, reference=_log_softmax(clean_logits).detach())


Metric = Callable[[Tensor, Answers], Tensor]
"""(logits [batch, vocab], answers) -> [batch]; larger = more the clean answer."""


def logit_diff(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the foil.

    Raises:
        ValueError: where an answer or a foil has several tokens; use `score`.
    """
    return _at(logits, answers.answer_ids) - _at(logits, answers.foil_ids)


def log_prob(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Log-probability (natural logarithm) of the answer; errors as `logit_diff`."""
    return _at(_log_softmax(logits), answers.answer_ids)


def prob(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Probability of the answer; errors as `logit_diff`."""
    return log_prob(logits, answers).exp()


def kl(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """Minus the Kullback-Leibler divergence, in nats, from the clean run: `-KL(clean || run)`.

    The sign makes larger mean more like the clean run; the largest value is 0.

    Raises:
        ValueError: where `answers` has no reference.
    """
    if answers.reference is None:
        raise ValueError(
            "kl compares with the clean run; give it answers.with_reference(clean_logits)"
        )
    clean = answers.reference
    return -(clean.exp() * (clean - _log_softmax(logits))).sum(-1)


def accuracy(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """1 where the answer is the likeliest of all tokens, else 0; errors as `logit_diff`."""
    said = logits.argmax(-1)
    return (said == _only(answers.answer_ids)).to(logits.dtype)


def flipped(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """1 where the foil is the likeliest of all tokens, else 0; errors as `logit_diff`."""
    return accuracy(logits, answers.swapped)


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "log_prob": log_prob,
    "prob": prob,
    "kl": kl,
    "accuracy": accuracy,
}
"""The metrics by name."""


READS_ANSWERS: tuple[Metric, ...] = (logit_diff,)
"""Metrics that read no other logits than those of answer and foil."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One run that a metric needs.

    Attributes:
        batch: what runs: the prompts, with an answer after them where it has several tokens.
        places: positions after which logits are read [batch, token].
        rows: the only tokens whose logits are read [batch, row], or None for all.
        reduce: (logits [batch, token, vocab or row], answers) -> [batch]; the value of a metric is
            the sum over its readings.
    """

    batch: Batch
    places: Int[Tensor, "batch token"]
    rows: Int[Tensor, "batch row"] | None
    reduce: Metric

    def logits(self, model: Callable[..., Tensor]) -> Float[Tensor, "batch token row"]:
        """What the reading reads, of a run of the whole model."""
        return chosen(logits_at(model, self.batch, self.places), self.rows)


def name_of(metric: Metric) -> str:
    """What a metric is called; that of an object without a name is its class's."""
    return getattr(metric, "__name__", type(metric).__name__)


def readings(batch: Batch, answers: Answers, metric: Metric) -> list[Reading]:
    """The runs that a metric needs for answers of any number of tokens.

    Raises:
        ValueError: another number of answers than prompts; a metric of one's own with answers of
            several tokens.
    """
    if len(batch) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(batch)} prompts; give one each")
    if answers.single or metric is kl:
        rows = None
        if metric in READS_ANSWERS:
            rows = torch.cat([answers.answer_ids, answers.foil_ids], dim=1)
        last = batch.layout.last[:, None]
        return [Reading(batch, last, rows, partial(_after_last, metric))]
    if metric not in METRICS.values():
        raise ValueError(
            f"some answers have several tokens, for which {metric!r} has no rule; use one of "
            f"{', '.join(METRICS)}, or answers of one token"
        )
    longer, places = forced(batch, answers.answer_ids)
    found = [Reading(longer, places, None, partial(_sequence, metric))]
    if metric is logit_diff:
        longer, places = forced(batch, answers.foil_ids)
        found.append(Reading(longer, places, None, _minus_foil))
    return found


def score(
    model: Callable[..., Tensor], batch: Batch, answers: Answers, metric: Metric = logit_diff
) -> Float[Tensor, " batch"]:
    """Run a model and measure it, for answers of any number of tokens.

    Hooks that are live act in every run, and gradients flow. Single-token answers take one run.
    Where an answer has several tokens, it is appended on the right (and `logit_diff` makes a second
    run with the foil): rows and positions of the prompts keep their indices, so hooks that edit
    `[rows, positions]` stay valid; a hook that replaces a whole tensor does not, as it is longer.

    Args:
        model: a HookedMultimodal, or anything called alike: `model(batch, logits_to_keep=n)`.
        metric: one of `METRICS`; one of your own where all answers are single tokens.

    Raises:
        ValueError: another number of answers than prompts; a metric of your own with answers of
            several tokens.
    """
    parts = readings(batch, answers, metric)
    first, *rest = (part.reduce(part.logits(model), answers) for part in parts)
    return sum(rest, first)


@torch.no_grad()
def prepared(
    model: Callable[..., Tensor], clean: Batch, answers: Answers, metric: Metric
) -> Answers:
    """The answers as a metric needs them: `kl` reads the clean run, which this makes for it."""
    return answers.with_reference(last_logits(model, clean)) if metric is kl else answers


def last_logits(model: Callable[..., Tensor], batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Logits after the last token of every prompt, however the batch is padded."""
    return logits_at(model, batch, batch.layout.last[:, None])[:, 0]


def logits_at(
    model: Callable[..., Tensor], batch: Batch, places: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token vocab"]:
    """Logits after some positions of every prompt."""
    first = int(places.min())
    logits = model(batch, logits_to_keep=batch.input_ids.shape[1] - first)
    rows = torch.arange(len(batch), device=logits.device)
    return logits[rows[:, None], (places - first).to(logits.device)]


def chosen(
    logits: Float[Tensor, "batch *token vocab"], rows: Int[Tensor, "batch row"] | None
) -> Float[Tensor, "batch *token row"]:
    """The logits of some tokens alone, for every prompt its own; all where none are named."""
    if rows is None:
        return logits
    return logits.gather(-1, rows[:, None].expand(-1, logits.shape[1], -1))


def forced(
    batch: Batch, ids: Int[Tensor, "batch token"]
) -> tuple[Batch, Int[Tensor, "batch token"]]:
    """A text written after the prompts (teacher forcing), and the positions to read it at.

    The logits at place `t` are the distribution over token `t` given the prompt and the tokens
    before it; those where `ids` is -1 mean nothing.
    """
    before = batch.input_ids.shape[1]
    after = torch.arange(before, before + ids.shape[1] - 1).expand(len(batch), -1)
    places = torch.cat([batch.layout.last[:, None], after], dim=1)
    return continued(batch, ids[:, :-1]), places


def forced_logits(
    model: Callable[..., Tensor], batch: Batch, ids: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token vocab"]:
    """Logits for every token of a text that is written after the prompts (as `forced`)."""
    longer, places = forced(batch, ids)
    return logits_at(model, longer, places)


def continued(batch: Batch, ids: Int[Tensor, "batch new"]) -> Batch:
    """Prompts with tokens written after them; positions of the prompts keep their indices.

    The new tokens stand to the right of everything, padding of the prompts included, and are
    masked where `ids` is -1. Their position ids go on from each prompt's last token.
    """
    if ids.shape[1] == 0:
        return batch
    last = batch.layout.last.to(ids.device)
    rows = torch.arange(len(batch), device=ids.device)
    real = ids >= 0
    steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    tokens = ids.where(real, batch.input_ids[rows, last][:, None])
    positions = batch.position_ids
    if positions is not None:
        positions = torch.cat([positions, positions[rows, last][:, None] + steps], dim=1)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, tokens], dim=1),
        attention_mask=torch.cat([batch.attention_mask, real.to(batch.attention_mask)], dim=1),
        position_ids=positions,
        extra={name: _longer(value, batch, ids.shape[1]) for name, value in batch.extra.items()},
        layout=_longer_layout(batch.layout, real.cpu()),
    )


def _longer(value: object, batch: Batch, new: int) -> object:
    """An input with one entry per position: the last token's entry stands for the new ones."""
    if not isinstance(value, Tensor) or value.shape[:2] != batch.input_ids.shape:
        return value
    rows = torch.arange(len(batch), device=value.device)
    last = value[rows, batch.layout.last.to(value.device)]
    return torch.cat([value, torch.stack([last] * new, dim=1)], dim=1)


def _longer_layout(layout: TokenLayout, real: Tensor) -> TokenLayout:
    nowhere = torch.full(real.shape, -1)
    return replace(
        layout,
        modality=torch.cat([layout.modality, torch.where(real, TEXT, PADDING)], dim=1),
        image=torch.cat([layout.image, nowhere], dim=1),
        view=torch.cat([layout.view, nowhere], dim=1),
        row=torch.cat([layout.row, nowhere], dim=1),
        column=torch.cat([layout.column, nowhere], dim=1),
        tokens=tuple((*texts, *[""] * real.shape[1]) for texts in layout.tokens),
        defined={
            name: torch.cat([mask, torch.zeros_like(real)], dim=1)
            for name, mask in layout.defined.items()
        },
    )


def _after_last(metric: Metric, logits: Tensor, answers: Answers) -> Tensor:
    """A metric of the logits at one position, which are those of answer and foil, or all."""
    if metric in READS_ANSWERS:
        first = torch.zeros_like(answers.answer_ids)
        answers = replace(answers, answer_ids=first, foil_ids=first + 1)
    return metric(logits[:, 0], answers)


def _sequence(metric: Metric, logits: Tensor, answers: Answers) -> Tensor:
    ids = answers.answer_ids
    if metric is accuracy:
        return ((logits.argmax(-1) == ids) | (ids < 0)).all(-1).to(logits.dtype)
    total = _sequence_log_prob(logits, ids)
    return total.exp() if metric is prob else total


def _minus_foil(logits: Tensor, answers: Answers) -> Tensor:
    return -_sequence_log_prob(logits, answers.foil_ids)


def _sequence_log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum of the tokens' log-probabilities, from [batch, token, vocab]."""
    each = _log_softmax(logits).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return each.masked_fill(ids < 0, 0).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    """In single precision at least: half precision has three digits."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, _only(ids)[:, None])[:, 0]


def _only(ids: Tensor) -> Tensor:
    """The token of every answer, where each is one token."""
    if ids.shape[1] != 1:
        raise ValueError(
            "an answer has several tokens, which the logits of one position cannot score; use "
            "score(model, batch, answers, metric)"
        )
    return ids[:, 0]


def _padded(model: HookedMultimodal, texts: Sequence[str]) -> Tensor:
    tokens = [model.answer_tokens(text) for text in texts]
    width = max(map(len, tokens), default=1)
    rows = [[*ids, *[-1] * (width - len(ids))] for ids in tokens]
    return torch.tensor(rows, dtype=torch.long, device=model.device)

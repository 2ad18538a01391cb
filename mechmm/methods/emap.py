"""EMAP: what is left of a model's answers when text and picture may only add up?

With f(t, v) the logits of the possible answers after text t with picture v, the additive function
nearest to f over all combinations of N texts with N pictures (least squares) is

    f+(t_i, v_i) = mean_j f(t_i, v_j) + mean_j f(t_j, v_i) - mean_jk f(t_j, v_k):

what the text says with any picture, plus what the picture says with any text. Where f+ answers as
well as f, the questions need no interaction of the two; where it falls back, they do. The text's
own part, mean_j f(t_i, v_j), and the picture's stand beside it, as do the answers with another
pair's picture, which tell what the right picture is worth.

Answers are compared among all answers and foils of the pairs, by their first token. f+ depends on
which examples are crossed. Hessel & Lee 2010.06572.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.pairs import PairDataset, PairError
from mechmm.engine.checks import check_limits, check_model, check_pairs
from mechmm.engine.crossed import check_pictures, crossed
from mechmm.engine.sweep import Report
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

FULL, ADDITIVE, TEXT, PICTURE = "model", "additive (EMAP)", "text alone", "picture alone"
OTHER = "other pictures"


@dataclass(frozen=True, eq=False)
class Emap(Result):
    """The logits of the possible answers for every text with every picture.

    Attributes:
        logits: [text, picture, answer]; text i and picture i are of pair i.
        own, foil: which of the answers is right, and which is the foil [example].
        answers: the texts.
    """

    logits: Float[Tensor, "example example answer"]
    own: Int[Tensor, " example"]
    foil: Int[Tensor, " example"]
    answers: tuple[str, ...]

    def projections(self) -> dict[str, Float[Tensor, "example answer"]]:
        """The logits of every example: of the model, of the additive function nearest to it, of its
        text's part and its picture's part, and with other pictures (the next pair's)."""
        text, picture = self.logits.mean(1), self.logits.mean(0)
        own = self.logits.diagonal().T
        other = self.logits.roll(-1, dims=1).diagonal().T
        additive = text + picture - self.logits.mean((0, 1))
        return {FULL: own, ADDITIVE: additive, TEXT: text, PICTURE: picture, OTHER: other}

    def accuracy(self) -> dict[str, Float[Tensor, " example"]]:
        """1 where the right answer has the largest logit of all answers."""
        found = self.projections().items()
        return {name: (logits.argmax(1) == self.own).float() for name, logits in found}

    def logit_diff(self) -> dict[str, Float[Tensor, " example"]]:
        """Logit of the answer minus logit of the foil."""
        found = self.projections().items()
        rows = torch.arange(len(self.own))
        return {n: logits[rows, self.own] - logits[rows, self.foil] for n, logits in found}

    def interaction(self) -> float:
        """The share of the variance of the logits over all combinations that is not additive (0:
        they are additive), each answer's variance taken around its own mean."""
        rest = self.logits - self.logits.mean(1, keepdim=True) - self.logits.mean(0)
        rest = rest + self.logits.mean((0, 1))
        total = self.logits - self.logits.mean((0, 1))
        return float((rest**2).sum() / (total**2).sum().clamp_min(1e-12))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per projection: mean accuracy among the answers and mean logit difference, each
        with its 95 % interval over examples (the crossed examples held fixed)."""
        rows = []
        accuracy, difference = self.accuracy(), self.logit_diff()
        for name in accuracy:
            row = [name]
            for values in (accuracy[name], difference[name]):
                row += [float(v) for v in (values.mean(), *bootstrap_interval(values))]
            rows.append(row)
        columns = ["run", "accuracy", "accuracy_low", "accuracy_high"]
        columns += ["logit_diff", "logit_diff_low", "logit_diff_high"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self) -> dict[str, Figure]:
        """Accuracy and logit difference of every projection."""
        table, count = self.to_dataframe(), len(self.own)
        figures = {}
        for name in ("accuracy", "logit_diff"):
            ends = (table[column].tolist() for column in (name, f"{name}_low", f"{name}_high"))
            value, low, high = ends
            title = f"{count} texts with {count} pictures: {name}"
            names = table["run"].tolist()
            figures[name] = plots.bars(names, value, low, high, title, value_title=name)
        return figures

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("EMAP", contents)], facts or {})

    def summary(self) -> str:
        """What the additive function answers, beside the model, in words."""
        table = self.to_dataframe().set_index("run")["accuracy"]
        return (
            f"{len(self.own)} texts with {len(self.own)} pictures, {len(self.answers)} answers: "
            f"accuracy is {table[FULL]:.2f}, and {table[ADDITIVE]:.2f} of the nearest additive "
            f"function ({table[TEXT]:.2f} of its text's part, {table[PICTURE]:.2f} of its "
            f"picture's), {table[OTHER]:.2f} with other pictures; {self.interaction():.2f} of the "
            "logits' variance is interaction."
        )


def emap(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Emap:
    """Cross the clean texts of all pairs with their clean pictures, and project on what adds up.

    It takes the square of the number of pairs in runs.

    Args:
        batch_size: texts that run together, each with all pictures.
        tokens: as for `patch`.
        report: called with (texts done, texts in all).

    Raises:
        ValueError: a model without logits after a prompt; no pairs; a limit below 1.
        PairError: one pair alone; an answer and its foil with the same first token.
        SpanError: a prompt without a picture; pictures that are cut into other patches.
        KeyboardInterrupt: the run was interrupted; without all combinations there is no projection.
    """
    check_model(model)
    check_pairs(pairs, "clean")
    check_limits(batch_size=batch_size, tokens=tokens)
    if len(pairs) < 2:
        raise PairError("one pair alone cannot be crossed; give two or more")
    check_pictures(pairs, batch_size)
    read, own, foil, answers = _answers(model, pairs)
    found = crossed(model, pairs, read, batch_size, tokens, report)
    if not found.complete:
        raise KeyboardInterrupt
    return Emap(found.logits, own, foil, answers)


def _answers(
    model: HookedMultimodal, pairs: PairDataset
) -> tuple[Int[Tensor, " answer"], Int[Tensor, " example"], Int[Tensor, " example"], tuple]:
    """The first tokens of all answers and foils; which of them every pair's are; and the texts."""
    texts = [[pair.answer for pair in pairs], [pair.foil for pair in pairs]]
    first = [[model.answer_tokens(text)[0] for text in side] for side in texts]
    for number, (answer, foil) in enumerate(zip(*first, strict=True)):
        if answer == foil:
            raise PairError(
                f"pair {number}: answer {pairs[number].answer!r} and foil {pairs[number].foil!r} "
                "have the same first token, by which answers are told apart here"
            )
    named = dict(zip([*first[0], *first[1]], [*texts[0], *texts[1]], strict=True))
    tokens = list(named)
    own, foil = (torch.tensor([tokens.index(t) for t in side]) for side in first)
    return torch.tensor(tokens), own, foil, tuple(named.values())

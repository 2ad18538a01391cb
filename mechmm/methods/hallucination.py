"""When expectation speaks instead of sight: what predicts the error, and what mends it?

The pairs' answer is what the picture shows, their foil what language expects
(`shapes.prior_pairs`). A clean prompt is answered rightly, with the foil (a prior-driven error), or
otherwise. For every prompt, signals that need no answer, each such that larger means more doubt:

    doubt       1 - p_1, with p_1 the probability of the likeliest token: the bar to beat
    entropy     of the next token, in nats
    margin      p_2 - p_1
    blindness   -KL(p || q), q after a distorted picture: the answer would be the same unseen
    inattention minus the weight of all heads from the last position to a span, mean over layers

and for each the area under the ROC curve (AUROC) for predicting errors, beside permuted labels, and
its difference from that of `doubt`.

Interventions are judged by the same answers: contrastive decoding (`mm.contrasted`, Leng et al.
2311.16922) and raised attention from last to the picture (Liu et al. 2407.21771), beside draws of
their controls: contrast with other pairs' distorted pictures, and attention raised to others of the
positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.contrast import check_strength, contrasted
from mechmm.data.corruption import Corruption, corrupt
from mechmm.data.metrics import Answers, accuracy, flipped, last_logits
from mechmm.data.pairs import PairBatch, PairDataset, Prompt
from mechmm.engine.attending import attending
from mechmm.engine.cells import Cells
from mechmm.engine.checks import check_limits
from mechmm.engine.raised import Raised
from mechmm.engine.routes import has_attention
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SIGNALS = ("doubt", "entropy", "margin", "blindness")
OUTCOMES = ("right", "foil", "other")
RESAMPLES = 1000
"""Of examples, for intervals, and of labels, for the null."""


@dataclass(frozen=True, eq=False)
class Hallucination(Result):
    """What was said of every picture, plainly and under every intervention, and signals of doubt.

    Attributes:
        said: 0 right, 1 the foil, 2 something else [way, example]; the first way is plain.
        ways: names; every intervention is followed by the draws of its control. controls: names of
            these.
        signals: by name, larger = more doubt [signal, example].
        names: of the signals, the bar to beat first.
    """

    said: Int[Tensor, "way example"] = field(metadata={"axis": 1})
    ways: tuple[str, ...]
    controls: tuple[str, ...]
    signals: Float[Tensor, "signal example"] = field(metadata={"axis": 1})
    names: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per way of answering: the shares of right answers, prior-driven errors (`foil`)
        and others, the 95 % interval of the foil's share, and its change from the plain one."""
        rows, plain = [], (self.said[0] == 1).float()
        for name, said in zip(self.ways, self.said, strict=True):
            foil = (said == 1).float()
            shares = {o: float((said == i).float().mean()) for i, o in enumerate(OUTCOMES)}
            low, high = map(float, bootstrap_interval(foil))
            ends = map(float, bootstrap_interval(foil - plain))
            row = {"way": name, "control": name in self.controls, **shares}
            row |= {"low": low, "high": high, "change": float((foil - plain).mean())}
            rows.append(row | dict(zip(("change_low", "change_high"), ends, strict=True)))
        return pd.DataFrame(rows)

    def ranges(self) -> pd.DataFrame:
        """One row per intervention: the change of the share of prior-driven errors, and over the
        draws of its control the mean, the lowest and the highest change, and their number."""
        foil = (self.said == 1).float()
        changes = (foil - foil[0]).mean(1).tolist()
        drawn: dict[str, list[float]] = {}
        own = ""
        for name, change in zip(self.ways[1:], changes[1:], strict=True):
            own = own if name in self.controls else name
            drawn.setdefault(own, []).append(change)
        rows = [
            (name, change, np.mean(some), min(some), max(some), len(some))
            for name, (change, *some) in drawn.items()
        ]
        columns = ("way", "change", "control_mean", "control_low", "control_high", "draws")
        return pd.DataFrame(rows, columns=list(columns))

    def predictors(self, seed: int = 0) -> pd.DataFrame:
        """One row per signal: AUROC for predicting that the plain answer is wrong, its 95 %
        interval over examples, that of permuted labels, and the difference from the first signal
        with its interval.

        Raises:
            ValueError: all plain answers are right, or all wrong.
        """
        wrong = (self.said[0] != 0).numpy()
        if not self._divided():
            raise ValueError(
                f"all {len(wrong)} plain answers are {'wrong' if wrong.all() else 'right'}: no "
                "signal tells errors from the rest; ask more pairs, or about pictures that are "
                "harder or easier to see"
            )
        rng = np.random.default_rng(seed)
        values = self.signals.double().numpy()
        draws = _resampled(wrong, rng)
        every = np.stack([_auroc(values[:, draw], wrong[draw]) for draw in draws])
        null = np.stack([_auroc(values, rng.permutation(wrong)) for _ in range(RESAMPLES)])
        area, gain = _auroc(values, wrong), every - every[:, :1]
        ends = {
            "low": np.quantile(every, 0.025, axis=0),
            "high": np.quantile(every, 0.975, axis=0),
            "null_low": np.quantile(null, 0.025, axis=0),
            "null_high": np.quantile(null, 0.975, axis=0),
            "gain": area - area[0],
            "gain_low": np.quantile(gain, 0.025, axis=0),
            "gain_high": np.quantile(gain, 0.975, axis=0),
        }
        return pd.DataFrame({"signal": self.names, "auroc": area, **ends})

    def _divided(self) -> bool:
        """Whether some plain answers are right and some wrong."""
        return 0 < int((self.said[0] != 0).sum()) < self.said.shape[1]

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `errors`, the share of prior-driven errors by way of answering, of a
        control with several draws their mean and range, and `signals`, how well each predicts
        errors, over the range of permuted labels; not where all plain answers are right, or all
        wrong."""
        table = self.to_dataframe()
        bars = [self._bar(own) for _, own in table.groupby(table["way"].map(_drawn), sort=False)]
        names, share, low, high = zip(*bars, strict=True)
        title = f"answers that language expects, {self.said.shape[1]} prompts"
        value_title = "share of prior-driven errors"
        errors = plots.bars(names, share, low, high, title, value_title=value_title)
        return {"errors": errors, **({"signals": self._signals()} if self._divided() else {})}

    def _bar(self, own: pd.DataFrame) -> tuple[str, float, float, float]:
        """Name, share and ends of a way of answering: an interval over examples, or the range of
        several draws."""
        first, foil = own.iloc[0], own["foil"]
        name = first["way"] + " (control)" * bool(first["control"])
        if len(own) == 1:
            return name, first["foil"], first["low"], first["high"]
        name = f"{first['way']} (range of {len(own)})"  # longer ones are cut
        return name, foil.mean(), foil.min(), foil.max()

    def _signals(self) -> Figure:
        signals = self.predictors()
        null = float(signals["null_low"].min()), float(signals["null_high"].max())
        area, low, high = (signals[name].to_numpy(float) for name in ("auroc", "low", "high"))
        return plots.bars(
            list(self.names),
            area,
            low,
            high,
            "what predicts an error",
            null=null,
            value_title="AUROC",
            null_title="permuted labels",
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and tables that there are."""
        contents = [*self.plot().values(), self.ranges(), self.to_dataframe()]
        contents += [self.predictors()] if self._divided() else []
        return Page(title, self.summary(), [Section("Hallucination", contents)], facts or {})

    def summary(self) -> str:
        """How often the model errs, what tells, and what helps, in words."""
        table = self.to_dataframe()
        plain = table.iloc[0]
        own = table[~table["control"]].iloc[1:]
        mend = own.loc[own["foil"].idxmin()]
        return (
            f"{self.said.shape[1]} prompts: {plain['right']:.2f} right, {plain['foil']:.2f} what "
            f"language expects. {self._best()}"
            f"{mend['way']} changes the share of prior-driven errors by {mend['change']:+.2f}"
            f"{self._control(mend['way'])}."
        )

    def _control(self, way: str) -> str:
        """What the draws of an intervention's control do, in words."""
        row = self.ranges().set_index("way").loc[way]
        low, high = row["control_low"], row["control_high"]
        return f", its control by {low:+.2f}" + (f" to {high:+.2f}" if row["draws"] > 1 else "")

    def _best(self) -> str:
        """The best predictor beside the bar to beat, in words."""
        if not self._divided():
            return "So no signal can tell errors from the rest. "
        signals = self.predictors()
        best = signals.loc[signals["auroc"].idxmax()]
        return (
            f"Best predictor of errors: {best['signal']}, AUROC {best['auroc']:.2f}; "
            f"{self.names[0]} has {signals['auroc'].iloc[0]:.2f}. "
        )


def hallucination(
    model: HookedMultimodal,
    pairs: PairDataset,
    distortion: Corruption,
    *,
    spans: Sequence[str] = ("image",),
    alpha: float = 1.0,
    beta: float = 0.1,
    scale: float = 2.0,
    layers: Sequence[int] | None = None,
    n_random: int = 5,
    seed: int = 0,
    batch_size: int = 16,
) -> Hallucination:
    """Ask about pictures that contradict expectation, plainly and under every intervention.

    Args:
        pairs: their clean prompts are asked; answers and foils are single tokens.
        distortion: of prompts, for contrast, for example
            `on_images(gaussian_noise, sd=80)` from `mechmm.data.corruption`.
        spans: whose attention from the last position is a signal each.
        alpha, beta: of contrastive decoding.
        scale: of attention from the last position to the first of the spans.
        layers: in which it is raised. Default: all.
        n_random: draws of each control; of the other pairs' pictures at most as many as there are
            other pairs.
        seed: of the controls.
        batch_size: pairs that run together.

    Raises:
        ValueError: fewer than two pairs; strengths that mean nothing; a number below 1; as `patch`.
        CorruptionError: a distortion that does not fit the prompts.
        SpanError: a span that some pair does not have.
    """
    check_strength(alpha, beta)
    check_limits(n_random=n_random, batch_size=batch_size)
    if len(pairs) < 2:
        raise ValueError("one pair has no other pair's picture as a control; give two or more")
    near = corrupt(pairs, distortion)
    far = [_exchanged(pairs, near, by) for by in range(1, min(n_random, len(pairs) - 1) + 1)]
    found = [
        _batch(model, *every, spans, (alpha, beta)) for every in _together(near, far, batch_size)
    ]
    said, signals = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
    raised = Raised(model, f"{spans[0]}->last", layers, [scale], n_random, seed)
    raised.check(pairs, batch_size)
    run = (raised.count, raised.changes, outcome, batch_size)
    steered = Cells(model, pairs, *run).run().values.round().long()
    controls = (
        _draws("contrast, another picture", len(far)),
        _draws(f"attention elsewhere x {scale:g}", n_random),
    )
    looked = f"attention to {spans[0]} x {scale:g}"
    return Hallucination(
        said=torch.cat([said, steered]),
        ways=("plain", "contrast", *controls[0], looked, *controls[1]),
        controls=(*controls[0], *controls[1]),
        signals=signals,
        names=(*SIGNALS, *(f"inattention to {span}" for span in spans)),
    )


def outcome(logits: Float[Tensor, "batch vocab"], answers: Answers) -> Float[Tensor, " batch"]:
    """0 where the answer is said, 1 where the foil is, 2 where something else is."""
    return 2 - 2 * accuracy(logits, answers) - flipped(logits, answers)


DRAW = ", draw "


def _draws(name: str, n: int) -> tuple[str, ...]:
    """Names of the draws of a control."""
    return (name, *(f"{name}{DRAW}{number}" for number in range(2, n + 1)))


def _drawn(way: str) -> str:
    """The control that a draw is of; any other way itself."""
    return way.partition(DRAW)[0]


def _exchanged(pairs: PairDataset, near: PairDataset, by: int) -> PairDataset:
    """Pairs whose corrupt prompts have the distorted picture of a pair some places on."""
    others = [near[(i + by) % len(pairs)].corrupt.images for i in range(len(pairs))]
    return corrupt(pairs, [partial(_with_images, images=own) for own in others])


def _with_images(prompt: Prompt, images: tuple[Image.Image, ...]) -> Prompt:
    return replace(prompt, images=images)


def _together(
    near: PairDataset, far: Sequence[PairDataset], size: int
) -> Iterator[tuple[PairBatch, list[Batch]]]:
    for ours, *theirs in zip(*(pairs.batches(size) for pairs in (near, *far)), strict=True):
        yield ours, [batch.corrupt for batch in theirs]


@torch.no_grad()
def _batch(
    model: HookedMultimodal,
    batch: PairBatch,
    others: Sequence[Batch],
    spans: Sequence[str],
    strength: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """What is said plainly and with contrast [way, example], and the signals [signal, example]."""
    p, weights = attending(model, batch.clean, has_attention(model, LANGUAGE, None))
    masks = torch.stack([batch.clean.layout.mask(span) for span in spans]).to(weights.device)
    q, *rest = (last_logits(model, prompts) for prompts in (batch.corrupt, *others))
    ways = (p, *(contrasted(p, unseen, *strength) for unseen in (q, *rest)))
    said = torch.stack([outcome(logits, batch.answers) for logits in ways])
    looks = (weights.mean(0) * masks).sum(-1)
    return said.round().long().cpu(), torch.cat([_doubts(p, q), -looks]).float().cpu()


def _doubts(p: Float[Tensor, "batch vocab"], q: Tensor) -> Float[Tensor, "signal batch"]:
    """The signals that logits give."""
    ours, theirs = p.log_softmax(-1), q.log_softmax(-1)
    first, second = ours.exp().topk(2, dim=-1).values.unbind(-1)
    entropy = -(ours.exp() * ours).sum(-1)
    blindness = -(ours.exp() * (ours - theirs)).sum(-1)
    return torch.stack([1 - first, entropy, second - first, blindness])


def _resampled(wrong: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws of examples that have both kinds [draw, example]."""
    draws = rng.integers(len(wrong), size=(RESAMPLES, len(wrong)))
    share = wrong[draws].mean(1)
    return draws[(share > 0) & (share < 1)]


def _auroc(values: Float[np.ndarray, "signal example"], wrong: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every signal: how often a wrong answer has more doubt than a
    right one, ties counted half."""
    # Imported here because scipy takes a while to import.
    from scipy.stats import rankdata

    ranks, count = rankdata(values, axis=1), int(wrong.sum())
    sums = ranks[:, wrong].sum(1) - count * (count + 1) / 2
    return sums / (count * (len(wrong) - count))

"""Direct logit attribution: what does each component add to the answer's logit by itself?

With the scale s of the final norm frozen at the run, the logit difference of answer a and foil f is
linear in what was written into the stream of the last position, and so it is a sum:

    logit(a) - logit(f) = sum_c <c, e> + beta,   e = C(w * (u_a - u_f)) / s

over the token embedding, every head, every MLP (or every neuron of it) and the biases
(`mechmm.engine.direct`). Heads may be split by where they read, for a head writes
sum_k pattern[last, k] v_k W_O.

Vision components write nothing there. What is given for them is their part in what language heads
read of the picture's embeddings, patterns and scales frozen, through the projector's Jacobian
(`mechmm.engine.seen`): those parts and a constant add up to `read`, which is a share of the heads'
parts, not something beside them.

A direct effect is an observation: components that act through others have none. So the strongest
components, and as many random ones, are ablated as well.

nostalgebraist 2020; Elhage et al. 2021 (direct paths); Wang et al. 2211.00593 (direct logit
attribution); Gandelsman et al. 2310.05916 (of vision heads, in CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import logit_diff
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.checks import check_choice, check_model, check_pairs, check_seed
from mechmm.engine.direct import (
    Component,
    End,
    end_of,
    gained,
    language_terms,
    language_writers,
    seen_run,
)
from mechmm.engine.seen import reads, vision_terms
from mechmm.engine.sites import Sites, heads, mlps
from mechmm.engine.sweep import Sweep
from mechmm.engine.wiring import Wiring, wired
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

ABLATIONS = ("mean", "zero", "resample")
N_ABLATED = 10
"""Strongest components that are ablated, and random others."""
SHOWN = 25
"""Components that are shown as bars."""
KEYS = ["tower", "layer", "kind", "part"]


@dataclass(frozen=True, eq=False)
class DirectLogitAttribution(Result):
    """What every component adds to the logit difference of every pair.

    Attributes:
        scores: [component, example]; positive = supports the answer, in logits.
        total: what those of the language model add up to [example]: the logit difference (or the
            answer's logit), before a softcap of the logits.
        read: what those of vision towers add up to [example].
        components: what the rows of `scores` are: name, tower, kind, layer, part (head or neuron),
            span (where a head reads).
        base: the metric that ablation changes [example].
        ablated: the same with a component ablated [checked, example].
        checked: which components: tower, layer, kind, part, and whether they are random.
        of: `"difference"` or `"answer"`.
        ablation: its name.
        softcap: of the logits, or None.
    """

    scores: Float[Tensor, "component example"] = field(metadata={"axis": 1})
    total: Float[Tensor, " example"] = field(metadata={"axis": 0})
    read: Float[Tensor, " example"] = field(metadata={"axis": 0})
    components: pd.DataFrame
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    ablated: Float[Tensor, "checked example"] = field(metadata={"axis": 1})
    checked: pd.DataFrame
    of: str
    ablation: str
    softcap: float | None

    @property
    def gap(self) -> float:
        """The largest difference between the sum of the language model's parts and the total."""
        own = torch.tensor((self.components["tower"] == LANGUAGE).to_numpy())
        return float((self.scores[own].sum(0) - self.total).abs().max())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component: mean score, its 95 % interval over examples; strongest first."""
        low, high = bootstrap_interval(self.scores)
        table = self.components.assign(
            score=self.scores.mean(1).numpy(), low=low.numpy(), high=high.numpy()
        )
        order = table["score"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def ablations(self) -> pd.DataFrame:
        """One row per ablated component: its mean score (spans and neurons together), what the
        metric loses without it, with the 95 % interval, and whether it was drawn at random."""
        scores = self.components[KEYS].assign(score=self.scores.mean(1).numpy())
        own = scores.groupby(KEYS, sort=False)["score"].sum()
        neurons = scores[scores["kind"] == "neuron"].groupby("layer")["score"].sum()
        loss = self.base - self.ablated
        low, high = bootstrap_interval(loss)
        table = self.checked.assign(loss=loss.mean(1).numpy(), low=low.numpy(), high=high.numpy())
        table["score"] = [
            float(own.get(tuple(row), neurons.get(row[1], math.nan)))
            for row in table[KEYS].itertuples(index=False)
        ]
        return table

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of score and loss over the ablated components of the language
        model; NaN for fewer than three."""
        table = self.ablations()
        table = table[table["tower"] == LANGUAGE]
        if len(table) < 3:
            return math.nan
        return float(table["score"].rank().corr(table["loss"].rank()))

    def plot(self) -> dict[str, Figure]:
        """Figures by name: the `strongest` components, `heads` by layer (all spans together), and
        what ablating the strongest takes beside random ones (`ablation`)."""
        figures = {"strongest": self._strongest()}
        if (self.components["kind"] == "head").any():
            figures["heads"] = self._heads()
        if len(self.checked):
            figures["ablation"] = self._ablation()
        return figures

    @property
    def _what(self) -> str:
        return "logit difference" if self.of == "difference" else "logit of the answer"

    def _strongest(self) -> Figure:
        top = self.to_dataframe().head(SHOWN)
        score, low, high = (top[name].to_numpy(float) for name in ("score", "low", "high"))
        title = f"direct logit attribution, {len(self.total)} pairs: strongest components"
        return plots.bars(
            top["name"].tolist(), score, low, high, title, value_title=f"part of the {self._what}"
        )

    def _heads(self) -> Figure:
        table = self.components.assign(score=self.scores.mean(1).numpy())
        table, maps = table[table["kind"] == "head"], {}
        for tower, group in table.groupby("tower", sort=False):
            wide = group.pivot_table(
                index="layer", columns="part", values="score", aggfunc="sum", sort=True
            ).sort_index(ascending=False)
            rows, columns = ([str(i) for i in axis] for axis in (wide.index, wide.columns))
            maps[str(tower)] = (wide.to_numpy(float), rows, columns)
        title = f"direct logit attribution of heads: {self._what}"
        n = len(self.total)
        return plots.tower_maps(maps, title, x_title="head", value_title="logits", n=n)

    def _ablation(self) -> Figure:
        table = self.ablations()
        random = table.loc[table["random"], "loss"].dropna()
        null = None
        if len(random) > 1:
            null = tuple(float(random.quantile(share)) for share in (0.025, 0.975))
        top = table[~table["random"]]
        names = [
            f"{name} (direct {score:.2f})"
            for name, score in zip(top["name"], top["score"], strict=True)
        ]
        loss, low, high = (top[name].to_numpy(float) for name in ("loss", "low", "high"))
        known = "" if math.isnan(self.agreement) else f", rank correlation {self.agreement:.2f}"
        title = f"{self.ablation} ablation of the strongest components{known}"
        return plots.bars(
            names,
            loss,
            low,
            high,
            title,
            null=null,  # type: ignore[arg-type] - two of them
            value_title=f"loss of {self._what}",
            null_title="random components",
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: every figure, the strongest components and the ablated ones."""
        contents = [*self.plot().values(), self.to_dataframe().head(2 * SHOWN), self.ablations()]
        return Page(title, self.summary(), [Section("Components", contents)], facts or {})

    def summary(self) -> str:
        """What adds up to what, in words."""
        cap = "" if self.softcap is None else f", before the softcap of {self.softcap:g}"
        seen = (
            f" Heads read {float(self.read.mean()):.2f} of it from the picture's embeddings."
            if (self.components["tower"] != LANGUAGE).any()
            else ""
        )
        known, count = "", int((self.checked["tower"] == LANGUAGE).sum())
        if not math.isnan(self.agreement):
            known = (
                f" Ranks of direct effect and {self.ablation} ablation correlate at "
                f"{self.agreement:.2f} over {count} components."
            )
        return (
            f"{len(self.components)} components, {len(self.total)} pairs. Those of the language "
            f"model add up to the {self._what} of {float(self.total.mean()):.2f}{cap} (largest gap "
            f"{self.gap:.1e}).{seen}{known}"
        )


def direct_logit_attribution(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    spans: Sequence[str] = (),
    neurons: Sequence[int] = (),
    of: str = "difference",
    vision: bool = True,
    n_ablated: int = N_ABLATED,
    ablation: str = "mean",
    seed: int = 0,
    batch_size: int = 16,
) -> DirectLogitAttribution:
    """Split the clean prompt's logit difference into what every component adds directly.

    Args:
        spans: heads are split by where they read; each position belongs to the first span that
            covers it, and to `rest` where none does.
        neurons: layers whose MLPs are split into neurons.
        of: `"difference"` of answer and foil, or `"answer"` alone.
        vision: whether to give the parts of vision components (one backward pass).
        n_ablated: strongest components of each tower that are ablated too, and random others.
        ablation: `"mean"`, `"zero"` or `"resample"`: at the last position, or at the picture's.
        seed: of the random components, and of `resample`.
        batch_size: pairs that run together.

    Raises:
        ValueError: an unknown name, a layer outside the model, a number below 0, answers of several
            tokens, a model whose logits are not what its final norm and unembedding give.
        StreamError: a model whose stream is no sum.
        DirectError: a head or MLP that is no sum of what it should be split into.
        SpanError: a span that the pairs do not have.
    """
    _check(model, pairs, of, ablation, n_ablated, neurons, seed)
    wiring, parts = wired(model), []
    for batch in pairs.batches(batch_size):
        if not batch.answers.single:
            raise ValueError("an answer or foil has several tokens; use answers of one token")
        parts.append(_batch(model, wiring, batch, spans, neurons, of, vision))
    terms, ends, seen = zip(*parts, strict=True)
    components = pd.DataFrame([asdict(component) for component, _ in terms[0]])
    columns = [torch.stack([score for _, score in some]) for some in terms]
    scores = torch.cat(columns, dim=1).float().cpu()
    total = torch.cat([end.total for end in ends]).float().cpu()
    sites, checked = _sites(model, components, scores, n_ablated, seed)
    metric = logit_diff if of == "difference" else _answer
    base, ablated = total, torch.zeros(0, len(pairs))
    if len(checked):
        named = {"seed": seed, "batch_size": batch_size}
        swept = Sweep(model, pairs, sites, metric, "clean", ablation, **named).run()  # type: ignore[arg-type]
        base, ablated = swept.base, swept.values
    return DirectLogitAttribution(
        scores=scores,
        total=total,
        read=torch.cat(seen).float().cpu(),
        components=components,
        base=base,
        ablated=ablated,
        checked=checked,
        of=of,
        ablation=ablation,
        softcap=ends[0].softcap,
    )


def _check(
    model: HookedMultimodal,
    pairs: PairDataset,
    of: str,
    ablation: str,
    n_ablated: int,
    neurons: Sequence[int],
    seed: int,
) -> None:
    check_model(model)
    check_pairs(pairs, ablation if ablation == "resample" and n_ablated else "clean")  # type: ignore[arg-type]
    check_choice("of", of, ("difference", "answer"))
    check_choice("ablation", ablation, ABLATIONS)
    check_seed(seed)
    if n_ablated < 0:
        raise ValueError(f"n_ablated is {n_ablated}; give 0 or more components")
    count = len(model.towers[LANGUAGE].blocks)
    outside = [layer for layer in neurons if not 0 <= layer < count]
    if outside:
        raise ValueError(f"the language model has layers 0..{count - 1}, not {outside[0]}")


def _answer(logits: Tensor, answers: Any) -> Tensor:
    """The answer's logit."""
    return logits.gather(-1, answers.answer_ids)[:, 0]


def _batch(
    model: HookedMultimodal,
    wiring: Wiring,
    batch: PairBatch,
    spans: Sequence[str],
    neurons: Sequence[int],
    of: str,
    vision: bool,
) -> tuple[list[tuple[Component, Tensor]], End, Tensor]:
    """Every component's part in every pair of a batch, the end, and what is read of pictures."""
    writers = language_writers(model, wiring, batch.clean)
    run = seen_run(model, writers, batch.clean, spans, neurons)
    end = end_of(model, run, batch.answers, of == "difference")
    terms = language_terms(model, writers, run, end, spans, neurons)
    read = torch.zeros(len(batch))
    if vision:
        g = reads(gained(writers, run), run, end.direction)
        seen, read = vision_terms(model, wiring, run, batch.answers, g)
        terms += seen
    return terms, end, read


def _sites(
    model: HookedMultimodal, components: pd.DataFrame, scores: Tensor, count: int, seed: int
) -> tuple[Sites, pd.DataFrame]:
    """Sites of the strongest components of every tower and of random others, and what they are."""
    every = heads(model, ("last", "image")) + mlps(model, ("last", "image"))
    own = every.table["tower"] == LANGUAGE
    table = every.table[own == (every.table["span"] == "last")]
    table = table.assign(
        part=table["head"].fillna(-1).astype(int), layer=table["layer"].astype(int)
    )
    table["at"] = np.arange(len(table))
    sums = components[KEYS].assign(score=scores.mean(1).numpy())
    sums["kind"] = sums["kind"].replace("neuron", "mlp")
    sums.loc[sums["kind"] == "mlp", "part"] = -1
    sums = sums.groupby(KEYS, sort=False)["score"].sum().reset_index()
    found = sums.merge(table, on=KEYS).sort_values("score", key=abs, ascending=False, kind="stable")
    rng, kept = np.random.default_rng(seed), []
    for _, group in found.groupby("tower", sort=False):
        top, rest = group.head(count), group.iloc[count:]
        drawn = rng.choice(len(rest), min(count, len(rest)), replace=False)
        kept += [top.assign(random=False), rest.iloc[drawn].assign(random=True)]
    chosen = pd.concat(kept) if kept else found.assign(random=False)
    chosen["name"] = [_name(row) for row in chosen[KEYS].itertuples(index=False)]
    sites = Sites(table[every.table.columns].iloc[chosen["at"].to_numpy()].reset_index(drop=True))
    sites = Sites(sites.table.astype({"layer": "Int64"}))
    return sites, chosen[["name", *KEYS, "random"]].reset_index(drop=True)


def _name(row: Any) -> str:
    prefix = "" if row.tower == LANGUAGE else f"{row.tower}."
    return f"{prefix}a{row.layer}.h{row.part}" if row.kind == "head" else f"{prefix}m{row.layer}"

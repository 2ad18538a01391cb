"""Steps of a run that are a method on something made by another public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from mechmm.data.metrics import Metric, logit_diff
from mechmm.data.pairs import PairDataset
from mechmm.data.questions import KINDS
from mechmm.data.shapes import Sampler
from mechmm.engine.closing import Layers
from mechmm.engine.sites import named
from mechmm.engine.source import Source
from mechmm.engine.sweep import Report
from mechmm.engine.train_sae import train_sae
from mechmm.methods.attribution import attribute
from mechmm.methods.checkpoints import OverCheckpoints
from mechmm.methods.checkpoints import over_checkpoints as on_each
from mechmm.methods.dictionary import Dictionary
from mechmm.methods.dictionary import dictionary as spliced
from mechmm.methods.knockout import N_NULL, Knockout, knockout
from mechmm.methods.knockout import mediation as routes_of
from mechmm.methods.latent_lens import LatentLens, latent_bank
from mechmm.methods.latent_lens import latent_lens as looked_up
from mechmm.methods.text_span import TextSpan
from mechmm.methods.text_span import text_span as described
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval


def mediation(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    source: str = "image",
    layers: Layers | None = None,
    window: int | None = None,
    metric: Metric = logit_diff,
    n_null: int = N_NULL,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Knockout:
    """`knockout` of the routes of `mm.mediation(source)`; arguments and errors as there."""
    rest: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "tokens": tokens}
    rest |= {"layers": layers, "window": window, "metric": metric, "n_null": n_null}
    return knockout(model, pairs, routes_of(source), report=report, **rest)


def latent_lens(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    texts: Sequence[str],
    skip: int = 1,
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
    """`mm.latent_lens` with the bank of some texts; arguments and errors as there and of
    `mm.latent_bank`."""
    bank = latent_bank(model, texts, skip=skip)
    return looked_up(
        model,
        pairs,
        bank,
        spans=spans,
        positions=positions,
        top_k=top_k,
        same_layer=same_layer,
        ablation=ablation,
        n_held=n_held,
        n_random=n_random,
        metric=metric,
        seed=seed,
        batch_size=batch_size,
        tokens=tokens,
        report=report,
    )


def dictionary(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    hook: str,
    span: str = "all",
    fit: PairDataset | None = None,
    d_sae: int | None = None,
    k: int = 16,
    train_steps: int = 1000,
    places: int = 512,
    lr: float = 2e-3,
    n_top: int = 10,
    n_random: int = 20,
    n_places: int = 8,
    steps: int = 500,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
) -> Dictionary:
    """`mm.dictionary` with one that `mm.train_sae` learns at a hook and span of the pairs `fit`
    (default: the pairs themselves); arguments and errors as there."""
    learned = train_sae(
        model,
        pairs if fit is None else fit,
        named(model, hook, (span,)),
        d_sae=d_sae,
        k=k,
        steps=train_steps,
        places=places,
        lr=lr,
        seed=seed,
        batch_size=batch_size,
    )
    return spliced(
        model,
        pairs,
        learned,
        span=span,
        fit=fit,
        n_top=n_top,
        n_random=n_random,
        n_places=n_places,
        steps=steps,
        metric=metric,
        seed=seed,
        batch_size=batch_size,
    )


def text_span(
    model: HookedMultimodal,
    *,
    texts: Mapping[str, Sequence[str]],
    kind: str = "color",
    n: int = 32,
    n_texts: int = 5,
    n_random: int = 20,
    n_ablated: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> TextSpan:
    """`mm.text_span` on pictures of random scenes that suit a kind of question."""
    if kind not in KINDS or n < 2:
        raise ValueError(
            f"kind is {kind!r} and n {n}; use one of {', '.join(KINDS)}, and 2 or more"
        )
    rng = np.random.default_rng(seed)
    pictures = [Sampler().scene(rng, kind).render() for _ in range(n)]
    rest: dict[str, Any] = {"n_texts": n_texts, "n_random": n_random, "n_ablated": n_ablated}
    return described(model, pictures, texts, seed=seed, batch_size=batch_size, **rest)


def over_checkpoints(
    model: HookedMultimodal,
    *,
    of: Callable[[HookedMultimodal], Result],
    checkpoints: Sequence[str],
    null: bool = True,
    seed: int = 0,
    tokens: int | None = None,
) -> OverCheckpoints:
    """`mm.over_checkpoints`: a step on every checkpoint, with the run's own pairs."""

    def method(other: HookedMultimodal) -> Result:
        return of(other, tokens=tokens)  # type: ignore[call-arg]

    options = {"dtype": model.dtype, "device": model.device}
    return on_each(method, checkpoints, null=null, seed=seed, **options)


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """How far two circuits are the same.

    Attributes:
        table: of `Circuit.overlap`: per span the size of both, their intersection over union, and
            the mean and 95 % quantile of that of random circuits of the same sizes.
    """

    table: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per span, `all` first."""
        return self.table

    def plot(self) -> dict[str, Figure]:
        """Every span as a bar, and its random circuits as the bar below it (its interval: up to
        the 95 % quantile)."""
        names, rows = [], []
        for row in self.table.to_dict("records"):
            names += [row["span"], "random of the same sizes"]
            rows += [[row["iou"]] * 3, [row["random_mean"], row["random_mean"], row["random_high"]]]
        value, low, high = zip(*rows, strict=True)
        title = "overlap of two circuits"
        return {"overlap": plots.bars(names, value, low, high, title, value_title="IoU")}


def overlap(
    model: HookedMultimodal,
    circuit: Circuit,
    other_circuit: Circuit,
    *,
    n_random: int = 100,
    seed: int = 0,
) -> Overlap:
    """`Circuit.overlap` as a step: intersection over union of two circuits, beside random ones."""
    return Overlap(circuit.overlap(other_circuit, n_random, seed))


def rediscovery(
    model: HookedMultimodal,
    pairs: PairDataset,
    circuit: Circuit,
    *,
    fraction: float,
    method: str = "eap-ig-inputs",
    steps: int = 5,
    metric: Metric = logit_diff,
    target: str = "corrupt",
    n_random: int = 100,
    batch_size: int = 16,
    seed: int = 0,
) -> Overlap:
    """The circuit that a model's own scores give (`mm.attribute`), beside another one: of another
    checkpoint, for example. Arguments and errors as of `attribute` and `Circuit.overlap`."""
    rest: dict[str, Any] = {"metric": metric, "target": target, "batch_size": batch_size}
    rest |= {"method": method, "steps": steps, "seed": seed, "spans": circuit.graph.spans[:-1]}
    own = attribute(model, pairs, **rest).circuit(fraction=fraction)
    return overlap(model, own, circuit, n_random=n_random, seed=seed)


def chosen_circuit(model: HookedMultimodal, circuit: Circuit) -> Circuit:
    """A circuit as a step, so that headlines can count its edges."""
    return circuit


@dataclass(frozen=True, eq=False)
class Answers(Result):
    """What a model makes of some pairs.

    Attributes:
        table: of `PairDataset.check`: per pair what is said after both prompts, and whether it is
            right and flips.
    """

    table: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair."""
        return self.table

    def plot(self) -> dict[str, Figure]:
        """Shares of pairs that are answered rightly, and that flip."""
        names = ["clean_right", "flips"]
        found = np.array(self.table[names], dtype=float).T.copy()
        low, high = bootstrap_interval(found)
        title = f"answers to {len(self.table)} pairs"
        means = found.mean(1)
        return {"answers": plots.bars(names, means, low, high, title, value_title="share")}


def answers(model: HookedMultimodal, pairs: PairDataset, *, batch_size: int = 32) -> Answers:
    """`PairDataset.check` as a step: is the clean prompt answered rightly, does the pair flip?"""
    return Answers(pairs.check(model, batch_size))

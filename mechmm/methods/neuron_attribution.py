"""Neuron attribution: which hidden units of MLPs speak for the answer, and is it lost without them?

With a the activation of neuron k of layer l (`mlp.hook_post`, [example, pos, neuron]) and m the
metric (larger = more the clean answer),

    score(l, k) = sum over the span's positions of (a - a_ref) . dm/da

where a_ref is zero, the mean over the clean runs, or the corrupt prompt's activation. The gradient
is that of the clean run (`"gradient"`; of the corrupt run for a_ref of the corrupt prompt), or its
mean over runs in which the layer's activations are a_ref + k / steps (a - a_ref), k = 1..steps
(`"ig"`). These are the scores of `mm.attribute(granularity="neuron")`.

Of some pairs the neurons with the largest mean scores are chosen. In all prompts they are set to
zero or to their mean, all together, at every position of the span; beside them stand sets of as
many random other neurons of the same layers. Effects are read on the pairs that chose nothing.

A neuron of the language model is decoded by W_U W_out[k], the logits that it writes directly; so is
one of the projector's hidden layer (`projector.hook_post`), whose output enters the language model
as it is.

Schwettmann et al. 2308.01544 (their score is the gradient's, with a_ref zero); Goh et al. 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, Reading, logit_diff, name_of
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.boxes import box_of
from mechmm.engine.cells import Cells, concatenated
from mechmm.engine.checks import SiteError, check_choice, check_limits, check_model, check_seed
from mechmm.engine.contrast import TARGETS, check_contrast, contrasts
from mechmm.engine.estimate import check_gradient
from mechmm.engine.hidden import PROJECTOR, behind, lacking, writes
from mechmm.engine.located import located
from mechmm.engine.places import Ints, Places, Values
from mechmm.engine.readout import nearest
from mechmm.engine.sites import Sites, hidden, neurons
from mechmm.engine.split import chosen_on
from mechmm.engine.states import means, prompts_of, states
from mechmm.engine.sweep import Report
from mechmm.engine.unit_scores import unit_scores
from mechmm.engine.units import Home, UnitBatch, UnitMap, projector_map, unit_map
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results import plots
from mechmm.results.report import Captioned, Page, Section
from mechmm.results.result import Result
from mechmm.results.sheet import sheet
from mechmm.results.statistics import bootstrap_interval

METHODS = {"gradient": "eap", "ig": "eap-ig-activations"}
"""What they are called among those of `mm.attribute`."""
ABLATIONS = ("zero", "mean")
WORDS = 5
"""Words that a neuron is decoded to."""


@dataclass(frozen=True, eq=False)
class NeuronAttribution(Result):
    """What neurons are worth, and what the metric is without the best.

    Attributes:
        scores: [example, neuron]; positive = supports the clean answer, in units of the metric.
        neurons: layer and neuron of every column of `scores`; the projector's layer is -1.
        train: the examples that chose [example].
        top: columns of the chosen neurons, largest mean score first.
        random: columns of the random sets, one set per row [draw, top].
        base: the metric of the clean prompts [example]; ablated: without the chosen neurons
            [example]; nulls: without each random set [draw, example].
        words: that each chosen neuron writes directly; random_words: those of each random set
            [draw, top]; both empty where none writes into the language model. answers: of all
            pairs, each word once.
        places: where the chosen neurons are most active in the clean prompts: layer, neuron,
            activation, example, position (of the hook's tensor), picture (a number in `pictures`,
            -1: none) and the box of the patch in pixels. pictures: of these places.
        tower, span, method, reference, ablation, metric: names.
    """

    scores: Float[Tensor, "example neuron"] = field(metadata={"axis": 0})
    neurons: pd.DataFrame
    train: Bool[Tensor, " example"] = field(metadata={"axis": 0})
    top: tuple[int, ...]
    random: tuple[tuple[int, ...], ...]
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    ablated: Float[Tensor, " example"] = field(metadata={"axis": 0})
    nulls: Float[Tensor, "draw example"] = field(metadata={"axis": 1})
    words: tuple[str, ...]
    random_words: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    places: pd.DataFrame
    pictures: tuple[Image.Image, ...]
    tower: str
    span: str
    method: str
    reference: str
    ablation: str
    metric: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per chosen neuron, largest score first: its mean score over the examples that
        chose, that over the others with its 95 % interval, and its words."""
        columns = list(self.top)
        other = self.scores[~self.train][:, columns]
        low, high = bootstrap_interval(other.T)
        table = self.neurons.iloc[columns].reset_index(drop=True)
        return table.assign(
            chosen_by=self.scores[self.train][:, columns].mean(0).numpy(),
            score=other.mean(0).numpy(),
            low=low.numpy(),
            high=high.numpy(),
            words=list(self.words) or "",
        )

    def effects(self) -> pd.DataFrame:
        """One row per set of neurons, the chosen one first: the mean change of the metric without
        it over the examples that did not choose, and its 95 % interval."""
        changes = (torch.cat([self.ablated[None], self.nulls]) - self.base)[:, ~self.train]
        low, high = bootstrap_interval(changes)
        names = ["top", *(f"random {number}" for number in range(1, len(self.nulls) + 1))]
        columns = {"change": changes.mean(1).numpy(), "low": low.numpy(), "high": high.numpy()}
        null = [name != "top" for name in names]
        return pd.DataFrame({"neurons": names, **columns, "null": null})

    def decoded(self) -> pd.DataFrame:
        """One row per set of neurons, the chosen one first: the share of its neurons that have an
        answer of some pair among their words, beside the mean share of the random sets. None where
        they have no words."""
        rows = [
            ("top" if number == 0 else f"random {number}", self._tell(words), number > 0)
            for number, words in enumerate((self.words, *self.random_words))
            if words
        ]
        table = pd.DataFrame(rows, columns=["neurons", "share", "null"])
        return table.assign(random_mean=table.loc[table["null"], "share"].mean())

    def _tell(self, words: Sequence[str]) -> float:
        """The share of some neurons that write an answer."""
        return float(np.mean([not set(self.answers).isdisjoint(own.split()) for own in words]))

    def sheet(self, rank: int = 0) -> Image.Image:
        """The pictures in which a chosen neuron is most active, its patch in a frame.

        Args:
            rank: of the neuron, 0 the one with the largest score.

        Raises:
            ValueError: a rank that there is not, or a neuron that is most active elsewhere.
        """
        own = self._pictured(rank)
        if not len(own):
            raise ValueError(f"the places of neuron {rank} are no parts of a picture")
        frames = own[["left", "top", "right", "bottom"]].itertuples(index=False, name=None)
        return sheet([self.pictures[int(i)] for i in own["picture"]], list(frames))

    def _pictured(self, rank: int) -> pd.DataFrame:
        if not 0 <= rank < len(self.top):
            raise ValueError(f"rank is {rank}; the chosen neurons are 0..{len(self.top) - 1}")
        layer, neuron = self.neurons.iloc[self.top[rank]]
        table = self.places
        mine = (table["layer"] == layer) & (table["neuron"] == neuron)
        return table[mine & (table["picture"] >= 0)]

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `neurons`, the scores of the chosen ones over those of the random ones,
        and `ablation`, the change without each set."""
        return {"neurons": self._bars(), "ablation": self._ablation()}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and both tables."""
        contents = [*self.plot().values(), self.effects(), self.decoded(), self.to_dataframe()]
        shown = [
            Captioned(self.sheet(rank), f"{_name(layer, neuron)}, most active on the left")
            for rank, (layer, neuron) in enumerate(self.neurons.iloc[list(self.top)].to_numpy())
            if len(self._pictured(rank))
        ]
        sections = [Section("Neurons", contents)]
        sections += [Section("Where they are most active", shown)] if shown else []
        return Page(title, self.summary(), sections, facts or {})

    def summary(self) -> str:
        """What was chosen, and what came of it, in words."""
        table = self.effects()
        rest = table["change"][1:]
        return (
            f"{len(self.neurons)} neurons of the {_where(self.tower)} at {self.span}, scored by "
            f"{self.method} from {self.reference}; the {len(self.top)} best of "
            f"{int(self.train.sum())} pairs set to {self.ablation} in {int((~self.train).sum())} "
            f"others. {self.metric} is {float(self.base[~self.train].mean()):.2f} and changes by "
            f"{table['change'][0]:.2f}; without as many random neurons of the same layers by "
            f"{rest.min():.2f} to {rest.max():.2f}."
        )

    def _bars(self) -> Figure:
        table = self.to_dataframe()
        rows = table.itertuples()
        names = [f"{_name(row.layer, row.neuron)} {row.words}".strip() for row in rows]
        value, low, high = (table[name].to_numpy(float) for name in ("score", "low", "high"))
        drawn = self.scores[~self.train].mean(0)[torch.tensor(self.random).flatten()]
        null = tuple(drawn.quantile(torch.tensor((0.025, 0.975))).tolist())
        title = f"neurons of {self.tower} at {self.span}: {self.method}, {self.metric}"
        extra = {"value_title": "score", "null_title": "random neurons"}
        return plots.bars(names, value, low, high, title, null=null, **extra)

    def _ablation(self) -> Figure:
        table = self.effects()
        value, low, high = (table[name].to_numpy(float) for name in ("change", "low", "high"))
        null = float(value[1:].min()), float(value[1:].max())
        title = f"change of {self.metric} with {len(self.top)} neurons set to {self.ablation}"
        extra = {"value_title": "change", "null_title": "random neurons"}
        return plots.bars(list(table["neurons"]), value, low, high, title, null=null, **extra)


def _name(layer: Any, neuron: Any) -> str:
    return f"m{layer}.n{neuron}" if layer >= 0 else f"{PROJECTOR}.n{neuron}"


def _where(tower: str) -> str:
    return tower if tower == PROJECTOR else f"{tower} tower"


def neuron_attribution(
    model: HookedMultimodal,
    pairs: PairDataset,
    *,
    tower: str = LANGUAGE,
    method: str = "gradient",
    reference: str = "zero",
    steps: int = 10,
    span: str = "image",
    top: int = 20,
    n_random: int = 5,
    n_places: int = 8,
    ablation: str = "zero",
    train: float = 0.5,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> NeuronAttribution:
    """Score every hidden unit of a tower's MLPs, and ablate the best beside random ones.

    Layers whose MLP is a mixture of experts have no neurons of their own and are left out.

    Args:
        tower: `"language"`, `"vision"`, ...; `"projector"`: the hidden layer of the projector.
        method: `"gradient"` or `"ig"` (see above).
        reference: `"zero"`, `"mean"` or `"corrupt"`.
        steps: of integrated gradients; each is a run per layer.
        span: whose positions are summed over and ablated.
        top: how many neurons are chosen and ablated together.
        n_random: random sets of as many neurons in the same layers.
        n_places: most active places kept of each chosen neuron.
        ablation: `"zero"` or `"mean"` (over the span's positions of every clean prompt).
        train: share of pairs that choose; effects are read on the others.
        metric: with a gradient.
        seed: of the split and the random sets.
        batch_size, tokens: as for `patch`.
        report: called with (cells done, cells in all) during ablation.

    Raises:
        ValueError: an unknown tower, method, reference or ablation; a number below 1; more neurons
            than half of a layer's; a share that leaves fewer than two pairs on a side; a metric
            without a gradient; a model without logits after a prompt.
        SiteError: a tower without neurons of its own, a projector without a hidden layer.
        SpanError: a span that some pair does not have.
        StreamError: a model whose residual stream is no sum of what its components write.
    """
    check_seed(seed)
    check_limits(steps=steps, top=top, n_random=n_random, n_places=n_places)
    check_limits(batch_size=batch_size)
    for what, given, known in (
        ("tower", tower, (*model.towers, PROJECTOR)),
        ("method", method, METHODS),
        ("reference", reference, TARGETS),
        ("ablation", ablation, ABLATIONS),
    ):
        check_choice(what, given, known)
    check_model(model)
    check_contrast(model, pairs, metric, reference)
    check_gradient(model, pairs, metric, "corrupt" if reference == "corrupt" else "clean")
    chosen = chosen_on(len(pairs), train, seed)
    units = _hidden(model, tower, span)
    _check_span(model, pairs, units.homes[0], span, batch_size)
    table = _table(units.homes)
    if top > len(table):
        raise ValueError(f"top is {top}, but there are {len(table)} neurons; ask for fewer")
    what = (METHODS[method], reference, steps, batch_size)
    scores = _scores(model, pairs, units, metric, *what)
    best = scores[chosen].mean(0).argsort(descending=True, stable=True)[:top].tolist()
    draws = _alike(table, best, n_random, np.random.default_rng([seed, 1]))
    sets = [best, *draws]
    ablated = _Ablated.of(model, pairs, units, table, sets, span, ablation, batch_size)
    every = Cells(model, pairs, len(sets), ablated.changes, metric, batch_size, tokens)
    found = every.run(report)
    told = _words(model, table, sets) if _speaks(model, tower) else ((),)
    chosen_ones = _sites(model, table.iloc[best], tower, span)
    places, pictures = _shown(model, pairs, chosen_ones, n_places, batch_size)
    return NeuronAttribution(
        scores=scores,
        neurons=table,
        train=chosen,
        top=tuple(best),
        random=tuple(tuple(draw) for draw in draws),
        base=found.base,
        ablated=found.values[0],
        nulls=found.values[1:],
        words=told[0],
        random_words=told[1:],
        answers=tuple(sorted({pair.answer.strip() for pair in pairs})),
        places=places,
        pictures=pictures,
        tower=tower,
        span=span,
        method=method,
        reference=reference,
        ablation=ablation,
        metric=name_of(metric),
    )


def _hidden(model: HookedMultimodal, tower: str, span: str) -> UnitMap:
    """The units of a model, of which only the hidden ones of one tower's MLPs have a home."""
    if tower == PROJECTOR:
        if why := lacking(model):
            raise SiteError(why)
        return projector_map(model, (span,))
    whole = unit_map(model, (span,), "neuron")
    own = tuple(
        home
        for home in whole.homes
        if home.group.tower == tower and home.hooks[0].endswith("mlp.hook_post")
    )
    if not own:
        raise SiteError(
            f"no MLP of the {tower} tower of {model.family.architecture} has neurons of its own; "
            "choose another tower, or score nodes with mm.attribute"
        )
    return replace(whole, homes=own)


def _check_span(
    model: HookedMultimodal, pairs: PairDataset, home: Home, span: str, batch_size: int
) -> None:
    """Refuse a span that a clean prompt has no position of."""
    site, what = hidden(model, home.hooks[0], (span,)), _where(home.group.tower)
    for batch in pairs.batches(batch_size):
        for at, part in ((batch.clean, "clean"), (batch.corrupt, "corrupt")):
            places = located(site, at.layout, 0, batch.indices)
            counts = np.bincount(places.trial, minlength=len(batch))
            if not counts.all():
                number = batch.indices[int(counts.argmin())]
                raise SpanError(
                    f"pair {number} has no position in span {span!r} of the {what} in its {part} "
                    "prompt; choose another span or drop the pair"
                )


def _table(homes: Sequence[Home]) -> pd.DataFrame:
    """Layer and number of every neuron, layer by layer."""
    layers = np.repeat([home.group.layer for home in homes], [home.size for home in homes])
    numbers = np.concatenate([np.arange(home.size) for home in homes])
    return pd.DataFrame({"layer": layers, "neuron": numbers})


def _scores(
    model: HookedMultimodal,
    pairs: PairDataset,
    units: UnitMap,
    metric: Metric,
    method: str,
    reference: str,
    steps: int,
    batch_size: int,
) -> Float[Tensor, "example neuron"]:
    """The score of every neuron at the span, which is the first of the map."""
    tower, rows = units.homes[0].group.tower, []
    own = np.concatenate([np.arange(*home.units) for home in units.homes])
    runs: dict[str, Any] = {"also": units.hidden}
    wiring = units.wiring
    for parts in contrasts(model, pairs, wiring, metric, reference, batch_size, **runs):
        found = [unit_scores(UnitBatch(part, units), method, steps) for part in parts]
        total = torch.stack(found).sum(0).numpy()
        rows.append(torch.from_numpy(units.units.by_tower(total)[tower][:, 0, own]))
    return torch.cat(rows)


def _alike(
    table: pd.DataFrame, best: Sequence[int], n: int, rng: np.random.Generator
) -> list[list[int]]:
    """Random sets of other neurons, in every layer as many as the best have there."""
    layers = table["layer"].to_numpy()
    draws: list[list[int]] = [[] for _ in range(n)]
    for layer, count in table["layer"].iloc[best].value_counts().sort_index().items():
        others = np.setdiff1d(np.flatnonzero(layers == layer), best)
        if len(others) < count:
            raise ValueError(
                f"{count} of the best neurons lie in layer {layer}, which has {len(others)} others "
                "to draw as many random ones from; ask for fewer (top)"
            )
        for draw in draws:
            draw += rng.choice(others, count, replace=False).tolist()
    return draws


def _speaks(model: HookedMultimodal, tower: str) -> bool:
    """Whether neurons write into the language model's residual stream directly."""
    return writes(model) if tower == PROJECTOR else tower == LANGUAGE


def _behind(model: HookedMultimodal, layer: Any) -> Any:
    """The linear map that reads the neurons of a layer of the language model, or (-1) of the
    projector."""
    return behind(model) if layer < 0 else model.towers[LANGUAGE].linear(layer, "mlp_out")


def _words(
    model: HookedMultimodal, table: pd.DataFrame, sets: Sequence[Sequence[int]]
) -> tuple[tuple[str, ...], ...]:
    """The words with the largest logits W_U W_out[k] of every neuron of some sets."""
    tower, every = model.towers[LANGUAGE], table.iloc[[n for own in sets for n in own]]
    linears = [_behind(model, row.layer) for row in every.itertuples()]
    numbers = every["neuron"].tolist()
    rows = [own.weight[:, neuron] for own, neuron in zip(linears, numbers, strict=True)]
    _, ids = nearest(torch.stack(rows).detach(), tower.W_U.detach().T, WORDS)
    said = [model.to_string(row[:, None]) for row in ids.cpu()]
    told = iter([" ".join(word.strip() for word in row) for row in said])
    return tuple(tuple(next(told) for _ in own) for own in sets)


def _sites(model: HookedMultimodal, table: pd.DataFrame, tower: str, span: str) -> Sites:
    """Sites of some neurons, layer by layer."""
    by_layer = {int(str(layer)): list(own["neuron"]) for layer, own in table.groupby("layer")}
    return neurons(model, by_layer, (span,), tower=tower)


def _shown(
    model: HookedMultimodal, pairs: PairDataset, sites: Sites, n: int, batch_size: int
) -> tuple[pd.DataFrame, tuple[Image.Image, ...]]:
    """The most active places of some neurons, and their pictures, each once."""
    rows, edges = [], ("left", "top", "right", "bottom")
    for batch, indices in prompts_of(pairs, batch_size):
        read = states(model, batch, sites, indices)
        for site, own in zip(sites.table.itertuples(), read, strict=True):
            values = own.values[:, 0]
            for at in values.topk(min(n, len(values))).indices.tolist():
                place = (int(own.prompt[at]), int(own.row[at]), int(own.position[at]))
                box = box_of(batch.layout, str(site.tower), *place) or (-1, *(np.nan,) * 4)
                layer = -1 if pd.isna(site.layer) else int(site.layer)  # type: ignore[arg-type]
                active = (layer, int(site.neuron), float(values[at]))  # type: ignore[arg-type]
                rows.append((*active, indices[place[0]], place[2], *box))
    columns = ("layer", "neuron", "activation", "example", "position", "image", *edges)
    table = pd.DataFrame(rows, columns=list(columns))
    table = table.sort_values("activation", ascending=False, kind="stable")
    table = table.groupby(["layer", "neuron"], sort=False).head(n).reset_index(drop=True)
    keys = list(zip(table["example"], table["image"], strict=True))
    numbers: dict[tuple[int, int], int] = {}
    of = [numbers.setdefault(key, len(numbers)) if key[1] >= 0 else -1 for key in keys]
    pictures = tuple(pairs[example].clean.images[image] for example, image in numbers)
    return table.drop(columns="image").assign(picture=of), pictures


# Ablation ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ablated:
    """Sets of neurons, each set to fixed values at a span.

    Attributes:
        sites: of all neurons that lie in a set.
        members: numbers of the sites of every set.
        values: what each site is set to [site].
    """

    sites: Sites
    members: Sequence[Ints]
    values: Float[Tensor, " site"]

    @classmethod
    def of(
        cls,
        model: HookedMultimodal,
        pairs: PairDataset,
        units: UnitMap,
        table: pd.DataFrame,
        sets: Sequence[Sequence[int]],
        span: str,
        ablation: str,
        batch_size: int,
    ) -> _Ablated:
        """Sites and values of some sets of columns of a table of neurons."""
        tower = units.homes[0].group.tower
        columns = np.unique(np.concatenate([np.array(own) for own in sets]))
        sites = _sites(model, table.iloc[columns], tower, span)
        values = torch.zeros(len(sites))
        if ablation == "mean":
            found = means(model, pairs, sites, batch_size=batch_size)
            values = torch.stack([state.mean() for state in found])
        members = [np.searchsorted(columns, np.array(own)) for own in sets]
        return cls(sites, members, values)

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """Every set's places, and what is put there."""
        own, prompts = located(self.sites, batch.clean.layout, 0, batch.indices), len(batch)
        site, found, sites = own.trial // prompts, [], []
        for number, members in enumerate(self.members):
            keep = np.isin(site, members)
            there = own.chosen(keep)
            found.append(replace(there, trial=number * prompts + there.trial % prompts))
            sites.append(site[keep])
        places = concatenated(own.hooks, prompts, len(self.members), found)
        put = self.values[torch.as_tensor(np.concatenate(sites))]

        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            return put[torch.as_tensor(at)].to(now).expand_as(now)

        return places, give

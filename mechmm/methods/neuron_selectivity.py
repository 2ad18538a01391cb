"""Neuron selectivity: which hidden units of MLPs fire at one modality, or in one domain, alone?

A neuron fires where the input of its nonlinearity (`mlp.hook_pre`; of a gated MLP the gate's) is
above a threshold. With r(g) the share of the positions of group g (image, text) at which it fires,

    p(g) = r(g) / sum of r,    entropy = - sum over groups of p(g) log p(g)   (nats)

0: it fires at one group alone; log(number of groups): at all alike. A neuron that never fires has
none (NaN). Null: the groups of each example's positions are shuffled, which keeps how often a
neuron fires. Groups may also be domains of the examples (photographs, scans, ...): all positions of
an example are then in its own, and the null deals the domains out to the examples anew. A neuron
counts as selective where its entropy is at most `most` and below those of
all of its shuffles. Each shuffle, beside the others, says how many neurons would count by chance.

Tang et al. 2402.16438 (languages); Huo et al. 2406.11193 (domains of pictures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.engine.checks import check_choice, check_limits, check_seed
from mechmm.engine.hidden import PROJECTOR, ahead, behind, lacking
from mechmm.engine.places import Ints
from mechmm.engine.sites import hidden, unfit_of
from mechmm.engine.states import Data, States, check_data, count, prompts_of, states
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SHOWN = 30
"""Neurons of each group in a report."""
MOST = 0.325
"""The entropy of a neuron that fires nine times as often in one of two groups, in nats."""


@dataclass(frozen=True, eq=False)
class NeuronSelectivity(Result):
    """How often every neuron fires in every group of positions.

    Attributes:
        fired: at how many positions, by example [example, group, neuron].
        positions: of every group [example, group].
        null: entropies with shuffled groups [shuffle, neuron]; NaN where the neuron never fires.
        neurons: layer and neuron of every column.
        spans: the groups: spans, or domains. tower: whose neurons; the projector's layer is -1.
        threshold: above which a neuron fires. most: entropy of a selective one.
    """

    fired: Float[Tensor, "example group neuron"] = field(metadata={"axis": 0})
    positions: Float[Tensor, "example group"] = field(metadata={"axis": 0})
    null: Float[Tensor, "shuffle neuron"]
    neurons: pd.DataFrame
    spans: tuple[str, ...]
    threshold: float
    most: float
    tower: str = LANGUAGE

    def rates(self) -> Float[Tensor, "group neuron"]:
        """The share of a group's positions at which a neuron fires."""
        return self.fired.sum(0) / self.positions.sum(0)[:, None]

    def entropy(self) -> Float[Tensor, " neuron"]:
        """Of every neuron, in nats; NaN where it never fires."""
        return entropies(self.rates())

    def selective(self) -> Bool[Tensor, " neuron"]:
        """Whether a neuron's entropy is at most `most`, and below those of all of its shuffles."""
        return self._beyond(self.entropy(), self.null)

    def _beyond(self, entropy: Tensor, null: Tensor) -> Tensor:
        return (entropy <= self.most) & (entropy < null.amin(0))

    def by_chance(self) -> Float[Tensor, " shuffle"]:
        """How many neurons count as selective in each shuffle, beside the other shuffles."""
        counts = [
            self._beyond(own, torch.cat([self.null[:i], self.null[i + 1 :]])).sum()
            for i, own in enumerate(self.null)
        ]
        return torch.stack(counts).float()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron, lowest entropy first: the group in which it fires most, how often it
        fires in each, its lowest entropy with shuffled groups, and whether it is selective."""
        rates, entropy = self.rates(), self.entropy()
        columns = {f"rate_{s}": r.numpy() for s, r in zip(self.spans, rates, strict=True)}
        best = np.array(self.spans)[rates.argmax(0).numpy()]
        table = self.neurons.assign(group=best, entropy=entropy.numpy(), **columns)
        table = table.assign(null_low=self.null.amin(0).numpy(), selective=self.selective().numpy())
        return table.sort_values("entropy", kind="stable").reset_index(drop=True)

    def groups(self) -> pd.DataFrame:
        """One row per layer and group: the share of the layer's neurons that are selective and fire
        most there."""
        table = self.to_dataframe()
        rows = [
            {"layer": layer, "group": span, "share": float((own["group"] == span).mean())}
            for layer, own in table.assign(group=table["group"].where(table["selective"])).groupby(
                "layer"
            )
            for span in self.spans
        ]
        return pd.DataFrame(rows)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `selective`, how many neurons are, by group, over how many would be by
        chance; and for each group its most selective neurons, by how much more often they fire."""
        table = self.to_dataframe()
        chosen = table[table["selective"]]
        counts = [float((chosen["group"] == span).sum()) for span in self.spans]
        null = (0.0, float(self.by_chance().max()))
        title = f"selective neurons of {len(table)}, by where they fire"
        extra = {"value_title": "neurons", "null_title": "shuffled groups"}
        figures = {
            "selective": plots.bars(self.spans, counts, None, None, title, null=null, **extra)
        }
        for span in self.spans:
            own = chosen[chosen["group"] == span].head(SHOWN)
            if len(own):
                figures[span] = self._firing(span, own)
        return figures

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the tables."""
        table = self.to_dataframe()
        shown = table[table["selective"]].groupby("group", sort=False).head(SHOWN)
        contents = [*self.plot().values(), self.groups(), shown]
        return Page(title, self.summary(), [Section("Selective neurons", contents)], facts or {})

    def summary(self) -> str:
        """How many neurons are selective, and how many would be by chance, in words."""
        table = self.to_dataframe()
        chosen = table[table["selective"]]
        counts = ", ".join(f"{(chosen['group'] == span).sum()} at {span}" for span in self.spans)
        return (
            f"{len(table)} neurons, {len(self.fired)} examples; "
            f"{int(table['entropy'].isna().sum())} never fire. Selective (entropy at most "
            f"{self.most:g} and below all of {len(self.null)} shuffles): {counts}; with shuffled "
            "groups at most "
            f"{int(self.by_chance().max())} in all."
        )

    def _firing(self, span: str, own: pd.DataFrame) -> Figure:
        """How often some neurons fire in their group, with intervals over examples, over how often
        they fire elsewhere."""
        order = self.neurons.reset_index().set_index(["layer", "neuron"])["index"]
        columns = [int(order[row.layer, row.neuron]) for row in own.itertuples()]  # type: ignore[index]
        group = self.spans.index(span)
        there = self.positions[:, group] > 0
        rates = self.fired[there, group][:, columns] / self.positions[there, group, None]
        low, high = bootstrap_interval(rates.T)
        elsewhere = own[[f"rate_{s}" for s in self.spans if s != span]].to_numpy()
        single = self.tower == PROJECTOR
        names = [
            f"{PROJECTOR}.n{row.neuron}" if single else f"m{row.layer}.n{row.neuron}"
            for row in own.itertuples()
        ]
        title = f"share of positions of {span} at which neurons fire"
        extra = {"value_title": "rate", "null_title": "the same neurons elsewhere"}
        null = (float(elsewhere.min()), float(elsewhere.max()))
        return plots.bars(names, rates.mean(0), low, high, title, null=null, **extra)


def entropies(rates: Float[Tensor, "*many group neuron"]) -> Float[Tensor, "*many neuron"]:
    """Entropy of how a neuron's rates are split among groups, in nats; NaN where all are 0."""
    shares = rates / rates.sum(-2, keepdim=True)
    return torch.special.entr(shares).sum(-2)


def neuron_selectivity(
    model: HookedMultimodal,
    data: Data,
    *,
    spans: Sequence[str] = ("image", "text"),
    domains: Sequence[str] | None = None,
    tower: str = LANGUAGE,
    layers: Sequence[int] | None = None,
    threshold: float = 0.0,
    most: float = MOST,
    n_shuffled: int = 20,
    seed: int = 0,
    batch_size: int = 16,
) -> NeuronSelectivity:
    """How selective the hidden units of a tower's MLPs are for groups of positions.

    Layers whose MLP is a mixture of experts have no neurons of their own and are left out.

    Args:
        data: pairs (the clean prompts are read), or batches.
        spans: the groups; no position may be in two.
        domains: of every example; they are the groups, and `spans` says which positions count.
        tower: `"language"`, `"vision"`, ...; `"projector"`: its hidden layer. Where a tower has no
            text, give spans of pictures, or domains.
        layers: default: all.
        threshold: above which a neuron fires, of `mlp.hook_pre` (`projector.hook_pre`).
        most: the largest entropy of a selective neuron, in nats.
        n_shuffled: shuffles of the groups of each example's positions, or of the domains.
        seed: of the shuffles.

    Raises:
        ValueError: fewer than two groups, or twice the same; another number of domains than of
            examples; positions in two groups; fewer than two shuffles; an unknown tower, or one
            without neurons or without a prompt's positions; a layer that it does not have.
        SpanError: a span that some example does not have.
    """
    check_seed(seed)
    check_limits(batch_size=batch_size)
    if n_shuffled < 2:
        raise ValueError(f"n_shuffled is {n_shuffled}; give 2 or more: each stands beside others")
    groups, label = _groups(data, spans, domains)
    if not 0 < most <= np.log(len(groups)):
        raise ValueError(f"most is {most}; entropies of {len(groups)} groups end at their log")
    check_choice("tower", tower, (*model.towers, PROJECTOR))
    hooks = _projector(model, layers) if tower == PROJECTOR else _hooks(model, tower, layers)
    sites = hidden(model, hooks[0].hook, spans)
    for own in hooks[1:]:
        sites = sites + hidden(model, own.hook, spans)
    check_data(model, data, sites)
    counts = _Counts(spans, threshold, n_shuffled, np.random.default_rng(seed), label)
    for batch, indices in prompts_of(data, batch_size):
        counts.add(states(model, batch, sites, indices, seed), indices)
    fired, positions, null = counts.found()
    table = pd.DataFrame(
        {
            "layer": np.repeat([own.layer for own in hooks], [own.size for own in hooks]),
            "neuron": np.concatenate([np.arange(own.size) for own in hooks]),
        }
    )
    return NeuronSelectivity(fired, positions, null, table, groups, threshold, most, tower)


def _groups(
    data: Data, spans: Sequence[str], domains: Sequence[str] | None
) -> tuple[tuple[str, ...], Ints | None]:
    """The names of the groups, and which of them every example is in, where they are domains."""
    if isinstance(spans, str) or not spans or len(set(spans)) < len(spans):
        raise ValueError(f"spans are {spans!r}; give a list of different ones")
    if domains is None:
        if len(spans) < 2:
            raise ValueError(f"spans are {list(spans)}; give two or more different ones")
        return tuple(spans), None
    names, label = np.unique(np.array(list(map(str, domains)), dtype=str), return_inverse=True)
    if len(label) != count(data):
        raise ValueError(f"{len(label)} domains for {count(data)} examples; give one for each")
    if len(names) < 2:
        raise ValueError(
            f"all examples are of the domain {str(names[0])!r}; give two domains or more"
        )
    return tuple(names.tolist()), label


class _Layer(NamedTuple):
    """Neurons of one layer: where they are hooked, and how many."""

    layer: int
    hook: str
    size: int


def _projector(model: HookedMultimodal, layers: Sequence[int] | None) -> list[_Layer]:
    """The hidden layer of the projector."""
    if why := lacking(model):
        raise ValueError(why)
    if layers is not None:
        raise ValueError(f"layers are {list(layers)}, but the projector has one; leave them out")
    size, before = behind(model).in_features, ahead(model).out_features
    if before != size:
        raise ValueError(
            f"projector.hook_pre of {model.family.architecture} has values and gates in one, "
            f"{before} numbers for {size} neurons, so that none says alone where a neuron fires; "
            "mm.neuron_attribution takes what they make together"
        )
    return [_Layer(-1, "projector.hook_pre", size)]


def _hooks(model: HookedMultimodal, name: str, layers: Sequence[int] | None) -> list[_Layer]:
    """Layers of a tower with neurons of their own."""
    tower, who = model.towers[name], f"the {name} tower of {model.family.architecture}"
    if why := unfit_of(model, name):
        raise ValueError(f"{who} has no positions of a prompt: {why}")
    count, found = tower.cfg.n_layers, []
    for layer in range(count) if layers is None else layers:
        if not 0 <= layer < count:
            raise ValueError(f"{who} has layers 0..{count - 1}, not {layer}")
        hook, linear = f"{tower.prefix}blocks.{layer}.mlp.hook_pre", tower.linear(layer, "mlp_out")
        mixed = tower.part(layer, "mlp", tower.row.experts) is not None
        if hook in model.hook_dict and linear is not None and not mixed:
            found.append(_Layer(layer, hook, linear.in_features))
    if not found:
        raise ValueError(
            f"no MLP of {who} in these layers has neurons of its own; choose other layers or "
            "another model"
        )
    return found


class _Counts:
    """At how many positions neurons fire, by example and group, and with shuffled groups."""

    def __init__(
        self,
        spans: Sequence[str],
        threshold: float,
        shuffles: int,
        rng: np.random.Generator,
        domain: Ints | None,
    ) -> None:
        self.spans, self.threshold, self.rng, self.domain = spans, threshold, rng, domain
        self.groups = len(spans) if domain is None else int(domain.max()) + 1
        self.dealt = [None if domain is None else rng.permutation(domain) for _ in range(shuffles)]
        self.fired: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.mixed = self.sizes = torch.zeros(())

    def add(self, found: Sequence[States], indices: Sequence[int]) -> None:
        """One batch: the states of every layer, span by span."""
        each, groups = len(self.spans), self.groups
        first = found[:each]
        self._check(first, indices)
        prompt = np.concatenate([own.prompt for own in first])
        label = np.repeat(np.arange(each), [len(own.prompt) for own in first])
        example = np.array(indices)[prompt]
        label = label if self.domain is None else self.domain[example]
        active = torch.cat(
            [
                torch.cat([own.values for own in found[at : at + each]]) > self.threshold
                for at in range(0, len(found), each)
            ],
            dim=1,
        ).float()
        own = torch.zeros(len(indices) * groups, active.shape[1])
        self.fired.append(
            own.index_add_(0, torch.as_tensor(prompt * groups + label), active).unflatten(
                0, (len(indices), groups)
            )
        )
        sizes = np.bincount(prompt * groups + label, minlength=len(own))
        self.positions.append(torch.tensor(sizes).float().view(-1, groups))
        mixed = [self._mixed(prompt, label) if d is None else d[example] for d in self.dealt]
        one_hot = torch.nn.functional.one_hot(torch.tensor(np.stack(mixed)), groups).float()
        self.mixed = self.mixed + torch.einsum("spg,pn->sgn", one_hot, active)
        self.sizes = self.sizes + one_hot.sum(1)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts [example, group, neuron], positions [example, group], and entropies with shuffled
        groups [shuffle, neuron]."""
        null = entropies(self.mixed / self.sizes[..., None])
        return torch.cat(self.fired), torch.cat(self.positions), null

    def _mixed(self, prompt: np.ndarray, label: np.ndarray) -> np.ndarray:
        """The groups of each prompt's positions in another order."""
        mixed = np.empty_like(label)
        by_prompt = np.lexsort((self.rng.random(len(prompt)), prompt))
        mixed[np.argsort(prompt, kind="stable")] = label[by_prompt]
        return mixed

    def _check(self, groups: Sequence[States], indices: Sequence[int]) -> None:
        """Refuse positions in two groups."""
        every = np.concatenate([np.stack([g.prompt, g.row, g.position]) for g in groups], axis=1)
        places, counts = np.unique(every, axis=1, return_counts=True)
        if counts.max() > 1:
            prompt, _, position = places[:, counts.argmax()].tolist()
            raise ValueError(
                f"position {position} of example {indices[prompt]} is in two of the spans "
                f"{', '.join(self.spans)}; give spans that do not overlap"
            )

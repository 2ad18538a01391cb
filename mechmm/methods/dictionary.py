"""A sparse dictionary at one hook: is it faithful, what do its features stand for, which are used?

With x a state, f its features, x^ what they stand for, L the loss (minus the log-probability of the
answer) and m the metric (larger = more the clean answer) of the clean prompts:

- splice: x <- x^ at every place of the site. Loss recovered: (L(0) - L(x^)) / (L(0) - L(x)), with
  all states at 0, and the same with all states at their mean. Beside it that of as many principal
  components as features are active, and of a dictionary whose encoder is random and whose decoder
  alone was learned (a dictionary is worth what it has beyond both);
- attribution of feature i: sum over places of f_i (W_dec,i . dm/dx), its first-order worth
  (Marks et al. 2403.19647);
- ablation: x <- x - f_i W_dec,i, for the features with the largest attributions, beside random ones
  that are active;
- the places where a feature is most active, with the patch of the picture that they stand for.

Cunningham et al. 2309.08600; Gao et al. 2406.04093.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Metric, log_prob, logit_diff, name_of, prepared, readings
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.boxes import box_of
from mechmm.engine.estimate import check_gradient, slopes
from mechmm.engine.located import located
from mechmm.engine.places import Places, index
from mechmm.engine.sites import Sites, named
from mechmm.engine.source import BySite, Function
from mechmm.engine.states import check_data
from mechmm.engine.sweep import Sweep
from mechmm.engine.train_sae import Recorded, train_sae
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.sparse import SparseAutoencoder
from mechmm.results import plots
from mechmm.results.report import Captioned, Page, Section
from mechmm.results.result import Result
from mechmm.results.sheet import sheet
from mechmm.results.statistics import bootstrap_interval, share_interval

SPLICES = ("dictionary", "principal components", "random features", "zero", "mean")
"""What takes the place of the states, in the order of `Dictionary.spliced`."""
TOGETHER = 1024
"""Places that are encoded at once."""


@dataclass(frozen=True, eq=False)
class Dictionary(Result):
    """What a dictionary keeps, and what its features are worth.

    Attributes:
        clean: the metric of the clean prompts [example].
        loss: of the clean prompts, in nats [example]; spliced: with the states replaced as
            `SPLICES` says [splice, example].
        explained: share of the states' variance that dictionary, components and random features
            keep [three].
        active: share of places at which each feature is active [feature].
        attribution: of every feature, per example, in units of the metric [example, feature].
        features: those that were ablated, strongest attribution first [top]; ablated: the metric
            without each [top, example].
        others: random active ones [random]; random: the metric without each [random, example].
        places: where the ablated features are most active: feature, rank, example, position,
            activation, picture (a number in `pictures`) and the box of the patch in pixels.
        pictures: of these places.
        hook, span, metric: names. components: principal components that were kept.
    """

    clean: Float[Tensor, " example"] = field(metadata={"axis": 0})
    loss: Float[Tensor, " example"] = field(metadata={"axis": 0})
    spliced: Float[Tensor, "splice example"] = field(metadata={"axis": 1})
    explained: Float[Tensor, " three"]
    active: Float[Tensor, " feature"]
    attribution: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    features: Int[Tensor, " top"]
    ablated: Float[Tensor, "top example"] = field(metadata={"axis": 1})
    others: Int[Tensor, " random"]
    random: Float[Tensor, "random example"] = field(metadata={"axis": 1})
    places: pd.DataFrame
    pictures: tuple[Image.Image, ...]
    hook: str
    span: str
    metric: str
    components: int

    def recovered(self, floor: str = "zero") -> pd.DataFrame:
        """Of dictionary, components and random features: the share of the loss that is recovered
        between `floor` (`"zero"` or `"mean"`) and the clean run, the interval of what is not, and
        the variance that they keep."""
        added = self.spliced[:3] - self.loss
        whole = float((self.spliced[SPLICES.index(floor)] - self.loss).mean())
        least, most = share_interval(added, whole)
        return pd.DataFrame(
            {
                "states": SPLICES[:3],
                "recovered": (1 - added.mean(-1) / whole).numpy(),
                "low": 1 - most,
                "high": 1 - least,
                "variance": self.explained.numpy(),
            }
        )

    def change(self) -> Float[Tensor, "top example"]:
        """How the metric of every example changes without each of `features`."""
        return self.ablated - self.clean

    def random_range(self) -> tuple[float, float]:
        """Where 95 % of the random features have their mean change."""
        changes = (self.random - self.clean).mean(-1)
        low, high = changes.quantile(torch.tensor((0.025, 0.975))).tolist()
        return low, high

    def to_dataframe(self) -> pd.DataFrame:
        """One row per ablated feature, the random ones last: attribution, change of the metric
        without it and its interval, and the share of places at which it is active."""
        numbers = torch.cat([self.features, self.others])
        changes = torch.cat([self.ablated, self.random]) - self.clean
        low, high = bootstrap_interval(changes)
        return pd.DataFrame(
            {
                "feature": numbers.numpy(),
                "chosen": ["attribution"] * len(self.features) + ["random"] * len(self.others),
                "attribution": self.attribution.mean(0)[numbers].numpy(),
                "change": changes.mean(-1).numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
                "active": self.active[numbers].numpy(),
            }
        )

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of attribution and the loss by ablation, over all features
        that were ablated."""
        table = self.to_dataframe()
        return float(table["attribution"].rank().corr((-table["change"]).rank()))

    def sheet(self, feature: int) -> Image.Image:
        """The pictures in which an ablated feature is most active, its patch in a frame.

        Raises:
            ValueError: a feature that was not ablated, or is active on no picture.
        """
        own = self.places[(self.places["feature"] == feature) & (self.places["picture"] >= 0)]
        if not len(own):
            raise ValueError(
                f"no pictures are kept of feature {feature}; there are those of "
                f"{sorted(set(self.places.loc[self.places['picture'] >= 0, 'feature']))}"
            )
        frames = own[["left", "top", "right", "bottom"]].itertuples(index=False, name=None)
        return sheet([self.pictures[int(i)] for i in own["picture"]], list(frames))

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `recovered` and `features`, what the metric loses without each."""
        table = self.recovered()
        columns = (table[name].to_numpy(float) for name in ("recovered", "low", "high"))
        value, low, high = columns
        names = [f"{row.states} (variance {row.variance:.2f})" for row in table.itertuples()]
        title = f"loss recovered by what stands for {self.hook}, {self.span}"
        figure = plots.bars(names, value, low, high, title, value_title="loss recovered")
        return {"recovered": figure, "features": self._features()}

    def _features(self) -> Figure:
        table = self.to_dataframe()
        top = table[table["chosen"] == "attribution"]
        value, low, high = (top[name].to_numpy(float) for name in ("change", "low", "high"))
        names = [f"feature {row.feature} ({row.attribution:.2f})" for row in top.itertuples()]
        title = f"change of {self.metric} without a feature (its attribution) of {self.hook}"
        extra = {"value_title": "change", "null_title": "random active features"}
        return plots.bars(names, value, low, high, title, null=self.random_range(), **extra)

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: both figures, the table, and the pictures of the strongest features."""
        first = Section("Splice and ablation", [*self.plot().values(), self.to_dataframe()])
        kept = set(self.places.loc[self.places["picture"] >= 0, "feature"])
        shown = [
            Captioned(self.sheet(number), f"feature {number}, most active on the left")
            for number in self.features.tolist()
            if number in kept
        ]
        sections = [first, *([Section("Where features are most active", shown)] if shown else [])]
        return Page(title, self.summary(), sections, facts or {})

    def summary(self) -> str:
        """What is recovered beside both baselines, and what ablation says, in words."""
        share = self.recovered()["recovered"]
        low, high = self.random_range()
        return (
            f"{len(self.active)} features at {self.hook}, {self.span}; {len(self.clean)} examples. "
            f"Spliced in, the dictionary recovers {share[0]:.2f} of the loss, "
            f"{self.components} principal components {share[1]:.2f}, random features "
            f"{share[2]:.2f}. Without its strongest feature {self.metric} changes by "
            f"{float(self.change()[0].mean()):.2f}; without random active ones by {low:.2f} to "
            f"{high:.2f}."
        )


def dictionary(
    model: HookedMultimodal,
    pairs: PairDataset,
    sae: SparseAutoencoder,
    *,
    span: str = "all",
    fit: PairDataset | None = None,
    n_top: int = 10,
    n_random: int = 20,
    n_places: int = 8,
    steps: int = 500,
    metric: Metric = logit_diff,
    seed: int = 0,
    batch_size: int = 16,
) -> Dictionary:
    """Splice a dictionary into the clean prompts of pairs, attribute the answer to its features,
    ablate the strongest, and find where they are active.

    Args:
        sae: from `train_sae` or `SparseAutoencoder.load`; its hook says where.
        span: which positions it stands for.
        fit: what the baselines learn from; give what the dictionary was trained on. Default: the
            pairs themselves, which favours the baselines.
        n_top, n_random: features to ablate by attribution and at random.
        n_places: most active places kept of each of the former.
        steps: of learning the baseline of random features.
        metric: of attribution and ablation, with a gradient; larger = more the clean answer.
        seed: of random features.

    Raises:
        DictionaryError: a dictionary of another width than the hook.
        UnknownHookError: a hook that the model does not have.
        ValueError: a metric without a gradient, a number below 1.
        SpanError: a span that some example does not have.
    """
    for name, value in {"n_top": n_top, "n_random": n_random, "n_places": n_places}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    site, sae = named(model, sae.hook, [span]), sae.to(model.device)
    check_data(model, pairs, site)
    check_gradient(model, pairs, metric, "clean")
    Sweep(model, pairs, site, metric, "clean", _Splice(sae))  # refuses another width
    source = fit if fit is not None else pairs
    recorded = Recorded.of(model, source, site, batch_size=batch_size, seed=seed)
    gathered = _Gathered.of(model, pairs, sae, site, metric, n_places, batch_size)
    k = max(1, round(float(gathered.active.sum()))) if not sae.k else sae.k
    random = train_sae(
        model,
        source,
        site,
        d_sae=sae.d_sae,
        k=k,
        steps=steps,
        learn_encoder=False,
        seed=seed,
        batch_size=batch_size,
    ).to(model.device)
    mean = recorded.mean().to(model.device)
    k = min(k, sae.d_in)
    stands: list[Function] = [_Splice(sae), _Project(mean, _components(recorded, mean, k))]
    stands += [_Splice(random)]
    explained = torch.tensor([_explained(recorded, mean, function) for function in stands])
    stands += [torch.zeros_like, _Set(mean)]
    worth = gathered.attribution.mean(0).abs()
    features = worth.argsort(descending=True, stable=True)[:n_top]
    others = _drawn(gathered.active, features, n_random, seed)
    numbers = torch.cat([features, others]).tolist()
    without = [_Without(sae, number) for number in numbers]
    spliced, log_probs = _swept(model, pairs, site, log_prob, stands, batch_size)
    changed, clean = _swept(model, pairs, site, metric, without, batch_size)
    ablated, drawn = changed.split([len(features), len(others)])
    places, pictures = gathered.shown(features.tolist(), pairs)
    return Dictionary(
        clean=clean,
        loss=-log_probs,
        spliced=-spliced,
        explained=explained,
        active=gathered.active,
        attribution=gathered.attribution,
        features=features,
        ablated=ablated,
        others=others,
        random=drawn,
        places=places,
        pictures=pictures,
        hook=sae.hook,
        span=span,
        metric=name_of(metric),
        components=k,
    )


def _swept(
    model: HookedMultimodal,
    pairs: PairDataset,
    site: Sites,
    metric: Metric,
    functions: Sequence[Function],
    batch_size: int,
) -> tuple[Float[Tensor, "function example"], Float[Tensor, " example"]]:
    """The metric of the clean prompts with one site changed by each function, and unchanged."""
    table = site.table.loc[site.table.index.repeat(len(functions))].reset_index(drop=True)
    source = BySite(tuple(functions))
    swept = Sweep(model, pairs, Sites(table), metric, "clean", source, 0, batch_size).run()
    return swept.values, swept.base


# What takes the place of states ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Splice:
    """States as far as a dictionary has them."""

    sae: SparseAutoencoder

    def __call__(self, now: Tensor) -> Tensor:
        wide = now.reshape(len(now), -1).float()
        return self.sae.reconstruct(wide).reshape(now.shape).to(now.dtype)


@dataclass(frozen=True, eq=False)
class _Without:
    """States less what one feature stands for."""

    sae: SparseAutoencoder
    feature: int

    def __call__(self, now: Tensor) -> Tensor:
        wide = now.reshape(len(now), -1).float()
        own = self.sae.encode(wide)[:, self.feature, None] * self.sae.W_dec[self.feature]
        return (wide - own).reshape(now.shape).to(now.dtype)


@dataclass(frozen=True, eq=False)
class _Project:
    """States as far as some directions have them."""

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d r"]

    def __call__(self, now: Tensor) -> Tensor:
        wide = now.reshape(len(now), -1).float() - self.mean
        return (self.mean + wide @ self.basis @ self.basis.T).reshape(now.shape).to(now.dtype)


@dataclass(frozen=True, eq=False)
class _Set:
    """One state for all."""

    mean: Float[Tensor, " d"]

    def __call__(self, now: Tensor) -> Tensor:
        return self.mean.expand(len(now), -1).reshape(now.shape).to(now.dtype)


def _components(recorded: Recorded, mean: Tensor, k: int) -> Float[Tensor, "d r"]:
    """The first principal components."""
    d = len(mean)
    square = torch.zeros(d, d, dtype=torch.float64)
    for part in recorded.parts:
        centred = (part.float() - mean.cpu()).double()
        square += centred.T @ centred
    return torch.linalg.eigh(square).eigenvectors[:, -k:].float().to(mean.device)


def _explained(recorded: Recorded, mean: Tensor, function: Function) -> float:
    """The share of the variance of states that something keeps."""
    lost, total = 0.0, 0.0
    for part in recorded.parts:
        for some in part.float().to(mean.device).split(TOGETHER):
            lost += float((some - function(some)).square().sum())
            total += float((some - mean).square().sum())
    return 1 - lost / total


def _drawn(active: Tensor, features: Tensor, n: int, seed: int) -> Int[Tensor, " random"]:
    """Random features that are active somewhere, other than those given."""
    may = active > 0
    may[features] = False
    known = may.nonzero().flatten().numpy()
    if not len(known):
        raise ValueError(
            "no feature is active but those that are ablated; ask for fewer of them (n_top)"
        )
    drawn = np.random.default_rng(seed).choice(known, min(n, len(known)), replace=False)
    return torch.as_tensor(np.sort(drawn))


# Features over the pairs ---------------------------------------------------------------------


class _Gathered:
    """What every feature does in the clean prompts of pairs.

    Attributes:
        attribution: [example, feature]. active: share of places [feature].
        top, where: the largest activations of every feature [rank, feature], and the number of the
            place of each. seen: of every place the example, row, position and picture box.
    """

    def __init__(self, sae: SparseAutoencoder, site: Sites, n_places: int) -> None:
        self.sae, self.site, self.n_places = sae, site, n_places
        self.rows: list[Tensor] = []
        self.counts = torch.zeros(sae.d_sae)
        self.top = torch.zeros(0, sae.d_sae)
        self.where = torch.zeros(0, sae.d_sae, dtype=torch.long)
        self.seen: list[tuple] = []

    @classmethod
    def of(
        cls,
        model: HookedMultimodal,
        pairs: PairDataset,
        sae: SparseAutoencoder,
        site: Sites,
        metric: Metric,
        n_places: int,
        batch_size: int,
    ) -> _Gathered:
        """Run every batch with gradients."""
        gathered = cls(sae, site, n_places)
        for batch in pairs.batches(batch_size):
            gathered.add(model, batch, metric)
        return gathered

    @property
    def attribution(self) -> Float[Tensor, "example feature"]:
        """Of all examples."""
        return torch.cat(self.rows)

    @property
    def active(self) -> Float[Tensor, " feature"]:
        """The share of places at which each feature is active."""
        return self.counts / max(1, len(self.seen))

    @torch.no_grad()
    def add(self, model: HookedMultimodal, batch: PairBatch, metric: Metric) -> None:
        """One batch."""
        places = located(self.site, batch.clean.layout, 0, batch.indices)
        answers = prepared(model, batch.clean, batch.answers, metric)
        total = torch.zeros(len(batch), self.sae.d_sae)
        for number, part in enumerate(readings(batch.clean, answers, metric)):
            found = slopes(model, part, answers, places.hooks)
            for value, slope in found.get(self.sae.hook, ()):
                for own in np.split(np.arange(len(places)), range(TOGETHER, len(places), TOGETHER)):
                    total += self._worth(places.chosen(own), value, slope, batch, number == 0)
        self.rows.append(total)

    def _worth(
        self, own: Places, value: Tensor, slope: Tensor, batch: PairBatch, first: bool
    ) -> Float[Tensor, "example feature"]:
        """The attribution of some places; where they are met first, their activations are kept."""
        where = index(self.sae.hook, own.row, own.position, own.part, value)
        wide, steep = (t[where].reshape(len(own), -1).float() for t in (value, slope))
        features = self.sae.encode(wide)
        if first:
            self._keep(features.cpu(), own, batch)
        worth = (features * (steep @ self.sae.W_dec.T)).cpu()
        total = torch.zeros(len(batch), self.sae.d_sae)
        return total.index_add_(0, torch.as_tensor(own.trial), worth)

    def _keep(self, features: Tensor, own: Places, batch: PairBatch) -> None:
        start, tower = len(self.seen), str(self.site.table["tower"].iloc[0])
        self.counts += (features > 0).sum(0)
        numbers = torch.arange(start, start + len(own))[:, None].expand_as(features)
        values, where = torch.cat([self.top, features]), torch.cat([self.where, numbers])
        kept = values.topk(min(self.n_places, len(values)), dim=0)
        self.top, self.where = kept.values, where.gather(0, kept.indices)
        for prompt, row, position in zip(own.trial, own.row, own.position, strict=True):
            place = (int(prompt), int(row), int(position))
            self.seen.append((batch.clean.layout, tower, batch.indices[prompt], *place))

    def shown(
        self, features: list[int], pairs: PairDataset
    ) -> tuple[pd.DataFrame, tuple[Image.Image, ...]]:
        """The most active places of some features, and their pictures, each once."""
        rows, pictures = [], {}
        for feature in features:
            values, where = self.top[:, feature], self.where[:, feature]
            for rank, (value, number) in enumerate(zip(values, where, strict=True)):
                if value <= 0:
                    continue
                layout, tower, example, prompt, row, position = self.seen[int(number)]
                box = box_of(layout, tower, prompt, row, position)
                key = None if box is None else (example, box[0])
                picture = -1 if key is None else pictures.setdefault(key, len(pictures))
                edges = (np.nan,) * 4 if box is None else box[1:]
                rows.append((feature, rank, example, position, float(value), picture, *edges))
        columns = ("feature", "rank", "example", "position", "activation", "picture")
        table = pd.DataFrame(rows, columns=[*columns, "left", "top", "right", "bottom"])
        return table, tuple(pairs[example].clean.images[image] for example, image in pictures)

"""TextSpan: which texts span what an attention head adds to the representation of pictures?

A picture's representation is a sum of direct shares of heads and MLPs (`mechmm.engine.shares`). For
one head, with C [image, d] its shares less their mean and R [text, d] the embeddings of texts
projected onto the row space of C, the basis is chosen greedily:

    take the text with the largest |C r|^2, r = R_text / |R_text|
    C <- C - C r r^T,  R <- R - R r r^T

and the variance explained after m texts is 1 - |C|^2 / |C_0|^2 (Gandelsman et al. 2310.05916; there
the directions are not normalised before they are compared). Null: as many random directions in the
place of the texts.

That texts span a head's share does not say that the head is used for them. So for every property (a
list of texts) the heads whose shares its texts explain most are ablated, their outputs set to the
mean over the pictures in the run itself, and zero-shot accuracy on every property stands beside
that with as many random heads ablated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.engine.embeddings import check_dual, embeddings
from mechmm.engine.lent import lent
from mechmm.engine.record import values
from mechmm.engine.shares import direct
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

NOTHING = 1e-4
"""A text of which less than this share is left adds no direction of its own."""
Texts = Mapping[str, Sequence[str]]
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class TextSpan(Result):
    """The text basis of every head, and what ablating the heads of a property does.

    Attributes:
        chosen: numbers of the texts, in order of choice, -1 where there was none left
            [layer, head, rank].
        projections: of every picture's share on the directions of these texts
            [layer, head, rank, image].
        spread: squared norm of every share less the mean [layer, head, image].
        null: variance explained by random directions [draw, layer, head, rank].
        total: squared norm of every representation less the mean [image].
        texts, property_of: the texts, and the property of each.
        heads: by property the heads that were ablated, [layer, head] each.
        labels: by property the number of the right text of every picture, or of the one that is
            nearest without ablation where none was given [image].
        given: whether labels were given.
        clean: cosine of every picture and text [image, text]; ablated: the same without the heads
            of each property [property, image, text]; random: without random heads
            [draw, image, text].
    """

    chosen: Int[Tensor, "layer head rank"]
    projections: Float[Tensor, "layer head rank image"] = field(metadata={"axis": 3})
    spread: Float[Tensor, "layer head image"] = field(metadata={"axis": 2})
    null: Float[Tensor, "draw layer head rank"]
    total: Float[Tensor, " image"] = field(metadata={"axis": 0})
    texts: tuple[str, ...]
    property_of: tuple[str, ...]
    heads: dict[str, list[list[int]]]
    labels: Int[Tensor, "property image"] = field(metadata={"axis": 1})
    given: bool
    clean: Float[Tensor, "image text"] = field(metadata={"axis": 0})
    ablated: Float[Tensor, "property image text"] = field(metadata={"axis": 1})
    random: Float[Tensor, "draw image text"] = field(metadata={"axis": 1})

    @property
    def properties(self) -> list[str]:
        """Names of the properties, in order."""
        return list(dict.fromkeys(self.property_of))

    def explained(self) -> Float[Tensor, "layer head rank"]:
        """Share of a head's variance that its first texts explain."""
        each = self.projections.square().sum(-1)
        return each.cumsum(-1) / self.spread.sum(-1, keepdim=True).clamp(min=1e-30)

    def by_property(self) -> Float[Tensor, "property layer head"]:
        """Variance of every head that the chosen texts of each property explain."""
        return _worth(self.chosen, self.projections, self.property_of)

    def right(
        self, cosines: Float[Tensor, "*run image text"]
    ) -> Float[Tensor, "*run property image"]:
        """1 where the nearest text of a property is the right one."""
        rows = []
        for name, labels in zip(self.properties, self.labels, strict=True):
            own = torch.tensor([i for i, p in enumerate(self.property_of) if p == name])
            rows.append((own[cosines[..., own].argmax(-1)] == labels).float())
        return torch.stack(rows, dim=-2)

    def ablation(self) -> pd.DataFrame:
        """One row per property whose heads were ablated and property that was asked: accuracy
        without ablation, its change with the interval over pictures, and the range of the change
        with random heads ablated."""
        clean, ablated = self.right(self.clean), self.right(self.ablated)
        random = (self.right(self.random) - clean).mean(-1)
        rows = []
        for i, name in enumerate(self.properties):
            change = ablated[i] - clean
            low, high = bootstrap_interval(change)
            for j, asked in enumerate(self.properties):
                row = (name, asked, clean[j].mean(), change[j].mean(), low[j], high[j])
                rows.append((*row, random[:, j].min(), random[:, j].max()))
        names = ("ablated", "asked", "accuracy", "change", "low", "high")
        columns = [*names, "random_low", "random_high"]
        return pd.DataFrame([[*r[:2], *map(float, r[2:])] for r in rows], columns=columns)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: its share of the representations' variance, what its texts explain of
        its own, the most that random directions do, and the texts."""
        layers, heads, ranks = self.chosen.shape
        explained = self.explained()[..., -1].flatten()
        part = self.spread.sum(-1).flatten() / self.total.sum().clamp(min=1e-30)
        texts = [
            "; ".join(self.texts[i] for i in row if i >= 0)
            for row in self.chosen.view(-1, ranks).tolist()
        ]
        return pd.DataFrame(
            {
                "layer": np.repeat(range(layers), heads),
                "head": np.tile(range(heads), layers),
                "variance": part.numpy(),
                "explained": explained.numpy(),
                "null_high": self.null[..., -1].amax(0).flatten().numpy(),
                "texts": texts,
            }
        )

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `variance` of heads' shares, what texts have `explained` of it beyond
        the best random directions, and `ablation`: the change of accuracy."""
        layers, heads, ranks = self.chosen.shape
        rows, columns = [str(i) for i in reversed(range(layers))], [str(i) for i in range(heads)]
        part = self.spread.sum(-1) / self.total.sum().clamp(min=1e-30)
        beyond = self.explained()[..., -1] - self.null[..., -1].amax(0)
        n = len(self.total)
        titles = (
            "variance of direct shares, of the representations'",
            f"variance explained by {ranks} texts less by the best of {len(self.null)} random sets",
        )
        variance, explained = (
            plots.heat_map(
                values.flip(0),
                rows,
                columns,
                title,
                x_title="head",
                y_title="layer",
                value_title="share",
                n=n,
            )
            for values, title in zip((part, beyond), titles, strict=True)
        )
        return {"variance": variance, "explained": explained, "ablation": self._bars()}

    def _bars(self) -> Figure:
        table = self.ablation()
        names = [f"heads of {row.ablated}: {row.asked}" for row in table.itertuples()]
        value, low, high = (table[c].to_numpy(float) for c in ("change", "low", "high"))
        null = (float(table["random_low"].min()), float(table["random_high"].max()))
        what = "zero-shot accuracy" if self.given else "answers that stay"
        extra = {"value_title": "change", "null_title": "random heads"}
        title = f"change of {what} where heads are set to their mean"
        return plots.bars(names, value, low, high, title, null=null, **extra)

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and both tables."""
        contents = [*self.plot().values(), self.ablation(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Heads", contents)], facts or {})

    def summary(self) -> str:
        """How much texts explain beside random directions, in words."""
        layers, heads, ranks = self.chosen.shape
        mean, null = float(self.explained()[..., -1].mean()), float(self.null[..., -1].mean())
        table = self.ablation()
        own = table[table["ablated"] == table["asked"]]
        changes = ", ".join(f"{row.asked} {row.change:+.2f}" for row in own.itertuples())
        return (
            f"{layers * heads} heads, {len(self.total)} pictures, {len(self.texts)} texts. "
            f"{ranks} texts explain {mean:.2f} of a head's variance on average, random directions "
            f"{null:.2f}. Accuracy without a property's own heads: {changes}; without random heads "
            f"{own['random_low'].min():+.2f} to {own['random_high'].max():+.2f}."
        )


def text_span(
    model: HookedMultimodal,
    images: Sequence[Any],
    texts: Texts,
    *,
    labels: Texts | None = None,
    text_model: HookedMultimodal | None = None,
    n_texts: int = 5,
    n_random: int = 20,
    n_ablated: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> TextSpan:
    """Describe every head of a vision tower by texts, and ablate those of each property.

    Args:
        model: CLIP, SigLIP or SigLIP 2; or any model with the vision tower of one, with
            `text_model`.
        images: pictures, two or more.
        texts: by property the texts that describe it: `{"color": ["a red thing", ...], ...}`.
        labels: by property the right text of every picture; default: the nearest one without
            ablation, so that "accuracy" is how many answers stay.
        text_model: the dual encoder from which the model's vision tower was taken: its last norm,
            projection and texts read what the model's own tower does, with the weights that it has
            in `model`. Default: `model`.
        n_texts: texts of a basis.
        n_random: sets of random directions, and of random heads.
        n_ablated: heads of a property.
        seed: of both.

    Raises:
        ValueError: another kind of model, or a text model of other sizes; fewer than two pictures;
            no texts, one twice, or a property with one alone; labels that do not fit; more heads
            than there are.
        InputError: a picture or text that the processor does not take.
    """
    if text_model is not None and text_model is not model:
        with lent(model, text_model):
            return text_span(
                text_model,
                images,
                texts,
                labels=labels,
                n_texts=n_texts,
                n_random=n_random,
                n_ablated=n_ablated,
                seed=seed,
                batch_size=batch_size,
            )
    check_dual(model, "give text_model, the dual encoder from which its vision tower was taken")
    names = _checked(texts, labels, len(images))
    every = [text for name in names for text in texts[name]]
    tower = model.towers["vision"]
    heads = [(i, h) for i in range(tower.cfg.n_layers) for h in range(tower.heads(i))]
    _check_numbers(n_texts, n_random, n_ablated, len(heads))
    batches = [
        model.encode(every[0], list(images[i : i + batch_size]))
        for i in range(0, len(images), batch_size)
    ]
    embedded = embeddings(model, model.encode(every, [images[0]]))[1]
    found = [direct(model, batch) for batch in batches]
    shares = torch.cat([one.heads for one in found]).permute(1, 2, 0, 3)
    shares = shares - shares.mean(2, keepdim=True)
    whole = torch.cat([one.representation for one in found])
    random = torch.Generator().manual_seed(seed)
    chosen, projections = _bases(shares, embedded, n_texts)
    spread = shares.square().sum(-1)
    sets = [torch.randn(embedded.shape, generator=random) for _ in range(n_random)]
    nulls = [_bases(shares, directions, n_texts)[1].square().sum(-1) for directions in sets]
    null = torch.stack(nulls).cumsum(-1) / spread.sum(-1)[..., None].clamp(min=1e-30)
    owner = tuple(name for name in names for _ in texts[name])
    means = _means(model, batches)
    compare = partial(_cosines, model, batches, embedded, means)
    clean = compare([])
    worth = _worth(chosen, projections, owner).flatten(1)
    own = [
        [heads[i] for i in each.argsort(descending=True, stable=True)[:n_ablated].tolist()]
        for each in worth
    ]
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(heads), n_ablated, replace=False) for _ in range(n_random)]
    return TextSpan(
        chosen=chosen,
        projections=projections,
        spread=spread,
        null=null,
        total=(whole - whole.mean(0)).square().sum(-1),
        texts=tuple(every),
        property_of=owner,
        heads={n: [list(head) for head in some] for n, some in zip(names, own, strict=True)},
        labels=_numbers(clean, every, owner, labels),
        given=labels is not None,
        clean=clean,
        ablated=torch.stack([compare(some) for some in own]),
        random=torch.stack([compare([heads[i] for i in some]) for some in drawn]),
    )


def _checked(texts: Texts, labels: Texts | None, count: int) -> list[str]:
    """The names of the properties."""
    if not isinstance(texts, Mapping) or not texts:
        raise ValueError("texts are lists by property, for example {'color': ['red', 'blue']}")
    if count < 2:
        raise ValueError(f"{count} picture(s); shares vary over pictures, so give two or more")
    every = [text for some in texts.values() for text in some]
    for name, some in texts.items():
        if isinstance(some, str) or len(some) < 2:
            raise ValueError(f"property {name!r} needs a list of two texts or more")
    doubled = [text for text in every if every.count(text) > 1]
    if doubled:
        raise ValueError(f"the text {doubled[0]!r} is given twice; leave one out")
    if labels is None:
        return list(texts)
    if set(labels) != set(texts):
        raise ValueError(f"labels of {sorted(labels)} for texts of {sorted(texts)}; give the same")
    for name, own in labels.items():
        odd = [label for label in own if label not in texts[name]]
        if odd or len(own) != count:
            what = f"{odd[0]!r} is none of its texts" if odd else f"{len(own)} for {count} pictures"
            raise ValueError(f"labels of {name!r}: {what}; give one of its texts per picture")
    return list(texts)


def _check_numbers(n_texts: int, n_random: int, n_ablated: int, heads: int) -> None:
    if n_texts < 1 or n_random < 1:
        raise ValueError(f"n_texts is {n_texts}, n_random {n_random}; give 1 or more")
    if not 1 <= n_ablated <= heads:
        raise ValueError(f"n_ablated is {n_ablated}, but there are {heads} heads")


def _numbers(
    clean: Tensor, every: Sequence[str], owner: Sequence[str], labels: Texts | None
) -> Int[Tensor, "property image"]:
    """The number of the right text of every picture, or of the nearest."""
    rows = []
    for name in dict.fromkeys(owner):
        own = torch.tensor([i for i, p in enumerate(owner) if p == name])
        if labels is None:
            rows.append(own[clean[:, own].argmax(-1)])
        else:
            rows.append(torch.tensor([list(every).index(text) for text in labels[name]]))
    return torch.stack(rows)


# Bases ---------------------------------------------------------------------------------------


def basis(
    shares: Float[Tensor, "image d"], directions: Float[Tensor, "text d"], n: int
) -> tuple[Int[Tensor, " rank"], Float[Tensor, "rank image"]]:
    """The directions that explain most of some shares, one after another.

    Args:
        shares: less their mean.
        n: of the basis.

    Returns:
        Numbers of the directions, -1 where none is left, and the shares' projections on each, as
        far as it is orthogonal to those before.
    """
    _, sizes, rows = torch.linalg.svd(shares, full_matrices=False)
    rows = rows[sizes > NOTHING * sizes.amax().clamp(min=1e-30)]
    left = directions @ rows.T @ rows
    floor = NOTHING * directions.norm(dim=-1)
    chosen, projections = torch.full((n,), -1), torch.zeros(n, len(shares))
    for rank in range(n):
        norms = left.norm(dim=-1)
        unit = left / norms.clamp(min=1e-30)[:, None]
        along = (unit @ shares.T) * (norms > floor)[:, None]
        best = int(along.square().sum(-1).argmax())
        if norms[best] <= floor[best]:
            break
        chosen[rank], projections[rank] = best, along[best]
        shares = shares - along[best][:, None] * unit[best]
        left = left - (left @ unit[best])[:, None] * unit[best]
    return chosen, projections


def _bases(
    shares: Float[Tensor, "layer head image d"], directions: Float[Tensor, "text d"], n: int
) -> tuple[Int[Tensor, "layer head rank"], Float[Tensor, "layer head rank image"]]:
    """The basis of every head."""
    found = [basis(own, directions, n) for own in shares.flatten(0, 1)]
    chosen, projections = (torch.stack(column) for column in zip(*found, strict=True))
    return chosen.unflatten(0, shares.shape[:2]), projections.unflatten(0, shares.shape[:2])


def _worth(
    chosen: Int[Tensor, "layer head rank"],
    projections: Float[Tensor, "layer head rank image"],
    owner: Sequence[str],
) -> Float[Tensor, "property layer head"]:
    """Variance of every head that the chosen texts of each property explain."""
    each = projections.square().sum(-1)
    own = np.array(owner, dtype=object)[chosen.clamp(min=0).numpy()]
    found = [torch.as_tensor(own == name) & (chosen >= 0) for name in dict.fromkeys(owner)]
    return torch.stack([(each * mask).sum(-1) for mask in found])


# Ablation ------------------------------------------------------------------------------------


def _hook(layer: int) -> str:
    return f"vision.blocks.{layer}.attn.hook_z"


@torch.no_grad()
def _means(model: HookedMultimodal, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The mean output of every head over all pictures, by hook [pos, head, d_head]."""
    hooks = [_hook(layer) for layer in range(model.towers["vision"].cfg.n_layers)]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for hook, value in values(model, batch, hooks).items():
            sums[hook] = sums.get(hook, 0) + value.double().sum(0)
    count = sum(len(media) for batch in batches for media in batch.layout.media)
    return {hook: total / count for hook, total in sums.items()}


def _cosines(
    model: HookedMultimodal,
    batches: Sequence[Batch],
    texts: Float[Tensor, "text d"],
    means: Mapping[str, Tensor],
    heads: Sequence[Head],
) -> Float[Tensor, "image text"]:
    """The cosine of every picture and text, with some heads at their mean."""

    def ablate(value: Tensor, hook: Any) -> Tensor:
        own = [head for layer, head in heads if _hook(layer) == hook.name]
        new = value.clone()
        new[:, :, own] = means[hook.name][:, own].to(value)
        return new

    live: list[Any] = [(_hook(layer), ablate) for layer in sorted({layer for layer, _ in heads})]
    with model.hooks(fwd_hooks=live):
        return torch.cat([embeddings(model, batch)[0] for batch in batches]) @ texts.T

"""Network dissection: which concept does each unit of a vision tower pick out of the pictures?

A unit k has one activation at every patch x of every picture. Its map is where it is among its
highest, over the whole data set, and the concept c's mask is where the concept is to be seen:

    M_k(x) = [a_k(x) > T_k],   T_k such that a share `top` of all patches lies above,

    IoU(k, c) = sum over pictures |M_k and L_c| / sum over pictures |M_k or L_c|

(Bau et al. 1704.05796, with patches in place of pixels). A unit detects the concept with which its
IoU is largest, where that is at least `least` and above all shuffles. Null: pictures exchange
their masks, which keeps how large a concept is and where in pictures it mostly lies; the largest
IoU over concepts is taken there, too. Each shuffle, beside the others, says how many units would
count by chance. As in the paper the space is also rotated at random, a_k <- (Q a)_k with Q
orthogonal: what single units say beyond that is a property of the basis and not of the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.pairs import PairDataset
from mechmm.engine.boxes import places_in
from mechmm.engine.checks import check_limits, check_seed
from mechmm.engine.located import located
from mechmm.engine.places import Ints
from mechmm.engine.sites import READING, SEEING, Sites, named, unfit_of
from mechmm.engine.states import Data, check_data, count, prompts_of, states
from mechmm.model.batch import Batch
from mechmm.model.hooked import VISION, HookedMultimodal
from mechmm.model.layout import Box, Patches, SpanError
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result

Concepts = Mapping[str, Sequence[Sequence[Box | Patches]]]
"""Name -> for every example the places where the concept is to be seen; none is an empty list."""
SHOWN = 20
"""Units in a figure."""
RESAMPLES = 1000
LEAST = 0.04
"""The IoU from which on Bau et al. call a unit a detector."""


@dataclass(frozen=True, eq=False)
class Dissection(Result):
    """How every unit's map and every concept's mask overlap.

    Attributes:
        overlap: patches of both, by example [example, unit, concept].
        active: patches of the unit's map [example, unit].
        area: patches of the concept's mask [example, concept].
        null: largest IoU over concepts where pictures exchange masks [shuffle, unit].
        rotated: largest IoU over concepts of the units of a randomly rotated space [unit].
        rotated_null: the same where pictures exchange masks [shuffle, unit].
        thresholds: T of every unit [unit].
        units: hook, layer, kind and number of every unit.
        concepts: their names. top: share of patches above T. least: IoU of a detector.
    """

    overlap: Int[Tensor, "example unit concept"] = field(metadata={"axis": 0})
    active: Int[Tensor, "example unit"] = field(metadata={"axis": 0})
    area: Int[Tensor, "example concept"] = field(metadata={"axis": 0})
    null: Float[Tensor, "shuffle unit"]
    rotated: Float[Tensor, " unit"]
    rotated_null: Float[Tensor, "shuffle unit"]
    thresholds: Float[Tensor, " unit"]
    units: pd.DataFrame
    concepts: tuple[str, ...]
    top: float
    least: float

    def iou(self) -> Float[Tensor, "unit concept"]:
        """Intersection over union of every unit's map and every concept's mask."""
        return _iou(self.overlap.sum(0), self.active.sum(0), self.area.sum(0))

    def best(self) -> Int[Tensor, " unit"]:
        """The concept with which a unit's IoU is largest, as an index into `concepts`."""
        return self.iou().argmax(-1)

    def detectors(self) -> Bool[Tensor, " unit"]:
        """Whether a unit's largest IoU is at least `least`, and above those of all shuffles."""
        return self._beyond(self.iou().amax(-1), self.null)

    def rotated_detectors(self) -> Bool[Tensor, " unit"]:
        """The same of the units of the rotated space."""
        return self._beyond(self.rotated, self.rotated_null)

    def by_chance(self) -> Float[Tensor, " shuffle"]:
        """How many units count as detectors in each shuffle, beside the other shuffles."""
        counts = [
            self._beyond(own, torch.cat([self.null[:i], self.null[i + 1 :]])).sum()
            for i, own in enumerate(self.null)
        ]
        return torch.stack(counts).float()

    def _beyond(self, found: Tensor, null: Tensor) -> Tensor:
        return (found >= self.least) & (found > null.amax(0))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per unit, largest IoU first: its concept, the largest IoU of all its shuffles,
        and whether it is a detector."""
        table = self.units.assign(
            concept=np.array(self.concepts)[self.best().numpy()],
            iou=self.iou().amax(-1).numpy(),
            null_high=self.null.amax(0).numpy(),
            detector=self.detectors().numpy(),
        )
        return table.sort_values("iou", ascending=False, kind="stable").reset_index(drop=True)

    def by_layer(self) -> pd.DataFrame:
        """One row per hook: how many of its units are detectors, of how many different concepts,
        and the mean over units of the largest IoU (`iou`); of the rotated space the detectors
        (`rotated`) and the mean (`rotated_iou`); the smallest and largest mean of a shuffle
        (`null_low`, `null_high`)."""
        rows, largest = [], self.iou().amax(-1)
        found, rotated = self.detectors(), self.rotated_detectors()
        for hook, own in self.units.groupby("hook", sort=False):
            at = torch.tensor(own.index.tolist())
            shuffles = self.null[:, at].mean(-1)
            row = {
                "hook": hook,
                "layer": own["layer"].iloc[0],
                "units": len(own),
                "detectors": int(found[at].sum()),
                "concepts": len(self.best()[at][found[at]].unique()),
                "iou": float(largest[at].mean()),
                "rotated": int(rotated[at].sum()),
                "rotated_iou": float(self.rotated[at].mean()),
                "null_low": float(shuffles.amin()),
                "null_high": float(shuffles.amax()),
            }
            rows.append(row)
        return pd.DataFrame(rows)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `concepts`, how many units detect each, over how many of any would by
        chance; `units`, the largest IoUs with intervals over pictures, over those of shuffles;
        `layers`, the mean of the largest IoU of every hook beside that of the rotated space."""
        return {"concepts": self._concepts(), "units": self._units(), "layers": self._layers()}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the tables."""
        table = self.to_dataframe()
        contents = [*self.plot().values(), self.by_layer(), table[table["detector"]].head(SHOWN)]
        return Page(title, self.summary(), [Section("Units", contents)], facts or {})

    def summary(self) -> str:
        """How many units detect how many concepts, and how many would by chance, in words."""
        found, top = self.detectors(), self.to_dataframe().iloc[0]
        different = self.best()[found].unique()
        return (
            f"{len(self.units)} units, {len(self.overlap)} pictures, {len(self.concepts)} "
            f"concepts. {int(found.sum())} units detect {len(different)} concepts (IoU at least "
            f"{self.least:g} and above all of {len(self.null)} shuffles); in a shuffle at most "
            f"{int(self.by_chance().max())} units, in the rotated space "
            f"{int(self.rotated_detectors().sum())}. Mean of the largest IoUs: "
            f"{float(self.iou().amax(-1).mean()):.3f}, rotated {float(self.rotated.mean()):.3f}, "
            f"exchanged masks {float(self.null.mean()):.3f}. Largest of all: {top['iou']:.2f}, of "
            f"{_name(top)} with {top['concept']} (exchanged masks: at most "
            f"{top['null_high']:.2f})."
        )

    def _concepts(self) -> Figure:
        counts = torch.bincount(self.best()[self.detectors()], minlength=len(self.concepts))
        order = counts.argsort(descending=True, stable=True).tolist()
        names, values = [self.concepts[i] for i in order], [float(counts[i]) for i in order]
        title = f"units that detect a concept, of {len(self.units)}"
        null = (0.0, float(self.by_chance().max()))
        extra = {"value_title": "units", "null_title": "exchanged masks, all concepts"}
        return plots.bars(names, values, None, None, title, null=null, **extra)

    def _units(self) -> Figure:
        table = self.to_dataframe().head(SHOWN)
        order = self.iou().amax(-1).argsort(descending=True, stable=True)[:SHOWN]
        low, high = self._intervals(order)
        null = self.null[:, order]
        names = [f"{_name(row)}: {row['concept']}" for _, row in table.iterrows()]
        extra = {"value_title": "IoU", "null_title": "exchanged masks"}
        ends = (float(null.min()), float(null.max()))
        title = "units and the concepts that they pick out"
        return plots.bars(names, table["iou"].to_numpy(), low, high, title, null=ends, **extra)

    def _intervals(self, units: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """95 % bootstrap intervals over pictures of some units' largest IoUs: sums are resampled,
        and the ratio taken."""
        best = self.best()[units]
        overlap = self.overlap[:, units, best].double()
        union = self.active[:, units] + self.area[:, best] - overlap
        n = len(overlap)
        draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        weights = torch.from_numpy(draws).double()
        ratios = (weights @ overlap) / (weights @ union).clamp(min=1)
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975]).double(), dim=0)
        return low.numpy(), high.numpy()

    def _layers(self) -> Figure:
        table = self.by_layer().reset_index(names="x")
        empty = {"low": np.nan, "high": np.nan, "name": table["hook"]}
        series = {
            label: table[["x"]].assign(value=table[column], **empty)
            for label, column in (("units", "iou"), ("rotated space", "rotated_iou"))
        }
        null = table[["x"]].assign(low=table["null_low"], high=table["null_high"])
        extra = {"x_title": "hook, in order", "y_title": "IoU", "level": None, "null": null}
        title = "mean over units of the largest IoU with a concept"
        return plots.lines(series, title, null_title="exchanged masks", **extra)


def _name(row: Any) -> str:
    layer = "" if pd.isna(row["layer"]) else f"layer {row['layer']} "
    return f"{layer}{row['kind']} {row['unit']}"


def _iou(
    overlap: Shaped[Tensor, "unit concept"],
    active: Shaped[Tensor, " unit"],
    area: Shaped[Tensor, " concept"],
) -> Float[Tensor, "unit concept"]:
    union = active.double()[:, None] + area.double() - overlap.double()
    return (overlap.double() / union.clamp(min=1)).float()


def dissection(
    model: HookedMultimodal,
    data: Data,
    concepts: Concepts | None = None,
    *,
    sites: Sites | None = None,
    top: float = 0.02,
    least: float = LEAST,
    n_shuffled: int = 20,
    seed: int = 0,
    batch_size: int = 16,
) -> Dissection:
    """Which concept every unit of a vision tower picks out, by intersection over union.

    All activations are held at once: 4 bytes for every patch of every picture and unit. Choose
    fewer `sites` where that is too much.

    Args:
        data: pairs (the clean prompts are read), or batches.
        concepts: name -> for every example the places where it is to be seen; for scenes
            `mechmm.data.shapes.concepts` makes them. Default: the pairs' own spans in pictures.
        sites: hooks of one tower, or of the projector, at one span; every feature of a hook is a
            unit. Default: the hidden units of all MLPs of the vision tower, at `image`.
        top: share of patches that lie above a unit's threshold, over all pictures.
        least: the IoU of a detector.
        n_shuffled: exchanges of masks among pictures that have equally many patches.
        seed: of the exchanges and of the rotation.

    Raises:
        ValueError: no concepts, one that is nowhere, or that does not say where for every example;
            sites of several towers or spans; a model without a vision tower or without hidden units
            in it; fewer than two shuffles; no two pictures that could exchange masks; a share of
            patches that is not between one of them and half.
        SpanError: a place outside a picture; an example without a picture.
        SiteError, UnknownHookError: a site that the model does not have.
    """
    check_seed(seed)
    check_limits(batch_size=batch_size)
    if n_shuffled < 2:
        raise ValueError(f"n_shuffled is {n_shuffled}; give 2 or more: each stands beside others")
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}; an IoU lies above 0 and at most at 1")
    sites = _hidden(model) if sites is None else sites
    check_data(model, data, sites)
    tower = _tower(model, sites)
    concepts = _checked(_own(data) if concepts is None else concepts, count(data))
    masks = _masks(data, sites, tower, concepts, batch_size)
    if not 1 <= round(top * len(masks)) <= len(masks) / 2:
        raise ValueError(f"top is {top} of {len(masks)} patches; give a share from one to half")
    rng = np.random.default_rng(seed)
    orders = [masks.exchanged(rng) for _ in range(n_shuffled)]
    read = [
        states(model, batch, sites, indices, seed)
        for batch, indices in prompts_of(data, batch_size)
    ]
    sizes = [own.values.shape[1] for own in read[0]]
    values = torch.cat([torch.cat([own.values for own in found], dim=1) for found in read])
    turned = _rotated(values, sizes, rng)
    maps, thresholds = _highest(values, top)
    other, _ = _highest(turned, top)
    found = [masks.best(which, order) for which in (maps, other) for order in orders]
    return Dissection(
        **masks.counts(maps),
        null=torch.stack(found[:n_shuffled]),
        rotated=masks.best(other),
        rotated_null=torch.stack(found[n_shuffled:]),
        thresholds=thresholds,
        units=_units(sites, sizes),
        concepts=tuple(concepts),
        top=top,
        least=least,
    )


def _hidden(model: HookedMultimodal) -> Sites:
    """The hidden units of all MLPs of the vision tower."""
    name = model.family.architecture
    if VISION not in model.towers or unfit_of(model, VISION):
        known = ", ".join(model.towers)
        raise ValueError(
            f"{name} has no vision tower with patches (its towers: {known}){_elsewhere(model)}"
        )
    tower, found = model.towers[VISION], Sites(pd.DataFrame())
    for layer in range(tower.cfg.n_layers):
        hook = f"{tower.prefix}blocks.{layer}.mlp.hook_post"
        if hook in model.hook_dict:
            found = found + named(model, hook, ("image",))
    if not len(found):
        raise ValueError(
            f"no MLP of the vision tower of {name} has hidden units of its own; give sites, for "
            "example mm.sites.residual(model, ['image'], towers=['vision'])"
        )
    return found


def _elsewhere(model: HookedMultimodal) -> str:
    """Which other tower has positions of a picture, as advice."""
    sees = any(medium.kind == "image" for medium in model.family.media)
    others = [name for name in model.towers if name in READING and not unfit_of(model, name)]
    if not sees or not others:
        return ", and no other in which a picture has places"
    return (
        "; give sites of another tower, for example "
        f"mm.sites.residual(model, ['image'], towers=[{others[0]!r}])"
    )


def _tower(model: HookedMultimodal, sites: Sites) -> str:
    """The tower of sites that all have the same places."""
    table = sites.table
    towers, spans = table["tower"].unique(), table["span"].unique()
    if len(towers) > 1 or len(spans) > 1 or not spans[0] or table["neuron"].notna().any():
        raise ValueError(
            f"the sites are of {', '.join(towers)} at {', '.join(map(repr, spans))}; give whole "
            "hooks of one tower at one span, whose units are compared at the same patches"
        )
    tower = str(towers[0])
    projector = model.family.projectors.get(tower.partition(".")[0])
    if tower not in (*READING, *SEEING) and (projector is None or not projector.last):
        raise ValueError(f"positions in {tower} stand for no part of a picture; choose a tower")
    return tower


def _own(data: Data) -> dict[str, list[list[Box | Patches]]]:
    """What the pairs' spans name in pictures."""
    if not isinstance(data, PairDataset):
        raise ValueError("batches name no concepts; say where each is to be seen (concepts)")
    places = [
        {name: place for name, place in pair.spans.items() if isinstance(place, Box | Patches)}
        for pair in data
    ]
    names = dict.fromkeys(name for own in places for name in own)
    return {name: [[own[name]] if name in own else [] for own in places] for name in names}


def _checked(concepts: Concepts, examples: int) -> Concepts:
    """Refuse concepts that do not say where they are."""
    if not concepts:
        raise ValueError("there are no concepts; give at least one, with its places")
    for name, places in concepts.items():
        if len(places) != examples:
            raise ValueError(
                f"concept {name!r} has places for {len(places)} examples, and there are {examples}"
            )
        odd = [place for own in places for place in own if not isinstance(place, Box | Patches)]
        if odd or not any(map(len, places)):
            raise ValueError(
                f"concept {name!r} is {'at ' + repr(odd[0]) if odd else 'nowhere'}; give boxes or "
                "patches, in one picture at least"
            )
    return concepts


@dataclass(frozen=True, eq=False)
class _Masks:
    """Where every concept is, patch by patch.

    Attributes:
        values: [patch, concept], 1 where it is to be seen.
        starts: the first patch of every example, and the end.
        grids: what has to be equal for two examples to exchange masks.
    """

    values: Float[Tensor, "patch concept"]
    starts: Ints
    grids: Sequence[Any]

    def __len__(self) -> int:
        return len(self.values)

    def exchanged(self, rng: np.random.Generator) -> Ints:
        """Patches in an order in which every example has those of another one of its size."""
        partner = np.arange(len(self.grids))
        for grid in set(self.grids):
            own = rng.permutation([i for i, other in enumerate(self.grids) if other == grid])
            partner[own] = np.roll(own, 1)
        if (partner == np.arange(len(partner))).all():
            raise ValueError(
                "no two pictures have equally many patches, so that none could exchange masks; "
                "give more of one size"
            )
        pieces = [np.arange(self.starts[i], self.starts[i + 1]) for i in partner]
        return np.concatenate(pieces)

    def best(self, maps: Float[Tensor, "patch unit"], order: Ints | None = None) -> Tensor:
        """The largest IoU of every unit over concepts."""
        values = self.values if order is None else self.values[torch.as_tensor(order)]
        return _iou(maps.T @ values, maps.sum(0), values.sum(0)).amax(-1)

    def counts(self, maps: Float[Tensor, "patch unit"]) -> dict[str, Tensor]:
        """Patches of maps, of masks and of both, by example."""
        parts = [slice(*ends) for ends in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return {
            "overlap": torch.stack([maps[own].T @ self.values[own] for own in parts]).int(),
            "active": torch.stack([maps[own].sum(0) for own in parts]).int(),
            "area": torch.stack([self.values[own].sum(0) for own in parts]).int(),
        }


def _masks(data: Data, sites: Sites, tower: str, concepts: Concepts, batch_size: int) -> _Masks:
    """The masks of all concepts at the places of the sites."""
    rows, sizes, grids, first = [], [], [], Sites(sites.table.iloc[:1])
    for batch, indices in prompts_of(data, batch_size):
        places = located(first, batch.layout, 0, indices)
        for prompt, number in enumerate(indices):
            there = places.trial == prompt
            if not there.any():
                span = sites.table["span"].iloc[0]
                raise SpanError(
                    f"example {number} has no position in span {span!r} of {tower}; choose another "
                    "span or drop the example"
                )
            at = list(zip(places.row[there].tolist(), places.position[there].tolist(), strict=True))
            rows.append(_mask(batch, tower, prompt, at, [own[number] for own in concepts.values()]))
            views = [view for medium in batch.layout.media[prompt] for view in medium.views]
            sizes.append(len(at))
            grids.append((len(at), *((view.rows, view.columns) for view in views)))
    return _Masks(torch.cat(rows), np.cumsum([0, *sizes]), grids)


def _mask(
    batch: Batch,
    tower: str,
    prompt: int,
    at: Sequence[tuple[int, int]],
    concepts: Sequence[Sequence[Box | Patches]],
) -> Float[Tensor, "patch concept"]:
    """1 at the places of one prompt where a concept is to be seen."""
    seen = [
        set().union(*(places_in(batch.layout, tower, prompt, place) for place in own))
        for own in concepts
    ]
    return torch.tensor([[place in own for own in seen] for place in at]).float()


def _highest(
    values: Float[Tensor, "patch unit"], top: float
) -> tuple[Float[Tensor, "patch unit"], Float[Tensor, " unit"]]:
    """1 where a unit is above its threshold, and the thresholds; equal values are left out."""
    threshold = values.topk(round(top * len(values)) + 1, dim=0).values[-1]
    return (values > threshold).float(), threshold


def _rotated(
    values: Float[Tensor, "patch unit"], sizes: Sequence[int], rng: np.random.Generator
) -> Float[Tensor, "patch unit"]:
    """The units of every hook, rotated at random."""
    parts = []
    for own in values.split(list(sizes), dim=1):
        width = own.shape[1]
        normal = torch.from_numpy(rng.standard_normal((width, width))).to(own)
        parts.append(own @ torch.linalg.qr(normal).Q)
    return torch.cat(parts, dim=1)


def _units(sites: Sites, sizes: Sequence[int]) -> pd.DataFrame:
    """Hook, layer, kind, head and number of every unit."""
    rows = sites.table[["hook", "layer", "kind"]].loc[np.repeat(np.arange(len(sites)), sizes)]
    units = np.concatenate([np.arange(size) for size in sizes])
    return rows.reset_index(drop=True).assign(unit=units)

"""Attention maps: where heads look in the picture, and whether that is where the answer comes from.

For every head, the weights a_i that the last position gives image tokens i. Its attention sum is
sum_i a_i. Its spatial entropy: tokens above the map's mean form connected components C (eight
neighbours) of the grid, with p_C = |C| / sum |C|, and

    H = - sum_C p_C ln p_C      (nats; 0: one compact region).

Localisation heads are those with an attention sum of at least a threshold (default: the elbow, the
point of the sorted sums farthest from the straight line from the largest to the smallest) and,
among them, the lowest entropy (Kang et al. 2503.06287).

Over all layers, with A a layer's weights [head, query, key], read at the last position's row:

    rollout      prod_l (mean_h A_l + 1) / 2                        (Abnar & Zuidema 2005.00928)
    relevance    prod_l (1 + mean_h max(0, A_l * dy / dA_l))        (Chefer et al. 2103.15679)

where y is the logit of the answer's first token less the foil's. All of these are observations.
What they are held against is in the same result: how much of a map lies on the asked object, on
the distractor, and of the map shuffled over the picture; and the metric with the localisation
heads' weights from the last position to the picture set to 0, beside as many random heads, out of
those that reach the threshold too where there are enough, so that as much attention is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import Answers, Metric, Reading, accuracy, last_logits, name_of
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.cells import Cells, concatenated
from mechmm.engine.checks import check_limits, check_pairs, check_seed
from mechmm.engine.lensed import first_picture
from mechmm.engine.located import Located
from mechmm.engine.places import Ints, Places, Values
from mechmm.engine.routes import Route, has_attention, lengthened, scores_hook
from mechmm.engine.sweep import Report
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError
from mechmm.results import plots
from mechmm.results.maps import heat_map
from mechmm.results.overlay import patch_overlay
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

N_RANDOM = 5
"""Random sets of heads."""
N_SHUFFLED = 200
"""Times that a map is shuffled over the picture."""
SUMMED = ("rollout", "relevance")
ABLE, ANY = "heads that reach the threshold", "all other heads"


@dataclass(frozen=True, eq=False)
class AttentionMaps(Result):
    """Weights of the last position on image tokens, and what they are held against.

    Attributes:
        weights: of every head [head, example, place]; 0 at places that a prompt lacks.
        summed: rollout and relevance over all layers [two, example, place].
        where: medium, view, row and column of every place, -1 for none [example, place, four].
        present: which places a prompt has [example, place].
        inside: which of them are in a span [span, example, place].
        spans: their names.
        heads: layer and head of the rows of `weights`.
        chosen: rows of the localisation heads. threshold: that their attention sum reached.
        closed: the metric with their weights on the picture at 0 [example].
        random: with those of as many random heads [draw, example].
        base: with all [example].
        control: out of which the random ones are drawn.
        metric: its name. seed: of the null. picture: of the first example.
    """

    weights: Float[Tensor, "head example place"] = field(metadata={"axis": 1})
    summed: Float[Tensor, "two example place"] = field(metadata={"axis": 1})
    where: Int[Tensor, "example place four"] = field(metadata={"axis": 0})
    present: Bool[Tensor, "example place"] = field(metadata={"axis": 0})
    inside: Bool[Tensor, "span example place"] = field(metadata={"axis": 1})
    spans: tuple[str, ...]
    heads: pd.DataFrame
    chosen: tuple[int, ...]
    threshold: float
    closed: Float[Tensor, " example"] = field(metadata={"axis": 0})
    random: Float[Tensor, "draw example"] = field(metadata={"axis": 1})
    base: Float[Tensor, " example"] = field(metadata={"axis": 0})
    control: str
    metric: str
    seed: int
    picture: Image.Image | None = field(default=None, metadata={"keep": "first"})

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: mean attention sum (`sum`), mean spatial entropy (`entropy`, nats),
        whether it is a localisation head, and the mean share of its map on every span."""
        shares = {f"on_{s}": self._on(self.weights, i).mean(1) for i, s in enumerate(self.spans)}
        return self.heads.assign(
            sum=self.weights.sum(-1).mean(1).numpy(),
            entropy=spatial_entropy(self.weights, self.where, self.present).mean(1).numpy(),
            localisation=np.isin(np.arange(len(self.heads)), self.chosen),
            **{name: share.numpy() for name, share in shares.items()},
        )

    def maps(self) -> dict[str, Float[Tensor, "example place"]]:
        """Maps by name: the mean over localisation heads, over all heads, rollout, relevance."""
        means = self.weights[list(self.chosen)].mean(0), self.weights.mean(0)
        return dict(
            zip(("localisation heads", "all heads", *SUMMED), (*means, *self.summed), strict=True)
        )

    def coverage(self) -> pd.DataFrame:
        """One row per map and span: the mean share of the map that lies on the span and its 95 %
        interval over examples, and the range of this mean where every example's map is shuffled
        over its picture (2.5 and 97.5 %)."""
        rows = []
        for name, values in self.maps().items():
            null = self._shuffled(values)
            for number, span in enumerate(self.spans):
                share = self._on(values[None], number)[0]
                low, high = (float(bound) for bound in bootstrap_interval(share))
                ends = np.quantile(null[number].numpy(), (0.025, 0.975)).tolist()
                rows.append((name, span, float(share.mean()), low, high, *ends))
        columns = ("map", "span", "share", "low", "high", "shuffled_low", "shuffled_high")
        return pd.DataFrame(rows, columns=list(columns))

    def _on(
        self, values: Float[Tensor, "map example place"], span: int
    ) -> Float[Tensor, "map example"]:
        """The share of maps that lies on a span; 0 of an empty map."""
        return (values * self.inside[span]).sum(-1) / values.sum(-1).clamp_min(1e-12)

    def _shuffled(self, values: Float[Tensor, "example place"]) -> Float[Tensor, "span draw"]:
        """Mean shares on every span of shuffled maps."""
        rng = torch.Generator().manual_seed(self.seed)
        found = []
        for _ in range(N_SHUFFLED):
            # Present places come first, and stay so: only these change places.
            order = (torch.rand(values.shape, generator=rng) - 2.0 * self.present).argsort(1)
            mixed = values.gather(1, order)
            found.append([self._on(mixed[None], s).mean() for s in range(len(self.spans))])
        return torch.tensor(found).T

    def knockout(self) -> pd.DataFrame:
        """The mean metric with all heads, without the localisation heads' look at the picture, and
        the mean, smallest and largest of random draws (columns value, low, high)."""
        low, high = (float(bound) for bound in bootstrap_interval(self.closed))
        draws = self.random.mean(1)
        rows = [
            ("all heads", float(self.base.mean()), np.nan, np.nan),
            ("without localisation heads", float(self.closed.mean()), low, high),
            ("without random heads", *(float(v) for v in (draws.mean(), draws.min(), draws.max()))),
        ]
        return pd.DataFrame(rows, columns=["run", "value", "low", "high"])

    def plot(self) -> dict[str, Figure]:
        """Attention sum of every head (`heads`), what maps cover (`coverage`), the metric without
        localisation heads (`knockout`), and maps over the first picture (`picture`)."""
        table, cover, runs = self.to_dataframe(), self.coverage(), self.knockout()
        wide = table.pivot(index="layer", columns="head", values="sum")
        count = len(self.base)
        axes = {"x_title": "head", "y_title": "layer", "value_title": "sum", "n": count}
        names = [f"{row.map}, {row.span}" for row in cover.itertuples()]
        share, low, high = (cover[name].to_numpy(float) for name in ("share", "low", "high"))
        null = float(cover["shuffled_low"].min()), float(cover["shuffled_high"].max())
        extra = {"value_title": "share of the map", "null_title": "shuffled maps"}
        title = f"what maps of the last position cover, {count} pairs"
        value, least, most = (runs[name].to_numpy(float) for name in ("value", "low", "high"))
        figures = {
            "heads": heat_map(
                wide.to_numpy(float),
                wide.index.tolist(),
                wide.columns.tolist(),
                "attention of the last position to the picture",
                **axes,
            ),
            "coverage": plots.bars(names, share, low, high, title, null=null, **extra),
            "knockout": plots.bars(
                runs["run"].tolist(),
                value,
                least,
                most,
                f"last->image closed in {len(self.chosen)} heads, {count} pairs",
                value_title=self.metric,
            ),
        }
        if self.picture is not None and bool((self.where[0, :, 2] >= 0).any()):
            figures["picture"] = self._over_picture(self.picture)
        return figures

    def _over_picture(self, picture: Image.Image) -> Figure:
        """Maps of the first example over the first view of its first picture, each as shares."""
        where = self.where[0]
        there = ((where[:, :2] == 0).all(1) & (where[:, 2:] >= 0).all(1)).nonzero().flatten()
        row, column = where[there, 2], where[there, 3]
        grids = np.full((4, int(row.max()) + 1, int(column.max()) + 1), np.nan)
        for grid, values in zip(grids, self.maps().values(), strict=True):
            own = values[0] / values[0].sum().clamp_min(1e-12)
            grid[row.numpy(), column.numpy()] = own[there].numpy()
        title = "attention of the last position, example 0"
        return patch_overlay(picture, grids, title, list(self.maps()), value_title="share")

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the tables."""
        contents = [*self.plot().values(), self.coverage(), self.knockout(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Attention", contents)], facts or {})

    def summary(self) -> str:
        """Which heads were chosen, and what closing them did, in words."""
        pairs = self.heads.iloc[list(self.chosen)].itertuples()
        names = ", ".join(f"{row.layer}.{row.head}" for row in pairs)
        base, closed, null = self.knockout()["value"]
        return (
            f"{len(self.base)} pairs; localisation heads (layer.head) {names}. {self.metric} is "
            f"{base:.2f} with all heads, {closed:.2f} where these do not see the picture from the "
            f"last position, and {null:.2f} where as many random ones, out of {self.control}, do "
            "not."
        )


def attention_maps(
    model: HookedMultimodal,
    pairs: PairDataset,
    spans: Sequence[str] = ("object", "distractor"),
    *,
    threshold: float | None = None,
    n_heads: int = 3,
    metric: Metric = accuracy,
    n_random: int = N_RANDOM,
    seed: int = 0,
    batch_size: int = 4,
    tokens: int | None = None,
    report: Report | None = None,
) -> AttentionMaps:
    """Where the last position of the clean prompts looks in the picture.

    Args:
        spans: of the pairs; of each, the tokens in the picture count.
        threshold: attention sum of a localisation head at least, as a mean over examples; None:
            the elbow.
        n_heads: localisation heads at most.
        metric: of the clean prompt with heads closed.
        n_random: draws of as many other heads, out of those that reach the threshold too or, where
            these are too few, of all.
        seed: of these.
        batch_size: pairs that run together; the weights of all layers are held for them.
        tokens: as for `patch`.
        report: called with (cells done, cells in all) of the runs with heads closed.

    Raises:
        ValueError: no spans, more than half of all heads, a threshold that no head reaches, a
            number below 1; as `patch`.
        RouteError: pictures that are not in the sequence.
        SpanError: a span that some pair does not have in its picture.
    """
    names = [spans] if isinstance(spans, str) else list(spans)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"spans are {names}; give one or more, each once")
    check_pairs(pairs, "clean")
    check_limits(n_random=n_random, batch_size=batch_size, n_heads=n_heads)
    check_seed(seed)
    Route.of("image->last", model)
    layers = has_attention(model, LANGUAGE, None)
    tower = model.towers[LANGUAGE]
    rows = [(layer, head) for layer in layers for head in range(tower.heads(layer))]
    heads = pd.DataFrame(rows, columns=["layer", "head"])
    if 2 * n_heads > len(heads):
        raise ValueError(
            f"n_heads is {n_heads}, but random ones are drawn from the others of {len(heads)} "
            f"heads; give at most {len(heads) // 2}"
        )
    where, present, inside = _places(pairs, names, batch_size)
    weights, summed = _weights(model, pairs, layers, present.shape[1], batch_size)
    sums = weights.sum(-1).mean(1)
    limit = elbow(sums) if threshold is None else float(threshold)
    chosen = _localisation(sums, spatial_entropy(weights, where, present).mean(1), limit, n_heads)
    others, control = _others(chosen, sums, limit, n_random, seed)
    closing = _Closing(model, heads, [chosen, *others])
    what = (model, pairs, 1 + n_random, closing.changes, metric, batch_size, tokens)
    found = Cells(*what).run(report)
    return AttentionMaps(
        weights=weights,
        summed=summed,
        where=where,
        present=present,
        inside=inside,
        spans=tuple(names),
        heads=heads,
        chosen=tuple(chosen),
        threshold=limit,
        closed=found.values[0],
        random=found.values[1:],
        base=found.base,
        control=control,
        metric=name_of(metric),
        seed=seed,
        picture=first_picture(pairs.batch([0]).clean),
    )


def spatial_entropy(
    weights: Float[Tensor, "head example place"],
    where: Int[Tensor, "example place four"],
    present: Bool[Tensor, "example place"],
) -> Float[Tensor, "head example"]:
    """How many regions, and how alike in size, the tokens above a map's mean form [nats]."""
    # Imported here because scipy takes a while to import.
    from scipy.ndimage import label

    # Neighbours are of one medium and view: only rows and columns are next to each other.
    near = np.zeros((3, 3, 3, 3), dtype=int)
    near[1, 1] = 1
    found = torch.zeros(weights.shape[:2])
    for example in range(weights.shape[1]):
        there = present[example] & (where[example] >= 0).all(1)
        at = where[example, there].numpy()
        grid = np.zeros(at.max(0) + 1, dtype=bool)
        for head, own in enumerate(weights[:, example, there].numpy()):
            grid[:] = False
            grid[tuple(at.T)] = own > own.mean()
            regions, _ = label(grid, near)  # type: ignore[misc]
            sizes = np.bincount(regions.ravel())[1:]
            shares = sizes / max(1, sizes.sum())
            found[head, example] = float(-(shares * np.log(shares)).sum())
    return found


def elbow(sums: Float[Tensor, " head"]) -> float:
    """The value where sorted sums bend most: farthest from the line between their ends."""
    ordered = sums.double().sort(descending=True).values
    line = torch.linspace(float(ordered[0]), float(ordered[-1]), len(ordered), dtype=torch.double)
    return float(ordered[int((line - ordered).abs().argmax())])


def _localisation(sums: Tensor, entropy: Tensor, limit: float, n_heads: int) -> list[int]:
    """Heads with the lowest entropy among those whose sum reaches the limit."""
    able = (sums.double() >= limit - 1e-9).nonzero().flatten()
    if not len(able):
        raise ValueError(
            f"no head reaches threshold {limit:g}: the largest mean attention sum is "
            f"{float(sums.max()):.3f}; give less"
        )
    return able[entropy[able].argsort(stable=True)][:n_heads].tolist()


def _others(
    chosen: Sequence[int], sums: Tensor, limit: float, n_random: int, seed: int
) -> tuple[list[list[int]], str]:
    """Random sets of as many of the other heads, and out of which."""
    rng = np.random.default_rng(seed)
    able = np.flatnonzero((sums.double() >= limit - 1e-9).numpy())
    pool, control = np.setdiff1d(able, chosen), ABLE
    if len(pool) < len(chosen):
        pool, control = np.setdiff1d(np.arange(len(sums)), chosen), ANY
    return [rng.choice(pool, len(chosen), False).tolist() for _ in range(n_random)], control


def _places(
    pairs: PairDataset, names: Sequence[str], batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(where, present, inside) of every image token, as in `AttentionMaps`."""
    where, inside = [], []
    for batch in pairs.batches(batch_size):
        layout = batch.clean.layout
        grid = torch.stack([layout.image, layout.view, layout.row, layout.column], -1)
        for prompt, pair in enumerate(batch.indices):
            image = layout.positions("image", prompt)
            masks = torch.stack([layout.mask(name)[prompt, image] for name in names])
            if not bool(masks.any(1).all()):
                name = names[int((~masks.any(1)).int().argmax())]
                raise SpanError(
                    f"pair {pair}: span {name!r} has no token in the picture; name another span "
                    "or drop the pair"
                )
            where.append(grid[prompt, image].long())
            inside.append(masks)
    width = max(len(each) for each in where)
    present = torch.stack([torch.arange(width) < len(each) for each in where])
    pad = torch.nn.functional.pad
    placed = torch.stack([pad(each, (0, 0, 0, width - len(each)), value=-1) for each in where])
    within = torch.stack([pad(each, (0, width - each.shape[1])) for each in inside], 1)
    return placed, present, within


def _weights(
    model: HookedMultimodal, pairs: PairDataset, layers: Sequence[int], width: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """(weights, summed) of every example, as in `AttentionMaps`."""
    weights, summed = [], []
    for batch in pairs.batches(batch_size):
        patterns, slopes = _patterns(model, batch.clean, batch.answers, layers)
        last = batch.clean.layout.last
        prompt = torch.arange(len(batch))
        rows = torch.cat([p[prompt, :, last] for p in patterns], 1)  # [prompt, head, position]
        over = torch.stack([_rollout(patterns, last), _relevance(patterns, slopes, last)], 1)
        for number in range(len(batch)):
            image = batch.clean.layout.positions("image", number)
            room = (0, width - len(image))
            weights.append(torch.nn.functional.pad(rows[number][:, image], room))
            summed.append(torch.nn.functional.pad(over[number][:, image], room))
    return torch.stack(weights, 1), torch.stack(summed, 1)


def _patterns(
    model: HookedMultimodal, batch: Batch, answers: Answers, layers: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [prompt, head, query, key] of every layer, and the slope of the answer's logit less
    the foil's by each."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(pattern: Tensor, hook: Any) -> Tensor:
        # A leaf beside the weights: its slope is theirs, whether or not parameters have any.
        change = torch.zeros_like(pattern, requires_grad=True)
        seen[hook.name] = pattern.detach(), change
        return pattern + change

    prefix = model.towers[LANGUAGE].prefix
    names = [f"{prefix}blocks.{layer}.attn.hook_pattern" for layer in layers]
    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, watch) for name in names]):
        logits = last_logits(model, batch)
        first = answers.answer_ids[:, :1], answers.foil_ids[:, :1]
        plus, minus = (logits.gather(1, ids.to(logits.device)).sum() for ids in first)
        changes = [seen[name][1] for name in names]
        slopes = torch.autograd.grad(plus - minus, changes)
    return [seen[name][0].float().cpu() for name in names], [s.float().cpu() for s in slopes]


def _rollout(
    patterns: Sequence[Float[Tensor, "prompt head query key"]], last: Int[Tensor, " prompt"]
) -> Float[Tensor, "prompt key"]:
    row = _at(patterns[0], last)
    for pattern in reversed(patterns):
        row = (row + torch.einsum("bq,bqk->bk", row, pattern.mean(1))) / 2
    return row


def _relevance(
    patterns: Sequence[Tensor], slopes: Sequence[Tensor], last: Int[Tensor, " prompt"]
) -> Float[Tensor, "prompt key"]:
    row = _at(patterns[0], last)
    for pattern, slope in zip(reversed(patterns), reversed(slopes), strict=True):
        row = row + torch.einsum("bq,bqk->bk", row, (pattern * slope).clamp_min(0).mean(1))
    return row


def _at(pattern: Tensor, last: Int[Tensor, " prompt"]) -> Float[Tensor, "prompt key"]:
    """1 at the last position of every prompt."""
    return torch.nn.functional.one_hot(last.cpu(), pattern.shape[-1]).float()


@dataclass(frozen=True, eq=False)
class _Closing:
    """Cells that hide the picture from the last position in some heads each."""

    model: HookedMultimodal
    heads: pd.DataFrame
    sets: Sequence[Sequence[int]]

    def changes(self, batch: PairBatch, part: Reading) -> tuple[Places, Values]:
        """What all cells hide in one reading of a batch."""
        route, finder = Route.of("image->last", self.model), Located(batch.clean.layout)
        layers = self.heads["layer"].unique().tolist()
        hooks = tuple(scores_hook(self.model, LANGUAGE, int(layer)) for layer in layers)
        found, keys, heads = [], [], []
        for cell, own in enumerate(self.sets):
            chosen = self.heads.iloc[list(own)]
            for prompt in range(len(batch)):
                hidden = route.hidden(finder, prompt)
                hidden = lengthened(hidden, route, batch.clean, part.batch, prompt)
                count = len(hidden.query)
                for layer, group in chosen.groupby("layer"):
                    trial = np.full(count, cell * len(batch) + prompt)
                    kind = np.full(count, layers.index(layer))
                    part_of = np.full(count, -1)
                    where = (trial, kind, hidden.row, hidden.query, part_of)
                    found.append(Places((), hidden.row, *where))
                    keys.append(hidden.keys)
                    heads += [group["head"].tolist()] * count
        places = concatenated(hooks, len(batch), len(self.sets), found)
        return places, _values(torch.as_tensor(np.concatenate(keys)), heads)


def _values(keys: Bool[Tensor, "place key"], heads: Sequence[Sequence[int]]) -> Values:
    def give(hook: str, at: Ints, now: Tensor) -> Tensor:
        hide = torch.zeros(now.shape, dtype=torch.bool, device=now.device)
        for row, place in enumerate(at.tolist()):
            hide[row, list(heads[place])] = keys[place, : now.shape[-1]].to(now.device)
        return now.masked_fill(hide, -torch.inf)

    return give

"""The table of places that an experiment touches: one row per site, both towers in one table.

A site is a hook, which of its heads (or all), and which positions: a span of the layout, one
position, or as many random ones (the null). Positions of the language model count from the first
token of a prompt that is not padding, negative ones from its end; positions of the vision tower
count its own sequence; those of the projector the tokens of an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TokenLayout

COLUMNS = ("hook", "tower", "layer", "kind", "head", "span", "position", "count")
TEXT_SPANS = ("text", "question", "last", "before_image")
RANDOM = "random "
READING = (LANGUAGE, "encoder", "text")
"""Towers whose positions are those of the prompt."""
SEEING = ("vision", "video", "audio")
"""Towers whose positions are those of the media; in all others, of what stands for them."""


@dataclass(frozen=True)
class Sites:
    """A table of sites.

    Attributes:
        table: one row per site with the columns hook, tower, layer (missing for the projector),
            kind (`resid_pre`, `head`, ...), head (missing: all), span (empty: see position),
            position (missing: see span), count (of random positions, else missing).
    """

    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def __add__(self, other: Sites) -> Sites:
        return Sites(pd.concat([self.table, other.table], ignore_index=True))

    def where(self, **columns: object) -> Sites:
        """The sites whose columns have the given values, for example `tower="vision"`."""
        keep = np.ones(len(self), dtype=bool)
        for name, value in columns.items():
            keep &= (self.table[name] == value).fillna(False).to_numpy(dtype=bool)
        return Sites(self.table[keep].reset_index(drop=True))

    def labels(self) -> list[str]:
        """A short name per site, for example `vision layer 2 head 1, object`."""
        return [_label(row) for row in self.table.itertuples()]


def _label(row) -> str:
    layer = "" if pd.isna(row.layer) else f" layer {row.layer}"
    head = "" if pd.isna(row.head) else f" {row.head}"
    place = row.span or f"position {row.position}"
    return f"{row.tower}{layer} {row.kind}{head}, {place}"


def residual(
    model: HookedMultimodal,
    spans: Sequence[str] = ("image", "question", "last"),
    *,
    positions: Iterable[int] | None = None,
    towers: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    point: str = "resid_pre",
) -> Sites:
    """The residual stream by layer and span, or by layer and single position.

    Args:
        spans: names of spans of the pairs' layouts; those of text are left out in other towers.
        positions: single positions instead of spans.
        towers: names of `model.towers`; default: all.
        layers: default: all that the model reads.
        point: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
    """
    return _per_layer(model, f"hook_{point}", point, spans, positions, towers, layers)


def mlps(
    model: HookedMultimodal,
    spans: Sequence[str] = ("all",),
    *,
    positions: Iterable[int] | None = None,
    towers: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
) -> Sites:
    """What each MLP adds to the residual stream, by layer and span (arguments as `residual`)."""
    return _per_layer(model, "hook_mlp_out", "mlp", spans, positions, towers, layers)


def attention(
    model: HookedMultimodal,
    spans: Sequence[str] = ("all",),
    *,
    positions: Iterable[int] | None = None,
    towers: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
) -> Sites:
    """What each attention layer adds, by layer and span (arguments as `residual`)."""
    return _per_layer(model, "hook_attn_out", "attn", spans, positions, towers, layers)


def heads(
    model: HookedMultimodal,
    spans: Sequence[str] = ("all",),
    *,
    towers: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
) -> Sites:
    """Every attention head's output (`hook_z`), by layer, head and span."""
    rows = []
    for name in _towers(model, towers):
        tower = model.towers[name]
        for layer in _layers(model, name, layers, "attn.hook_z"):
            hook = f"{tower.prefix}blocks.{layer}.attn.hook_z"
            if hook not in model.hook_dict:
                continue
            rows += [
                _row(hook, name, layer, "head", span, head=head)
                for head in range(tower.heads(layer))
                for span in _spans(name, spans)
            ]
    return _table(rows)


def patches(model: HookedMultimodal, *, layers: Iterable[int] | None = None) -> Sites:
    """Every single position of the vision tower's residual stream (`resid_pre`), by layer.

    Raises:
        ValueError: for a model without a vision tower, or with one that takes any size.
    """
    if "vision" not in model.towers:
        raise ValueError(f"no vision tower; this model has {', '.join(model.towers)}")
    n_ctx = model.towers["vision"].cfg.n_ctx
    if n_ctx < 1:
        raise ValueError(
            "this vision tower takes pictures of any size, so there is no number of patches; use "
            "residual(model, positions=range(...), towers=['vision'])"
        )
    return residual(model, positions=range(n_ctx), towers=["vision"], layers=layers)


def projector(model: HookedMultimodal, spans: Sequence[str] = ("image",)) -> Sites:
    """The projector's output, by span of image positions."""
    return _table(
        [
            _row(f"{prefix}.hook_out", prefix, None, "out", span)
            for prefix, row in model.family.projectors.items()
            for prefix in _numbered(model, prefix)
            if row.last
            for span in _spans(prefix, spans)
        ]
    )


def _numbered(model: HookedMultimodal, prefix: str) -> list[str]:
    """A projector's own prefix, or those of a list of projectors."""
    names = [name for name in model.hook_dict if re.fullmatch(rf"{prefix}(\.\d+)?\.hook_out", name)]
    return [name.removesuffix(".hook_out") for name in names]


def random_like(sites: Sites, layout: TokenLayout, n: int, seed: int = 0) -> Sites:
    """The null: for each tower, kind and span, `n` sites with a random layer and head of that group
    and random positions, as many as the span covers in the first prompt.

    Their span reads `random object`, where `object` is the span that they stand beside.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for (_, _, span), group in sites.table.groupby(["tower", "kind", "span"], sort=False):
        count = len(places(group.iloc[0], layout, 0))
        place = {"span": f"{RANDOM}{span}", "position": None, "count": count}
        chosen = rng.integers(len(group), size=n) if count else []
        rows += [{**group.iloc[int(index)].to_dict(), **place} for index in chosen]
    return _table(rows)


def places(
    site: pd.Series, layout: TokenLayout, prompt: int, seed: int = 0
) -> list[tuple[int, int]]:
    """(row, position) of a site in its hook's tensor, for one prompt.

    The row is the prompt for the language model, and the image, counted over the whole batch, for
    the other towers.

    Raises:
        SpanError: for a span that the layout has not.
        ValueError: for a position outside the sequence.
    """
    layout.refuse_two_kinds()
    every = _everything(site.tower, layout, prompt)
    if site.span.startswith(RANDOM):
        rng = np.random.default_rng([seed, int(site.name or 0), prompt])
        chosen = rng.choice(len(every), min(int(site["count"]), len(every)), replace=False)
        return [every[int(i)] for i in sorted(chosen)]
    if not pd.isna(site.position):
        at = int(site.position)
        if not -len(every) <= at < len(every):
            raise ValueError(
                f"position {at} is outside prompt {prompt}, which has {len(every)} positions in "
                f"{site.hook}"
            )
        return [every[at]]
    if site.tower in READING:
        return [(prompt, position) for position in layout.positions(site.span, prompt)]
    first = tower_rows(layout, prompt)
    if site.tower in SEEING:
        return [(first + i, p) for i, p in layout.vision_positions(site.span, prompt)]
    projected = _projected(layout, prompt)
    covered = (
        {p for p, _ in projected} if site.span == "all" else layout.positions(site.span, prompt)
    )
    return [place for position, place in projected if position in set(covered)]


def _everything(tower: str, layout: TokenLayout, prompt: int) -> list[tuple[int, int]]:
    """Every (row, position) of a prompt in a tower or projector."""
    if tower in READING:
        real = (layout.modality[prompt] != PADDING).nonzero().flatten().tolist()
        return [(prompt, position) for position in real]
    if tower in SEEING:
        first = tower_rows(layout, prompt)
        return [(first + i, p) for i, p in layout.vision_positions("all", prompt)]
    return [place for _, place in _projected(layout, prompt)]


def _projected(layout: TokenLayout, prompt: int) -> list[tuple[int, tuple[int, int]]]:
    """(position, (row, index)) of every projected token of a prompt."""
    found, first = [], tower_rows(layout, prompt)
    for number, medium in enumerate(layout.media[prompt]):
        positions = (layout.image[prompt] == number).nonzero().flatten().tolist()
        for position, place in zip(positions, medium.projected, strict=True):
            if place is not None:
                found.append((position, (first + place[0], place[1])))
        first += medium.tower_rows
    return found


def tower_rows(layout: TokenLayout, prompts: int | None = None) -> int:
    """Rows of the vision tower's batch that the first prompts take; default: all of them."""
    return sum(medium.tower_rows for media in layout.media[:prompts] for medium in media)


def _per_layer(model, hook, kind, spans, positions, towers, layers) -> Sites:
    rows = []
    for name in _towers(model, towers):
        prefix = model.towers[name].prefix
        for layer in _layers(model, name, layers, hook):
            full = f"{prefix}blocks.{layer}.{hook}"
            if full not in model.hook_dict:
                continue
            if positions is not None:
                rows += [_row(full, name, layer, kind, "", position=p) for p in positions]
            else:
                rows += [_row(full, name, layer, kind, span) for span in _spans(name, spans)]
    return _table(rows)


def _towers(model: HookedMultimodal, towers: Sequence[str] | None) -> list[str]:
    known = sorted(model.towers, key=lambda name: name == LANGUAGE)
    unknown = [name for name in towers or [] if name not in known]
    if unknown:
        raise ValueError(f"unknown tower {unknown[0]!r}; this model has {', '.join(known)}")
    chosen = known if towers is None else list(towers)
    unfit = {name: why for name in chosen if (why := _unfit(model, name))}
    if towers is not None and unfit:
        name, why = next(iter(unfit.items()))
        raise ValueError(f"tower {name!r} has no sites: {why}")
    return [name for name in chosen if name not in unfit]


def _unfit(model: HookedMultimodal, tower: str) -> str:
    """Why positions of the layout are none of a tower's, empty where they are."""
    if model.towers[tower].row.stream_layout is not None:
        return "its positions change from stage to stage"
    if tower == LANGUAGE and model.config.is_encoder_decoder:
        return "the layout is that of the encoder; hook the decoder by position yourself"
    return ""


def _layers(
    model: HookedMultimodal, tower: str, layers: Iterable[int] | None, hook: str
) -> list[int]:
    """The wanted layers of a tower, or all but those that the model leaves unread."""
    count = model.towers[tower].cfg.n_layers
    if layers is not None:
        wanted = list(layers)
        outside = [layer for layer in wanted if not 0 <= layer < count]
        if outside:
            raise ValueError(f"tower {tower!r} has layers 0..{count - 1}, not {outside[0]}")
        return wanted
    unread = list(model.family.unread(model.config))
    prefix = model.towers[tower].prefix
    return [
        layer
        for layer in range(count)
        if not any(re.fullmatch(p, f"{prefix}blocks.{layer}.{hook}") for p in unread)
    ]


def _spans(tower: str, spans: Sequence[str]) -> list[str]:
    """The spans that make sense in a tower: text has no place outside the language model."""
    return [span for span in spans if tower in READING or span not in TEXT_SPANS]


def _row(hook, tower, layer, kind, span, head=None, position=None) -> dict:
    return dict(zip(COLUMNS, (hook, tower, layer, kind, head, span, position, None), strict=True))


def _table(rows: list[dict]) -> Sites:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    whole = {name: "Int64" for name in ("layer", "head", "position", "count")}
    return Sites(table.astype(whole))

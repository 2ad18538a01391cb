"""The table of places that an experiment touches: one row per site, both towers in one table.

A site is a hook, which of its heads or neurons (or all), and which positions: a span of the
layout, one position, or as many random ones (the null). Positions of the language model count from
the first token of a prompt that is not padding, negative ones from its end; positions of the vision
tower count its own sequence; those of the projector the tokens of an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechmm.engine.hidden import HIDDEN, PROJECTOR, lacking, standing
from mechmm.engine.places import spot_of
from mechmm.model.hooked import LANGUAGE, HookedMultimodal

COLUMNS = ("hook", "tower", "layer", "kind", "head", "neuron", "span", "position", "count")
NUMBERS = ("layer", "head", "neuron", "position", "count")
TEXT_SPANS = ("text", "question", "last", "before_image")
POINTS = ("resid_pre", "resid_mid", "resid_post")
"""Where the residual stream is hooked in a block."""
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
            kind (`resid_pre`, `head`, ...), head and neuron (missing: all), span (empty: see
            position), position (missing: see span), count (of random positions, else missing).
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
    part = "".join(f" {number}" for number in (row.head, row.neuron) if not pd.isna(number))
    place = row.span or f"position {row.position}"
    return f"{row.tower}{layer} {row.kind}{part}, {place}"


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
    if point not in POINTS:
        raise ValueError(f"unknown point {point!r}; use {', '.join(POINTS)}")
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
    return _per_head(model, "hook_z", "head", spans, towers, layers)


def patterns(
    model: HookedMultimodal,
    spans: Sequence[str] = ("all",),
    *,
    towers: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
) -> Sites:
    """Every attention head's pattern (`hook_pattern`), by layer, head and span of the queries."""
    return _per_head(model, "hook_pattern", "pattern", spans, towers, layers)


def _per_head(model, hook, kind, spans, towers, layers) -> Sites:
    rows = []
    for name in _towers(model, towers):
        tower = model.towers[name]
        for layer in _layers(model, name, layers, f"attn.{hook}"):
            full = f"{tower.prefix}blocks.{layer}.attn.{hook}"
            if full not in model.hook_dict:
                continue
            rows += [
                _row(full, name, layer, kind, span, head=head)
                for head in range(tower.heads(layer))
                for span in _spans(name, spans)
            ]
    return table_of(rows)


def neurons(
    model: HookedMultimodal,
    neurons: Mapping[int, Sequence[int]],
    spans: Sequence[str] = ("all",),
    *,
    tower: str = LANGUAGE,
) -> Sites:
    """Chosen neurons of MLPs (`mlp.hook_post`), by layer, neuron and span.

    Args:
        neurons: layer -> numbers of neurons; of the projector, which has one layer: {-1: numbers}.
        tower: name of one of `model.towers`, or `"projector"` for the projector's hidden layer.

    Raises:
        ValueError: a tower or layer that there is not, or a projector without a hidden layer.
    """
    if tower == PROJECTOR:
        return _projected(model, neurons, spans)
    (tower,) = _towers(model, [tower])
    rows = []
    for layer in _layers(model, tower, neurons, "mlp.hook_post"):
        hook = f"{model.towers[tower].prefix}blocks.{layer}.mlp.hook_post"
        model.check_names([hook])
        rows += [
            _row(hook, tower, layer, "neuron", span, neuron=int(neuron))
            for neuron in neurons[layer]
            for span in _spans(tower, spans)
        ]
    return table_of(rows)


def _projected(
    model: HookedMultimodal, neurons: Mapping[int, Sequence[int]], spans: Sequence[str]
) -> Sites:
    """Chosen neurons of the projector's hidden layer."""
    if why := lacking(model):
        raise ValueError(why)
    if odd := set(neurons) - {-1}:
        raise ValueError(f"the projector has one hidden layer, -1, and no layer {odd.pop()}")
    tower = standing(model)
    rows = [
        _row(HIDDEN, tower, None, "neuron", span, neuron=int(neuron))
        for neuron in neurons.get(-1, ())
        for span in _spans(tower, spans)
    ]
    return table_of(rows)


def hidden(model: HookedMultimodal, hook: str, spans: Sequence[str]) -> Sites:
    """A hook of hidden units, of an MLP or of the projector, by span.

    Raises:
        UnknownHookError: a hook that the model does not have, with the nearest names.
    """
    found = named(model, hook, spans)
    ours = found.table["tower"] == PROJECTOR
    return Sites(found.table.assign(tower=standing(model))) if ours.any() else found


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


def named(model: HookedMultimodal, hook: str, spans: Sequence[str] = ("all",)) -> Sites:
    """Any hook by its name, by span.

    Raises:
        UnknownHookError: a hook that the model does not have, with the nearest names.
    """
    model.check_names([hook])
    spot = spot_of(model, hook)
    layer = spot.layer if "blocks." in hook else None
    kind = hook.rpartition(".")[2].removeprefix("hook_")
    return table_of([_row(hook, spot.tower, layer, kind, span) for span in spans])


def projector(model: HookedMultimodal, spans: Sequence[str] = ("image",)) -> Sites:
    """The projector's output, by span of image positions."""
    return table_of(
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
    return table_of(rows)


def _towers(model: HookedMultimodal, towers: Sequence[str] | None) -> list[str]:
    known = sorted(model.towers, key=lambda name: name == LANGUAGE)
    unknown = [name for name in towers or [] if name not in known]
    if unknown:
        raise ValueError(f"unknown tower {unknown[0]!r}; this model has {', '.join(known)}")
    chosen = known if towers is None else list(towers)
    unfit = {name: why for name in chosen if (why := unfit_of(model, name))}
    if towers is not None and unfit:
        name, why = next(iter(unfit.items()))
        raise ValueError(f"tower {name!r} has no sites: {why}")
    return [name for name in chosen if name not in unfit]


def unfit_of(model: HookedMultimodal, tower: str) -> str:
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


def _row(hook, tower, layer, kind, span, head=None, neuron=None, position=None) -> dict:
    values = (hook, tower, layer, kind, head, neuron, span, position, None)
    return dict(zip(COLUMNS, values, strict=True))


def table_of(rows: list[dict]) -> Sites:
    """Sites from rows with the columns of the table."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return Sites(table.astype({name: "Int64" for name in NUMBERS}))

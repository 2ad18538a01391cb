"""The residual stream, state by state, where a lens reads it: language model and towers before it.

A state of the language model is what its hook shows. A state of a tower before it means nothing to
the unembedding as it is; it is read as if the blocks behind it added nothing: wherever the rest of
the model reads a later layer of that tower it finds this state, and everything behind runs as the
family has it (norm behind the tower, Q-Former or resampler, merger, projector, scaling). What then
enters the first block of the language model, at the positions of the picture, is what a lens reads.
So the last layer that a model reads gives exactly the projector's output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmm.engine.places import Places, spot_of
from mechmm.engine.record import record
from mechmm.engine.sites import SEEING, unfit_of
from mechmm.engine.whole import Whole
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TEXT, TokenLayout

Read = Callable[[int, Bool[Tensor, "prompt place"], Float[Tensor, "row d_model"]], None]
"""Called with the number of a state, which of the places it has, and its rows there, in order."""
INPUT = -1
"""The layer of what enters a tower's first block."""


def states(
    model: HookedMultimodal,
    layout: TokenLayout,
    towers: Sequence[str] | None = None,
    middle: bool = False,
) -> pd.DataFrame:
    """A table of the states that can be read, in the order in which they are computed.

    Columns: tower; layer (-1: what enters the first block; of the language model at the positions
    of the picture that is the projector's output); point; hook; label.

    Args:
        layout: of the prompts, which says which towers run.
        towers: names; default: all that run and reach the language model at positions of its own.
        middle: also between attention and MLP, in the language model.

    Raises:
        ValueError: an unknown tower, or one that cannot be read, with the reason.
    """
    reasons = {name: _unread(model, layout, name) for name in model.towers}
    unknown = [name for name in towers or () if name not in reasons]
    if unknown:
        raise ValueError(
            f"unknown tower {unknown[0]!r}; this model has {', '.join(sorted(reasons))}"
        )
    unfit = [name for name in towers or () if reasons[name]]
    if unfit:
        raise ValueError(f"tower {unfit[0]!r} cannot be read as words: {reasons[unfit[0]]}")
    chosen = [n for n, why in reasons.items() if not why and (towers is None or n in towers)]
    rows = [row for name in chosen for row in _states_of(model, name, middle)]
    return pd.DataFrame(rows, columns=["tower", "layer", "point", "hook", "label"])


def _states_of(model: HookedMultimodal, tower: str, middle: bool) -> Iterator[tuple]:
    prefix = model.towers[tower].prefix
    yield tower, INPUT, "resid_pre", f"{prefix}blocks.0.hook_resid_pre", f"{tower} in"
    count = max(_reads(model, tower)) if tower != LANGUAGE else model.cfg.n_layers
    for layer in range(count):
        between = f"{prefix}blocks.{layer}.hook_resid_mid"
        if middle and tower == LANGUAGE and between in model.hook_dict:
            yield tower, layer, "resid_mid", between, f"{tower} {layer} mid"
        hook = f"{prefix}blocks.{layer}.hook_resid_post"
        yield tower, layer, "resid_post", hook, f"{tower} {layer}"


def _reads(model: HookedMultimodal, tower: str) -> tuple[int, ...]:
    """Which states of a tower are read by something else than its next block: `i` leaves block
    `i - 1`."""
    found = model.family.reads(model.config) if tower in SEEING else ()
    return found or (model.towers[tower].cfg.n_layers,)


def _unread(model: HookedMultimodal, layout: TokenLayout, tower: str) -> str:
    """Why a tower cannot be read as words; empty where it can."""
    if tower == LANGUAGE:
        return "" if model.family.unembed is not None else "the model has no unembedding"
    if model.family.unembed is None or model.config.is_encoder_decoder:
        return "what it gives reaches words through a decoder, at no position of its own"
    if model.family.resume == "cross":
        return "it reaches the language model by cross-attention, at no position of its own"
    kinds = {medium.kind for media in layout.media for medium in media}
    if not kinds:
        return "the prompts have nothing to see or hear"
    own = {"video": "video", "audio": "audio"}.get(tower, "image")
    shared = tower == "vision" and "video" not in model.towers
    if tower in SEEING and own not in kinds and not (shared and "video" in kinds):
        return f"the prompts have no {own}"
    return unfit_of(model, tower)


# Running -------------------------------------------------------------------------------------


@torch.no_grad()
def read_states(
    model: HookedMultimodal,
    batch: Batch,
    table: pd.DataFrame,
    places: Int[Tensor, "prompt place"],
    read: Read,
) -> None:
    """Run prompts once and hand every state to `read`, at some positions; nothing is kept.

    Args:
        table: as `states` gives it.
        places: positions in the batch's own sequence; -1 where a prompt has fewer.
    """
    numbers = table.reset_index(drop=True)
    _read_towers(model, batch, numbers[numbers["tower"] != LANGUAGE], places, read)
    inner = numbers[numbers["tower"] == LANGUAGE]
    if not len(inner):
        return
    waiting, last = inner.index.tolist(), []

    def tell(number: int, value: Tensor, hook: Any) -> None:
        skip(number)
        last[:] = [value.detach()]
        skip(number + 1)

    def skip(until: int) -> None:
        # A block that is passed over (cross-attention without a picture) leaves the state as it is.
        while waiting and waiting[0] < until:
            _tell(read, waiting.pop(0), places, places >= 0, last[0])

    hooks = [(hook, partial(tell, number)) for number, hook in inner["hook"].items()]
    with model.hooks(fwd_hooks=hooks):
        model(batch, logits_to_keep=1)
    skip(len(numbers))


def _tell(read: Read, number: int, places: Tensor, there: Tensor, stream: Tensor) -> None:
    prompt, place = there.nonzero(as_tuple=True)
    position = places[prompt, place].to(stream.device)
    read(number, there, stream.detach()[prompt.to(stream.device), position])


def _read_towers(
    model: HookedMultimodal, batch: Batch, table: pd.DataFrame, places: Tensor, read: Read
) -> None:
    rows = torch.arange(len(places))[:, None]
    seen = (places >= 0) & (batch.layout.modality[rows, places.clamp(min=0)] > TEXT)
    if not seen.any():
        return
    for tower, group in table.groupby("tower", sort=False):
        for number, stream in _exits(model, batch, str(tower), group):
            _tell(read, number, places, seen, stream)


def _exits(
    model: HookedMultimodal, batch: Batch, tower: str, table: pd.DataFrame
) -> Iterator[tuple[int, Tensor]]:
    """What enters the language model when a tower ends at each of its states."""
    before = list(model.towers)[: list(model.towers).index(tower) + 1]
    prefix = model.towers[tower].prefix
    ends = [
        (read - 1, f"{prefix}blocks.{read - 1}.hook_resid_post") for read in _reads(model, tower)
    ]
    hooks = [hook for _, hook in ends]
    wanted = batch.layout.last[:, None]
    recording = record(model, batch, wanted, [*table["hook"], *hooks], before, blocks=False)
    shape = recording.hooks[hooks[0]].shape[:2]
    row, position = (
        axis.flatten().numpy() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    )
    made = []
    for trial, layer in enumerate(table["layer"]):
        later = [number for number, (read, _) in enumerate(ends) if read >= layer]
        made += [(np.full(len(row), trial), np.full(len(row), n), row, position) for n in later]
    trial, hook, row, position = (np.concatenate(column) for column in zip(*made, strict=True))
    prompts = np.zeros(len(table), dtype=np.int64)
    places = Places(tuple(hooks), prompts, trial, hook, row, position, np.full(len(trial), -1))
    own = table["hook"].tolist()

    def values(hook: str, at: np.ndarray, now: Tensor) -> Tensor:
        there = places.chosen(at)
        return recording.hooks[own[there.trial[0]]][there.row, there.position].to(now)

    whole = Whole(model, recording, places, [spot_of(model, hook) for hook in hooks], values)
    for trial, number in enumerate(table.index):
        copy = np.full((1, len(batch)), -1)
        copy[0, 0] = trial
        yield int(number), whole.run(copy, towards=True)


# Positions -----------------------------------------------------------------------------------


def read_layout(model: HookedMultimodal, batch: Batch) -> TokenLayout:
    """What the positions of the language model are; those of a decoder beside an encoder are the
    tokens that it is given."""
    if not model.config.is_encoder_decoder:
        return batch.layout
    ids = batch.extra["decoder_input_ids"].cpu()
    nowhere = torch.full(ids.shape, -1)
    modality = torch.full(ids.shape, TEXT)
    own = (modality, nowhere, nowhere, nowhere, nowhere)
    return TokenLayout(*own, model.token_texts(ids), ((),) * len(ids), text_only=True)


def first_real(layout: TokenLayout) -> Int[Tensor, " prompt"]:
    """The first position of every prompt that is not padding."""
    return (layout.modality != PADDING).long().argmax(1)


def chosen_places(
    layout: TokenLayout,
    spans: Sequence[str] | None,
    positions: Sequence[int] | None,
    numbers: Sequence[int],
    seed: int,
) -> list[list[int]]:
    """The positions to read of every prompt, in its batch: those of some spans, with as many others
    of the same modality for every span that has fewer of them among the rest; or single ones.

    Args:
        spans: names; None: all positions.
        positions: single ones instead, counted from the first token that is not padding, negative
            ones from the end.
        numbers: of the prompts, which choose the others, together with the seed.

    Raises:
        SpanError: a span that the layout has not.
        ValueError: a position outside a prompt.
    """
    every = [layout.positions("all", prompt) for prompt in range(len(layout.tokens))]
    if positions is not None:
        for prompt, own in enumerate(every):
            outside = [p for p in positions if not -len(own) <= p < len(own)]
            if outside:
                raise ValueError(
                    f"position {outside[0]} is outside prompt {numbers[prompt]}, which has "
                    f"{len(own)} positions"
                )
        return [sorted({own[p] for p in positions}) for own in every]
    if spans is None:
        return every
    found = [{p for span in spans for p in layout.positions(span, n)} for n in range(len(every))]
    for prompt, own in enumerate(found):
        rng = np.random.default_rng([seed, numbers[prompt]])
        for span in spans:
            own |= _others(layout, prompt, set(layout.positions(span, prompt)), own, rng)
    return [sorted(own) for own in found]


def _others(
    layout: TokenLayout, prompt: int, span: Collection[int], read: set[int], rng: Any
) -> set[int]:
    """Random positions that make those outside a span as many as those inside it."""
    kinds = {int(layout.modality[prompt, p]) for p in span}
    alike = [p for p in layout.positions("all", prompt) if int(layout.modality[prompt, p]) in kinds]
    spare = [p for p in alike if p not in span and p not in read]
    missing = len(span) - sum(p in read and p not in span for p in alike)
    missing = min(max(0, missing), len(spare))
    return {int(p) for p in rng.choice(spare, missing, replace=False)} if missing else set()

"""Routes through attention: which positions (keys) may not be read from which (queries).

`"image->last"`: the keys of the span `image` are hidden from the queries of the span `last`. A span
may be less others, `"question - last"`; several routes are one, `"image->last + image->question"`;
the prefix of a tower puts a route into it, `"vision.object->image"`. Both ends of a part are
looked up in the prompt; tokens written after it read as its last position does, and are hidden
from nobody.

A hidden key has the score -inf before the softmax, so that its weight is exactly 0 and the other
weights of the row add up to 1 (Geva et al. 2304.14767). A query whose keys are all hidden has no
such row: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmm.engine.cells import concatenated
from mechmm.engine.located import Located
from mechmm.engine.places import Places, Values
from mechmm.engine.sites import READING, SEEING, patterns
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import PADDING, TokenLayout

ARROW, AND, LESS = "->", " + ", " - "
FORWARD = ("causal", "recurrent", "cross")
"""Kinds of `Family.resume` whose sequence is read from left to right alone."""
End = tuple[str, ...]
"""A span, and others that are taken out of it."""
Keys = Bool[np.ndarray, "query key"]


class RouteError(ValueError):
    """A route cannot be read, or leaves a position nothing to attend to."""


@dataclass(frozen=True)
class Route:
    """Where information may not go.

    Attributes:
        name: as it was written.
        parts: (source, reader): the keys of the one are hidden from the queries of the other.
        tower: whose attention.
    """

    name: str
    parts: tuple[tuple[End, End], ...]
    tower: str = LANGUAGE

    @classmethod
    def of(cls, text: str, model: HookedMultimodal) -> Route:
        """A route as it is written (see above).

        Raises:
            RouteError: with the part that is no route, a tower without such spans, or a picture
                that is not in the sequence.
        """
        if not isinstance(text, str):
            raise RouteError(f"a route is a text such as 'image->last', not {text!r}")
        found = [_part(part, text, model) for part in text.split(AND)]
        towers = {tower for tower, _ in found}
        if len(towers) > 1:
            raise RouteError(
                f"route {text!r} goes through {' and '.join(sorted(towers))}; give each tower a "
                "route of its own"
            )
        route = cls(text, tuple(ends for _, ends in found), towers.pop())
        _check_tower(route, model)
        return route

    def hidden(self, finder: Located, prompt: int) -> Hidden:
        """Which keys it hides from which queries of one prompt, as `Hidden`."""
        where = [(_ends(finder, self, source, prompt), reader) for source, reader in self.parts]
        ends = [(keys, _ends(finder, self, reader, prompt)) for keys, reader in where]
        return Hidden.of([_pairs(keys, queries) for keys, queries in ends], _width(finder, self))


def _part(part: str, text: str, model: HookedMultimodal) -> tuple[str, tuple[End, End]]:
    """The tower and the ends of one part of a route."""
    own, tower = part.strip(), LANGUAGE
    for name in model.towers:
        if own.startswith(f"{name}."):
            own, tower = own.removeprefix(f"{name}."), name
    ends = [tuple(span.strip() for span in end.split(LESS)) for end in own.split(ARROW)]
    if len(ends) != 2 or not all(span for end in ends for span in end):
        raise RouteError(
            f"{part.strip()!r} in {text!r} is no route; write source->reader, for example "
            "'image->last', 'image->question - last' or 'vision.object->image'"
        )
    return tower, (ends[0], ends[1])


def _check_tower(route: Route, model: HookedMultimodal) -> None:
    if route.tower not in (*READING, *SEEING) or route.tower not in model.towers:
        raise RouteError(
            f"route {route.name!r}: spans have no places in tower {route.tower!r}; this model has "
            f"{', '.join(t for t in model.towers if t in (*READING, *SEEING))}"
        )
    pictures = any("image" in source for source, _ in route.parts)
    if route.tower == LANGUAGE and model.family.resume == "cross" and pictures:
        raise RouteError(
            f"route {route.name!r}: {model.family.architecture} reads its pictures by "
            "cross-attention, so that they are no keys of the sequence; ablate "
            "hook_cross_attn_out instead"
        )


def _ends(finder: Located, route: Route, end: End, prompt: int) -> Int[np.ndarray, "place two"]:
    """(row, position) of a span less others."""
    span, *less = end
    own = finder.covered(route.tower, span, prompt)
    out = {tuple(place) for name in less for place in finder.covered(route.tower, name, prompt)}
    keep = [tuple(place) not in out for place in own.tolist()]
    return own[np.array(keep, dtype=bool)]


def _width(finder: Located, route: Route) -> int:
    """Positions of a row of the route's tower."""
    if route.tower in READING:
        return finder.layout.shape[1]
    media = [medium for prompt in finder.layout.media for medium in prompt]
    return max((medium.tower_positions for medium in media), default=0)


def _pairs(keys: np.ndarray, queries: np.ndarray) -> Int[np.ndarray, "pair three"]:
    """(row, query, key) of all keys that stand in one row with a query."""
    same = queries[:, None, 0] == keys[None, :, 0]
    query, key = same.nonzero()
    return np.stack([queries[query, 0], queries[query, 1], keys[key, 1]], axis=1)


@dataclass(frozen=True, eq=False)
class Hidden:
    """Keys hidden from queries.

    Attributes:
        row, query: of a tower's attention [query]; each once.
        keys: which keys are hidden from it [query, key].
    """

    row: Int[np.ndarray, " query"]
    query: Int[np.ndarray, " query"]
    keys: Keys

    @classmethod
    def of(cls, pairs: Sequence[np.ndarray], width: int) -> Hidden:
        """From (row, query, key) of every hidden pair [pair, 3]."""
        every = np.concatenate([np.zeros((0, 3), dtype=np.int64), *pairs])
        which, back = np.unique(every[:, :2], axis=0, return_inverse=True)
        keys = np.zeros((len(which), width), dtype=bool)
        keys[back.reshape(-1), every[:, 2]] = True
        return cls(which[:, 0], which[:, 1], keys)

    @property
    def count(self) -> int:
        """Hidden pairs."""
        return int(self.keys.sum())

    def longer(self, new: Int[np.ndarray, " new"], width: int, last: int) -> Hidden:
        """The same where a text follows the prompt, whose tokens read as its last position does.

        Args:
            new: positions of that text's tokens; `width`: of a row, with them.
        """
        keys = np.pad(self.keys, ((0, 0), (0, width - self.keys.shape[1])))
        at = np.flatnonzero(self.query == last)
        if not len(at):
            return replace(self, keys=keys)
        row, more = self.row[at].repeat(len(new)), keys[at].repeat(len(new), axis=0)
        return Hidden(
            np.concatenate([self.row, row]),
            np.concatenate([self.query, np.tile(new, len(at))]),
            np.concatenate([keys, more]),
        )


def lengthened(hidden: Hidden, route: Route, prompts: Batch, longer: Batch, prompt: int) -> Hidden:
    """What is hidden from one prompt, where a text may follow it in the batch that runs."""
    before, width = prompts.input_ids.shape[1], longer.input_ids.shape[1]
    if width == before or route.tower in SEEING:
        return hidden
    real = longer.attention_mask[prompt, before:].cpu().numpy()
    return hidden.longer(before + np.flatnonzero(real), width, int(prompts.layout.last[prompt]))


def seen_by(layout: TokenLayout, prompt: int, causal: bool) -> Keys:
    """Which positions every position of a prompt sees, at most [query, key]."""
    real = (layout.modality[prompt] != PADDING).numpy()
    seen = np.outer(real, real)
    return np.tril(seen) if causal else seen


def check_left(
    hidden: Hidden, route: Route, model: HookedMultimodal, layout: TokenLayout, at: tuple[int, int]
) -> None:
    """Refuse a route that hides all that a position sees.

    Args:
        at: number of the prompt in the layout, and of its pair.

    Raises:
        RouteError: with the pair, the position and the route.
    """
    if not len(hidden.query):
        return
    if route.tower in READING:
        seen = seen_by(layout, at[0], model.family.resume in FORWARD)[hidden.query]
    else:
        seen = np.ones_like(hidden.keys)
    nothing = ~(seen & ~hidden.keys).any(1)
    if nothing.any():
        raise RouteError(_nothing(f"pair {at[1]}", route.name, int(hidden.query[nothing][0])))


def _nothing(whose: str, route: str, position: int) -> str:
    return (
        f"{whose}: route {route!r} leaves position {position} nothing to attend to, so that its "
        "weights cannot add up to 1; take positions out of an end with ' - '"
    )


def has_attention(model: HookedMultimodal, tower: str, layers: Iterable[int] | None) -> list[int]:
    """Layers of a tower, all or the wanted ones, whose attention has scores.

    Raises:
        ValueError: a layer outside the tower, one without attention scores, or none at all.
    """
    wanted = None if layers is None else list(layers)
    table = patterns(model, ("all",), towers=[tower], layers=wanted).table
    there = [int(layer) for layer in table["layer"].unique()]
    missing = [layer for layer in wanted or () if layer not in there]
    if missing or not there:
        which = f"layer {missing[0]}" if missing else "no layer"
        raise ValueError(
            f"tower {tower!r}: {which} has {'no ' if missing else ''}attention scores; those that "
            f"have: {', '.join(map(str, patterns(model, towers=[tower]).table['layer'].unique()))}"
        )
    return there


def scores_hook(model: HookedMultimodal, tower: str, layer: int) -> str:
    """Where a layer's scores are hooked."""
    return f"{model.towers[tower].prefix}blocks.{layer}.attn.hook_attn_scores"


# Changes -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocked:
    """What cells hide in one batch.

    Attributes:
        hidden: by number of the route and prompt.
        cells: (number of the route, hooks of its layers).
        names: of the routes.
        amounts: what is added to the scores of every cell's keys; None: they are hidden.
    """

    hidden: dict[tuple[int, int], Hidden]
    cells: Sequence[tuple[int, tuple[str, ...]]]
    names: Sequence[str]
    amounts: Sequence[float] | None = None

    def changes(self, prompts: int, device: torch.device) -> tuple[Places, Values]:
        """The places of all cells, and what is put there."""
        hooks = tuple(dict.fromkeys(hook for _, own in self.cells for hook in own))
        number = {hook: i for i, hook in enumerate(hooks)}
        # Every hidden row once, the same for all layers.
        starts = np.cumsum([0, *(len(h.query) for h in self.hidden.values())])
        start = dict(zip(self.hidden, starts, strict=False))
        found, rows = [], []
        for trial, route, prompt, hook in self._each(prompts):
            own = self.hidden[route, prompt]
            count = len(own.query)
            kind, which = np.full(count, number[hook]), np.full(count, trial)
            found.append(Places((), own.row, which, kind, own.row, own.query, np.full(count, -1)))
            rows.append(start[route, prompt] + np.arange(count))
        places = concatenated(hooks, prompts, len(self.cells), found)
        row = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        keys = _stacked([h.keys for h in self.hidden.values()]).to(device)
        return places, self._values(places, row, keys)

    def _each(self, prompts: int) -> Iterator[tuple[int, int, int, str]]:
        """(trial, route, prompt, hook)."""
        for cell, (route, hooks) in enumerate(self.cells):
            for prompt in range(prompts):
                for hook in hooks:
                    yield cell * prompts + prompt, route, prompt, hook

    def _values(self, places: Places, row: np.ndarray, keys: Tensor) -> Values:
        def give(hook: str, at: np.ndarray, now: Tensor) -> Tensor:
            hide = keys[torch.as_tensor(row[at], device=keys.device), : now.shape[-1]]
            if self.amounts is not None:
                return now + self._added(places, at, now) * hide[:, None]
            new = now.masked_fill(hide[:, None], -torch.inf)
            nothing = _lost(new)
            if nothing is not None:
                own = at[nothing]
                cell, prompt = divmod(int(places.trial[own]), int(places.prompts.max()) + 1)
                whose = f"prompt {prompt} of a batch, {hook}"
                name = self.names[self.cells[cell][0]]
                raise RouteError(_nothing(whose, name, int(places.position[own])))
            return new

        return give

    def _added(self, places: Places, at: np.ndarray, now: Tensor) -> Float[Tensor, "place 1 1"]:
        """What is added to the keys of some places."""
        assert self.amounts is not None
        cell = places.trial[at] // (int(places.prompts.max()) + 1)
        return torch.as_tensor(self.amounts).to(now)[cell][:, None, None]


def _stacked(keys: Sequence[np.ndarray]) -> Bool[Tensor, "hidden width"]:
    """Rows of several towers, each filled up to the widest."""
    width = max((k.shape[1] for k in keys), default=0)
    padded = [np.pad(k, ((0, 0), (0, width - k.shape[1]))) for k in keys]
    return torch.as_tensor(np.concatenate([np.zeros((0, width), dtype=bool), *padded]))


def _lost(scores: Tensor) -> int | None:
    """The first row [row, head, key] without a key; a masked one has the lowest number."""
    none = (scores <= torch.finfo(scores.dtype).min).all(-1).any(-1)
    return int(none.int().argmax()) if bool(none.any()) else None


@dataclass(eq=False)
class Hiding:
    """A hook on one layer's scores that hides keys, in full runs and in cached generation.

    Attributes:
        rows: hidden keys of every row of the tower's batch, by query.
        width: positions of the prompt.
        last: the last position of every row's prompt; None where nothing is written after it.
        name: of the route.
    """

    rows: list[dict[int, Bool[np.ndarray, " key"]]]
    width: int
    last: Sequence[int] | None
    name: str
    read: int = 0

    def __call__(self, scores: Tensor, hook: Any = None) -> Tensor:
        """Scores [batch, head, query, key] with what is hidden at -inf.

        Raises:
            RouteError: where a query has no key left.
        """
        batch, _, queries, keys = scores.shape
        self.read = 0 if queries == keys else self.read  # a run from the start
        hide = torch.zeros(batch, queries, keys, dtype=torch.bool)
        before = max(0, self.read + queries - keys)  # keys that a sliding cache dropped
        for row in range(batch):
            own = row * len(self.rows) // batch  # beams of a prompt stand together
            for query, hidden in self._of(own, queries):
                part = torch.as_tensor(hidden)[before:][:keys]
                hide[row, query, : len(part)] = part
        self.read += queries
        new = scores.masked_fill(hide[:, None].to(scores.device), -torch.inf)
        lost = _lost(new.transpose(1, 2)[hide.any(-1)])
        if lost is not None:
            position = int(hide.any(-1).nonzero()[lost, 1])
            raise RouteError(_nothing("a prompt", self.name, position))
        return new

    def _of(self, row: int, queries: int) -> Iterator[tuple[int, np.ndarray]]:
        """The queries of a run from which something is hidden, and what."""
        own = self.rows[row]
        for query in range(queries):
            position = self.read + query
            if position >= self.width and self.last is not None:
                position = self.last[row]
            if position in own:
                yield query, own[position]

"""Edges cut at the hooks of what reads: for every model and tower, by trials of the engine.

With c the change that an edge carries, the projection of a head gives W n(x - c) in the place of
W n(x), and whatever else reads the stream reads x - c. Where the hook of such a reader lies in the
stream itself, c is added again behind it, or the stream is set back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.changes import Changes, Spread
from mechmm.engine.contrast import Contrast
from mechmm.engine.cut import Cut, Loss
from mechmm.engine.engine import Engine
from mechmm.engine.flow import slopes_at
from mechmm.engine.places import Ints, Places
from mechmm.engine.readers import Reader
from mechmm.engine.splice import hidden_of, stream_at
from mechmm.engine.wiring import Group, Wiring
from mechmm.model.hooked import HookedMultimodal

New = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(what is there, the edge's change, what all readers read [place, d_model], head) -> new value."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What cutting edges into some readers of a group does at one hook.

    Attributes:
        readers: those that the hook belongs to.
        heads: whether each of them is a head there.
    """

    hook: str
    readers: range
    heads: bool
    new: New


def edits_of(model: HookedMultimodal, wiring: Wiring, group: Group) -> list[Edit]:
    """What cutting does at every hook of a group."""
    hooks = _hooks(model, wiring, group)
    if group.kind in ("heads", "queries"):
        reader = Reader(model, group)
        slots = [range(slot.start, slot.stop) for slot in reader.slots()]
        return [
            Edit(hook, slot, True, _projected(reader, half))
            for half, (hook, slot) in enumerate(zip(hooks, slots, strict=True))
        ]
    if group.kind == "mlp" and not hooks[0].endswith("hook_mlp_in"):
        names = ("mlp_gate", "mlp_in")[-len(hooks) :]
        return [
            Edit(hook, range(1), False, _hidden(model, group, name))
            for hook, name in zip(hooks, names, strict=True)
        ]
    behind = _set_back if group.kind == "hidden" else partial(_moved, 1)
    news = (partial(_moved, -1), behind)
    return [Edit(hook, range(1), False, new) for hook, new in zip(hooks, news, strict=False)]


def _hooks(model: HookedMultimodal, wiring: Wiring, group: Group) -> list[str]:
    """Hooks that cutting changes. Behind the last hidden state that is read everything belongs to
    what reads it, and nothing is set back."""
    hooks = [hook for hook in slopes_at(model, group) if hook in model.hook_dict]
    later = [g.layer > group.layer for g in wiring.readers if g.tower == group.tower]
    return hooks if any(later) or group.kind != "hidden" else hooks[:1]


def _projected(reader: Reader, half: int) -> New:
    def new(now: Tensor, change: Tensor, stream: Tensor, head: int) -> Tensor:
        x = (stream - change).to(now)[None]
        return reader.project_each(half, x, torch.tensor([head], device=now.device))[:, 0]

    return new


def _hidden(model: HookedMultimodal, group: Group, name: str) -> New:
    def new(now: Tensor, change: Tensor, stream: Tensor, head: int) -> Tensor:
        return hidden_of(model, group, name, (stream - change).to(now))

    return new


def _moved(sign: int, now: Tensor, change: Tensor, stream: Tensor, head: int) -> Tensor:
    return now + sign * change.to(now)


def _set_back(now: Tensor, change: Tensor, stream: Tensor, head: int) -> Tensor:
    return stream


def hooks_of_cuts(model: HookedMultimodal, wiring: Wiring, groups: Sequence[Group]) -> list[str]:
    """Hooks that cutting edges into some groups changes or reads."""
    changed = [hook for group in groups for hook in _hooks(model, wiring, group)]
    read = [name for g in groups if (name := _read(model, wiring, g)) is not None]
    return list(dict.fromkeys([*changed, *read]))


def _read(model: HookedMultimodal, wiring: Wiring, group: Group) -> str | None:
    """The hook that shows the stream of which a group's new values are computed, if they are."""
    if group.kind == "hidden":
        return next(iter(_hooks(model, wiring, group)[1:]), None)
    computed = group.kind in ("heads", "queries", "mlp")
    name = stream_at(model, group) if computed else None
    return None if name is None or name.endswith("hook_mlp_in") else name


class AtHooks:
    """Cuts edges of one contrast at hooks."""

    def __init__(self, contrast: Contrast, engine: Engine, changes: Changes, loss: Loss) -> None:
        self.contrast, self.engine = contrast, engine
        self.changes, self.loss = changes, loss

    @property
    def most(self) -> int:
        """Trials on all prompts that one pass holds."""
        return max(1, self.engine.tokens // self.engine.size)

    def lost(self, cut: Cut) -> Float[Tensor, "reader writer prompt"]:
        """What every cut loses."""
        trials = _Trials(self, cut)
        return self._run(trials.places, trials.values, cut)

    def states(self, number: int) -> Float[Tensor, "prompt reader"]:
        """What cutting loses in front of keys and values that are made of pictures alone."""
        group = self.contrast.wiring.readers[number]
        first, stop = group.nodes
        prompts = np.arange(len(self.engine.batch))
        cut = Cut(number, 0, np.zeros(1, np.int64), np.arange(stop - first), prompts)
        trials = _States(self.contrast, group, cut)
        return self._run(trials.places, trials.values, cut)[:, 0].T

    def _run(self, places: Places, values, cut: Cut) -> Float[Tensor, "reader writer prompt"]:
        found = torch.zeros(len(cut.of))
        for trials, logits in self.engine.run(places, values):
            found[torch.as_tensor(trials)] = self.loss(logits, cut.of[trials])
        return found.view(cut.shape)


class _Trials:
    """Edges of one cut as trials, with their values."""

    def __init__(self, way: AtHooks, cut: Cut) -> None:
        contrast, self.cut = way.contrast, cut
        group = contrast.wiring.readers[cut.number]
        self.edits = edits_of(contrast.model, contrast.wiring, group)
        spread = way.changes.spread[group.tower]
        self.own = np.flatnonzero(spread.span == cut.span)
        row, position = spread.row[self.own], spread.position[self.own]
        at = (torch.as_tensor(row), torch.as_tensor(position))
        self.change = way.changes.of(group.tower, cut.writers, at)
        name = _read(contrast.model, contrast.wiring, group)
        stream = None if name is None else way.engine.recording.hooks[name]
        self.stream = self.change[0] if stream is None else stream.to(self.change.device)[at]
        self.places = self._places(spread)

    def _places(self, spread: Spread) -> Places:
        """By edit, reader, writer and place that this changed."""
        _, writers, prompts = self.cut.shape
        writer, place = spread.moved[np.ix_(self.cut.writers, self.own)].nonzero()
        example = spread.example[self.own][place]
        columns = []
        for number, edit in enumerate(self.edits):
            for r, reader in enumerate(self.cut.readers):
                if reader not in edit.readers:
                    continue
                trial = (r * writers + writer) * prompts + example
                part = reader - edit.readers.start if edit.heads else -1
                hook, head = np.full_like(trial, number), np.full_like(trial, part)
                columns.append(np.stack([trial, hook, head, writer, place]))
        trial, hook, part, self.writer, self.place = np.concatenate(columns, axis=1)
        row, position = (column[self.own][self.place] for column in (spread.row, spread.position))
        hooks = tuple(edit.hook for edit in self.edits)
        return Places(hooks, self.cut.of, trial, hook, row, position, part)

    def values(self, hook: str, at: Ints, now: Tensor) -> Tensor:
        """New values of some places."""
        edit = next(edit for edit in self.edits if edit.hook == hook)
        new, part = torch.empty_like(now), self.places.part[at]
        for head in np.unique(part):
            own = np.flatnonzero(part == head)
            place = torch.as_tensor(self.place[at[own]])
            change = self.change[torch.as_tensor(self.writer[at[own]]), place]
            some = torch.as_tensor(own, device=now.device)
            given = edit.new(now[some], change, self.stream[place], int(head))
            new[some] = given.view(now[some].shape).to(now)
        return new


class _States:
    """Keys and values that are made of pictures alone, one head's after the other set to the
    reference."""

    def __init__(self, contrast: Contrast, group: Group, cut: Cut) -> None:
        self.hooks = tuple(slopes_at(contrast.model, group))
        clean, self.reference = contrast.changes()
        columns = []
        for half, hook in enumerate(self.hooks):
            differ = (clean[hook] != self.reference[hook]).any(-1).cpu().numpy()
            row, position, head = differ.nonzero()
            reader = half * differ.shape[2] + head
            trial = reader * len(cut.prompts) + row // (len(differ) // len(cut.prompts))
            columns.append(np.stack([trial, np.full_like(trial, half), row, position, head]))
        trial, hook, row, position, part = np.concatenate(columns, axis=1)
        self.places = Places(self.hooks, cut.of, trial, hook, row, position, part)

    def values(self, hook: str, at: Ints, now: Tensor) -> Tensor:
        """What the reference run has there."""
        p = self.places
        where = (torch.as_tensor(c[at]) for c in (p.row, p.position, p.part))
        return self.reference[hook][tuple(where)].to(now)

"""Trials as runs of the Hugging Face model itself, its blocks before the change frozen.

Every trial is a copy of its prompt in one larger batch. Blocks that come before the first change,
and those that nobody reads, give what they gave in the recorded run, and so does attention in the
block of the first change where all changes come behind it; everything else computes. Where the
language model can go on from recorded blocks, the run ends when its first block is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechmm.data.metrics import logits_at
from mechmm.engine.freeze import Halt, constant, first_of, frozen, with_first, zeros
from mechmm.engine.places import Entry, Ints, Places, Spot, Values, halves, index
from mechmm.engine.projections import KEYS, NAMES
from mechmm.engine.record import Recording, blocks_read, embedding
from mechmm.model.attention import Attention, States, reentering
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal


class Whole:
    """Runs trials as copies of the recorded batch."""

    def __init__(
        self,
        model: HookedMultimodal,
        recording: Recording,
        places: Places,
        spots: list[Spot],
        values: Values,
    ) -> None:
        self.model, self.recording, self.places, self.values = model, recording, places, values
        self.spots, self.prompts = spots, len(recording.batch)

    @torch.no_grad()
    def run(self, copies: Ints, towards: bool = False) -> Tensor:
        """Run trials together.

        Args:
            copies: the trial of every copy's prompts [copy, prompt], -1 where it is unchanged.
            towards: end at the first block of the language model.

        Returns:
            What enters that block [copy * prompt, pos, d_model], or logits by (copy, prompt)
            [copy * prompt, token, vocab]; for an encoder what it gives of each.
        """
        batch = tile(self.recording.batch, len(copies))
        changed = np.unique(copies[copies >= 0])
        spots = [self.spots[hook] for hook in np.unique(self.places.hook[self.places.of(changed)])]
        first = min(spots)
        forwards = self._frozen(first, len(copies))
        if towards:
            forwards[self.model.towers[LANGUAGE].blocks[0]] = _halt
        wanted = self.recording.wanted
        wanted = None if wanted is None else wanted.repeat(len(copies), 1)
        hooks = self.model.hooks(fwd_hooks=self._hooks(copies))
        with frozen(forwards), self._attended(first, len(copies)), hooks:
            try:
                if wanted is not None:
                    return logits_at(self.model, batch, wanted)
                return self._apart(self.model(batch), len(copies))
            except Halt as halt:
                return halt.found

    def _apart(self, found: Tensor, copies: int) -> Tensor:
        """What an encoder gives, by prompt; of images against texts only those of one copy."""
        if self.model.family.output != "logits_per_image":
            return found
        square = found.view(copies, self.prompts, copies, self.prompts)
        own = torch.arange(copies, device=found.device)
        return square[own, :, own].flatten(0, 1)

    def _frozen(self, first: Spot, copies: int) -> dict[nn.Module, Callable]:
        """The blocks that come before every change, and those that nobody reads, each giving what
        it gave."""
        forwards: dict[nn.Module, Callable] = {}
        for number, (name, tower) in enumerate(self.model.towers.items()):
            before = len(tower.blocks) if 2 * number < first.stage else 0
            before = max(first.layer, 0) if first.tower == name else before
            behind = blocks_read(self.model, name)
            given = self.recording.given.get(name, [])
            embed = embedding(tower)
            if before and embed is not None and name in self.recording.embedded:
                forwards[embed] = constant(self._tiled(name, self.recording.embedded[name], copies))
            for layer, (block, output) in enumerate(zip(tower.blocks, given, strict=False)):
                if not before <= layer < behind:
                    forwards[block] = constant(self._tiled(name, output, copies))
        return forwards

    def _tiled(self, tower: str, output: Any, times: int) -> Any:
        """What a module of a tower gave, for as many copies of the batch."""
        packed = self.model.towers[tower].row.packed
        value = first_of(output).to(self.recording.logits.device)
        axis = packed.axis if packed is not None else 0
        repeats = [times if i == axis else 1 for i in range(value.ndim)]
        return with_first(output, value.repeat(repeats))

    @contextmanager
    def _attended(self, first: Spot, copies: int) -> Iterator[None]:
        """While it lasts, the attention of the block of the first change gives what it gave, where
        the change comes behind it."""
        z = self.recording.z.get((first.tower, first.layer))
        if z is None or first.entry == Entry.WHOLE:
            yield
            return
        tower = self.model.towers[first.tower]
        core = tower.part(first.layer, "attn", tower.row.core)
        assert core is not None
        names = KEYS if tower.row.q_gate else NAMES  # the query projection gives what gates z, too
        linears = (tower.linear(first.layer, name) for name in names)
        skipped: dict[nn.Module, Callable] = {m: zeros(m) for m in linears if m is not None}
        repeats = (1, copies) if tower.row.packed is not None else (copies, 1)
        z = z.to(self.recording.logits.device).repeat(*repeats, 1, 1)
        with frozen(skipped), reentering(core, _Given(z)):
            yield

    def _hooks(self, copies: Ints) -> list[Any]:
        """Hooks that make the changes of all copies."""
        number = np.full(len(self.places.prompts), -1)
        copy, _ = np.nonzero(copies >= 0)
        number[copies[copies >= 0]] = copy
        return [
            (hook, self._change(hook, np.flatnonzero(self.places.hook == i), number, len(copies)))
            for i, hook in enumerate(self.places.hooks)
            if (number[self.places.trial[self.places.hook == i]] >= 0).any()
        ]

    def _change(self, name: str, at: Ints, number: Ints, copies: int) -> Callable:
        copy = number[self.places.trial[at]]
        at, copy = at[copy >= 0], copy[copy >= 0]

        def change(tensor: Any, hook: Any) -> Any:
            rows = len(tensor) // copies
            for half in halves(self.places.part[at]):
                own = at[half]
                row = copy[half] * rows + self.places.row[own]
                position, part = self.places.position[own], self.places.part[own]
                place = index(name, row, position, part, tensor)
                tensor[place] = self.values(name, own, tensor[place]).to(tensor)
            return tensor

        return change


class _Given:
    """Attention that gives what it is told."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def attend(
        self, states: States, mask: Tensor | None, causal: bool, compute: Attention
    ) -> Tensor:
        return self.z


def _halt(*args: Any, **kwargs: Any) -> Any:
    raise Halt(args[0] if args else kwargs["hidden_states"])


def tile(batch: Batch, times: int) -> Batch:
    """A batch that holds every prompt `times` times, all prompts before the first repeats."""
    extra = {k: _repeat(v, times) if isinstance(v, Tensor) else v for k, v in batch.extra.items()}
    layout = batch.layout
    tiled = replace(
        layout,
        modality=_repeat(layout.modality, times),
        image=_repeat(layout.image, times),
        view=_repeat(layout.view, times),
        row=_repeat(layout.row, times),
        column=_repeat(layout.column, times),
        tokens=layout.tokens * times,
        media=layout.media * times,
        windows=layout.windows * times,
        defined={name: _repeat(mask, times) for name, mask in layout.defined.items()},
    )
    return replace(
        batch,
        input_ids=_repeat(batch.input_ids, times),
        attention_mask=_repeat(batch.attention_mask, times),
        position_ids=None if batch.position_ids is None else _repeat(batch.position_ids, times),
        extra=extra,
        layout=tiled,
        images=batch.images * times,
    )


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))

"""Tokens of many trials in one row, and the attention that each of them has.

A language block treats tokens one by one except in its attention. So the tokens of trials that
begin at different positions stand side by side as [1, token, d_model], without padding, and only
the attention function sees them by trial: their queries against the keys and values of the whole
prompt, recorded ones where the trial has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechmm.engine.places import Ints
from mechmm.engine.record import BY_TOKEN, Block
from mechmm.engine.shelf import pick
from mechmm.engine.tiles import Tile

TILES = {"cpu": 32}
TILE = 256
"""Positions whose attention is computed together, by kind of device: fewer of them see fewer keys
in vain, more of them keep a large device busy."""
GROUPS = {"cpu": 512}
GROUP = 65_536
"""Keys that are laid out together, by kind of device."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens in one row, those of a trial together and in order.

    Attributes:
        trial: number of the trial of every token [token], among those of a chunk.
        position: its position in the prompt [token].
        prompts: the prompt of every trial of the chunk.
        width: positions of a prompt.
        device: of the tensors.
    """

    trial: Ints
    position: Ints
    prompts: Ints
    width: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.trial)

    @cached_property
    def at(self) -> np.ndarray:
        """Number of the token of (trial, position), -1 where there is none."""
        table = np.full((len(self.prompts), self.width), -1)
        table[self.trial, self.position] = np.arange(len(self))
        return table

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """(prompt, position) of every token, as indices of recorded tensors."""
        prompt = self.prompts[self.trial]
        return self.tensor(prompt), self.tensor(self.position)

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array as a tensor on the device."""
        return torch.as_tensor(array, device=self.device)

    def of(self, recorded: Tensor) -> Tensor:
        """The values of a recorded tensor [batch, pos, ...] for every token [1, token, ...]."""
        if self.even is None:
            return pick(recorded, *self.index, device=self.device)[None]
        own = self.by_prompt(recorded[:, self._span].to(self.device))
        own = own.clone(memory_format=torch.contiguous_format)
        return own.flatten(0, 1)[None]

    def joined(self, other: Tokens) -> Tokens:
        """These tokens and others behind them."""
        trial = np.concatenate([self.trial, other.trial])
        position = np.concatenate([self.position, other.position])
        return Tokens(trial, position, self.prompts, self.width, self.device)

    def part(self, keep: np.ndarray | slice) -> Tokens:
        """Some of the tokens, by mask or number."""
        rest = (self.prompts, self.width, self.device)
        return Tokens(self.trial[keep], self.position[keep], *rest)

    def options(self, block: Block) -> dict[str, Any]:
        """The keyword arguments of a block for these tokens."""
        found = self._options
        for name, value in block.options.items():
            if name in BY_TOKEN and id(value) not in found:
                found[id(value)] = self._option(name, value)
        return {
            name: found[id(value)] if name in BY_TOKEN else value
            for name, value in block.options.items()
        }

    @cached_property
    def _options(self) -> dict[int, Any]:
        """Of arguments that blocks share, by their identity."""
        return {}

    def _option(self, name: str, value: Any) -> Any:
        if value is None:
            return value
        if isinstance(value, tuple | list):
            return tuple(self._option(name, part) for part in value)
        prompt, position = self.index
        if value.ndim == 1:
            return value[position]
        if name == "position_embeddings":  # [..., batch or 1, pos, d]
            own = prompt if value.shape[-3] > 1 else torch.zeros_like(prompt)
            return value[..., own, position, :].unsqueeze(-3).contiguous()
        own = prompt if value.shape[-2] > 1 else torch.zeros_like(prompt)
        return value[..., own, position].unsqueeze(-2)  # position_ids [..., batch or 1, pos]

    # By trial --------------------------------------------------------------------------------

    @cached_property
    def trials(self) -> Ints:
        """The trials that have tokens, by number."""
        return np.unique(self.trial)

    @cached_property
    def even(self) -> int | None:
        """How many tokens each trial has, where all have the same positions, one behind the other,
        and stand in order: then parts of tensors are slices, not lists of indices."""
        count, rest = divmod(len(self), max(1, len(self.trials)))
        if rest or not count:
            return None
        positions = self.position[0] + np.arange(count)
        same = bool((self.position.reshape(-1, count) == positions).all())
        ordered = np.array_equal(self.trial, np.repeat(self.trials, count))
        return count if same and ordered else None

    @property
    def _span(self) -> slice:
        """The positions of each trial, where `even`."""
        return slice(int(self.position[0]), int(self.position[-1]) + 1)

    def by_prompt(self, recorded: Tensor) -> Tensor:
        """Recorded values [batch, ...] for every trial [trial, ...]; without a copy of one."""
        if len(recorded) == 1:
            return recorded.expand(len(self.trials), *recorded.shape[1:])
        return recorded[self.tensor(self.prompts[self.trials])]

    @cached_property
    def rows(self) -> Tensor:
        """Which of `trials` every token belongs to [token]."""
        return self.tensor(np.searchsorted(self.trials, self.trial))

    def put(self, new: Tensor, whole: Tensor) -> None:
        """Put keys or values of the tokens [head, token, d_head] among those of whole prompts
        [trial, head, pos, d_head]."""
        if self.even is None:
            whole[self.rows, :, self.index[1]] = new.transpose(0, 1)
        else:
            whole[:, :, self._span] = new.unflatten(1, (-1, self.even)).transpose(0, 1)

    @cached_property
    def known(self) -> int:
        """The position behind the last one where a trial has no token."""
        _, missing = np.nonzero(self.at[self.trials] < 0)
        return int(missing.max(initial=-1)) + 1

    @property
    def groups(self) -> list[tuple[Tokens, slice]]:
        """The tokens of some trials at a time, whose keys are laid out together, and where they
        are among these."""
        few = len(self.trials) <= self._together
        return [(self, slice(None))] if few else self._groups

    @property
    def _together(self) -> int:
        return max(1, GROUPS.get(self.device.type, GROUP) // self.width)

    @cached_property
    def _groups(self) -> list[tuple[Tokens, slice]]:
        size = self._together
        ends = [0, *np.searchsorted(self.trial, self.trials[size - 1 :: size], side="right")]
        ends += [len(self)] if ends[-1] < len(self) else []
        places = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        return [(self.part(place), place) for place in places]

    @cached_property
    def tiles(self) -> list[Tile]:
        """The tokens by position, those at the end of the prompts together."""
        table, found = self.at[self.trials], []
        size = TILES.get(self.device.type, TILE)
        for end in range(self.width, int(self.position.min()), -size):
            positions = np.arange(max(0, end - size), end)
            there = table[:, positions] >= 0
            columns, rows = there.any(0), there.any(1)
            if rows.any():
                numbers = table[:, positions[columns]][rows]
                at = (np.flatnonzero(rows), positions[columns], numbers)
                found.append(Tile(*at, self.device, self.even))
        return found

    def visible(self, tile: Tile, block: Block, dtype: torch.dtype) -> Tensor | None:
        """What the queries of a tile see [trial or 1, 1, query, key], as booleans or what is added
        to scores; None: every key."""
        if block.mask is not None:
            at = self.tensor(tile.positions)
            own = self.prompts[self.trials[tile.rows]]
            own = own if len(block.mask) > 1 else np.zeros(1, dtype=np.int64)
            return block.mask[self.tensor(own)[:, None], 0, at][:, None]
        return tile.triangle(dtype) if block.causal else None

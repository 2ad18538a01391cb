"""Tokens of many trials in one row, and the attention that each of them has.

A language block treats tokens one by one except in its attention. So the tokens of trials that
begin at different positions stand side by side as [1, token, d_model], without padding, and only
the attention function sees them by trial: their queries against the keys and values of the whole
prompt, recorded ones where the trial has none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechmm.engine.freeze import Halt
from mechmm.engine.places import Ints
from mechmm.engine.record import BY_TOKEN, Block
from mechmm.engine.shelf import pick
from mechmm.model.attention import Compute, States

TILES = {"cpu": 32}
TILE = 256
"""Positions whose attention is computed together, by kind of device: fewer of them see fewer keys
in vain, more of them keep a large device busy."""


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
        return pick(recorded, *self.index, device=self.device)[None]

    def joined(self, other: Tokens) -> Tokens:
        """These tokens and others behind them."""
        trial = np.concatenate([self.trial, other.trial])
        position = np.concatenate([self.position, other.position])
        return Tokens(trial, position, self.prompts, self.width, self.device)

    def part(self, keep: np.ndarray) -> Tokens:
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
    def rows(self) -> Tensor:
        """Which of `trials` every token belongs to [token]."""
        return self.tensor(np.searchsorted(self.trials, self.trial))

    @cached_property
    def _rooms(self) -> dict[str, Tensor]:
        return {}

    def laid_out(self, name: str, recorded: Tensor) -> Tensor:
        """Recorded keys or values of every trial [trial, head, pos, d_head], in memory that is
        used anew for each block: to ask for it takes longer than to fill it."""
        shape = (len(self.trials), *recorded.shape[1:])
        room = self._rooms.get(name)
        if room is None or room.shape != shape:
            self._rooms[name] = room = recorded.new_empty(shape, device=self.device)
        recorded = recorded.to(self.device)
        if len(recorded) > 1:
            prompts = self.tensor(self.prompts[self.trials])
            return torch.index_select(recorded, 0, prompts, out=room)
        known = self._known
        room[:, :, :known].copy_(recorded[:, :, :known].expand(shape[0], -1, -1, -1))
        return room

    @cached_property
    def _known(self) -> int:
        """The position behind the last one where a trial has no token."""
        _, missing = np.nonzero(self.at[self.trials] < 0)
        return int(missing.max(initial=-1)) + 1

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
                found.append(Tile(np.flatnonzero(rows), positions[columns], numbers, self.device))
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


@dataclass(frozen=True, eq=False)
class Tile:
    """Neighbouring positions of some trials.

    Attributes:
        rows: which trials, of those that have tokens [row].
        positions: theirs [query].
        tokens: their numbers, -1 where a trial has none [row, query].
        device: of the tensors.
    """

    rows: Ints
    positions: Ints
    tokens: Ints
    device: torch.device

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.as_tensor(self.tokens.clip(min=0), device=self.device)

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        """(place among rows and queries, number) of every token."""
        flat = self.tokens.flatten()
        there = np.flatnonzero(flat >= 0)
        return tuple(torch.as_tensor(part, device=self.device) for part in (there, flat[there]))  # type: ignore[return-value] - two of them

    def keys(self, block: Block, width: int) -> int:
        """How many of the first keys are all that the queries see."""
        causal = block.mask is None and block.causal
        return int(self.positions[-1]) + 1 if causal else width

    def some(self, states: Tensor) -> Tensor:
        """Keys or values of these trials, of [trial, ...]; without a copy where they come first."""
        count = len(self.rows)
        if self.rows[-1] + 1 == count:
            return states[:count]
        return states[torch.as_tensor(self.rows, device=states.device)]

    def triangle(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores so that no query sees what comes later [1, 1, query, key]."""
        if dtype not in self._triangles:
            keys = torch.arange(int(self.positions[-1]) + 1, device=self.device)
            later = keys > torch.as_tensor(self.positions, device=self.device)[:, None]
            lowest = torch.zeros(later.shape, dtype=dtype, device=self.device)
            self._triangles[dtype] = lowest.masked_fill(later, -torch.inf)[None, None]
        return self._triangles[dtype]

    @cached_property
    def _triangles(self) -> dict[torch.dtype, Tensor]:
        return {}

    def queries(self, states: Tensor) -> Tensor:
        """Queries [row, head, query, d_head], of [token, head, d_head]."""
        return states[self._numbers].transpose(1, 2)

    def put(self, found: Tensor, z: Tensor) -> None:
        """Put z of the tile [row, query, head, d_head] into that of all tokens."""
        place, numbers = self._own
        z[numbers] = found.flatten(0, 1)[place]


class Reenter:
    """Attention of tokens in one row: queries of their own, keys and values of the whole prompt.

    With `collect`, the keys and values are noted and the run ends there; with `known`, they are
    those that were noted, and the tokens' own are put among them.
    """

    def __init__(
        self,
        tokens: Tokens,
        block: Block,
        *,
        collect: bool = False,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.tokens, self.block, self.collect, self.known = tokens, block, collect, known

    def attend(self, states: States, mask: Tensor | None, causal: bool, compute: Compute) -> Tensor:
        query, *own = states
        key, value = self._recorded()
        for whole, new in zip((key, value), own, strict=True):
            whole[self.tokens.rows, :, self.tokens.index[1]] = new[0].transpose(0, 1)
        if self.collect:
            raise Halt((key, value))
        by_token = query[0].transpose(0, 1)  # [token, head, d_head]
        z = value.new_empty(*by_token.shape[:2], value.shape[-1])
        for tile in self.tokens.tiles:
            seen = tile.keys(self.block, self.tokens.width)
            keys, values = (tile.some(state)[:, :, :seen] for state in (key, value))
            states = (tile.queries(by_token), keys, values)
            tile.put(compute(states, self.tokens.visible(tile, self.block, query.dtype)), z)
        return z[None]

    def _recorded(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole prompt [trial, head, pos, d_head]."""
        if self.known is not None:
            return self.known
        keys, values = self.block.keys, self.block.values
        assert keys is not None
        assert values is not None
        return self.tokens.laid_out("keys", keys), self.tokens.laid_out("values", values)

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

TILE = 32
"""Queries whose causal attention is computed together."""


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
        return {name: self._option(name, value) for name, value in block.options.items()}

    def _option(self, name: str, value: Any) -> Any:
        if name not in BY_TOKEN or value is None:
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
        """The trials that have tokens, in the order of their tokens."""
        first = np.ones(len(self), dtype=bool)
        first[1:] = self.trial[1:] != self.trial[:-1]
        return self.trial[first]

    @cached_property
    def _slots(self) -> tuple[Ints, Ints]:
        """(which of `trials`, how manieth of its tokens) of every token."""
        first = np.ones(len(self), dtype=bool)
        first[1:] = self.trial[1:] != self.trial[:-1]
        of = first.cumsum() - 1
        return of, np.arange(len(self)) - first.nonzero()[0][of]

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """As `_slots`, on the device."""
        of, rank = self._slots
        return self.tensor(of), self.tensor(rank)

    @cached_property
    def padded(self) -> np.ndarray:
        """Position of every token by trial [trial, token], 0 where a trial has fewer tokens."""
        of, rank = self._slots
        table = np.zeros((len(self.trials), int(rank.max()) + 1), dtype=np.int64)
        table[of, rank] = self.position
        return table

    @cached_property
    def aligned(self) -> bool:
        """Whether all trials have the same positions."""
        return bool((self.padded == self.padded[0]).all()) and self.padded.size == len(self)

    @cached_property
    def tiles(self) -> list[Tile]:
        """Causal attention in parts: queries by rank, each with the keys that some of them see."""
        rows = self.padded[:1] if self.aligned else self.padded
        found = []
        for start in range(0, self.padded.shape[1], TILE):
            queries = slice(start, start + TILE)
            seen = int(rows[:, queries].max()) + 1
            keys = torch.arange(seen, device=self.device)
            visible = keys <= self.tensor(rows[:, queries])[..., None]
            found.append(Tile(queries, seen, visible[:, None]))
        return found

    def mask(self, block: Block) -> Tensor:
        """What every token sees where the block has a mask: [trial, 1, token, key]."""
        assert block.mask is not None
        own = self.prompts[self.trials] if len(block.mask) > 1 else np.zeros_like(self.trials)
        return block.mask[self.tensor(own)[:, None], 0, self.tensor(self.padded)][:, None]


@dataclass(frozen=True, eq=False)
class Tile:
    """Some queries, and what they see.

    Attributes:
        queries: their ranks.
        keys: how many of the first keys they see.
        visible: [trial or 1, 1, query, key].
    """

    queries: slice
    keys: int
    visible: Tensor


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
        recorded = self.known or (self.block.keys, self.block.values)
        key, value = (self._whole(r, new) for r, new in zip(recorded, own, strict=True))
        if self.collect:
            raise Halt((key, value))
        z = self._by_trial_z(self._by_trial(query), key, value, compute)
        if self.tokens.aligned:
            return z.flatten(0, 1)[None]
        return z[self.tokens.slots][None]

    def _by_trial_z(self, query: Tensor, key: Tensor, value: Tensor, compute: Compute) -> Tensor:
        """z [trial, token, head, d_head]."""
        tokens, block = self.tokens, self.block
        if block.mask is not None:
            return compute((query, key, value), tokens.mask(block))
        whole = tokens.aligned and tokens.padded.shape[1] == tokens.width
        if whole or not block.causal:
            return compute((query, key, value), None)
        parts = [
            compute((query[:, :, t.queries], key[:, :, : t.keys], value[:, :, : t.keys]), t.visible)
            for t in tokens.tiles
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _whole(self, recorded: Tensor | None, own: Tensor) -> Tensor:
        """Keys or values of the whole prompt [trial, head, pos, d_head]."""
        assert recorded is not None
        tokens = self.tokens
        if self.known is None:
            prompts = torch.as_tensor(tokens.prompts[tokens.trials])
            recorded = pick(recorded, prompts, device=tokens.device)
        recorded[tokens.slots[0], :, tokens.index[1]] = own[0].transpose(0, 1)
        return recorded

    def _by_trial(self, query: Tensor) -> Tensor:
        """Queries [trial, head, token, d_head], 0 where a trial has fewer tokens."""
        tokens = self.tokens
        if tokens.aligned:
            return query[0].unflatten(1, tokens.padded.shape).transpose(0, 1)
        shape = (*tokens.padded.shape, query.shape[1], query.shape[3])
        padded = query.new_zeros(shape)
        padded[tokens.slots] = query[0].transpose(0, 1)
        return padded.transpose(1, 2)

"""Neighbouring positions of some trials, whose attention is computed together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mechmm.engine.places import Ints
from mechmm.engine.record import Block


@dataclass(frozen=True, eq=False)
class Tile:
    """Neighbouring positions of some trials.

    Attributes:
        rows: which trials, of those that have tokens [row].
        positions: theirs [query].
        tokens: their numbers, -1 where a trial has none [row, query].
        device: of the tensors.
        even: as `Tokens.even`.
    """

    rows: Ints
    positions: Ints
    tokens: Ints
    device: torch.device
    even: int | None

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
        return self._end if causal else width

    @cached_property
    def _end(self) -> int:
        return int(self.positions[-1]) + 1

    def some(self, states: Tensor) -> Tensor:
        """Keys or values of these trials, of [trial, ...]; without a copy where they come first."""
        count = len(self.rows)
        if self.rows[-1] + 1 == count:
            return states[:count]
        return states[torch.as_tensor(self.rows, device=states.device)]

    def triangle(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores so that no query sees what comes later [1, 1, query, key]."""
        if dtype not in self._triangles:
            keys = torch.arange(self._end, device=self.device)
            later = keys > torch.as_tensor(self.positions, device=self.device)[:, None]
            lowest = torch.zeros(later.shape, dtype=dtype, device=self.device)
            self._triangles[dtype] = lowest.masked_fill(later, -torch.inf)[None, None]
        return self._triangles[dtype]

    @cached_property
    def _triangles(self) -> dict[torch.dtype, Tensor]:
        return {}

    def queries(self, states: Tensor) -> Tensor:
        """Queries [row, head, query, d_head], of [token, head, d_head]."""
        own = states[self._numbers] if self.even is None else self._part(states)
        return own.transpose(1, 2)

    def put(self, found: Tensor, z: Tensor) -> None:
        """Put z of the tile [row, query, head, d_head] into that of all tokens."""
        if self.even is None:
            place, numbers = self._own
            z[numbers] = found.flatten(0, 1)[place]
        else:
            self._part(z).copy_(found)

    def _part(self, states: Tensor) -> Tensor:
        """What belongs to the tile [row, query, ...], as a view of [token, ...]."""
        assert self.even is not None
        first = int(self.tokens[0, 0])
        return states.unflatten(0, (-1, self.even))[:, first : first + self.tokens.shape[1]]

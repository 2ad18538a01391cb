"""Attention of tokens in one row: queries of their own, keys and values of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechmm.engine.freeze import Halt
from mechmm.engine.record import Block
from mechmm.engine.tokens import Tokens
from mechmm.model.attention import Compute, States

Keys = tuple[Tensor, Tensor]
"""Keys and values [key-value head, token, d_head]."""


class Rooms:
    """Memory that is used anew for every block: to ask for it takes longer than to fill it."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of some shape, filled with anything."""
        size = torch.Size(shape).numel()
        room = self._found.get(name)
        if room is None or len(room) < size or room.dtype != like.dtype:
            self._found[name] = room = like.new_empty(size)
        return room[:size].view(shape)


class Reenter:
    """Attention of tokens in one row.

    Args:
        rooms: where keys and values are laid out.
        collect: only the tokens' keys and values are wanted: the run ends there.
        given: tokens of the same trials, and their keys and values, in the place of those that
            these tokens have.
    """

    def __init__(
        self,
        tokens: Tokens,
        block: Block,
        rooms: Rooms | None = None,
        *,
        collect: bool = False,
        given: tuple[Tokens, Keys] | None = None,
    ) -> None:
        self.tokens, self.block, self.rooms = tokens, block, rooms or Rooms()
        self.collect, self.given = collect, given

    def attend(self, states: States, mask: Tensor | None, causal: bool, compute: Compute) -> Tensor:
        query, key, value = (state[0] for state in states)
        if self.collect:
            raise Halt((key, value))
        source, (key, value) = self.given or (self.tokens, (key, value))
        query = query.transpose(0, 1)  # [token, head, d_head]
        z: Tensor | None = None
        for (tokens, at), (others, there) in zip(self.tokens.groups, source.groups, strict=True):
            keys = self._laid_out("keys", others, self.block.keys, key[:, there])
            values = self._laid_out("values", others, self.block.values, value[:, there])
            for tile in tokens.tiles:
                seen = tile.keys(self.block, tokens.width)
                whole = (tile.some(state)[:, :, :seen] for state in (keys, values))
                parts: States = (tile.queries(query[at]), *whole)  # type: ignore[assignment] - two of them
                visible = tokens.visible(tile, self.block, query.dtype)
                found = compute(parts, visible)
                z = query.new_empty(*query.shape[:2], found.shape[-1]) if z is None else z
                tile.put(found, z[at])
        assert z is not None
        return z[None]

    def _laid_out(self, name: str, tokens: Tokens, recorded: Tensor | None, own: Tensor) -> Tensor:
        """Keys or values of whole prompts [trial, head, pos, d_head]: the tokens' own [head, token,
        d_head], and recorded ones before them."""
        assert recorded is not None
        shape = (len(tokens.trials), *recorded.shape[1:])
        room, known = self.rooms.of(name, shape, own), tokens.known
        room[:, :, :known] = tokens.by_prompt(recorded[:, :, :known].to(own.device))
        tokens.put(own, room)
        return room

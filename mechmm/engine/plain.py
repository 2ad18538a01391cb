"""Language blocks as sums of their modules, in fewer passes over memory than as they are written.

Most decoder blocks with norm n before attention and n' before the MLP are

    mid = x + o(z(q(n x), k(n x), v(n x))),   out = mid + mlp(n' mid)

with queries and keys that are rotated by position. Here the sums are made in place, so that more
tokens fit into a pass; positions that enter a block as recorded keep their keys and values and, but
for the rotation, take no part in its first norm and projections; and in the last block, where few
positions have a query, head h mixes what its values are made of instead of the values,

    z_h = sum_j a_hj W_V,h n x_j = W_V,h sum_j a_hj n x_j,

so that no value is computed. Whether a block is such a sum is not only read off the modules that it
has: it is run both ways on some recorded tokens, and the modules alone are used where both give the
same queries, keys, values and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.engine.freeze import first_of
from mechmm.engine.head import close
from mechmm.engine.record import Recording
from mechmm.engine.reenter import Reenter, Rooms
from mechmm.engine.tokens import Tokens
from mechmm.model import taps
from mechmm.model.attention import Attention, Reentry, States, listening, reentering
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower

ROWS = 1024
"""Tokens that go through an MLP together: its hidden layer is large."""
SOME = 16
"""Tokens on which a block is tried, of all prompts together, but two of each at least."""
CLOSE = 1e-5
"""How far queries, keys and values of both ways may differ, of the largest number; outputs by as
much as `head.close` has it, for where attention is sharp, rounding of large scores weighs more."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [1, token, d_head]."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a block that are all it is made of.

    Attributes:
        d_head: size of a head.
    """

    ln1: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    ln2: nn.Module
    mlp: nn.Module
    d_head: int

    @classmethod
    def of(cls, tower: Tower, layer: int) -> Parts | None:
        """Those of a block; None where it has others, too, or computes in half precision, where
        every step rounds as it is written."""
        row, block = tower.row, tower.blocks[layer]
        others = (row.ln1_post, row.ln2_post, row.cross_attn, row.attn_out, row.mlp_out_at)
        if row.post_norm or any(tower.module(path, layer) is not None for path in others):
            return None
        ln1, ln2, mlp = (tower.module(path, layer) for path in (row.ln1, row.ln2, row.mlp))
        linears = [tower.linear(layer, name) for name in "qkvo"]
        if ln1 is None or ln2 is None or mlp is None or any(m is None for m in linears):
            return None
        q, k, v, o = (m for m in linears if m is not None)
        parts = (ln1, q, k, v, o, ln2, mlp)
        ours = sum(p.numel() for module in parts for p in module.parameters())
        if ours != sum(p.numel() for p in block.parameters()) or _half(block):
            return None
        return cls(*parts, tower.d_head(layer))

    def queries(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries as attention uses them [token, head, d_head], of normed tokens [1, token, d]."""
        return self._turned(self.q(x), rotation)

    def keys(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Keys as attention uses them [token, head, d_head]."""
        return self._turned(self.k(x), rotation)

    def values(self, x: Tensor) -> Tensor:
        """Values [token, head, d_head]."""
        return self._heads(self.v(x))

    def behind(self, hidden: Tensor, z: Tensor) -> Tensor:
        """What leaves the block, in the place of what entered it."""
        hidden += self.o(z.flatten(2))
        del z  # the hidden layers take its room
        return self.fed(hidden)

    def fed(self, hidden: Tensor, rest: Tensor | None = None) -> Tensor:
        """What leaves the block, in the place of what its MLP reads [1, token, d_model].

        Args:
            rest: what it adds to; None: what it reads.
        """
        for first in range(0, hidden.shape[1], ROWS):
            some = slice(first, first + ROWS)
            part = hidden[:, some]
            added = first_of(self.mlp(self.ln2(part)))
            torch.add(part if rest is None else rest[:, some], added, out=part)
        return hidden

    def _heads(self, projected: Tensor) -> Tensor:
        return projected[0].unflatten(-1, (-1, self.d_head))

    def _turned(self, projected: Tensor, rotation: Rotation | None) -> Tensor:
        heads = self._heads(projected)
        if rotation is None:
            return heads
        return turned(heads, *(part[0, :, None] for part in rotation))


def _altered(module: nn.Module) -> bool:
    """Whether a module does more than its own code; taps act for hook points alone."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    others = any(getattr(hook, "__module__", "") != taps.__name__ for hook in hooks)
    return others or "forward" in module.__dict__


def _half(block: nn.Module) -> bool:
    return any(torch.finfo(p.dtype).bits < 32 for p in block.parameters() if p.is_floating_point())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x'', x') sin, of halves x' and x'' along the last axis (Su et al. 2104.09864)."""
    half = x.shape[-1] // 2
    new = x * cos
    new[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    new[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return new


@dataclass(frozen=True, eq=False)
class Shared:
    """What the blocks of one recording share.

    Attributes:
        rooms: where keys and values are laid out.
        queries: of all recorded positions, by block.
    """

    rooms: Rooms = field(default_factory=Rooms)
    queries: dict[int, Tensor] = field(default_factory=dict)


class Plain:
    """A block of one recording as sums.

    Attributes:
        parts: its modules.
        attention: what its attention does.
    """

    def __init__(
        self, parts: Parts, attention: Attention, recording: Recording, layer: int, shared: Shared
    ) -> None:
        self.parts, self.attention, self.shared = parts, attention, shared
        self.layer, self.block = layer, recording.blocks[layer]
        self.stream = recording.stream(layer)

    def through(self, tokens: Tokens, hidden: Tensor, unchanged: np.ndarray) -> Tensor:
        """The block for tokens, in the place of what entered it [1, token, d_model].

        Args:
            unchanged: which of them enter it as recorded [token].
        """
        return self.parts.behind(hidden, self._z(tokens, hidden, unchanged))

    def _z(self, tokens: Tokens, hidden: Tensor, unchanged: np.ndarray) -> Tensor:
        """z of tokens [1, token, head, d_head]."""
        if unchanged.any():
            own, at = tokens.part(~unchanged), tokens.tensor(np.flatnonzero(~unchanged))
            new, key, value = self.states(hidden[:, at], own)
            query = tokens.of(self.queries)[0]
            query[at] = new
        else:
            own = tokens
            query, key, value = self.states(hidden, tokens)
        source = (own, (key.transpose(0, 1), value.transpose(0, 1)))
        reenter = Reenter(tokens, self.block, self.shared.rooms, given=source)
        return self._attend(reenter, query, self.attention)

    def states(self, hidden: Tensor, tokens: Tokens) -> States:
        """Queries, keys and values of what enters the block [token, head, d_head]."""
        x, rotation = self.parts.ln1(hidden), self.rotation(tokens)
        return (
            self.parts.queries(x, rotation),
            self.parts.keys(x, rotation),
            self.parts.values(x),
        )

    def ends(self, tokens: Tokens, hidden: Tensor, ends: Tokens, stream: Tensor) -> Tensor:
        """The block for the positions `ends` alone, in the place of `stream`, of which the tokens
        may be others than recorded."""
        x = self.parts.ln1(hidden)
        key = self.parts.keys(x, self.rotation(tokens)).transpose(0, 1)
        query = self.parts.queries(self.parts.ln1(stream), self.rotation(ends))
        block = replace(self.block, values=self.normed)
        reenter = Reenter(ends, block, self.shared.rooms, given=(tokens, (key, x)))
        return self.parts.behind(stream, self._attend(reenter, query, self._mixed))

    def _attend(self, reenter: Reentry, query: Tensor, compute: Any) -> Tensor:
        states = query.transpose(0, 1)[None]
        return reenter.attend((states, states, states), None, True, compute)

    def _mixed(self, states: States, mask: Tensor | None) -> Tensor:
        """z [trial, query, head, d_head] of what values are made of [trial, 1, key, d_model]."""
        query, key, x = states
        pattern = self.attention.pattern(query, key, mask)
        mean = (pattern.flatten(1, 2) @ x[:, 0]).unflatten(1, pattern.shape[1:3])
        weight = self.parts.v.weight.unflatten(0, (key.shape[1], 1, -1))  # [head, 1, d_head, d]
        groups = mean.unflatten(1, (key.shape[1], -1))  # [trial, key-value head, group, query, d]
        z = torch.einsum("tkgqm,kuem->tqkge", groups, weight).flatten(2, 3)
        bias = self.parts.v.bias
        if bias is None:
            return z
        return z + bias.view(key.shape[1], -1).repeat_interleave(groups.shape[2], 0)

    def rotation(self, tokens: Tokens) -> Rotation | None:
        """What turns queries and keys of tokens, or None."""
        return rotation_of(tokens, tokens.options(self.block))

    # What is recorded ------------------------------------------------------------------------

    def _everything(self) -> tuple[Tokens, Tensor]:
        """All positions of all prompts, and what they enter the block with, normed."""
        count, width = self.stream.shape[:2]
        trial, position = np.divmod(np.arange(count * width), width)
        device = next(self.parts.o.parameters()).device
        tokens = Tokens(trial, position, np.arange(count), width, device)
        return tokens, self.parts.ln1(tokens.of(self.stream))

    @property
    def queries(self) -> Float[Tensor, "prompt pos head d_head"]:
        """Of the recorded prompts; one block's are kept, for trials come in the order of blocks."""
        if self.layer not in self.shared.queries:
            self.shared.queries.clear()
            tokens, x = self._everything()
            found = self.parts.queries(x, self.rotation(tokens))
            self.shared.queries[self.layer] = found.unflatten(0, self.stream.shape[:2])
        return self.shared.queries[self.layer]

    @cached_property
    def normed(self) -> Float[Tensor, "prompt one pos d_model"]:
        """What values are made of in the recorded prompts."""
        _, x = self._everything()
        return x.view(self.stream.shape)[:, None]


def rotation_of(tokens: Tokens, options: dict[str, Any]) -> Rotation | None:
    """The rotation of tokens that a block is given, if it is given one.

    Raises:
        ValueError: where that is not one of whole heads.
    """
    given = options.get("position_embeddings")
    if given is None:
        return None
    shape = (1, len(tokens))
    if len(given) == 2 and all(isinstance(p, Tensor) and p.shape[:-1] == shape for p in given):
        return given[0], given[1]
    raise ValueError("no rotation of whole heads")


class Plains:
    """The blocks of one recording that are sums.

    Attributes:
        refused: numbers of blocks that have the modules of a sum and give something else.
    """

    def __init__(self, model: HookedMultimodal, recording: Recording) -> None:
        self.model, self.recording, self.shared = model, recording, Shared()
        self._found: dict[int, Plain | None] = {}
        self.refused: list[int] = []

    def of(self, layer: int) -> Plain | None:
        """A block as sums, or None where it is not one, or somebody listens in it."""
        if layer not in self._found:
            self._found[layer] = self._tried(layer)
        return self._found[layer]

    @property
    def every(self) -> bool:
        """Whether all blocks are sums."""
        return all(self.of(layer) is not None for layer in range(len(self.recording.blocks)))

    @property
    def tower(self) -> Tower:
        """The language model."""
        return self.model.towers[LANGUAGE]

    @torch.no_grad()
    def _tried(self, layer: int) -> Plain | None:
        parts = Parts.of(self.tower, layer)
        if parts is None or self._watched(layer):
            return None
        plain = self._alike(parts, layer)
        if plain is None:
            self.refused.append(layer)
        return plain

    def _alike(self, parts: Parts, layer: int) -> Plain | None:
        """A block as sums, if these give on some tokens what the block gives."""
        tokens, seen = self._some(), _Seen()
        hidden = tokens.of(self.recording.stream(layer))
        wanted = self._written(layer, tokens, hidden.clone(), seen)
        plain = Plain(parts, seen.attention, self.recording, layer, self.shared)
        try:
            states = plain.states(hidden, tokens)
        except (ValueError, RuntimeError):  # a rotation of another shape
            return None
        found = plain.through(tokens, hidden, np.zeros(len(tokens), dtype=bool))
        theirs = (state[0].transpose(0, 1) for state in seen.states)
        alike = all(map(_close, states, theirs)) and close(found, wanted)
        return plain if alike else None

    def _written(self, layer: int, tokens: Tokens, hidden: Tensor, seen: _Seen) -> Tensor:
        """What a block itself gives."""
        block = self.recording.blocks[layer]
        core = self.tower.part(layer, "attn", self.tower.row.core)
        assert core is not None
        seen.reenter = Reenter(tokens, block, self.shared.rooms)
        self.tower.shape = hidden.shape
        with reentering(core, seen):
            return first_of(self.tower.blocks[layer](hidden, **tokens.options(block)))

    def _some(self) -> Tokens:
        """A few positions of every prompt."""
        prompts, width = self.recording.stream(0).shape[:2]
        real = (self.recording.batch.attention_mask > 0).cpu().numpy()
        chosen = [np.flatnonzero(row) for row in real]
        few = max(2, SOME // prompts)
        chosen = [row[np.linspace(0, len(row) - 1, few).astype(int)] for row in chosen]
        position = [np.unique(row) for row in chosen]
        trial = np.repeat(np.arange(prompts), [len(row) for row in position])
        device = self.recording.logits.device
        return Tokens(trial, np.concatenate(position), np.arange(prompts), width, device)

    def _watched(self, layer: int) -> bool:
        """Whether anybody listens in a block, or has changed what its modules do."""
        points = (
            point
            for name, point in self.model.hook_dict.items()
            if name.startswith(f"blocks.{layer}.")
        )
        modules = self.tower.blocks[layer].modules()
        return any(map(listening, points)) or any(map(_altered, modules))


class _Seen:
    """Notes what attention is given and what it does with it."""

    reenter: Reenter
    states: States
    attention: Attention

    def attend(
        self, states: States, mask: Tensor | None, causal: bool, compute: Attention
    ) -> Tensor:
        self.states, self.attention = states, compute
        return self.reenter.attend(states, mask, causal, compute)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(b.abs().max().clamp(min=1e-30))
    return float((a - b).abs().max()) <= CLOSE * scale

"""Edges cut within blocks of the language model that are sums of their modules.

In such a block, mid = x + o(z) and out = mid + mlp(n' mid). With c the change that an edge carries,
what one head reads changes its z alone,

    q' = W_Q,h n(x - c),   z'_h = softmax(q' k^T) v_h,    mid' = mid + (z'_h - z_h) W_O,h

(k' and v' alike, for all heads that share them), and what the MLP reads, out' = mid + mlp(n'(mid -
c)). So one head's attention takes the place of a block's, and the run goes on from out'. What the
logits read takes no block at all. In the last block only the positions whose logits are read have
a query.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad

from mechmm.engine.changes import Changes
from mechmm.engine.contrast import Contrast
from mechmm.engine.cut import Cut, Loss
from mechmm.engine.engine import Engine
from mechmm.engine.flow import slopes_at
from mechmm.engine.places import Ints
from mechmm.engine.plain import ROWS, Parts, Plain, turned
from mechmm.engine.record import resumes
from mechmm.engine.tokens import Tokens
from mechmm.engine.wiring import Group
from mechmm.model.hooked import LANGUAGE, HookedMultimodal


def may(model: HookedMultimodal, group: Group) -> bool:
    """Whether a group of readers may lie in a block that is a sum, by its modules."""
    if group.tower != LANGUAGE or not resumes(model):
        return False
    if group.kind == "logits":
        return True
    alike = group.kind == "heads" or slopes_at(model, group)[0].endswith("hook_mlp_in")
    tower = model.towers[LANGUAGE]
    return group.kind in ("heads", "mlp") and alike and Parts.of(tower, group.layer) is not None


class Within:
    """Cuts edges of one contrast within blocks."""

    def __init__(self, contrast: Contrast, engine: Engine, changes: Changes, loss: Loss) -> None:
        self.contrast, self.engine = contrast, engine
        self.changes, self.loss = changes, loss
        self.spans = contrast.spans()
        self._normed: tuple[tuple, Tensor] | None = None

    @staticmethod
    def fits(engine: Engine, group: Group) -> bool:
        """Whether edges into a group can be cut here."""
        if engine.head is None or not may(engine.model, group):
            return False
        return group.kind == "logits" or engine.plains.of(group.layer) is not None

    @property
    def most(self) -> int:
        """Trials that one pass holds: not too few, for the edges of a pass share what enters."""
        tokens = max(self.engine.tokens, ROWS)
        return max(1, tokens // self.engine.batch.input_ids.shape[1])

    def last(self, group: Group) -> bool:
        """Whether readers need no more than the positions that are read."""
        return group.layer == len(self.engine.recording.blocks) - 1

    def lost(self, cut: Cut) -> Float[Tensor, "reader writer prompt"]:
        """What every cut loses."""
        group = self.contrast.wiring.readers[cut.number]
        layers = len(self.engine.recording.blocks)
        if group.kind == "logits":
            stream, layer, start = self._read(cut), layers, 0
        else:
            within = _Block(self, cut, group)
            stream, layer, start = within.left(), group.layer + 1, within.start
        logits = self.engine.onward(layer, stream, cut.of, start)
        return self.loss(logits, cut.of).view(cut.shape)

    def _read(self, cut: Cut) -> Float[Tensor, "trial token d_model"]:
        """What the logits read."""
        recording = self.engine.recording
        wanted = self.engine.wanted[cut.prompts]
        at = grid(cut.prompts, wanted)
        stream = recording.stream(len(recording.blocks))[at].unflatten(0, wanted.shape)
        return (stream - self.change(cut, wanted)).flatten(0, 1)

    def change(self, cut: Cut, positions: Ints) -> Float[Tensor, "writer prompt pos d_model"]:
        """What the edges carry at some positions of every prompt [prompt, pos]."""
        at = grid(cut.prompts, positions)
        found = self.changes.of(LANGUAGE, cut.writers, at)
        own = self.spans[LANGUAGE][at] == cut.span
        if not own.all():
            found *= own[:, None].to(found)
        return found.unflatten(1, positions.shape)

    def start(self, cut: Cut) -> int:
        """The first position that any of the edges changes, or that is read."""
        spread, starts = self.changes.spread[LANGUAGE], self.engine.starts
        moved = spread.moved[cut.writers].any(0) & (spread.span == cut.span)
        moved &= np.isin(spread.example, cut.prompts)
        first = starts[spread.row[moved], spread.position[moved]]
        reads = starts[cut.prompts, self.engine.wanted[cut.prompts].min(1)]
        return int(min(first.min(), reads.min()))

    def normed(self, cut: Cut, plain: Plain, positions: Ints) -> Tensor:
        """What projections read where the edges are cut [writer, prompt, pos, d_model]; the last
        one is kept, for many readers read it."""
        key = (plain.layer, cut.span, *(a.tobytes() for a in (cut.writers, cut.prompts, positions)))
        if self._normed is None or self._normed[0] != key:
            self._normed = None
            stream = plain.stream[grid(cut.prompts, positions)].unflatten(0, positions.shape)
            change = self.change(cut, positions)
            self._normed = key, plain.parts.ln1(torch.sub(stream, change, out=change))
        return self._normed[1]


def grid(prompts: Ints, positions: Ints) -> tuple[Tensor, Tensor]:
    """(prompts, positions) of some positions of every prompt [prompt, pos]."""
    row = np.repeat(prompts, positions.shape[1])
    return torch.as_tensor(row), torch.as_tensor(positions.flatten())


class _Block:
    """Edges of one cut into one block."""

    def __init__(self, way: Within, cut: Cut, group: Group) -> None:
        self.way, self.cut, self.group = way, cut, group
        plain = way.engine.plains.of(group.layer)
        assert plain is not None
        self.plain, self.parts, self.block = plain, plain.parts, plain.block
        self.width = plain.stream.shape[1]
        self.start = way.start(cut)
        self.last = way.last(group)
        self.rows = torch.as_tensor(cut.prompts)
        self.changed = self._every
        self.read = way.engine.wanted[cut.prompts] if self.last else self._every

    @cached_property
    def _every(self) -> Ints:
        return np.tile(np.arange(self.start, self.width), (len(self.cut.prompts), 1))

    # What leaves the block ---------------------------------------------------------------------

    def left(self) -> Float[Tensor, "trial pos d_model"]:
        """The stream that leaves the block, by reader, writer and prompt; of the last block at the
        positions that are read."""
        mid = self._mid()
        if self.group.kind == "mlp":
            change = self.way.change(self.cut, self.read)
            stream = torch.sub(mid, change, out=change)[None]
            rest = mid.expand(stream.shape).reshape(1, -1, mid.shape[-1])
        else:
            readers, writers, _ = self.cut.shape
            stream, rest = mid.new_empty(readers, writers, *mid.shape), None
            for number, reader in enumerate(self.cut.readers):
                torch.add(mid, self._attended(int(reader)), out=stream[number])
        self.parts.fed(stream.view(1, -1, stream.shape[-1]), rest)
        if self.block.added is not None:
            stream += self._of(self.block.added, self.read)
        stream = stream.flatten(0, 2)
        return stream if self.last or not self.start else pad(stream, (0, 0, self.start, 0))

    def _mid(self) -> Float[Tensor, "prompt pos d_model"]:
        """What enters the MLP in the clean run."""
        z = self._of(self.z, self.read)
        return self._of(self.plain.stream, self.read) + self.parts.o(z.flatten(2))

    @property
    def z(self) -> Float[Tensor, "prompt pos head d_head"]:
        """Of the clean run."""
        return self.way.contrast.clean.values[f"blocks.{self.group.layer}.attn.hook_z"]

    def _of(self, recorded: Tensor, positions: Ints) -> Tensor:
        """What is recorded at some positions of the prompts [prompt, pos, ...]."""
        return recorded[grid(self.cut.prompts, positions)].unflatten(0, positions.shape)

    # Attention ---------------------------------------------------------------------------------

    def _attended(self, reader: int) -> Float[Tensor, "writer prompt pos d_model"]:
        """What cutting changes in what attention adds."""
        heads, groups = self.heads
        kind, number = "q", reader
        if reader >= heads:
            kind, number = "kv"[(reader - heads) // groups], (reader - heads) % groups
        group = number if kind != "q" else number * groups // heads
        size = heads // groups
        own = range(number, number + 1) if kind == "q" else range(group * size, (group + 1) * size)
        delta = {"q": self._query, "k": self._key, "v": self._value}[kind](number, group, own)
        d_head = self.parts.d_head
        weight = self.parts.o.weight[:, own.start * d_head : own.stop * d_head]
        carried = linear(delta.transpose(1, 2).flatten(2), weight)
        return carried.unflatten(0, self.cut.shape[1:])

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and key-value heads."""
        d_head = self.parts.d_head
        return self.parts.q.out_features // d_head, self.parts.k.out_features // d_head

    def _query(self, head: int, group: int, own: range) -> Tensor:
        query = self._turned(self._projected(self.parts.q, head, self.read), self.read)
        keys, values = (self._each(states) for states in self._states(group))
        return self._pattern(query, keys) @ values - self._each(self._z(own))

    def _key(self, number: int, group: int, own: range) -> Tensor:
        new = self._turned(self._projected(self.parts.k, number, self.changed), self.changed)
        keys, values = self._states(group)
        keys = keys.repeat(self.cut.shape[1], 1, 1, 1)
        keys[:, :, self.start :] = new
        pattern = self._pattern(self._each(self._queries(own)), keys)
        return pattern @ self._each(values) - self._each(self._z(own))

    def _value(self, number: int, group: int, own: range) -> Tensor:
        keys, values = self._states(group)
        new = self._projected(self.parts.v, number, self.changed)
        pattern = self._pattern(self._queries(own), keys)[..., self.start :]
        return self._each(pattern) @ (new - self._each(values[:, :, self.start :]))

    def _pattern(self, query: Tensor, keys: Tensor) -> Tensor:
        """[trial, head, pos, key pos]"""
        mask = self._mask
        if mask is not None and len(mask) > 1:
            mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
        return self.plain.attention.pattern(query, keys, mask)

    @cached_property
    def _mask(self) -> Tensor | None:
        """What the queries see [prompt or 1, 1, query, key], as booleans or what is added."""
        mask = self.block.mask
        if mask is not None:
            rows = self.rows if len(mask) > 1 else torch.zeros_like(self.rows)
            return mask[rows[:, None], 0, torch.as_tensor(self.read)][:, None]
        if not self.block.causal:
            return None
        keys = torch.arange(self.width)
        seen = keys <= torch.as_tensor(self.read)[:, None, :, None]
        return seen.to(self.plain.stream.device)

    def _projected(self, module, head: int, positions: Ints) -> Tensor:
        """What one head's projection gives [trial, 1, pos, d_head]."""
        x = self.way.normed(self.cut, self.plain, positions)
        part = slice(head * self.parts.d_head, (head + 1) * self.parts.d_head)
        bias = None if module.bias is None else module.bias[part]
        return linear(x, module.weight[part], bias).flatten(0, 1)[:, None]

    def _turned(self, heads: Tensor, positions: Ints) -> Tensor:
        rotation = self.plain.rotation(self._tokens(positions))
        if rotation is None:
            return heads
        shape = (1, *positions.shape, -1)  # [writer, prompt, pos, d_head]
        cos, sin = (part[0].view(shape) for part in rotation)
        own = heads[:, 0].unflatten(0, self.cut.shape[1:])
        return turned(own, cos, sin).flatten(0, 1)[:, None]

    def _tokens(self, positions: Ints) -> Tokens:
        trial = np.repeat(np.arange(len(positions)), positions.shape[1])
        device = self.plain.stream.device
        return Tokens(trial, positions.flatten(), self.cut.prompts, self.width, device)

    def _states(self, group: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a group [prompt, 1, pos, d_head]."""
        keys, values = self.block.keys, self.block.values
        assert keys is not None
        assert values is not None
        some = slice(group, group + 1)
        return keys[self.rows, some], values[self.rows, some]

    def _queries(self, own: range) -> Tensor:
        """Of the clean run [prompt, head, pos, d_head]."""
        queries = self._of(self.plain.queries, self.read)
        return queries[:, :, own.start : own.stop].transpose(1, 2)

    def _z(self, own: range) -> Tensor:
        return self._of(self.z, self.read)[:, :, own.start : own.stop].transpose(1, 2)

    def _each(self, recorded: Tensor) -> Tensor:
        """What is recorded of every prompt, for every trial [trial, ...]."""
        writers, prompts = self.cut.shape[1:]
        if prompts == 1:
            return recorded
        return recorded.repeat(writers, *[1] * (recorded.ndim - 1))

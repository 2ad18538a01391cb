"""Floating-point operations: what a run costs, from the sizes of its matrices.

A linear layer with `w` weights takes `2 w` operations a token, attention of `q` queries over `k`
keys `4 q k` times heads and their size. Norms, rotations and activations are left out, as PyTorch's
own counter leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mechmm.engine.places import Entry, Ints
from mechmm.engine.plain import Parts
from mechmm.engine.trials import Trials
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Weights that a token meets in every block of a tower [layer].

    Attributes:
        whole: all of them; attn: those of attention; queries: those of queries, keys and values;
            keys: those of keys and values; heads: query heads times their size.
        once: those of projections that run once for all positions that enter unchanged.
        values, mixed: those of values, and query heads times the size of the stream, where the
            block runs as a sum (`engine.plain`), else 0.
    """

    whole: Ints
    attn: Ints
    queries: Ints
    keys: Ints
    heads: Ints
    once: Ints
    values: Ints
    mixed: Ints

    @classmethod
    def of(cls, tower: Tower) -> Blocks:
        """Of the modules as they are."""
        layers = range(len(tower.blocks))
        attn = [tower.part(i, "attn", "") for i in layers]
        sums = [tower.name == LANGUAGE and Parts.of(tower, i) is not None for i in layers]
        columns = (
            [weights(block) for block in tower.blocks],
            [0 if module is None else weights(module) for module in attn],
            [_linears(tower, i, ("q", "k", "v", "qkv")) for i in layers],
            [_linears(tower, i, ("k", "v", "qkv")) for i in layers],
            [tower.heads(i) * tower.d_head(i) for i in layers],
            [_linears(tower, i, ("q",) if sums[i] else ("q", "k", "v", "qkv")) for i in layers],
            [_linears(tower, i, ("v",)) * sums[i] for i in layers],
            [tower.heads(i) * tower.cfg.d_model * sums[i] for i in layers],
        )
        return cls(*(np.array(column, dtype=np.int64) for column in columns))


def _linears(tower: Tower, layer: int, names: tuple[str, ...]) -> int:
    """Weights of some projections of a block."""
    found = (tower.linear(layer, name) for name in names)
    return sum(weights(module) for module in found if module is not None)


def weights(module: nn.Module) -> int:
    """Weights of linear layers that a token meets; of experts as many as are chosen for it."""
    total = 0
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            total += part.weight.numel()
        elif name.endswith("experts") and not isinstance(part, nn.ModuleList):
            total += _chosen(part)
    return total


def _chosen(experts: Any) -> int:
    """Weights of the experts that are chosen for one token."""
    config = getattr(experts, "config", None)
    chosen = getattr(config, "num_experts_per_tok", 1)
    every = sum(p.numel() for p in experts.parameters(recurse=False) if p.ndim == 3)
    return every * chosen // max(getattr(experts, "num_experts", 1), 1)


@dataclass(frozen=True)
class Shape:
    """Sizes of one batch.

    Attributes:
        prompts, width: of the language model.
        wanted: positions of a prompt whose logits are read; rows: logits read at each, 0 for all.
        rows_of: rows and positions of the batch of every other tower.
    """

    prompts: int
    width: int
    wanted: int
    rows: int
    rows_of: dict[str, tuple[int, int]]


class Cost:
    """What runs of one model cost.

    Attributes:
        blocks: by tower.
    """

    def __init__(self, model: HookedMultimodal) -> None:
        self.model = model
        self.blocks = {name: Blocks.of(tower) for name, tower in model.towers.items()}

    def trials(self, trials: Trials, changed: Ints, shape: Shape) -> np.ndarray:
        """Operations of every trial in the language model [trial].

        Args:
            changed: positions that every trial changes [trial].
        """
        blocks, last = self.blocks[LANGUAGE], len(self.blocks[LANGUAGE].whole) - 1
        tokens, ends = shape.width - trials.start, shape.wanted
        joins = trials.layer + (trials.entry != Entry.WHOLE)
        per_token = 2 * tokens[:, None] * blocks.whole[None, :last]
        attention = 4 * tokens[:, None] * shape.width * blocks.heads[None, :last]
        through = joins[:, None] <= np.arange(last)
        total = ((per_token + attention) * through).sum(1)
        middle = trials.entry == Entry.MIDDLE
        behind = np.where(trials.layer == last, np.minimum(changed, ends), changed)
        rest = (blocks.whole - blocks.attn)[trials.layer]
        total += middle * 2 * behind * rest
        within = joins <= last
        known = np.where(joins == last, np.minimum(changed, tokens), tokens)
        known = np.where((trials.entry != Entry.WHOLE) & (joins == last), tokens, known)
        block = 2 * ends * blocks.whole[last] + 4 * ends * shape.width * blocks.heads[last]
        block += 2 * ends * shape.width * blocks.mixed[last]
        keys = blocks.keys[last] - blocks.values[last]
        total += within * (2 * known * keys + block)
        return total - self._shared(trials, shape) + self.head(shape)

    def _shared(self, trials: Trials, shape: Shape) -> np.ndarray:
        """What is saved because projections of unchanged positions are computed once [trial]."""
        blocks, layer = self.blocks[LANGUAGE], trials.layer
        there = trials.shared > 0
        sharing = np.bincount(layer, there, len(blocks.whole)).clip(min=1)
        once = there * shape.prompts * shape.width / sharing[layer]
        return 2 * (trials.shared * blocks.queries[layer] - once * blocks.once[layer])

    def laid_out(self, trials: Trials, shape: Shape) -> np.ndarray:
        """What the block that trials enter costs them more where it runs whole prompts [trial]."""
        blocks, last = self.blocks[LANGUAGE], len(self.blocks[LANGUAGE].whole) - 1
        ran = np.where(trials.layer == last, shape.wanted, shape.width - trials.start)
        each = 2 * blocks.whole + 4 * shape.width * blocks.heads
        return (shape.width - ran) * each[trials.layer]

    def head(self, shape: Shape) -> int:
        """Operations of the logits that are read after one prompt."""
        unembed = self.model.towers[LANGUAGE].unembed if LANGUAGE in self.model.towers else None
        if unembed is None:
            return 0
        count: int = shape.rows * unembed.in_features if shape.rows else unembed.weight.numel()  # type: ignore[operator, union-attr, assignment] - a linear layer
        return 2 * shape.wanted * count

    def tower(self, name: str, shape: Shape, first: int = 0) -> int:
        """Operations of a tower's blocks from one on, for one batch."""
        blocks = self.blocks[name]
        rows, width = shape.rows_of.get(name, (shape.prompts, shape.width))
        dense = 2 * rows * width * int(blocks.whole[first:].sum())
        return dense + 4 * rows * width * width * int(blocks.heads[first:].sum())

    def attention(self, name: str, shape: Shape, layer: int) -> int:
        """Operations of a block's projections and attention, up to z, for one batch."""
        blocks = self.blocks[name]
        rows, width = shape.rows_of.get(name, (shape.prompts, shape.width))
        each = 2 * int(blocks.queries[layer]) + 4 * width * int(blocks.heads[layer])
        return rows * width * each

    def projectors(self, shape: Shape) -> int:
        """Operations of the projectors, for one batch."""
        total = 0
        for row in self.model.family.projectors.values():
            rows, width = shape.rows_of.get(row.tower, (shape.prompts, shape.width))
            total += 2 * rows * width * weights(self.model.hf_model.get_submodule(row.root))
        return total

    def embed(self, name: str, shape: Shape) -> int:
        """Operations of the embedding of a tower that sees or hears, for one batch."""
        tower = self.model.towers[name]
        embed = tower.module(tower.row.embed)
        if name not in shape.rows_of or embed is None:
            return 0
        rows, width = shape.rows_of[name]
        parts = [m for m in embed.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
        return 2 * rows * width * sum(part.weight.numel() for part in parts)

    def whole(self, shape: Shape) -> int:
        """Operations of the whole model on one batch, with all logits where they are read."""
        towers = sum(self.tower(name, shape) + self.embed(name, shape) for name in self.blocks)
        unembed = Shape(shape.prompts, shape.width, shape.wanted, 0, shape.rows_of)
        return towers + self.projectors(shape) + shape.prompts * self.head(unembed)

"""One run of the unchanged prompts, recorded block by block, from which every trial goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from re import match
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechmm.data.metrics import logits_at
from mechmm.engine.freeze import first_of, with_first
from mechmm.engine.places import QUERY_ROWS, Entry, Spot
from mechmm.engine.shelf import Shelf
from mechmm.model.attention import Attention, States, reentering
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower

SUFFIXES = ("causal", "image spans", "both ways")
"""Kinds of `Family.resume` whose language blocks can run some positions alone."""
BY_TOKEN = ("position_embeddings", "position_ids", "cache_position")
"""What a language block is given for every position."""


@dataclass
class Block:
    """What one block of the language model was given and gave.

    Attributes:
        stream: what entered [batch, pos, d_model].
        options: its keyword arguments.
        attn: what its attention module gave, raw; gave: what it gave itself.
        keys, values: as attention used them [batch, key-value head, pos, d_head].
        mask: as attention used it, or None.
        causal: whether attention without a mask is causal.
        added: what was added to the stream behind it and outside of it, or None.
    """

    stream: Tensor
    options: dict[str, Any]
    attn: Any = None
    gave: Any = None
    keys: Tensor | None = None
    values: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = True
    added: Tensor | None = None

    def kept(self, shelf: Shelf) -> Block:
        """The same block, its activations where a shelf keeps them."""
        names = ("stream", "keys", "values", "added")
        there = {name: value for name in names if (value := getattr(self, name)) is not None}
        found = shelf.put(there)
        if self.attn is None:
            return replace(self, **found)
        return replace(self, **found, attn=_kept(self.attn, shelf))


def _kept(output: Any, shelf: Shelf) -> Any:
    """What a module gave, its first tensor where a shelf keeps it."""
    return with_first(output, shelf.put({"output": first_of(output)})["output"])


@dataclass
class Recording:
    """A run of the unchanged prompts.

    Attributes:
        batch: the prompts.
        wanted: positions whose logits are read [batch, token], or None for an encoder.
        logits: the logits there [batch, token, vocab]; what an encoder gives.
        hooks: values of the hooks that were asked for.
        given: raw outputs of the blocks of every tower that runs once, by tower.
        embedded: the same of their embeddings, where there is one.
        z: what attention gave in some blocks of these, by (tower, layer).
        blocks: of the language model, where it can run some positions alone; else empty.
        end: what left the last of them [batch, pos, d_model].
    """

    batch: Batch
    wanted: Int[Tensor, "batch token"] | None
    logits: Tensor
    hooks: dict[str, Tensor]
    given: dict[str, list[Any]]
    embedded: dict[str, Any] = field(default_factory=dict)
    z: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    end: Tensor | None = None

    def kept(self, shelf: Shelf) -> Recording:
        """The same recording, its activations where a shelf keeps them."""
        hooks = shelf.put(self.hooks)
        blocks = [block.kept(shelf) for block in self.blocks]
        end = None if self.end is None else shelf.put({"end": self.end})["end"]
        given = {name: [_kept(o, shelf) for o in outputs] for name, outputs in self.given.items()}
        embedded = {name: _kept(output, shelf) for name, output in self.embedded.items()}
        z = {block: _kept(value, shelf) for block, value in self.z.items()}
        behind = {"given": given, "embedded": embedded, "z": z}
        return replace(self, hooks=hooks, blocks=blocks, end=end, **behind)

    @property
    def numbers(self) -> int:
        """How many numbers are recorded."""
        blocks = [part for b in self.blocks for part in (b.stream, b.keys, b.values)]
        towers = [first_of(output) for outputs in self.given.values() for output in outputs]
        tensors = [*self.hooks.values(), *self.z.values(), *towers, *blocks]
        return sum({id(t): t.numel() for t in tensors if t is not None}.values())

    def stream(self, layer: int) -> Tensor:
        """What entered a block, or left the last one [batch, pos, d_model]."""
        if layer < len(self.blocks):
            return self.blocks[layer].stream
        assert self.end is not None
        return self.end


def record(
    model: HookedMultimodal,
    batch: Batch,
    wanted: Int[Tensor, "batch token"] | None,
    hooks: Sequence[str],
    towers: Sequence[str],
    behind: Sequence[Spot] = (),
    *,
    blocks: bool = True,
) -> Recording:
    """Run the prompts once and keep what trials go on from.

    Args:
        wanted: positions whose logits are read; None for an encoder.
        hooks: whose values are kept; those of scores and patterns by a run of their own, because
            attention that shows them computes otherwise.
        towers: whose blocks' outputs are kept.
        behind: where trials begin behind the attention of a block, of which the output is kept.
        blocks: whether to keep the language model's, where they can run some positions alone.
    """
    patterns = [hook for hook in hooks if hook.endswith(QUERY_ROWS)]
    kept = values(model, batch, patterns) if patterns else {}
    called: list[Block] = []
    given = {name: _Outputs(model.towers[name]) for name in towers}
    z: dict[tuple[str, int], Tensor] = {}
    with ExitStack() as stack:
        for outputs in given.values():
            stack.enter_context(outputs.listening())
        for name, layer in {(spot.tower, spot.layer) for spot in behind if spot.tower in given}:
            core = model.towers[name].part(layer, "attn", model.towers[name].row.core)
            if core is not None:
                stack.enter_context(reentering(core, _Note(z, (name, layer))))
        if blocks and wanted is not None and resumes(model):
            middle = [spot for spot in behind if spot.entry == Entry.MIDDLE]
            attn = {spot.layer for spot in middle if spot.tower == LANGUAGE}
            called = stack.enter_context(_blocks(model.towers[LANGUAGE], attn))
        streams = {f"blocks.{i}.hook_resid_pre": i for i in range(model.cfg.n_layers)}
        streams = streams if blocks and wanted is not None and resumes(model) else {}
        others = set(hooks) - set(patterns) - set(streams)
        stack.enter_context(model.hooks(fwd_hooks=_keeping(kept, others)))
        logits = model(batch) if wanted is None else logits_at(model, batch, wanted)
    kept |= {hook: called[i].stream for hook, i in streams.items() if hook in hooks}
    end = first_of(called[-1].gave) if called else None
    _note_additions(called)
    found = {name: o.found for name, o in given.items() if o.once}
    z = {(name, layer): value for (name, layer), value in z.items() if name in found}
    embedded = {name: given[name].embedded[0] for name in found if len(given[name].embedded) == 1}
    return Recording(batch, wanted, logits, kept, found, embedded, z, called, end)


def values(model: HookedMultimodal, batch: Batch, hooks: Iterable[str]) -> dict[str, Tensor]:
    """The values of some hooks on one batch; those of scores and patterns by a run of their own,
    because attention that shows them computes otherwise."""
    kept: dict[str, Tensor] = {}
    names = set(hooks)
    patterns = {hook for hook in names if hook.endswith(QUERY_ROWS)}
    for some in filter(None, (patterns, names - patterns)):
        with model.hooks(fwd_hooks=_keeping(kept, some)):
            model(batch, logits_to_keep=1)
    return kept


def _keeping(kept: dict[str, Tensor], hooks: Iterable[str]) -> list[Any]:
    return [(name, partial(_keep, kept)) for name in sorted(set(hooks))]


def resumes(model: HookedMultimodal) -> bool:
    """Whether the language model's blocks can run some positions alone."""
    return (
        model.family.resume in SUFFIXES
        and LANGUAGE in model.towers
        and not model.config.is_encoder_decoder
    )


def blocks_read(model: HookedMultimodal, tower: str) -> int:
    """How many of a tower's blocks anything behind them reads; LLaVA-1.5 leaves out the last."""
    family, count = model.family, len(model.towers[tower].blocks)
    unread = family.unread(model.config)
    while count and any(match(p, f"{tower}.blocks.{count - 1}.hook_resid_post") for p in unread):
        count -= 1
    return count


def _keep(kept: dict[str, Tensor], value: Tensor, hook: Any) -> None:
    kept[hook.name] = value.detach()


def embedding(tower: Tower) -> nn.Module | None:
    """The module that makes a tower's first stream of pixels or sound, if it has one that treats
    every row of a batch alone."""
    row = tower.row
    if tower.name == LANGUAGE or row.packed is not None or (row.embed or "<").startswith("<"):
        return None
    return tower.module(row.embed)


class _Outputs:
    """What the embedding and the blocks of a tower give."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.embedded: list[Any] = []
        self.found: list[Any] = []

    @property
    def once(self) -> bool:
        return len(self.found) == len(self.tower.blocks)

    @contextmanager
    def listening(self) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self.found.append(output)

        def embed(module: nn.Module, args: tuple, output: Any) -> None:
            self.embedded.append(output)

        handles = [block.register_forward_hook(keep) for block in self.tower.blocks]
        module = embedding(self.tower)
        if module is not None:
            handles.append(module.register_forward_hook(embed))
        try:
            yield
        finally:
            _remove(handles)


@contextmanager
def _blocks(tower: Tower, attended: Collection[int]) -> Iterator[list[Block]]:
    """The blocks of a stack as they are called, with what attention gives in some of them."""
    found: list[Block] = []
    handles: list[RemovableHandle] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        options = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        options |= {k: None for k in ("attention_mask", "past_key_values") if k in options}
        options |= {"use_cache": False} if "use_cache" in options else {}
        found.append(Block(stream, options))

    def behind(module: nn.Module, args: tuple, output: Any) -> None:
        lone = isinstance(output, Tensor)
        found[-1].attn = output if lone else (output[0], *[None] * (len(output) - 1))

    def last(module: nn.Module, args: tuple, output: Any) -> None:
        found[-1].gave = output

    with ExitStack() as stack:
        for layer, block in enumerate(tower.blocks):
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            attn, core = (tower.part(layer, "attn", path) for path in ("", tower.row.core))
            assert attn is not None
            assert core is not None
            if layer in attended:
                handles.append(attn.register_forward_hook(behind))
            stack.enter_context(reentering(core, _Watch(found)))
            handles.append(block.register_forward_hook(last))
        try:
            yield found
        finally:
            _remove(handles)


@dataclass
class _Note:
    """Notes what the attention of a block gives."""

    found: dict[tuple[str, int], Tensor]
    block: tuple[str, int]

    def attend(
        self, states: States, mask: Tensor | None, causal: bool, compute: Attention
    ) -> Tensor:
        self.found[self.block] = z = compute(states, mask)
        return z


class _Watch:
    """Notes keys and values as attention uses them."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    def attend(
        self, states: States, mask: Tensor | None, causal: bool, compute: Attention
    ) -> Tensor:
        block = self.blocks[-1]
        _, block.keys, block.values = states
        block.mask, block.causal = mask, causal
        return compute(states, mask)


def _note_additions(blocks: list[Block]) -> None:
    """Where what a block gave is not what entered the next one: the difference."""
    for block, after in pairwise(blocks):
        gave = first_of(block.gave)
        if not torch.equal(gave, after.stream):
            block.added = after.stream - gave
    for block in blocks:
        block.gave = None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

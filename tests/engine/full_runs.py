"""Trials written down one by one, and what the whole model gives for them, run with plain hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from mechmm.data.metrics import forced, logits_at
from mechmm.engine.engine import Engine
from mechmm.engine.places import Places
from mechmm.engine.whole import tile
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import RECIPES, tiny_hf, tiny_inputs

QUERIES = ("hook_attn_scores", "hook_pattern")
BANNED = 1e30
"""A logit beyond it is no number but a ban on a token."""
TOGETHER = 16
"""Copies of a batch in one full run."""


@dataclass(frozen=True)
class Change:
    """One place of a hook, and what is put there or added to what is there."""

    hook: str
    row: int
    position: int
    part: int
    value: Tensor
    add: bool = False

    def make(self, tensor: Tensor, first: int) -> None:
        """Change a tensor, whose rows for this copy of the batch begin at `first`."""
        row, every = first + self.row, slice(None)
        if self.hook.endswith(QUERIES):
            where = (row, every if self.part < 0 else self.part, self.position)
        else:
            where = (row, self.position, *([] if self.part < 0 else [self.part]))
        tensor[where] = tensor[where] + self.value if self.add else self.value


@dataclass(frozen=True)
class Trial:
    """One prompt with some places changed."""

    prompt: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Subject:
    """A tiny model and a batch: a prompt with one medium, and a longer one with two.

    Attributes:
        even: whether both prompts are of one length, with two media each, so that there is no mask.
        answered: whether an answer of three tokens, and one of one, stand behind the prompts.
        rounded: whether to compute in single precision with weights and pixels of half.
    """

    family: str
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    side: str = "left"
    even: bool = False
    answered: bool = False
    rounded: bool = False

    @cached_property
    def model(self) -> HookedMultimodal:
        dtype = torch.bfloat16 if self.rounded else self.dtype
        hf = tiny_hf(self.family, dtype=dtype, attention=self.attention, layers=3)
        return HookedMultimodal.from_hf(hf.float() if self.rounded else hf)

    @cached_property
    def batch(self) -> Batch:
        return self.reading[0]

    @property
    def wanted(self) -> Tensor | None:
        """Where logits are read: after the last token, or after every token of the answer; None for
        the whole output of an encoder or of what has one."""
        return self.reading[1]

    @cached_property
    def reading(self) -> tuple[Batch, Tensor | None]:
        """Batch and `wanted`."""
        recipe, one = RECIPES[self.family], self.model.family.unembed is None
        inputs = tiny_inputs(
            self.model,
            (1, 1) if one else (2, 2) if self.even else (1, 2),
            6 if one or self.even else (6, 4),
            kind=next(iter(recipe.makers)),
            padding_side=self.side,
        )
        if self.rounded:
            halved = {name: value.bfloat16() for name, value in inputs.items()}
            inputs = {k: halved[k].to(v) if v.is_floating_point() else v for k, v in inputs.items()}
        batch = Batch.from_inputs(self.model, **inputs)
        if one or self.model.config.is_encoder_decoder:
            return batch, None
        if self.answered:
            return forced(batch, torch.tensor([[9, 20, 11], [15, -1, -1]]))
        return batch, batch.layout.last[:, None]

    @cached_property
    def cache(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(self.model.run_with_cache(self.batch, names_filter=lambda name: True)[1])

    # Changes -------------------------------------------------------------------------------------

    def change(self, hook: str, prompt: int, at: float, part: int = -1, *, add=False) -> Change:
        """A random change of a hook, `at` of the way through a prompt (0 its first position)."""
        value = self.cache[hook]
        row, positions = self.rows(hook, prompt)
        position = positions[round(at * (len(positions) - 1))]
        here = value[row, :, position] if hook.endswith(QUERIES) else value[row, position]
        here = here if part < 0 else here[part]
        if hook.endswith(("hook_scale", "hook_router")):  # positive, and as many experts as chosen
            return Change(hook, row, position, part, here * 1.5)
        random = torch.Generator().manual_seed(crc32(f"{hook} {prompt} {position}".encode()))
        size = here.float().abs().clamp(max=9).mean() + 0.1
        noise = (torch.randn(here.shape, generator=random) * size).to(here)
        if hook.endswith("hook_pattern"):  # what is not seen may be padding, which is nothing
            noise = noise * (here != 0)
        return Change(hook, row, position, part, noise if add else here + noise, add)

    def rows(self, hook: str, prompt: int) -> tuple[int, list[int]]:
        """A prompt's row in a hook's tensor, and its positions there."""
        value = self.cache[hook]
        count = value.shape[2 if hook.endswith(QUERIES) else 1]
        last = len(value) - 1
        if count != self.batch.input_ids.shape[1] or last != len(self.batch) - 1:
            return (last if prompt else 0), list(range(count))
        return prompt, self.batch.attention_mask[prompt].nonzero().flatten().tolist()

    def every_kind(self, turn: int) -> Iterator[Trial]:
        """A change at every kind of hook: in two blocks of the language model, in one elsewhere.
        Block, position, prompt and part take turns."""
        kinds: dict[str, list[str]] = {}
        for hook in self.model.hook_dict:
            if hook in self.cache and self.cache[hook].is_floating_point():
                kinds.setdefault(re.sub(r"blocks\.\d+", "blocks", hook), []).append(hook)
        turns = numbers(turn)
        for kind, hooks in kinds.items():
            first, few = next(turns), min(len(hooks), 2 if kind.startswith("blocks") else 1)
            for number in range(first, first + few):
                yield self._turn(hooks[number % len(hooks)], next(turns))

    def _turn(self, hook: str, turn: int) -> Trial:
        queries = hook.endswith(QUERIES)
        inner = self.cache[hook].shape[1 if queries else 2]
        parted = turn % 4 > 1 and inner > 1 and not hook.endswith("hook_router")
        prompt, at = turn % 2, (0.5, 1.0, 0.1)[turn % 3]
        return Trial(prompt, (self.change(hook, prompt, at, 1 if parted else -1),))

    # Runs ----------------------------------------------------------------------------------------

    def full_runs(self, trials: Sequence[Trial]) -> Tensor:
        """What the whole model gives for each trial, run with hooks on a copy of the batch."""
        parts = range(0, len(trials), TOGETHER)
        return torch.cat([self._together(trials[i : i + TOGETHER]) for i in parts])

    @torch.no_grad()
    def _together(self, trials: Sequence[Trial]) -> Tensor:
        count, model, batch = len(trials), self.model, tile(self.batch, len(trials))
        hooks: dict[str, list[tuple[int, Change]]] = {}
        for copy, trial in enumerate(trials):
            for change in trial.changes:
                hooks.setdefault(change.hook, []).append((copy, change))

        def edit(tensor: Tensor, hook: Any) -> Tensor:
            for copy, change in hooks[hook.name]:
                change.make(tensor, copy * (len(tensor) // count))
            return tensor

        with model.hooks(fwd_hooks=[(hook, edit) for hook in hooks]):
            if self.wanted is not None:
                found = logits_at(model, batch, self.wanted.repeat(count, 1))
            else:
                found = model(batch)
        found = found.unflatten(0, (count, len(self.batch)))
        if model.family.output == "logits_per_image":  # every image meets every text of all copies
            square = found.unflatten(2, (count, len(self.batch)))
            found = torch.stack([square[copy, :, copy] for copy in range(count)])
        return torch.stack([found[copy, trial.prompt] for copy, trial in enumerate(trials)])

    def plain(self) -> Tensor:
        """What the whole model gives for every prompt, without copies or hooks."""
        with torch.no_grad():
            if self.wanted is None:
                return self.model(self.batch)
            return logits_at(self.model, self.batch, self.wanted)

    def engine(self, trials: Iterable[Trial], **options: Any) -> Engine:
        """An engine for the hooks of some trials."""
        return Engine(self.model, self.batch, hooks_of(trials), self.wanted, **options)


def hooks_of(trials: Iterable[Trial]) -> tuple[str, ...]:
    """Every hook that trials change."""
    return tuple(dict.fromkeys(change.hook for trial in trials for change in trial.changes))


def engine_runs(engine: Engine, trials: Sequence[Trial]) -> Tensor:
    """What the engine gives for each trial."""
    changes = [(i, change) for i, trial in enumerate(trials) for change in trial.changes]
    hooks = hooks_of(trials)

    def array(values: Iterable[int]) -> np.ndarray:
        return np.array(list(values), dtype=np.int64)

    places = Places(
        hooks,
        array(trial.prompt for trial in trials),
        array(i for i, _ in changes),
        array(hooks.index(change.hook) for _, change in changes),
        array(change.row for _, change in changes),
        array(change.position for _, change in changes),
        array(change.part for _, change in changes),
    )

    def values(hook: str, at: np.ndarray, now: Tensor) -> Tensor:
        own = [changes[i][1] for i in at.tolist()]
        return torch.stack(
            [c.value + n if c.add else c.value for c, n in zip(own, now, strict=True)]
        )

    found: dict[int, Tensor] = {}
    for own, logits in engine.run(places, values):
        assert not found.keys() & set(own.tolist()), "a trial came twice"
        found.update(zip(own.tolist(), logits, strict=True))
    return torch.stack([found[i] for i in range(len(trials))])


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest logit."""
    assert torch.equal(found.isfinite(), wanted.isfinite())
    there = wanted.abs() < BANNED
    found, wanted = found.detach()[there].float(), wanted[there].float()
    return float((found - wanted).abs().max() / wanted.abs().max())

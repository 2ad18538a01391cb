"""Trials of the language model, each from the block that it changes, many in one row.

The tokens of a trial are the positions from the first one that its change can reach. They enter at
the block where the change is: at its beginning, behind its attention (whose output is known, and to
which the change of z is carried by the output projection, which is linear), or behind the block. In
the last block only the positions whose logits are read go through; of the others it needs keys and
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.engine.freeze import Halt, constant, first_of, frozen, with_first, zeros
from mechmm.engine.head import Head
from mechmm.engine.places import QUERY_ROWS, Entry, Ints, Places, Spot, Values, halves, index
from mechmm.engine.plain import Plain, Plains
from mechmm.engine.projections import Projections
from mechmm.engine.record import Recording
from mechmm.engine.reenter import Reenter
from mechmm.engine.shelf import pick
from mechmm.engine.tokens import Tokens
from mechmm.engine.trials import Entries, Trials, starts
from mechmm.model.attention import reentering
from mechmm.model.hooked import LANGUAGE, HookedMultimodal

STREAM = ("hook_resid_pre", "hook_resid_post")
"""Hooks on what enters and leaves a block, which are written without a hook."""
BEFORE_KEYS = ("ln1.", "attn.hook_k", "attn.hook_v", "attn.hook_rot_k")
"""Hooks whose change reaches other positions within the block."""


class Rerun:
    """Runs trials over one recording."""

    def __init__(
        self,
        model: HookedMultimodal,
        recording: Recording,
        places: Places,
        spots: list[Spot],
        values: Values,
        head: Head,
        plains: Plains,
    ) -> None:
        self.model, self.recording, self.places, self.values = model, recording, places, values
        self.tower, self.head, self.plains = model.towers[LANGUAGE], head, plains
        self.last = len(recording.blocks) - 1
        assert recording.wanted is not None
        self.wanted = recording.wanted.cpu().numpy()
        self.device = recording.stream(0).device
        self.width = recording.stream(0).shape[1]
        real = recording.batch.attention_mask > 0
        reached = starts(recording.blocks, real).cpu().numpy()
        self.entries = Entries.of(places, spots, reached, self.wanted, self.last)
        self.projections, self.rooms = Projections(self.tower, recording), plains.shared.rooms

    @torch.no_grad()
    def run(self, numbers: Ints, trials: Trials) -> Float[Tensor, "trial token vocab"]:
        """The logits of some trials after the positions that are read.

        Args:
            numbers: which trials of the places.
            trials: where each of them enters.
        """
        return _Chunk(self, numbers, trials).run()


class _Chunk:
    """Trials that run together; they are numbered anew from 0."""

    def __init__(self, rerun: Rerun, numbers: Ints, trials: Trials) -> None:
        self.of, self.trials, self.numbers = rerun, trials, numbers
        self.prompts = rerun.places.prompts[numbers]
        anew = np.full(len(rerun.places.prompts), -1)
        anew[numbers] = np.arange(len(numbers))
        self.places = np.flatnonzero(anew[rerun.places.trial] >= 0)
        self.trial = anew[rerun.places.trial[self.places]]
        self.hook = rerun.places.hook[self.places]
        self.position = rerun.places.position[self.places]
        self.tower, self.recording = rerun.tower, rerun.recording

    # The way through the blocks --------------------------------------------------------------

    def run(self) -> Tensor:
        last = self.of.last
        tokens, hidden = self._nothing()
        for layer in range(int(self.trials.layer.clip(max=last).min()), last):
            tokens, hidden = self._join(layer, tokens, hidden)
            if len(tokens):
                hidden = self._through(layer, tokens, hidden)
            tokens, hidden = self._behind(layer, tokens, hidden)
        tokens, hidden = self._join(last, tokens, hidden, last=True)
        ends, stream = self._nothing()
        if len(tokens):
            ends, stream = self._through_last(tokens, hidden)
        ends, stream = self._behind(last, ends, stream)
        return self._logits(ends, stream)

    def _join(
        self, layer: int, tokens: Tokens, hidden: Tensor, last: bool = False
    ) -> tuple[Tokens, Tensor]:
        """The tokens of the trials that enter at the beginning of a block are put behind the
        others; then what enters the block is changed."""
        new = (self.trials.layer == layer) & (self.trials.entry == Entry.WHOLE)
        if new.any():
            numbers = np.flatnonzero(new)
            few = last and self.trials.enters is None
            own = self._changed(layer, numbers) if few else self._suffixes(numbers)
            tokens, hidden = self._with(tokens, hidden, own, self._entering(layer, own))
        if len(tokens):
            hidden = self._write(layer, "hook_resid_pre", tokens, hidden)
        return tokens, hidden

    def _entering(self, layer: int, tokens: Tokens) -> Tensor:
        """What enters a block for new tokens."""
        if self.trials.enters is None or layer > self.trials.layer.min():
            return tokens.of(self.recording.stream(layer))
        stream, row = self.trials.enters
        return stream[tokens.tensor(row[tokens.trial]), tokens.index[1]][None]

    def _behind(self, layer: int, tokens: Tokens, hidden: Tensor) -> tuple[Tokens, Tensor]:
        """What leaves a block is changed and added to; trials that enter inside or behind it
        join, with the positions that they reach from there."""
        if len(tokens):
            hidden = self._write(layer, "hook_resid_post", tokens, hidden)
            hidden = self._added(layer, tokens, hidden)
        for entry, compute in ((Entry.MIDDLE, self._middle), (Entry.END, self._end)):
            new = (self.trials.layer == layer) & (self.trials.entry == entry)
            if not new.any():
                continue
            numbers = np.flatnonzero(new)
            changed = self._changed(layer, numbers)
            whole = layer == self.of.last
            own = self._ends(numbers) if whole else self._suffixes(numbers)
            changed = changed.part(own.at[changed.trial, changed.position] >= 0)
            stream = own.of(self.recording.stream(layer + 1))
            if len(changed):
                place = own.tensor(own.at[changed.trial, changed.position])
                stream[0, place] = compute(layer, changed)[0]
            tokens, hidden = self._with(tokens, hidden, own, stream)
        return tokens, hidden

    def _added(self, layer: int, tokens: Tokens, hidden: Tensor) -> Tensor:
        added = self.recording.blocks[layer].added
        return hidden if added is None else hidden + tokens.of(added)

    def _middle(self, layer: int, tokens: Tokens) -> Tensor:
        """What enters the next block, for trials whose attention gives what it gave, but for the
        change of z."""
        block = self.recording.blocks[layer]
        attn = self.tower.part(layer, "attn", "")
        assert attn is not None
        gave = tokens.of(first_of(block.attn))
        output = with_first(block.attn, self._carried(layer, tokens, gave))
        with frozen({attn: constant(output)}):
            hidden = self._block(layer, tokens, tokens.of(block.stream))
        hidden = self._write(layer, "hook_resid_post", tokens, hidden)
        return self._added(layer, tokens, hidden)

    def _carried(self, layer: int, tokens: Tokens, output: Tensor) -> Tensor:
        """What attention gives after a change of z, or of what each head adds."""
        for name in ("hook_z", "hook_result"):
            for hook, at in self._at(layer, name):
                token = tokens.at[self.trial[at], self.position[at]]
                at, token = at[token >= 0], token[token >= 0]
                base = self.recording.hooks[hook]
                for half in halves(self.of.places.part[self.places[at]]):
                    now, new = self._new(hook, base, at[half])
                    delta = self._heads(layer, name, new - now, at[half])
                    output = output.index_add(1, tokens.tensor(token[half]), delta[None])
        return output

    def _heads(self, layer: int, name: str, delta: Tensor, at: Ints) -> Tensor:
        """What a change of z, or of results, of some heads or all adds to the stream."""
        part = self.of.places.part[self.places[at]]
        if name == "hook_result":
            return delta.sum(-2) if part[0] < 0 else delta
        weight = self.tower.weight("W_O", layer)  # [head, d_head, d_model]
        assert weight is not None
        if part[0] < 0:
            return delta.flatten(-2) @ weight.flatten(0, 1)
        total = delta.new_zeros(len(delta), weight.shape[-1])
        for head in np.unique(part):
            chosen = torch.as_tensor(np.flatnonzero(part == head), device=delta.device)
            total[chosen] = delta[chosen] @ weight[int(head)]
        return total

    def _end(self, layer: int, tokens: Tokens) -> Tensor:
        """What enters the next block, after a change behind a block or of what its MLP adds."""
        stream = tokens.of(self.recording.stream(layer + 1)).clone()
        for name in ("hook_mlp_out", "hook_deepstack", "hook_resid_post"):
            for hook, at in self._at(layer, name):
                token = tokens.at[self.trial[at], self.position[at]]
                at, token = at[token >= 0], token[token >= 0]
                base = self.recording.hooks[hook]
                for half in halves(self.of.places.part[self.places[at]]):
                    now, new = self._new(hook, base, at[half])
                    part = torch.as_tensor(self.of.places.part[self.places[at[half]]])
                    delta = _entries(new - now, part, stream.shape[-1])
                    stream = stream.index_add(1, tokens.tensor(token[half]), delta[None])
        return stream

    # Blocks ----------------------------------------------------------------------------------

    def _through(self, layer: int, tokens: Tokens, hidden: Tensor) -> Tensor:
        """A whole block; trials whose scores or patterns change run by themselves."""
        apart = self._apart(layer)
        if not len(apart):
            return self._attended(layer, tokens, hidden)
        alone = np.isin(tokens.trial, apart)
        new = torch.empty_like(hidden)
        for keep, compute in ((~alone, self._attended), (alone, self._laid_out)):
            if keep.any():
                at = tokens.tensor(np.flatnonzero(keep))
                new[:, at] = compute(layer, tokens.part(keep), hidden[:, at])
        return new

    def _apart(self, layer: int) -> Ints:
        """Trials whose scores or patterns change in a block."""
        return np.unique(np.concatenate([self.trial[at] for _, at in self._rows(layer)] or [[]]))

    def _rows(self, layer: int) -> list[tuple[str, Ints]]:
        """Places in scores and patterns of a block."""
        return [found for name in QUERY_ROWS for found in self._at(layer, name)]

    def _attended(self, layer: int, tokens: Tokens, hidden: Tensor) -> Tensor:
        unchanged, plain = self._unchanged(layer, tokens), self._plain(layer)
        if plain is not None:
            return plain.through(tokens, hidden, unchanged)
        known = self.of.projections.forwards(layer, tokens, unchanged)
        reenter = Reenter(tokens, self.recording.blocks[layer], self.of.rooms)
        with self._again(layer, reenter), frozen(known):
            return self._block(layer, tokens, hidden)

    def _plain(self, layer: int) -> Plain | None:
        """A block as sums, where nothing is changed inside of it."""
        inside = any(self._inside(i, layer, ()) for i in range(len(self.of.places.hooks)))
        return None if inside else self.of.plains.of(layer)

    def _unchanged(self, layer: int, tokens: Tokens) -> np.ndarray:
        """Which tokens enter a block as recorded, where it is worth knowing [token]."""
        fresh = (self.trials.layer == layer) & (self.trials.shared > 0)
        mask = fresh[tokens.trial]
        if mask.any():
            changed = self._changed(layer, np.flatnonzero(fresh))
            at = tokens.at[changed.trial, changed.position]
            mask[at[at >= 0]] = False
        return mask

    def _again(self, layer: int, reenter: Reenter) -> AbstractContextManager:
        core = self.tower.part(layer, "attn", self.tower.row.core)
        assert core is not None
        return reentering(core, reenter)

    def _through_last(self, tokens: Tokens, hidden: Tensor) -> tuple[Tokens, Tensor]:
        """The last block, for the positions whose logits are read; trials whose scores or patterns
        change run whole prompts."""
        layer = self.of.last
        ends, apart = self._ends(tokens.trials), self._apart(layer)
        if not len(apart):
            return ends, self._read(layer, tokens, hidden, ends)
        alone, theirs = np.isin(tokens.trial, apart), np.isin(ends.trial, apart)
        new = hidden.new_empty(1, len(ends), hidden.shape[-1])
        for keep, own, compute in ((~alone, ~theirs, self._read), (alone, theirs, self._laid_out)):
            if keep.any():
                at, there = (tokens.tensor(np.flatnonzero(mask)) for mask in (keep, own))
                parts = (tokens.part(keep), hidden[:, at], ends.part(own))
                new[:, there] = compute(layer, *parts)
        return ends, new

    def _read(self, layer: int, tokens: Tokens, hidden: Tensor, ends: Tokens) -> Tensor:
        """The last block, for the positions whose logits are read."""
        at = tokens.at[ends.trial, ends.position]
        stream = ends.of(self.recording.stream(layer))
        there = np.flatnonzero(at >= 0)
        stream[:, ends.tensor(there)] = hidden[:, tokens.tensor(at[there])]
        plain = self._plain(layer)
        if plain is not None:
            return plain.ends(tokens, hidden, ends, stream)
        given = (tokens, self._keys(layer, tokens, hidden))
        reenter = Reenter(ends, self.recording.blocks[layer], self.of.rooms, given=given)
        with self._again(layer, reenter):
            return self._block(layer, ends, stream)

    def _keys(self, layer: int, tokens: Tokens, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens [head, token, d_head]."""
        reenter = Reenter(tokens, self.recording.blocks[layer], collect=True)
        q = self.tower.linear(layer, "q")
        skipped: dict[nn.Module, Callable] = {} if q is None else {q: zeros(q)}
        with self._again(layer, reenter), frozen(skipped):
            try:
                self._block(layer, tokens, hidden, BEFORE_KEYS)
            except Halt as halt:
                return halt.found
        raise AssertionError("attention was not reached")

    def _block(
        self, layer: int, tokens: Tokens, hidden: Tensor, only: tuple[str, ...] = ()
    ) -> Tensor:
        """One block over tokens in one row."""
        self.tower.shape = hidden.shape
        with self._hooks(layer, tokens, only):
            options = tokens.options(self.recording.blocks[layer])
            return first_of(self.tower.blocks[layer](hidden, **options))

    def _laid_out(
        self, layer: int, tokens: Tokens, hidden: Tensor, ends: Tokens | None = None
    ) -> Tensor:
        """One block over whole prompts [trial, pos, d_model], for changes of scores or patterns;
        what it gives for the tokens, or for `ends`."""
        numbers = tokens.trials
        whole = self._suffixes(numbers, from_start=True)
        stream = self._entering(layer, whole)
        stream[0, whole.tensor(whole.at[tokens.trial, tokens.position])] = hidden[0]
        stream = stream.view(len(numbers), self.of.width, -1)
        self.tower.shape = stream.shape
        row = np.full(len(self.prompts), -1)
        row[numbers] = np.arange(len(numbers))
        block = self.recording.blocks[layer]
        count = len(numbers)
        options = {k: _by_trial(v, k, count) for k, v in whole.options(block).items()}
        if block.mask is not None:
            own = self.prompts[numbers] if len(block.mask) > 1 else np.zeros_like(numbers)
            options["attention_mask"] = block.mask[whole.tensor(own)]
        with self._hooks(layer, whole, rows=row):
            gave = first_of(self.tower.blocks[layer](stream, **options)).flatten(0, 1)[None]
        wanted = tokens if ends is None else ends
        return gave[:, whole.tensor(whole.at[wanted.trial, wanted.position])]

    # Tokens ----------------------------------------------------------------------------------

    def _tokens(self, trial: Ints, position: Ints) -> Tokens:
        return Tokens(trial, position, self.prompts, self.of.width, self.of.device)

    def _nothing(self) -> tuple[Tokens, Tensor]:
        empty = np.zeros(0, dtype=np.int64)
        stream = self.recording.stream(0)
        return self._tokens(empty, empty), stream.new_zeros(1, 0, stream.shape[-1])

    def _suffixes(self, numbers: Ints, from_start: bool = False) -> Tokens:
        """Every position from the first that a trial can change."""
        first = np.zeros(len(numbers), np.int64) if from_start else self.trials.start[numbers]
        counts = self.of.width - first
        ends = counts.cumsum()
        position = np.arange(ends[-1]) - np.repeat(ends - counts - first, counts)
        return self._tokens(np.repeat(numbers, counts), position)

    def _ends(self, numbers: Ints) -> Tokens:
        """The positions whose logits are read."""
        wanted = [np.unique(self.of.wanted[prompt]) for prompt in self.prompts[numbers]]
        counts = [len(positions) for positions in wanted]
        return self._tokens(np.repeat(numbers, counts), np.concatenate(wanted))

    def _changed(self, layer: int, numbers: Ints) -> Tokens:
        """The positions that trials change in one block."""
        there = np.isin(self.trial, numbers) & (self.of.entries.layers[self.hook] == layer)
        both = np.unique(self.trial[there] * self.of.width + self.position[there])
        trial, position = np.divmod(both, self.of.width)
        return self._tokens(trial, position)

    @staticmethod
    def _with(tokens: Tokens, hidden: Tensor, own: Tokens, stream: Tensor) -> tuple[Tokens, Tensor]:
        if not len(tokens):
            return own, stream
        return tokens.joined(own), torch.cat([hidden, stream], dim=1)

    # Changes ---------------------------------------------------------------------------------

    def _at(self, layer: int, name: str) -> list[tuple[str, Ints]]:
        """Places in the hooks of a block by one name: (hook, numbers among the chunk's places)."""
        return [
            (self.of.places.hooks[number], np.flatnonzero(self.hook == number))
            for number in np.unique(self.hook)
            if self.of.entries.layers[number] == layer and self.of.entries.names[number] == name
        ]

    def _new(self, hook: str, tensor: Tensor, at: Ints) -> tuple[Tensor, Tensor]:
        """What recorded places hold and what they shall hold."""
        places = self.of.places.chosen(self.places[at])
        where = index(hook, places.row, places.position, places.part, tensor)
        now = pick(tensor, *where, device=self.of.device)
        return now, self.of.values(hook, self.places[at], now).to(now)

    def _write(self, layer: int, name: str, tokens: Tokens, hidden: Tensor) -> Tensor:
        """The stream after changes of what enters or leaves a block."""
        for hook, at in self._at(layer, name):
            hidden = self._changes(hook, at, tokens, None)(hidden.clone(), hook=None)
        return hidden

    @contextmanager
    def _hooks(
        self, layer: int, tokens: Tokens, only: tuple[str, ...] = (), rows: Ints | None = None
    ) -> Iterator[None]:
        """While it lasts, the changes inside a block are made at the tokens."""
        hooks: list[Any] = [
            (hook, self._changes(hook, np.flatnonzero(self.hook == number), tokens, rows))
            for number, hook in enumerate(self.of.places.hooks)
            if self._inside(number, layer, only)
        ]
        with ExitStack() as stack:
            if hooks:
                stack.enter_context(self.of.model.hooks(fwd_hooks=hooks))
            yield

    def _inside(self, number: int, layer: int, only: tuple[str, ...]) -> bool:
        hook = self.of.places.hooks[number]
        if self.of.entries.layers[number] != layer or hook.endswith(STREAM):
            return False
        rest = hook.removeprefix(f"blocks.{layer}.")
        return (not only or rest.startswith(only)) and bool((self.hook == number).any())

    def _changes(self, name: str, at: Ints, tokens: Tokens, rows: Ints | None) -> Callable:
        """A hook that makes changes at tokens in one row, or at [row, position]."""

        def change(tensor: Any, hook: Any) -> Any:
            for half in halves(self.of.places.part[self.places[at]]):
                own = at[half]
                row, position = self._where(own, tokens, rows)
                there = position >= 0
                own, row, position = own[there], row[there], position[there]
                if not len(own):
                    continue
                part = self.of.places.part[self.places[own]]
                place = index(name, row, position, part, tensor)
                new = self.of.values(name, self.places[own], tensor[place])
                tensor[place] = new.to(tensor)
            return tensor

        return change

    def _where(self, at: Ints, tokens: Tokens, rows: Ints | None) -> tuple[Ints, Ints]:
        if rows is not None:
            row = rows[self.trial[at]]
            return row, np.where(row >= 0, self.position[at], -1)
        token = tokens.at[self.trial[at], self.position[at]]
        return np.zeros_like(token), token

    # The end ---------------------------------------------------------------------------------

    def _logits(self, ends: Tokens, stream: Tensor) -> Tensor:
        """Logits by trial, after the positions that are read."""
        wanted = self.of.wanted[self.prompts]
        at = ends.tensor(ends.at[np.arange(len(wanted))[:, None], wanted])
        with self._hooks(self.of.last + 1, ends):
            return self.of.head(stream, ends.tensor(self.prompts), at)


def _entries(delta: Tensor, part: Tensor, width: int) -> Tensor:
    """A change of the stream [place, d_model], of which it may be one entry alone [place]."""
    if delta.ndim > 1:
        return delta
    whole = delta.new_zeros(len(delta), width)
    whole[torch.arange(len(delta)), part] = delta
    return whole


def _by_trial(value: Any, name: str, count: int) -> Any:
    """An argument of tokens in one row [..., 1, token, ...], by trial."""
    if isinstance(value, tuple):
        return tuple(_by_trial(part, name, count) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 1:
        return value.view(count, -1)[0]
    axis = -2 if name == "position_embeddings" else -1
    return value.unflatten(axis, (count, -1)).squeeze(axis - 2 if value.ndim > 1 else axis)

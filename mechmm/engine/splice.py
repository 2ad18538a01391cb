"""Exact edge ablation: one run in which every reader reads its own sum of writers.

With x_ref what a reader reads in the reference run (the corrupt prompt, means, or zeros),

    x_v = x_ref + sum over writers u with a kept edge u -> v of (u - u_ref),

where u is what the writer writes in this very run, whose own readers read their own sums. The clean
prompt runs; with every edge kept that is the clean run, with none the reference.

Every reader is set at its hook point: queries, keys and values of single heads where projections
give them, MLPs, projectors and the logits where the stream enters them. What the blocks themselves
add up is read by nobody.

A run that keeps the same edges as the one before it, up to some readers, has the same changes up
to there: the blocks before them need not run. And where a batch holds its examples several times,
every time with other edges kept, one run is several trials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear as linear_fn

from mechmm.data.metrics import Answers
from mechmm.data.metrics import Reading as Part
from mechmm.engine.flow import Edit, slopes_at, stem
from mechmm.engine.freeze import first_of, frozen, with_first
from mechmm.engine.readers import Reader
from mechmm.engine.record import record
from mechmm.engine.wiring import Group, Wiring
from mechmm.engine.writers import Values, Writer, grid
from mechmm.model.hooked import HookedMultimodal

Masks = Sequence[Tensor]
"""By block: how much of every edge is kept, 0 or 1 [span, writer, reader], or that in every trial
[trial, span, writer, reader]; the examples of a trial come before those of the next one."""
Cells = list[tuple[int, int, "Tensor | slice"]]
"""(trial, span, its places)."""


@dataclass(frozen=True, eq=False)
class Splice:
    """Runs circuits on one batch.

    Attributes:
        part, answers: what runs, and how it is measured.
        writers: of all streams.
        clean: values of the writers' hooks in the clean run.
        reference: the same in the reference run, and of the streams where it is a run.
        spans: by tower, the number of the span of every place [row, pos].
        examples: by tower, which example every row is of [row].
    """

    model: HookedMultimodal
    wiring: Wiring
    part: Part
    answers: Answers
    writers: Sequence[Writer]
    clean: Values
    reference: Values
    spans: dict[str, Int[Tensor, "row pos"]]
    examples: dict[str, Int[Tensor, " row"]]

    def run(self, masks: Masks) -> Float[Tensor, " example"]:
        """The metric of every example with some edges kept."""
        return Runs(self, masks).run(masks)

    @cached_property
    def streams(self) -> list[Tensor | None]:
        """What the readers of every block read in the reference run [row, pos, d_model]."""
        return [self._stream(number) for number in range(len(self.wiring.readers))]

    def _stream(self, number: int) -> Tensor | None:
        name = stream_at(self.model, self.wiring.readers[number])
        if name is not None and name in self.reference:
            return self.reference[name].float()
        groups = self.wiring.before(number)
        writers = [writer for writer in self.writers if writer.group in groups]
        if name is None or not writers:  # a tower that did not run
            return None
        shape = self.clean[writers[0].hooks[0]].shape[:2]
        at = grid(self.clean[writers[0].hooks[0]])
        total = sum(writer.of(self.reference, at).sum(0) for writer in writers)
        return total.unflatten(0, shape)  # type: ignore[union-attr]

    def cells(self, tower: str, trials: int) -> Cells:
        """The places of every span in every trial."""
        if (tower, trials) not in self._cells:
            self._cells[tower, trials] = self._divided(tower, trials)
        return self._cells[tower, trials]

    @cached_property
    def _cells(self) -> dict[tuple[str, int], Cells]:
        return {}

    def _divided(self, tower: str, trials: int) -> Cells:
        trial = self.examples[tower] // (len(self.answers) // trials)
        count = len(self.wiring.graph.spans)
        number = (trial[:, None] * count + self.spans[tower]).where(self.spans[tower] >= 0, -1)
        found: Cells = []
        for cell in number.unique().tolist():
            at = (number.flatten() == cell).nonzero().flatten()
            if cell >= 0:
                whole = slice(None) if len(at) == number.numel() else at.to(self.model.device)
                found.append((cell // count, cell % count, whole))
        return found

    @cached_property
    def given(self) -> dict[str, list[Any]]:
        """What the blocks of every tower gave in the clean run."""
        towers = list(dict.fromkeys(group.tower for group in self.wiring.readers))
        return record(self.model, self.part.batch, self.part.places, [], towers, blocks=False).given


def stream_at(model: HookedMultimodal, group: Group) -> str | None:
    """The hook that shows what a group of readers reads."""
    block = stem(model, group)
    if group.kind == "states":
        return None
    if group.kind == "mlp" and len(slopes_at(model, group)) == 1:
        return f"{block}.hook_mlp_in"
    if group.kind == "mlp" and model.towers[group.tower].row.mid is not None:
        return f"{block}.hook_resid_mid"
    if group.kind in ("logits", "hidden"):
        return slopes_at(model, group)[0]
    return f"{block}.hook_resid_pre"


def hidden_of(
    model: HookedMultimodal, group: Group, name: str, x: Float[Tensor, "place d_model"]
) -> Float[Tensor, "place d_mlp"]:
    """What a linear layer of an MLP without a norm of its own gives of what enters the block."""
    tower = model.towers[group.tower]
    norm = tower.module(tower.row.ln1, group.layer) if tower.row.mid is None else None
    linear = tower.linear(group.layer, name)
    assert linear is not None
    return linear_fn(x if norm is None else norm(x), linear.weight, linear.bias)


ENDS = ("hidden", "logits")
"""Kinds of readers behind which something else goes on than a stream."""


class Runs:
    """Runs one after the other, with the changes that were written so far.

    Args:
        masks: every edge that some run keeps.
    """

    def __init__(self, splice: Splice, masks: Masks) -> None:
        self.splice, self.masks = splice, _by_trial(masks)
        self.now: dict[str, Tensor] = {}
        self.changes: dict[str, Tensor] = {}
        self.slots = self._slots()
        readers = splice.wiring.readers
        self.towers = list(dict.fromkeys(group.tower for group in readers))
        self.start = (0, -1)

    @torch.no_grad()
    def run(self, masks: Masks, first: int = 0) -> Float[Tensor, " example"]:
        """The metric of every example with some edges kept.

        Args:
            first: of the graph's blocks; the edges into readers before it are as they were in the
                last run that began there or earlier.
        """
        self.masks, part = _by_trial(masks), self.splice.part
        self.start = self._depth(self.splice.wiring.readers[first]) if first else (0, -1)
        hooks = self.splice.model.hooks(fwd_hooks=self.edits())
        with frozen(self._frozen()), hooks:
            return part.reduce(part.logits(self.splice.model), self.splice.answers)

    def _depth(self, group: Group) -> tuple[int, int]:
        """When the readers or writers of a group come, by tower and block."""
        return self.towers.index(group.tower), group.layer + (group.kind == "logits")

    def _frozen(self) -> dict[nn.Module, Callable]:
        """The blocks that nobody reads, giving what they gave in the clean run."""
        if self.start <= (0, 0):
            return {}
        forwards: dict[nn.Module, Callable] = {}
        ends = [self._depth(g) for g in self.splice.wiring.readers if g.kind in ENDS]
        for number, name in enumerate(self.towers):
            end = max(depth for depth in ends if depth[0] == number)  # behind it others go on
            blocks = self.splice.model.towers[name].blocks[: end[1]]
            pairs = zip(blocks, self.splice.given.get(name, []), strict=False)
            for layer, (block, output) in enumerate(pairs):
                if (number, layer) < self.start:
                    forwards[block] = _again(output)
        return forwards

    def _slots(self) -> dict[str, Tensor]:
        """By tower: where the changes of every writer are kept, -1 if it has no kept edge."""
        writers = self.splice.wiring.graph.writers
        towers = writers["tower"].tolist()
        used = torch.zeros(len(writers), dtype=torch.bool)
        for block, mask in zip(self.splice.wiring.graph.blocks, self.masks, strict=True):
            used[slice(*block.writers)] |= mask.bool().any(0).any(0).any(1).cpu()
        slots = {}
        for tower in dict.fromkeys(towers):
            own = used & torch.tensor([name == tower for name in towers])
            slots[tower] = torch.where(own, own.cumsum(0) - 1, -1)
        return slots

    # What is written ---------------------------------------------------------------------------

    def edits(self) -> list[Edit]:
        """What happens at which hook."""
        edits: list[Edit] = []
        for writer in self.splice.writers:
            if writer.hooks and self._depth(writer.group) >= self.start:
                edits += [(writer.hooks[0], partial(self._written, writer))]
        for number, group in enumerate(self.splice.wiring.readers):
            if self._depth(group) >= self.start or group.kind in ENDS:
                edits += self._reader(number, group)
        for writer in self.splice.writers:  # a gate is read before it is part of what is written
            if writer.hooks and self._depth(writer.group) >= self.start:
                edits += [(hook, self._note) for hook in writer.hooks[1:]]
        return edits

    def _note(self, value: Tensor, hook: Any) -> None:
        self.now[hook.name] = value

    def _written(self, writer: Writer, value: Tensor, hook: Any) -> None:
        """Keep what the writers of a group changed."""
        tower = writer.group.tower
        slots = self.slots[tower][slice(*writer.group.nodes)]
        if (slots < 0).all():
            return
        self.now[hook.name] = value
        change = writer.change(self.now, self.splice.reference, grid(value))
        if tower not in self.changes:
            count = int(self.slots[tower].max()) + 1
            self.changes[tower] = change.new_zeros(count, *change.shape[1:])
        kept = (slots >= 0).to(change.device)
        self.changes[tower][slots[slots >= 0].to(change.device)] = change[kept]

    # What is read ------------------------------------------------------------------------------

    def _reader(self, number: int, group: Group) -> list[Edit]:
        """The edits that set what a group of readers reads."""
        if group.kind == "states":
            return [
                (hook, partial(self._set_states, number, half))
                for half, hook in enumerate(slopes_at(self.splice.model, group))
            ]
        if group.kind in ("heads", "queries"):
            reader = Reader(self.splice.model, group)
            return [
                (hook, partial(self._set_heads, number, reader, half))
                for half, (hook, _) in enumerate(reader.projections())
            ]
        hooks = slopes_at(self.splice.model, group)
        if group.kind == "mlp" and len(hooks) == 2:
            names = ("mlp_gate", "mlp_in")
            return [
                (hook, partial(self._set_hidden, number, group, name))
                for hook, name in zip(hooks, names, strict=True)
            ]
        return [(hooks[0], partial(self._set_stream, number))]

    def _set_stream(self, number: int, value: Tensor, hook: Any) -> Tensor:
        return self._sums(number, torch.tensor([0]))[0].view(value.shape).to(value)

    def _set_hidden(self, number: int, group: Group, name: str, value: Tensor, hook: Any) -> Tensor:
        """What a linear layer of an MLP gives that has no norm of its own."""
        x = self._sums(number, torch.tensor([0]))[0].to(value)
        return hidden_of(self.splice.model, group, name, x).view(value.shape)

    def _set_states(self, number: int, half: int, value: Tensor, hook: Any) -> Tensor:
        """Keys or values that are made of pictures alone."""
        reference, mask = self.splice.reference[hook.name].to(value), self.masks[number]
        kept = mask[:, 0, 0].unflatten(1, (2, -1))[:, half].to(value)
        kept = kept.repeat_interleave(len(value) // len(kept), dim=0)  # a row is a tile
        return reference + (value - reference) * kept[:, None, :, None]

    def _set_heads(
        self, number: int, reader: Reader, half: int, value: Tensor, hook: Any
    ) -> Tensor:
        """Queries, keys or values, those of every head from its own sum."""
        slot = reader.slots()[half]
        mask = self.masks[number][..., slot]
        heads = mask.flatten(0, -2).bool().any(0).nonzero().flatten().cpu()
        stream = self.splice.streams[number]
        assert stream is not None
        new = reader.project(half, stream.to(value)).view(value.shape)
        if len(heads):
            sums = self._sums(number, heads + slot.start)
            new[:, :, heads] = reader.project_each(half, sums.to(value), heads).view(
                *value.shape[:2], len(heads), value.shape[3]
            )
        return new

    def _sums(self, number: int, readers: Tensor) -> Float[Tensor, "reader place d_model"]:
        """What some readers of a block read."""
        block, stream = self.splice.wiring.graph.blocks[number], self.splice.streams[number]
        assert stream is not None
        x = stream.flatten(0, 1).expand(len(readers), -1, -1).clone()
        slots, mask = (
            self.slots[block.tower][slice(*block.writers)],
            self.masks[number][..., readers],
        )
        for trial, span, at in self.splice.cells(block.tower, len(mask)):
            if span not in block.spans:
                continue
            part = mask[trial, block.spans.index(span)]
            kept = part.bool().any(1)
            if kept.any():
                changes = self.changes[block.tower][slots[kept].to(x.device)]
                x[:, at] += torch.einsum("ur,upd->rpd", part[kept].to(x), changes[:, at])
        return x


def _by_trial(masks: Masks) -> list[Float[Tensor, "trial span writer reader"]]:
    return [mask if mask.ndim == 4 else mask[None] for mask in masks]


def _again(output: Any) -> Callable[..., Any]:
    """A forward function that gives an output anew: what comes behind may write into it."""
    return lambda *args, **kwargs: with_first(output, first_of(output).clone())

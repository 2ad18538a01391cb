"""Edge scores with the softmax of attention computed again: the query and key correction of AtP*.

A slope says little of attention that is saturated: where one key has all of the weight, the softmax
is flat, however much another query or key would change it. So for an edge u -> v into the query or
the key of a head, what v reads is changed by what u writes, and the pattern is computed again:

    score(u -> v) = sum over i, j of (pattern'_ij - pattern_ij) . dm/dpattern_ij,
    pattern' = softmax(scores + dscores),   dscores = J_scores J_v (u_clean - u_ref)

J_v is the derivative of what the head's projection gives by what it reads (the norm in front of it
is linearised, as in EAP), J_scores that of the scores by the query or key alone: rotations and the
product with the other side are linear, so this is exact; a norm of queries or keys and a soft cap
of the scores are linearised. All positions of a span change together. A key that several heads
share counts in the patterns of all of them, and so does any query or key where one norm spans all
heads (InternVL's larger tower); what a query gates besides (Qwen3.5) counts to first order. Every
other edge has its EAP score; so have keys of cross-attention, which read no stream.

Both derivatives are those of the model's own modules, taken along what writers write: J t is the
derivative of v -> J' v, itself a backward pass. So it holds for any rotation and any norm.

Gradients are those of EAP: of the reference run, with `mean` and `zero` of the clean one (where it
is u_ref - u_clean that changes the pattern, and the score is the difference's negative).

Kramár et al. 2403.00745.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.contrast import Contrast
from mechmm.engine.edges import edge_scores
from mechmm.engine.estimate import constant
from mechmm.engine.flow import Edit, hooks_of, slopes, stem
from mechmm.engine.readers import Reader
from mechmm.engine.wiring import Group
from mechmm.engine.writers import grid

TOGETHER = 2**24
"""Numbers in the patterns that are computed again at once."""


def atp_scores(contrast: Contrast) -> Float[Tensor, "example edge"]:
    """The score of every edge for every example of a batch.

    Memory: the patterns of all layers and their slopes; of one layer at a time, what one layer's
    writers write at the width of the stream, and `TOGETHER` numbers of patterns.
    """
    model, wiring = contrast.model, contrast.wiring
    _, at, normed = hooks_of(model, wiring)
    patterns = [_hook(contrast, group, "pattern") for group in wiring.readers if _attends(group)]
    part = contrast.corrupt_part if contrast.paired else contrast.clean_part
    flow = slopes(model, part, contrast.answers, [*at, *patterns], normed)
    readers = [Reader(model, group) for group in wiring.readers]
    for reader in readers:
        if reader.ran(flow):
            reader.add(flow)
    found = edge_scores(wiring, contrast.writers, readers, *contrast.changes(), contrast.places)
    for number, scores in _Run(contrast, flow.slopes).scored().items():
        block, start = wiring.graph.blocks[number], wiring.graph.starts[number]
        old = found[:, start : start + block.size].view(-1, *block.shape)
        old[..., : scores.shape[-1]] = scores
    return found


def _attends(group: Group) -> bool:
    """Whether readers are queries (and keys) of heads that read a stream."""
    return group.kind in ("heads", "queries")


def _hook(contrast: Contrast, group: Group, name: str) -> str:
    return f"{stem(contrast.model, group)}.{group.part}.hook_{name}"


def along(
    output: Float[Tensor, "*out"], at: Float[Tensor, "*in"], changes: Float[Tensor, "change *in"]
) -> Float[Tensor, "change *out"]:
    """The derivative of an output by what it was made of, along many changes of that at once."""
    v = torch.zeros_like(output, requires_grad=True)
    (back,) = torch.autograd.grad(output, at, v, create_graph=True)
    (found,) = torch.autograd.grad(back, v, changes, is_grads_batched=True, retain_graph=True)
    return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """One attention layer as the run comes by.

    Attributes:
        stream: what enters the block [row, pos, d_model].
        given: by letter, what the projections of queries and keys gave of it.
        taken: the same as attention took it, without a memory of the stream.
        scores: what attention made of these [row, head, query, key].
        slope: of the metric by the pattern.
        sign: 1 where the reference is changed to clean, -1 where clean is changed to it.
    """

    stream: Tensor
    given: dict[str, Tensor]
    taken: dict[str, Tensor]
    scores: Tensor
    slope: Tensor
    sign: float

    @cached_property
    def pattern(self) -> Tensor:
        """As it is in the run."""
        return self.scores.detach().float().softmax(-1)

    def coupled(self, letter: str) -> bool:
        """Whether a head's query or key has an effect on the scores of others: through a norm over
        all of them."""
        taken = self.taken[letter]
        own = self.scores.shape[1] // taken.shape[2]
        (slope,) = torch.autograd.grad(self.scores[:, :own].sum(), taken, retain_graph=True)
        return bool(slope[:, :, 1:].any())

    def effects(
        self, letter: str, changes: Float[Tensor, "writer row pos d_model"]
    ) -> Float[Tensor, "writer row head query"]:
        """What the pattern does when the query (or key) of one head sees changes, for each."""
        moved = along(self.given[letter], self.stream, changes.to(self.stream))
        heads = moved.shape[3]
        if not self.coupled(letter):
            return self._patterns(letter, moved).unflatten(2, (heads, -1)).sum(3)
        alone = torch.eye(heads, device=moved.device, dtype=moved.dtype)[:, None, None, :, None]
        each = self._patterns(letter, (moved[:, None] * alone).flatten(0, 1)).sum(2)
        return each.unflatten(0, (-1, heads)).transpose(1, 2)

    def _patterns(
        self, letter: str, moved: Float[Tensor, "change row pos head d_head"]
    ) -> Float[Tensor, "change row _ query"]:
        """What the patterns of all heads do when queries or keys are moved."""
        scores = along(self.scores, self.taken[letter], moved).float()
        pattern = (self.scores.detach().float() + self.sign * scores).softmax(-1)
        return pattern.sub_(self.pattern).mul_(self.slope.float() * self.sign).sum(-1)

    def through_gate(
        self, changes: Float[Tensor, "writer row pos d_model"], slope: Tensor
    ) -> Float[Tensor, "writer row head query"]:
        """What queries that also gate what a head gives do in that, to first order."""
        moved = along(self.given["gate"], self.stream, changes.to(self.stream)).float()
        return (moved * slope.float()).sum(-1).transpose(-1, -2)


class _Run:
    """A run in which the edges into every attention layer are scored as it comes by.

    Args:
        slopes: of the metric by the pattern [row, head, query, key], and by a gate, by hook.
    """

    def __init__(self, contrast: Contrast, slopes: dict[str, Tensor]) -> None:
        self.contrast, self.slopes = contrast, slopes
        self.spans, self.rows = contrast.spans(), contrast.rows()
        self.given: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        self.found: dict[int, Tensor] = {}

    @torch.inference_mode(mode=False)
    def scored(self) -> dict[int, Float[Tensor, "example span writer reader"]]:
        """By number of a block of the graph, the scores of its edges into queries, then keys."""
        contrast, model = self.contrast, self.contrast.model
        part = contrast.corrupt_part if contrast.paired else contrast.clean_part
        edits = self._edits()
        with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=edits):
            part.logits(model)
        return self.found

    def _edits(self) -> list[Edit]:
        contrast, edits = self.contrast, []
        there = contrast.model.hook_dict
        for name in dict.fromkeys(group.tower for group in contrast.wiring.readers):
            tower = contrast.model.towers[name]
            blocks = (f"{tower.prefix}blocks.{layer}" for layer in range(len(tower.blocks)))
            edits += [
                (f"{block}.hook_resid_pre", partial(self._take, "stream")) for block in blocks
            ]
        for number, group in enumerate(contrast.wiring.readers):
            if _attends(group) and _hook(contrast, group, "pattern") in self.slopes:
                parts = ("q", "k", "v", "gate")
                hooks = ((_hook(contrast, group, part), part) for part in parts)
                edits += [(h, partial(self._take, p)) for h, p in hooks if h in there]
                scores = _hook(contrast, group, "attn_scores")
                edits.append((scores, partial(self._score, number, group)))
        return edits

    def _take(self, name: str, value: Tensor, hook: Any) -> Tensor:
        """What lies behind has no memory of what lies before."""
        leaf = value.detach().requires_grad_()
        self.given[name], self.taken[name] = value, leaf
        return leaf.clone() if name in ("stream", "q", "k") else value.detach()

    def _score(self, number: int, group: Group, scores: Tensor, hook: Any) -> Tensor:
        """Score all edges into the queries and keys of one layer."""
        slope = self.slopes[_hook(self.contrast, group, "pattern")]
        sign = 1.0 if self.contrast.paired else -1.0
        layer = _Layer(self.taken["stream"], self.given, self.taken, scores, slope, sign)
        block, heads = self.contrast.wiring.graph.blocks[number], scores.shape[1]
        # Values are as many as keys, and the last readers.
        keys = 0 if group.kind == "queries" else (block.shape[2] - heads) // 2
        sizes = (len(self.contrast.indices), *block.shape[:2], heads + keys)
        found = torch.zeros(sizes, device=scores.device)
        each = scores.numel() * (heads if layer.coupled("q") else 1)
        for first, changes in self._changes(number, each):
            own = slice(first, first + len(changes))
            effects = layer.effects("q", changes)
            if (gate := self.slopes.get(_hook(self.contrast, group, "gate"))) is not None:
                effects += layer.through_gate(changes, gate)
            found[:, :, own, :heads] = self._by_query(group.tower, effects)
            for span in range(block.shape[0] if keys else 0):
                there = (self.spans[group.tower] == span).to(changes)[..., None]
                effects = layer.effects("k", changes * there).sum(-1)
                found[:, span, own, heads:] = self._by_row(group.tower, effects)
        self.found[number] = found.cpu()
        return scores.detach()

    def _changes(
        self, number: int, size: int
    ) -> Iterator[tuple[int, Float[Tensor, "writer row pos d_model"]]]:
        """What the writers that a block sees write, some at a time, and the number of the first."""
        together, start = (
            max(1, TOGETHER // size),
            self.contrast.wiring.graph.blocks[number].writers[0],
        )
        groups = self.contrast.wiring.before(number)
        for writer in self.contrast.writers:
            if writer.group in groups:
                value = self.contrast.clean.values[writer.hooks[0]]
                change = writer.change(*self.contrast.changes(), grid(value))
                shown = change.unflatten(1, value.shape[:2])
                first = writer.group.nodes[0] - start
                for i, some in enumerate(shown.split(together)):
                    yield first + i * together, some

    def _by_query(
        self, tower: str, effects: Float[Tensor, "writer row head query"]
    ) -> Float[Tensor, "example span writer head"]:
        """Sums over the queries of every example and span."""
        spans, examples = len(self.contrast.wiring.graph.spans), len(self.contrast.indices)
        own = self.spans[tower]
        bins = torch.where(own < 0, examples * spans, self.rows[tower][:, None] * spans + own)
        values = effects.permute(1, 3, 0, 2).flatten(0, 1)
        sums = values.new_zeros(examples * spans + 1, *values.shape[1:])
        sums.index_add_(0, bins.flatten().to(values.device), values)
        return sums[:-1].unflatten(0, (examples, spans))

    def _by_row(
        self, tower: str, values: Float[Tensor, "writer row head"]
    ) -> Float[Tensor, "example writer head"]:
        """Sums over the rows of every example."""
        sums = values.new_zeros(len(self.contrast.indices), len(values), values.shape[2])
        return sums.index_add_(0, self.rows[tower].to(values.device), values.transpose(0, 1))

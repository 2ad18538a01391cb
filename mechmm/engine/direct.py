"""What every component adds to a logit directly, through the stream of the last position.

With the scale s of the final norm frozen at the run, the logit of token a (less that of b) is
linear in the stream x of the last position, and x is the sum of what was written into it:

    logit = sum_c <c, e> + beta,   e = C(w * (u_a - u_b)) / s,

u the unembedding's columns, w the norm's weight, C the centring of a layer norm (else nothing), and
beta what the norm's and the unembedding's biases give. What lies between a component and the
stream (layer scale, sandwich norms) is frozen likewise. A softcap comes behind: what is split is
the logit before it.

A head's part is split further by where it reads: z = sum_k pattern[last, k] v_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.data.metrics import Answers, logits_at
from mechmm.engine.exits import checked_head
from mechmm.engine.head import close
from mechmm.engine.wiring import Wiring
from mechmm.engine.writers import At, Writer, weight_of
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.taps import moments, norm_kind
from mechmm.results.graph import REST

SILENT = ("projector", "deepstack")
"""Writers that write at positions of pictures alone, never at the last one."""


class DirectError(ValueError):
    """A part of the model is no sum that could be split as it was asked for."""


@dataclass(frozen=True)
class Component:
    """One term of the sum.

    Attributes:
        name: as in the graph of circuits, with the span in angle brackets.
        kind: `input`, `head`, `attn`, `mlp`, `neuron`, `bias`.
        layer, part: numbers, -1 where there is none; part: of the head or neuron.
        span: where a head reads; empty: everywhere.
    """

    name: str
    tower: str
    kind: str
    layer: int
    part: int = -1
    span: str = ""


@dataclass(frozen=True, eq=False)
class Run:
    """One run, of which the last position is seen.

    Attributes:
        values: of the writers' hooks at the last position [batch, 1, ...]; of those that a gain
            scales, at all.
        patterns: by layer, the last position's [batch, head, key].
        parts: by layer, its z by span [span, batch, head, d_head].
        scales: by layer, of what norms before attention [batch, pos, 1].
        logits: [batch, vocab].
    """

    batch: Batch
    values: dict[str, Tensor]
    patterns: dict[int, Tensor]
    parts: dict[int, Tensor]
    scales: dict[int, Tensor]
    logits: Tensor

    @property
    def last(self) -> Tensor:
        """The last position of every prompt."""
        return self.batch.layout.last.to(self.logits.device)


@dataclass(eq=False)
class _Watch:
    """Hooks that keep what is needed of one run."""

    model: HookedMultimodal
    batch: Batch
    masks: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, Tensor] = field(default_factory=dict)
    own: dict[int, Tensor] = field(default_factory=dict)

    def at_last(self, value: Tensor) -> Tensor:
        rows = torch.arange(len(value), device=value.device)
        return value[rows, self.batch.layout.last.to(value.device)][:, None].clone()

    def last(self, value: Tensor, hook: Any) -> None:
        self.values[hook.name] = self.at_last(value)

    def whole(self, value: Tensor, hook: Any) -> None:
        self.values[hook.name] = value.clone()

    def v(self, value: Tensor, hook: Any) -> None:
        self.own[hook.layer()] = value.clone()

    def pattern(self, value: Tensor, hook: Any) -> None:
        layer = hook.layer()
        row = self.at_last(value.transpose(1, 2))[:, 0]
        self.patterns[layer] = row
        if len(self.masks):
            v = self.own.pop(layer)
            v = v.repeat_interleave(row.shape[1] // v.shape[2], dim=2)
            masks = self.masks.to(row)
            self.parts[layer] = torch.einsum("bhk,bkhe,sbk->sbhe", row, v, masks)

    def scale(self, value: Tensor, hook: Any) -> None:
        tower = self.model.towers[LANGUAGE]
        module = tower.module(tower.row.ln1, hook.layer())
        if module is not None:
            kind = norm_kind(module, tower.row.norm)
            self.scales[hook.layer()] = moments(value, module, kind)[1]


@torch.no_grad()
def seen_run(
    model: HookedMultimodal,
    writers: Sequence[Writer],
    batch: Batch,
    spans: Sequence[str],
    neurons: Sequence[int] = (),
) -> Run:
    """Run the prompts and keep what the last position shows.

    Args:
        spans: that heads are split by; what they do not cover is `rest`.
        neurons: layers whose neurons are wanted.
    """
    watch = _Watch(model, batch, span_masks(batch, spans))
    end = f"blocks.{len(model.towers[LANGUAGE].blocks) - 1}.hook_resid_post"
    hooks: list[Any] = [(end, watch.last)]
    for writer in writers:
        keep = watch.whole if writer.scaled else watch.last
        hooks += [(name, keep) for name in writer.hooks if name != end]
        block = f"blocks.{writer.group.layer}"
        if writer.group.kind == "heads" and writer.group.part == "attn":
            hooks.append((f"{block}.hook_resid_pre", watch.scale))
            hooks += [(f"{block}.attn.hook_v", watch.v)] if len(spans) else []
            hooks.append((f"{block}.attn.hook_pattern", watch.pattern))
    hooks += [(f"blocks.{layer}.mlp.hook_post", watch.last) for layer in neurons]
    with model.hooks(fwd_hooks=hooks):
        logits = logits_at(model, batch, batch.layout.last[:, None])
    kept = (watch.values, watch.patterns, watch.parts, watch.scales)
    return Run(batch, *kept, logits[:, 0])


def span_masks(batch: Batch, spans: Sequence[str]) -> Float[Tensor, "span batch pos"]:
    """Which positions belong to every span, the first that covers them, and to the rest."""
    left, found = batch.layout.mask("all").clone(), []
    for span in spans:
        own = batch.layout.mask(span) & left
        left &= ~own
        found.append(own)
    shape = (0, *batch.layout.shape)
    return torch.stack([*found, left]).float() if found else torch.zeros(shape)


@dataclass(frozen=True, eq=False)
class End:
    """The end of the language model, linear with its norm's scale frozen.

    Attributes:
        direction: e, what a unit of the stream adds [batch, d_model].
        bias: beta [batch].
        total: the logit (difference) before a softcap [batch].
        softcap: of the logits, or None.
    """

    direction: Float[Tensor, "batch d_model"]
    bias: Float[Tensor, " batch"]
    total: Float[Tensor, " batch"]
    softcap: float | None


@torch.no_grad()
def end_of(model: HookedMultimodal, run: Run, answers: Answers, difference: bool) -> End:
    """What the stream of the last position adds to the answer's logit, less the foil's.

    Raises:
        HeadError: a model whose logits are not what final norm and unembedding give.
    """
    tower = model.towers[LANGUAGE]
    x = run.values[f"blocks.{len(tower.blocks) - 1}.hook_resid_post"]
    head = checked_head(model, run.batch, x, run.logits[:, None])
    weight, own = head.unembed.weight.float(), head.unembed.bias
    own = torch.zeros(len(weight), device=weight.device) if own is None else own.float()
    answer, foil = answers.answer_ids[:, 0], answers.foil_ids[:, 0]
    u, b = weight[answer], own[answer]
    if difference:
        u, b = u - weight[foil], b - own[foil]
    e, beta = through(tower.module(tower.row.ln_final), tower.row.norm, x[:, 0], u)
    total = (x[:, 0].float() * e).sum(-1) + beta + b
    return End(e, beta + b, total, head.softcap)


def through(
    module: nn.Module | None, norm: Any, x: Tensor, direction: Tensor
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """A direction behind a norm as one before it, the scale frozen at x; and what its bias adds."""
    if module is None:
        return direction, direction.new_zeros(len(direction))
    kind = norm_kind(module, norm)
    e = direction * weight_of(module, kind, direction) / moments(x, module, kind)[1]
    if kind == "layer":
        e = e - e.mean(-1, keepdim=True)
    bias = getattr(module, "bias", None)
    beta = direction.new_zeros(len(direction)) if bias is None else direction @ bias.float()
    return e, beta


# The language model ------------------------------------------------------------------------


def language_writers(model: HookedMultimodal, wiring: Wiring, batch: Batch) -> list[Writer]:
    """What writes into the stream of the last position, gains not yet read off a run."""
    reader = max(i for i, g in enumerate(wiring.readers) if g.tower == LANGUAGE)
    groups = [g for g in wiring.before(reader) if g.tower == LANGUAGE and g.kind not in SILENT]
    return [Writer(model, group) for group in groups]


@torch.no_grad()
def language_terms(
    model: HookedMultimodal,
    writers: Sequence[Writer],
    run: Run,
    end: End,
    spans: Sequence[str],
    neurons: Sequence[int],
) -> list[tuple[Component, Float[Tensor, " batch"]]]:
    """Every component's part, and the biases'; they add up to `end.total`."""
    terms = [(Component("bias", LANGUAGE, "bias", -1), end.bias)]
    for writer in gained(writers, run):
        group = writer.group
        if group.kind == "heads":
            terms += _heads(writer, run, end, spans)
        elif group.kind == "mlp" and group.layer in neurons:
            terms += _neurons(model, writer, run, end)
        else:
            kind, name = {"input": ("input", "input"), "mlp": ("mlp", f"m{group.layer}")}.get(
                group.kind, ("attn", f"a{group.layer}")
            )
            value = writer.of(run.values, _at(writer, run))[0]
            component = Component(name, LANGUAGE, kind, group.layer)
            terms.append((component, (value * end.direction).sum(-1)))
    return terms


def gained(writers: Sequence[Writer], run: Run) -> list[Writer]:
    """The writers with the gains that a run shows."""
    return [writer.with_gain(run.values) if writer.scaled else writer for writer in writers]


def _at(writer: Writer, run: Run) -> At:
    """Where the last positions lie in the values that were kept."""
    rows = torch.arange(len(run.last), device=run.last.device)
    return rows, run.last if writer.scaled else torch.zeros_like(rows)


def _heads(
    writer: Writer, run: Run, end: End, spans: Sequence[str]
) -> list[tuple[Component, Tensor]]:
    """The heads of one layer, by where they read."""
    layer, crossing = writer.group.layer, writer.group.part == "cross_attn"
    letter, at = "c" if crossing else "a", _at(writer, run)
    if crossing or not spans:
        parts = writer.of(run.values, at)  # [head, batch, d_model]
        scores = torch.einsum("hbd,bd->hb", parts, end.direction)
        return [
            (Component(f"{letter}{layer}.h{h}", LANGUAGE, "head", layer, h), score)
            for h, score in enumerate(scores)
        ]
    z = gated(writer, run, run.parts[layer].float())
    own = writer.z(run.values, at)
    if not close(z.sum(0), own):
        raise DirectError(
            f"layer {layer}: values change between their projection and attention, so that heads "
            "cannot be split by where they read; leave spans out"
        )
    weight = writer.tower.weight("W_O", layer)
    assert weight is not None
    e = _before_stream(writer, run, end.direction)
    scores = torch.einsum("sbhe,hed,bd->shb", z, weight.float(), e)
    names = [*spans, REST]
    terms = [
        (Component(f"a{layer}.h{h}<{span}>", LANGUAGE, "head", layer, h, span), scores[s, h])
        for h in range(scores.shape[1])
        for s, span in enumerate(names)
    ]
    rest = writer.of(run.values, at).sum(0)
    bias = (rest * end.direction).sum(-1) - scores.sum((0, 1))
    return [*terms, (Component(f"a{layer}.bias", LANGUAGE, "bias", layer), bias)]


def gated(writer: Writer, run: Run, z: Tensor) -> Tensor:
    """z [..., batch, head, d_head] times the gate that some models have behind it."""
    if not writer.tower.row.q_gate:
        return z
    rows, at = _at(writer, run)
    return z * run.values[writer.hooks[1]][rows, at].float().sigmoid()


def reading_direction(
    writer: Writer, run: Run, direction: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch head d_head"]:
    """What a unit of every head's z adds, through what lies between it and the stream."""
    e = _before_stream(writer, run, direction)
    weight = writer.tower.weight("W_O", writer.group.layer)
    assert weight is not None
    return gated(writer, run, torch.einsum("hed,bd->bhe", weight.float(), e))


def _before_stream(writer: Writer, run: Run, direction: Tensor) -> Tensor:
    """A direction of the stream as one of what the output projection gives."""
    if writer.gain is not None:
        return direction * writer.gain
    post = writer.tower.module(writer.tower.row.ln1_post, writer.group.layer)
    if post is None:
        return direction
    out = writer.heads(writer.z(run.values, _at(writer, run))).sum(0)
    return through(post, writer.tower.row.norm, out, direction)[0]


def _neurons(
    model: HookedMultimodal, writer: Writer, run: Run, end: End
) -> list[tuple[Component, Tensor]]:
    """The neurons of one MLP, and its bias.

    Raises:
        DirectError: an MLP whose output is no sum over neurons.
    """
    layer, tower = writer.group.layer, model.towers[LANGUAGE]
    weight, bias = tower.weight("W_out", layer), tower.weight("b_out", layer)
    post = run.values.get(f"blocks.{layer}.mlp.hook_post")
    written = writer.of(run.values, _at(writer, run))[0]
    if weight is None or post is None:
        raise DirectError(f"layer {layer}: its MLP has no neurons of its own (experts)")
    out = post[:, 0].float() @ weight.float()
    out = out if bias is None else out + bias.float()
    module = tower.module(tower.row.ln2_post, layer)
    e, beta = through(module, tower.row.norm, out, end.direction)
    scores = post[:, 0].float() * (e @ weight.float().T)
    rest = beta if bias is None else beta + e @ bias.float()
    if not close(scores.sum(-1) + rest, (written * end.direction).sum(-1)):
        raise DirectError(f"layer {layer}: what its MLP adds is no sum over its neurons")
    terms = [
        (Component(f"m{layer}.n{n}", LANGUAGE, "neuron", layer, n), score)
        for n, score in enumerate(scores.T)
    ]
    return [*terms, (Component(f"m{layer}.bias", LANGUAGE, "bias", layer), rest)]

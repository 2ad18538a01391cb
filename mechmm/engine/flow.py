"""One run seen from its residual streams: what was written into them, and the slopes of a metric.

A `Flow` holds the values of the hooks that a wiring names, and for a run with gradients the slope
of the metric at each hook that readers need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechmm.data.metrics import Answers, Reading
from mechmm.engine.estimate import constant
from mechmm.engine.wiring import Group, Wiring
from mechmm.model.hooked import HookedMultimodal

Edit = tuple[str | Callable, Callable]
"""A hook, and (value, hook) -> what its value becomes, or None to leave it; as wide as the type of
`HookedRootModule.hooks`, whose lists are invariant."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Values and slopes of one run by hook, rows counted over the whole batch.

    Attributes:
        metric: of every example [batch]; empty where none was computed.
    """

    values: dict[str, Tensor]
    slopes: dict[str, Tensor] = field(default_factory=dict)
    metric: Tensor = field(default_factory=lambda: torch.zeros(0))


def stem(model: HookedMultimodal, group: Group) -> str:
    """What the names of the hooks of a group's block begin with."""
    return f"{model.towers[group.tower].prefix}blocks.{max(group.layer, 0)}"


def written_at(model: HookedMultimodal, group: Group) -> list[str]:
    """The hooks that tell what a group of writers wrote."""
    block, crossing = stem(model, group), "cross_" if group.part == "cross_attn" else ""
    row = model.towers[group.tower].row
    if group.kind == "heads":
        scaled = row.gated or (row.cross_attn_out if crossing else row.attn_out)
        gate = [f"{block}.{group.part}.hook_gate"] if row.q_gate and not crossing else []
        out = [f"{block}.hook_{crossing}attn_out"] if scaled else []
        return [f"{block}.{group.part}.hook_z", *gate, *out]
    if group.kind == "projector" and model.family.resume == "cross":
        return []
    hook = {"attn": "attn_out", "mlp": "mlp_out", "deepstack": "deepstack"}
    return [f"{block}.hook_{hook.get(group.kind, 'resid_pre')}"]


def slopes_at(model: HookedMultimodal, group: Group) -> list[str]:
    """The hooks whose slopes tell what a group of readers is worth."""
    block = stem(model, group)
    if group.kind == "heads":
        gate = [f"{block}.attn.hook_gate"] if model.towers[group.tower].row.q_gate else []
        return [*(f"{block}.attn.hook_{letter}" for letter in "qkv"), *gate]
    if group.kind == "queries":
        return [f"{block}.cross_attn.hook_q"]
    if group.kind == "states":
        return [f"{block}.cross_attn.hook_{letter}" for letter in "kv"]
    if group.kind == "attn":
        return [f"{block}.hook_resid_pre", f"{block}.hook_resid_mid"]
    if group.kind == "mlp":
        if f"{block}.hook_mlp_in" in model.hook_dict:
            return [f"{block}.hook_mlp_in"]
        inside = [f"{block}.mlp.hook_pre", f"{block}.mlp.hook_pre_linear"]
        return [hook for hook in inside if hook in model.hook_dict]
    prefix = model.towers[group.tower].prefix
    if group.kind == "logits":
        return [f"{prefix}blocks.{group.layer}.hook_resid_post"]
    read = [f"{prefix}blocks.{group.layer - 1}.hook_resid_post"]
    if group.layer - 1 in model.towers[group.tower].ends:  # all that comes behind is the projector
        return read
    return [*read, f"{prefix}blocks.{group.layer}.hook_resid_pre"]


def values_at(model: HookedMultimodal, group: Group) -> list[str]:
    """The hooks whose values tell how a group of readers norms what it reads."""
    entered = group.kind in ("heads", "queries") or (
        group.kind == "mlp" and len(slopes_at(model, group)) == 2
    )
    return [f"{stem(model, group)}.hook_resid_pre"] if entered else []


def hooks_of(model: HookedMultimodal, wiring: Wiring) -> tuple[list[str], list[str], list[str]]:
    """Hooks that a run with gradients needs: of writers, of slopes, of what readers norm."""
    states = [group for group in wiring.readers if group.kind == "states"]
    written = _each(
        [
            *(written_at(model, group) for group in wiring.writers),
            *(slopes_at(model, group) for group in states),
        ]
    )
    slopes = _each(slopes_at(model, group) for group in wiring.readers)
    normed = _each(values_at(model, group) for group in wiring.readers)
    there = set(model.hook_dict)
    return written, [hook for hook in slopes if hook in there], normed


def _each(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


@torch.no_grad()
def values(
    model: HookedMultimodal,
    part: Reading,
    answers: Answers,
    hooks: Sequence[str],
    edits: Sequence[Edit] = (),
) -> Flow:
    """The values of some hooks in a run, and its metric.

    Args:
        edits: are made before.
    """
    caught: dict[str, list[Tensor]] = defaultdict(list)

    def catch(value: Tensor, hook: Any) -> None:
        caught[hook.name].append(value.clone())

    live = [*edits, *((name, catch) for name in hooks)]
    with model.hooks(fwd_hooks=live):
        metric = part.reduce(part.logits(model), answers)
    return Flow({hook: torch.cat(some) for hook, some in caught.items()}, metric=metric)


@torch.inference_mode(mode=False)
def slopes(
    model: HookedMultimodal,
    part: Reading,
    answers: Answers,
    hooks: Sequence[str],
    also: Sequence[str] = (),
    edits: Sequence[Edit] = (),
) -> Flow:
    """The values of some hooks in a run, and the slope of the metric at them.

    Prompts do not see each other, so that every place holds the gradient of its own example.

    Args:
        also: hooks whose values alone are wanted.
        edits: are made before.
    """
    caught: dict[str, list[Tensor]] = defaultdict(list)
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def catch(value: Tensor, hook: Any) -> Tensor:
        if hook.name in also:
            kept[hook.name].append(value.detach().clone())
        if hook.name not in hooks:
            return value
        if value.requires_grad:
            caught[hook.name].append(value)
            return value
        leaf = value.detach().requires_grad_()
        caught[hook.name].append(leaf)
        return leaf.clone()  # nothing may write into a leaf

    live = [*edits, *((name, catch) for name in dict.fromkeys([*hooks, *also]))]
    with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=live):
        metric = part.reduce(part.logits(model), answers)
        flat = [value for some in caught.values() for value in some]
        gradients = iter(torch.autograd.grad(metric.sum(), flat, allow_unused=True))
    found = {hook: [next(gradients) for _ in some] for hook, some in caught.items()}
    return Flow(
        {hook: torch.cat(some) for hook, some in (kept | _detached(caught, kept)).items()},
        {hook: _slope(some, caught[hook]) for hook, some in found.items()},
        metric.detach(),
    )


def _detached(
    caught: dict[str, list[Tensor]], kept: dict[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    return {h: [v.detach() for v in some] for h, some in caught.items() if h not in kept}


def _slope(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> Tensor:
    """The gradients of all firings of a hook; zero where the metric does not depend on one."""
    pairs = zip(gradients, values, strict=True)
    return torch.cat([torch.zeros_like(v) if g is None else g for g, v in pairs])

"""Runs every advertised hook point and reports whether it is alive.

A hook point is *live* when it fires, an edit of it changes the logits, and a gradient of the logits
reaches it. The effect of an edit is

    max |logits(a + e) - logits(a)|,   e = +-(1/2) rms(a) with random signs,

over positions that are not padding. Both runs take the same path through attention, so rounding
cancels exactly.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

LIVE, UNUSED, DEAD = "live", "unused by this model", "dead"
OTHER_PATH = ("hook_attn_scores", "hook_pattern")
"""Hooks where somebody listening makes attention compute its pattern."""
SMALLEST = 1e-6
"""An effect below this share of the largest logit counts as none."""


@dataclass(frozen=True)
class HookAudit:
    """What the audit saw at one hook point.

    Attributes:
        name: of the hook point.
        shape: of the activation at its first firing, None where it never fired.
        fired: how often it fired in one run.
        effect: largest absolute change of a logit by an edit.
        gradient: whether a nonzero gradient of the logits reaches it.
        status: `live`, `unused by this model` or `dead`.
        reason: why it is not live, empty where it is.
    """

    name: str
    shape: tuple[int, ...] | None
    fired: int
    effect: float
    gradient: bool
    status: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The audit of a model on one batch, one entry per hook point.

    Attributes:
        model: architecture and size, as text.
        hooks: in the order of `model.hook_dict`.
    """

    model: str
    hooks: tuple[HookAudit, ...]

    @property
    def dead(self) -> list[str]:
        """Names of the hook points that ought to be live and are not."""
        return [hook.name for hook in self.hooks if hook.status == DEAD]

    @property
    def unused(self) -> list[str]:
        """Names of the hook points that this model's configuration leaves unread."""
        return [hook.name for hook in self.hooks if hook.status == UNUSED]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able record per hook point."""
        return [{**asdict(hook), "shape": hook.shape and list(hook.shape)} for hook in self.hooks]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per hook point: name, shape, fired, effect, gradient, status, reason."""
        return pd.DataFrame([asdict(hook) for hook in self.hooks])

    def table(self) -> str:
        """Every hook point as a line of text."""
        return self.to_dataframe().to_string(index=False)

    def __str__(self) -> str:
        """Counts, then every hook point that is not live with its reason."""
        counts = Counter(hook.status for hook in self.hooks)
        head = ", ".join(f"{counts[status]} {status}" for status in (LIVE, UNUSED, DEAD))
        others = [hook for hook in self.hooks if hook.status != LIVE]
        lines = [f"  {hook.status}: {hook.name} ({hook.reason})" for hook in others]
        title = f"{self.model}\n{len(self.hooks)} hook points: {head}"
        return "\n".join([title, *lines])


@dataclass(frozen=True)
class _Run:
    """What one hook point did: firings, effect of an edit, size of the largest logit."""

    shapes: tuple[tuple[int, ...], ...]
    effect: float
    scale: float


def audit(model: HookedMultimodal, batch: Batch, *, seed: int = 0) -> Audit:
    """Run, edit and differentiate every hook point of a model.

    A forward pass per hook point (two for scores and patterns), and one forward and backward pass
    for all of them. No hook and no parameter gradient is left behind. Hooks that the caller has
    set stay on and take part.

    Args:
        model: the model.
        batch: a small batch with at least one image, so that every tower runs.
        seed: of the edits and of the direction in which the logits are differentiated.

    Raises:
        ValueError: for a batch without prompts, or without images (no hook of a tower would fire).
    """
    if not len(batch):
        raise ValueError("the batch is empty; encode at least one prompt with an image")
    if batch.layout.text_only:
        raise ValueError(
            "the batch has no image, so no hook outside the language model could fire; encode a "
            "prompt with an image"
        )
    gradients, shapes = _gradients(model, batch, seed), _shapes(model, batch)
    unread = {**model.family.unread(model.config), **_asleep(model, shapes)}
    with torch.no_grad():
        plain = real(batch, model(batch))
        effects = {name: _effect(model, batch, name, plain, seed) for name in model.hook_dict}
    scale = float(plain.abs().max())
    runs = {name: _Run(shapes.get(name, ()), effects[name], scale) for name in model.hook_dict}
    hooks = (_judge(name, run, gradients[name], unread) for name, run in runs.items())
    return Audit(repr(model), tuple(hooks))


def _shapes(model: HookedMultimodal, batch: Batch) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shape of every firing of every hook point in one run."""
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    def watch(value: Tensor, hook: HookPoint) -> None:
        shapes[str(hook.name)].append(tuple(value.shape))

    with torch.no_grad():
        model.run_with_hooks(batch, fwd_hooks=[(lambda name: True, watch)])
    return {name: tuple(fired) for name, fired in shapes.items()}


def _asleep(model: HookedMultimodal, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of the hooks of towers that a batch does not run (a video tower, on images)."""
    return {
        rf"{tower.name}\..*": f"this batch does not run tower {tower.name!r}"
        for tower in model.towers.values()
        if f"{tower.prefix}blocks.0.hook_resid_pre" not in shapes
    }


def _effect(model: HookedMultimodal, batch: Batch, name: str, plain: Tensor, seed: int) -> float:
    """The largest change of a logit by an edit at one hook point.

    Where a hook changes the path through attention, both runs have one there. Experts that are not
    chosen stay so.
    """

    def disturb(value: Tensor, hook: HookPoint) -> Tensor:
        noise = _noise(value, seed)
        return value + (noise * (value != 0) if name.endswith("hook_router") else noise)

    if name.endswith(OTHER_PATH):
        plain = _logits(model, batch, name, lambda value, hook: None)
    return float((_logits(model, batch, name, disturb) - plain).abs().max())


def _logits(model: HookedMultimodal, batch: Batch, name: str, hook: Any) -> Tensor:
    """Logits [position, vocab] of all positions that are not padding, in float32."""
    return real(batch, model.run_with_hooks(batch, fwd_hooks=[(name, hook)]))


def real(batch: Batch, output: Tensor) -> Tensor:
    """An output in float32 without positions that are padding and entries that are masked out."""
    mask = batch.attention_mask.bool()
    output = output[mask] if output.shape[:2] == mask.shape else output
    return output.float().where(output.abs() < torch.finfo(output.dtype).max / 2, 0)


def _noise(value: Tensor, seed: int) -> Tensor:
    """Half the root mean square of an activation, with random signs.

    Entries at the lowest number (masked scores) do not count towards the size.
    """
    ordinary = value[value.abs() < torch.finfo(value.dtype).max / 2].float()
    size = float(ordinary.square().mean().sqrt()) if ordinary.numel() else 0.0
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, value.shape, generator=random) * 2 - 1
    return (signs * (size or 1.0) / 2).to(value.device, value.dtype)


def _gradients(model: HookedMultimodal, batch: Batch, seed: int) -> dict[str, bool]:
    """Whether the logits, along a random direction, have a gradient at each hook point.

    `torch.autograd.grad` is asked for the hooked tensors alone: parameters keep their gradients.
    """
    caught: dict[str, list[Tensor]] = defaultdict(list)

    def catch(value: Tensor, hook: HookPoint) -> None:
        if not value.requires_grad:
            value.requires_grad_()
        caught[str(hook.name)].append(value)

    with torch.enable_grad(), model.hooks(fwd_hooks=[(lambda name: True, catch)]):
        logits = real(batch, model(batch))
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        target = (logits * direction.to(logits.device)).sum()
    tensors = [value for values in caught.values() for value in values]
    found = iter(torch.autograd.grad(target, tensors, allow_unused=True))
    reached = {name: [_nonzero(next(found)) for _ in values] for name, values in caught.items()}
    return {name: any(reached.get(name, ())) for name in model.hook_dict}


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().max() > 0)


def _judge(name: str, run: _Run, gradient: bool, unread: Mapping[str, str]) -> HookAudit:
    """The verdict on one hook point."""
    lacks = []
    if not run.shapes:
        lacks.append("it never fired")
    elif not run.effect > SMALLEST * run.scale:
        lacks.append("an edit changes no logit")
    if run.shapes and not gradient:
        lacks.append("no gradient reaches it")
    excuse = next((why for pattern, why in unread.items() if re.fullmatch(pattern, name)), None)
    status = LIVE if not lacks else DEAD if excuse is None else UNUSED
    reason = "; ".join(lacks) if status == DEAD else excuse if status == UNUSED else ""
    shape = run.shapes[0] if run.shapes else None
    return HookAudit(name, shape, len(run.shapes), run.effect, gradient, status, reason or "")

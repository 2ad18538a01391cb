"""Taps: how hook points are fed from the modules of an unmodified Hugging Face model.

- A value that a module takes or gives goes to the hook point, and what comes back takes its place.
- `hook_resid_mid` sits on the residual stream between attention and MLP, which is no module's own
  output: the tensor that enters `ln2` is the one that the block's skip connection adds later, so an
  edit is written into it in place and reaches both.
- What is added to the stream outside of any module (gates, DeepStack) is the difference of the
  stream, and the change of that difference is added back.
- What a module computes inside (`hook_scale`, `hook_normalized`, `hook_result`) is computed again
  from its input when somebody listens, and replaces the module's output only where it was edited.

Taps come before the recorders that `transformers` itself installs, so that recorded hidden states
show edits too. Of two taps on the output of one module, the one laid later comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mechmm.model import attention
from mechmm.model.attention import View, fire, listening, replaced, with_strides
from mechmm.model.experts import expert_outputs
from mechmm.model.rows import Norm
from mechmm.model.tower import Tower

When = Callable[[Tensor], bool]


class Component(nn.Module):
    """A node of the hook tree; also gives the weights of its part of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Callable[[], Tensor | None]] = {}

    def __getattr__(self, name: str) -> Any:
        weights = self.__dict__.get("weights", {})
        if name in weights:
            return weights[name]()
        return super().__getattr__(name)


def hook_point(root: nn.Module, name: str) -> HookPoint:
    """A new hook point at a dotted name, with the nodes on the way there."""
    *path, last = name.split(".")
    node = root
    for i, part in enumerate(path):
        if part not in node._modules:
            numbered = i + 1 < len(path) and path[i + 1].isdigit()
            node.add_module(part, nn.ModuleList() if numbered else Component())
        node = node._modules[part]
        assert node is not None
    point = HookPoint()
    node.add_module(last, point)
    return point


class Taps:
    """The taps laid on one Hugging Face model; `remove` takes them off again."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.handles: list[RemovableHandle] = []
        self.attentions: list[nn.Module] = []

    def remove(self) -> None:
        """Take every tap and every attention module's hooks off the Hugging Face model."""
        for handle in self.handles:
            handle.remove()
        for module in self.attentions:
            attention.detach(module)
        self.handles, self.attentions = [], []

    def enter(self, block: nn.Module, tower: Tower) -> None:
        """Note the shape of what enters a block: inside it, positions may be flattened."""

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tower.shape = (args[0] if args else kwargs[_first(kwargs)]).shape

        self.handles.append(block.register_forward_pre_hook(tap, with_kwargs=True))

    def added(
        self, start: nn.Module, module: nn.Module, name: str, tower: Tower, *, behind: bool
    ) -> None:
        """What was added to the stream since it entered `start`, where no module gives it: read
        where the stream enters `module`, or behind it."""
        point = hook_point(self.root, name)
        since: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                since[:] = [args[0] if args else kwargs[_first(kwargs)]]

        def change(now: Tensor) -> Tensor:
            added = now - since.pop().view(now.shape)
            return fire(point, added, tower.shown) - added

        def before(module: nn.Module, args: tuple) -> None:
            if listening(point):
                args[0].add_(change(args[0]))

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if not listening(point):
                return None
            if isinstance(output, tuple):
                return (output[0] + change(output[0]), *output[1:])
            return output + change(output)

        self.handles.append(start.register_forward_pre_hook(keep, with_kwargs=True))
        if behind:
            self.handles.append(module.register_forward_hook(after, prepend=True))
        else:
            self.handles.append(module.register_forward_pre_hook(before))

    def deepstack(self, tower: Tower, layer: int) -> None:
        """What is added between one block and the next."""
        point = hook_point(self.root, f"{tower.prefix}blocks.{layer}.hook_deepstack")
        after = [*tower.blocks, tower.module(tower.row.ln_final)][layer + 1]
        assert after is not None
        before: list[Tensor] = []

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if listening(point):
                before[:] = [output[0] if isinstance(output, tuple) else output]

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not listening(point):
                return None
            stream = args[0] if args else kwargs[_first(kwargs)]
            added = stream - before.pop()
            new = stream + (fire(point, added, tower.shown) - added)
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, _first(kwargs): new}

        # The hooks of one module run in the order they were laid: this block's output is laid
        # already, the next block's input is not yet.
        self.handles.append(tower.blocks[layer].register_forward_hook(leave))
        self.handles.append(after.register_forward_pre_hook(enter, with_kwargs=True))

    def input(
        self,
        module: nn.Module | None,
        name: str,
        view: View | None = None,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """What enters a module; only where `when`, if given, says so of it."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not listening(point) or (when is not None and not when(args[0])):
                return None
            if args:
                return (fire(point, args[0], view), *args[1:]), kwargs
            key = _first(kwargs)
            return args, {**kwargs, key: fire(point, kwargs[key], view)}

        self.handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))

    def output(
        self,
        module: nn.Module | None,
        name: str,
        view: View | None = None,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """What a module gives, or the first part of it; `when` as in `_input`."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Any) -> Any:
            if not listening(point) or (when is not None and not when(args[0])):
                return None
            if isinstance(output, tuple):
                return (fire(point, output[0], view), *output[1:])
            return fire(point, output, view)

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def parts(
        self,
        module: nn.Module | None,
        names: Sequence[str],
        layout: str,
        axis: str,
        view: View,
        **sizes: int,
    ) -> None:
        """The parts of what a projection gives, for example heads of q, k and v.

        Args:
            names: of the hook points, one per part.
            layout: of the last axis (einops), with the axis `axis`.
        """
        if module is None:
            return
        points = [hook_point(self.root, name) for name in names]
        inside = layout.strip("()").replace(axis, "").split()
        apart, together = f"{axis} ... {' '.join(inside)}", f"... {layout}"

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not any(listening(point) for point in points):
                return None
            parts = rearrange(output, f"{together} -> {apart}", **sizes)
            new = [fire(p, value, view) for p, value in zip(points, parts, strict=True)]
            whole = rearrange(torch.stack(new), f"{apart} -> {together}")
            return with_strides(whole, output.stride())

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def residual(self, module: nn.Module | None, name: str, view: View) -> None:
        """The residual stream where it enters a module, edited in place: the skip sees it too."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                stream = args[0] if args else kwargs[_first(kwargs)]
                stream.copy_(fire(point, stream, view))

        self.handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))

    def norm(
        self,
        module: nn.Module | None,
        name: str,
        kind: Norm,
        view: View,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """The scale and the normalised value inside a norm; `when` as in `_input`."""
        if module is None or isinstance(module, nn.Identity):
            return
        scale_point = hook_point(self.root, f"{name}.hook_scale")
        point = hook_point(self.root, f"{name}.hook_normalized")
        kind = "layer" if isinstance(module, nn.LayerNorm) else kind

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not (listening(scale_point) or listening(point)):
                return None
            if when is not None and not when(args[0]):
                return None
            centred, scale = _moments(args[0], module, kind)
            new_scale = fire(scale_point, scale, view)
            normalized = centred / new_scale
            new = fire(point, normalized, view)
            with _loaded(module):
                plain = _affine(centred / scale, module, kind)
                return replaced(output, plain, _affine(new, module, kind))

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def result(self, module: nn.Linear | None, name: str, n_heads: int, view: View) -> None:
        """Every head's own addition to the residual stream, computed only for listeners."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            with _loaded(module):
                return _with_results(
                    module, args[0], output, n_heads, partial(fire, point, view=view)
                )

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def experts(self, module: nn.Module | None, name: str, view: View) -> None:
        """Every expert's own addition, computed only for listeners."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            with _loaded(module):
                each, combine = expert_outputs(module, args, output)
            return replaced(output, combine(each), combine(fire(point, each, view)))

        self.handles.append(module.register_forward_hook(tap, prepend=True))


def _first(kwargs: dict[str, Any]) -> str:
    """The name of the first tensor among a module's keyword arguments."""
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))


def _loaded(module: nn.Module) -> AbstractContextManager:
    """The weights of a module that `accelerate` keeps elsewhere between its own forward passes."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _with_results(
    module: Any, z: Tensor, output: Tensor, n_heads: int, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """The output of an output projection after a change of every head's own addition."""
    z = rearrange(z, "... (head d) -> ... head d", head=n_heads)
    per_head = rearrange(module.weight, "d_model (head d) -> head d d_model", head=n_heads)
    result = einsum(z, per_head, "... head d, head d d_model -> ... head d_model")
    bias = 0 if module.bias is None else module.bias
    return replaced(output, result.sum(-2) + bias, change(result).sum(-2) + bias)


def _moments(x: Tensor, module: nn.Module, kind: Norm) -> tuple[Tensor, Tensor]:
    """The (centred) input of a norm in float32, and its scale [..., 1]."""
    x = x.float()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return x, (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # type: ignore[operator]


def _affine(normalized: Tensor, module: nn.Module, kind: Norm) -> Tensor:
    """What a norm makes of the normalised value."""
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None:
        return normalized
    if kind == "rms":
        return weight * normalized.to(weight.dtype)
    if kind == "rms_plus_one":
        return (normalized * (1.0 + weight.float())).to(weight.dtype)
    bias = getattr(module, "bias", None)
    scaled = normalized * weight.float()
    return (scaled if bias is None else scaled + bias.float()).to(weight.dtype)

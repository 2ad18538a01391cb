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

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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


class Point(HookPoint):
    """A hook point that says when somebody begins or ceases to listen."""

    def __init__(self, changed: Callable[[HookPoint], None]) -> None:
        super().__init__()
        self.changed, self.awake = changed, False

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch; `add_hook` comes here too."""
        handle = super().register_forward_hook(*args, **kwargs)
        self._say()
        return handle

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch; `add_hook` comes here too."""
        handle = super().register_full_backward_hook(*args, **kwargs)
        self._say()
        return handle

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens."""
        super().remove_hooks(*args, **kwargs)
        self._say()

    def _say(self) -> None:
        if listening(self) != self.awake:
            self.awake = not self.awake
            self.changed(self)


@dataclass(frozen=True)
class Tap:
    """A PyTorch hook that is on its module while somebody listens at one of its points (always, if
    it has none)."""

    function: Callable
    points: tuple[HookPoint, ...]
    register: Callable[..., RemovableHandle]


class Taps:
    """The taps laid on one Hugging Face model; `remove` takes them off again.

    A model runs without any of them where nobody listens.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.laid: dict[nn.Module, list[Tap]] = defaultdict(list)
        self.tapped: dict[HookPoint, list[nn.Module]] = defaultdict(list)
        self.handles: dict[nn.Module, list[RemovableHandle]] = {}
        self.attentions: list[nn.Module] = []

    def remove(self) -> None:
        """Take every tap and every attention module's hooks off the Hugging Face model."""
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        for module in self.attentions:
            attention.detach(module)
        self.laid.clear()
        self.tapped.clear()
        self.handles, self.attentions = {}, []

    def point(self, name: str) -> HookPoint:
        """A new hook point at a dotted name, with the nodes on the way there."""
        *path, last = name.split(".")
        node = self.root
        for i, part in enumerate(path):
            if part not in node._modules:
                numbered = i + 1 < len(path) and path[i + 1].isdigit()
                node.add_module(part, nn.ModuleList() if numbered else Component())
            node = node._modules[part]
            assert node is not None
        point = Point(self._changed)
        node.add_module(last, point)
        return point

    def before(self, module: nn.Module, tap: Callable, *points: HookPoint) -> None:
        """Lay a tap (module, args, kwargs) on what enters a module."""
        self._lay(module, Tap(tap, points, partial(_register_before, with_kwargs=True)))

    def behind(self, module: nn.Module, tap: Callable, *points: HookPoint) -> None:
        """Lay a tap (module, args, output) on what a module gives; later ones come first."""
        self._lay(module, Tap(tap, points, partial(_register_behind, prepend=True)))

    def last(self, module: nn.Module, tap: Callable, *points: HookPoint) -> None:
        """Lay a tap behind all others on what a module gives."""
        self._lay(module, Tap(tap, points, _register_behind))

    def _lay(self, module: nn.Module, tap: Tap) -> None:
        self.laid[module].append(tap)
        for point in tap.points:
            self.tapped[point].append(module)
        if not tap.points:
            self._refresh(module)

    def _changed(self, point: HookPoint) -> None:
        for module in self.tapped.get(point, ()):
            self._refresh(module)

    def _refresh(self, module: nn.Module) -> None:
        """Have those taps on a module that are needed now, in the order in which they were laid."""
        for handle in self.handles.pop(module, ()):
            handle.remove()
        needed = [
            tap
            for tap in self.laid.get(module, ())
            if not tap.points or any(listening(point) for point in tap.points)
        ]
        if needed:
            self.handles[module] = [tap.register(module, tap.function) for tap in needed]

    # Kinds of tap ----------------------------------------------------------------------------

    def enter(self, block: nn.Module, tower: Tower) -> None:
        """Note the shape of what enters a block: inside it, positions may be flattened."""

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tower.shape = (args[0] if args else kwargs[_first(kwargs)]).shape

        self.before(block, tap)

    def added(
        self, start: nn.Module, module: nn.Module, name: str, tower: Tower, *, behind: bool
    ) -> None:
        """What was added to the stream since it entered `start`, where no module gives it: read
        where the stream enters `module`, or behind it."""
        point = self.point(name)
        since: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                since[:] = [args[0] if args else kwargs[_first(kwargs)]]

        def change(now: Tensor) -> Tensor:
            added = now - since.pop().view(now.shape)
            return fire(point, added, tower.shown) - added

        def write(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                args[0].add_(change(args[0]))

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if not listening(point):
                return None
            if isinstance(output, tuple):
                return (output[0] + change(output[0]), *output[1:])
            return output + change(output)

        self.before(start, keep, point)
        if behind:
            self.behind(module, after, point)
        else:
            self.before(module, write, point)

    def deepstack(self, tower: Tower, layer: int) -> None:
        """What is added between one block and the next."""
        point = self.point(f"{tower.prefix}blocks.{layer}.hook_deepstack")
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
        self.last(tower.blocks[layer], leave, point)
        self.before(after, enter, point)

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
        point = self.point(name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not listening(point) or (when is not None and not when(args[0])):
                return None
            if args:
                return (fire(point, args[0], view), *args[1:]), kwargs
            key = _first(kwargs)
            return args, {**kwargs, key: fire(point, kwargs[key], view)}

        self.before(module, tap, point)

    def output(
        self,
        module: nn.Module | None,
        name: str,
        view: View | None = None,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """What a module gives, or the first part of it; `when` as in `input`."""
        if module is None:
            return
        point = self.point(name)

        def tap(module: nn.Module, args: tuple, output: Any) -> Any:
            if not listening(point) or (when is not None and not when(args[0])):
                return None
            if isinstance(output, tuple):
                return (fire(point, output[0], view), *output[1:])
            return fire(point, output, view)

        self.behind(module, tap, point)

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
        points = [self.point(name) for name in names]
        inside = layout.strip("()").replace(axis, "").split()
        apart, together = f"{axis} ... {' '.join(inside)}", f"... {layout}"

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not any(listening(point) for point in points):
                return None
            parts = rearrange(output, f"{together} -> {apart}", **sizes)
            new = [fire(p, value, view) for p, value in zip(points, parts, strict=True)]
            whole = rearrange(torch.stack(new), f"{apart} -> {together}")
            return with_strides(whole, output.stride())

        self.behind(module, tap, *points)

    def residual(self, module: nn.Module | None, name: str, view: View) -> None:
        """The residual stream where it enters a module, edited in place: the skip sees it too."""
        if module is None:
            return
        point = self.point(name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                stream = args[0] if args else kwargs[_first(kwargs)]
                stream.copy_(fire(point, stream, view))

        self.before(module, tap, point)

    def norm(
        self,
        module: nn.Module | None,
        name: str,
        kind: Norm,
        view: View,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """The scale and the normalised value inside a norm; `when` as in `input`."""
        if module is None or isinstance(module, nn.Identity):
            return
        scale_point = self.point(f"{name}.hook_scale")
        point = self.point(f"{name}.hook_normalized")
        kind = norm_kind(module, kind)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not (listening(scale_point) or listening(point)):
                return None
            if when is not None and not when(args[0]):
                return None
            centred, scale = moments(args[0], module, kind)
            new_scale = fire(scale_point, scale, view)
            normalized = centred / new_scale
            new = fire(point, normalized, view)
            with _loaded(module):
                plain = affine(centred / scale, module, kind)
                return replaced(output, plain, affine(new, module, kind))

        self.behind(module, tap, scale_point, point)

    def result(self, module: nn.Linear | None, name: str, n_heads: int, view: View) -> None:
        """Every head's own addition to the residual stream, computed only for listeners."""
        if module is None:
            return
        point = self.point(name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            with _loaded(module):
                return _with_results(
                    module, args[0], output, n_heads, partial(fire, point, view=view)
                )

        self.behind(module, tap, point)

    def experts(self, module: nn.Module | None, name: str, view: View) -> None:
        """Every expert's own addition, computed only for listeners."""
        if module is None:
            return
        point = self.point(name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            with _loaded(module):
                each, combine = expert_outputs(module, args, output)
            return replaced(output, combine(each), combine(fire(point, each, view)))

        self.behind(module, tap, point)


def _register_before(module: nn.Module, tap: Callable, **options: Any) -> RemovableHandle:
    return module.register_forward_pre_hook(tap, **options)


def _register_behind(module: nn.Module, tap: Callable, **options: Any) -> RemovableHandle:
    return module.register_forward_hook(tap, **options)


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


def norm_kind(module: nn.Module, kind: Norm) -> Norm:
    """How a norm of a stack computes: a `LayerNorm` as one, others as the row says."""
    return "layer" if isinstance(module, nn.LayerNorm) else kind


def moments(x: Tensor, module: nn.Module, kind: Norm) -> tuple[Tensor, Tensor]:
    """The (centred) input of a norm in float32, and its scale [..., 1]."""
    x = x.float()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return x, (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # type: ignore[operator]


def affine(normalized: Tensor, module: nn.Module, kind: Norm) -> Tensor:
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

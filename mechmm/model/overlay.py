"""Lays TransformerLens hook points over an unmodified Hugging Face model.

Every hook point is fed by a PyTorch hook on a module that a row names, or by the attention
function. Kinds of tap:

- a value that a module takes or gives goes to the hook point, and what comes back takes its place;
- `hook_resid_mid` sits on the residual stream between attention and MLP, which is no module's own
  output: the tensor that enters `ln2` is the one that the block's skip connection adds later, so an
  edit is written into it in place and reaches both;
- what is added to the stream outside of any module (gates, DeepStack) is the difference of the
  stream, and the change of that difference is added back;
- what a module computes inside (`hook_scale`, `hook_normalized`, `hook_result`) is computed again
  from its input when somebody listens, and replaces the module's output only where it was edited.

Taps come before the recorders that `transformers` itself installs, so that recorded hidden states
show edits too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mechmm.model import attention
from mechmm.model.attention import AttentionHooks, View, fire, listening, replaced, with_strides
from mechmm.model.experts import expert_outputs, rerouted
from mechmm.model.rows import Norm, Projector
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


class Overlay:
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

    # Stacks ----------------------------------------------------------------------------------

    def lay_tower(self, tower: Tower, eager: bool, deepstack: int = 0) -> None:
        """All hook points of one stack; the first `deepstack` blocks are followed by features of
        another tower."""
        prefix, row, view = tower.prefix, tower.row, tower.shown
        if row.packed is not None:
            self._pack(tower)
        embed, name = tower.module(row.embed), f"{prefix}hook_embed"
        lay = self._input if (row.embed or "").startswith("<") else self._output
        lay(embed, name, partial(view, where="embed"))
        before = partial(view, where="embed")
        self._norm(tower.module(row.ln_pre), f"{prefix}ln_pre", row.norm, before)
        for layer in range(len(tower.blocks)):
            self._lay_block(tower, layer, eager)
            if layer < deepstack:
                self._deepstack(tower, layer)
        final = tower.module(row.ln_final)
        pooled = partial(view, where="pooled")
        self._norm(final, f"{prefix}ln_final", row.norm, pooled, tower.is_stream)

    def lay_projector(self, root: nn.Module, prefix: str, row: Projector, tower: Tower) -> None:
        """All hook points of one projector, or of each in a list of them."""
        if isinstance(root, nn.ModuleList):
            for i, module in enumerate(root):
                self.lay_projector(module, f"{prefix}.{i}", row, tower)
            return
        tokens = partial(tower.shown, where="tokens")
        features = partial(tower.shown, where="features")
        self._input(root, f"{prefix}.hook_in", features, Tensor.is_floating_point)
        if row.pre is not None:
            self._output(root.get_submodule(row.pre), f"{prefix}.hook_pre", tokens)
        if row.post is not None:
            self._input(root.get_submodule(row.post), f"{prefix}.hook_post", tokens)
        self._output(root, f"{prefix}.hook_out", tokens, Tensor.is_floating_point)

    def _pack(self, tower: Tower) -> None:
        """Note, at every run of a tower that packs, where its patches lie."""
        packing = tower.row.packed
        assert packing is not None

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tower.pack = packing.pack(module, args, kwargs)

        self.handles.append(tower.root.register_forward_pre_hook(tap, with_kwargs=True))

    def _lay_block(self, tower: Tower, layer: int, eager: bool) -> None:
        """All hook points of one block. Of two taps on the output of one module, the one laid later
        comes first: what is computed inside a module is laid after what the module gives."""
        row, block, view = tower.row, tower.blocks[layer], tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        self._enter(block, tower)
        stream = partial(view, where="stream")
        self._input(block, f"{name}.hook_resid_pre", stream)
        self._lay_middle(tower, layer)
        for part, prefix in (("attn", ""), ("cross_attn", "cross_")):
            self._lay_attention(tower, layer, part, prefix, eager)
        self._lay_mlp(tower, layer)
        for norm in ("ln1", "ln1_post", "ln_cross", "ln2", "ln2_post"):
            module = tower.module(getattr(row, norm), layer)
            self._norm(module, f"{name}.{norm}", row.norm, view)
        self._output(block, f"{name}.hook_resid_post", stream)
        for part in ("attn", "cross_attn", "mlp"):
            node = self.root.get_submodule(name)._modules.get(part)
            if isinstance(node, Component):
                node.weights = tower.weights(layer, part)

    def _lay_middle(self, tower: Tower, layer: int) -> None:
        """What attention adds, and the residual stream behind it."""
        row, view = tower.row, tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        outs = {
            "hook_attn_out": tower.first(layer, row.attn_out, row.ln1_post, row.attn),
            "hook_cross_attn_out": tower.first(layer, row.cross_attn_out, row.cross_attn),
        }
        outs = {hook: module for hook, module in outs.items() if module is not None}
        middle = ("hook_resid_mid", "hook_resid_mid_cross")[: len(outs)]
        if row.post_norm:
            stream = [tower.module(row.ln1, layer), tower.module(row.ln_cross, layer)]
            lay = self._output
        else:
            between = [tower.module(row.ln_cross, layer)] if len(outs) > 1 else []
            stream = [*between, tower.module(row.mid or row.ln2, layer)]
            lay = self._residual
        for (hook, module), point, at in zip(outs.items(), middle, stream, strict=False):
            if row.gated:
                assert at is not None
                self._added(tower.blocks[layer], at, f"{name}.{hook}", tower, behind=False)
            else:
                self._output(module, f"{name}.{hook}", view)
            lay(at, f"{name}.{point}", view)

    def _lay_mlp(self, tower: Tower, layer: int) -> None:
        row, view = tower.row, tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        ln2, into = tower.module(row.ln2, layer), tower.linear(layer, "mlp_in")
        if row.post_norm:
            self._input(into, f"{name}.hook_mlp_in", view)
        elif ln2 is not None:
            self._input(ln2, f"{name}.hook_mlp_in", view)
        if row.gated:
            assert ln2 is not None
            self._added(ln2, tower.blocks[layer], f"{name}.hook_mlp_out", tower, behind=True)
        else:
            added = tower.first(layer, row.mlp_out_at, row.ln2_post, row.mlp)
            self._output(added, f"{name}.hook_mlp_out", view)
        points = [f"{name}.mlp.hook_pre", f"{name}.mlp.hook_pre_linear"]
        gate = tower.linear(layer, "mlp_gate")
        if row.mlp_in_layout is not None:
            self._parts(into, points, row.mlp_in_layout, "two", view, two=2)
        elif gate is not None:
            self._output(gate, points[0], view)
            self._output(into, points[1], view)
        else:
            self._output(into, points[0], view)
        self._input(tower.linear(layer, "mlp_out"), f"{name}.mlp.hook_post", view)
        self._lay_experts(tower, layer, f"{name}.mlp")

    def _lay_experts(self, tower: Tower, layer: int, name: str) -> None:
        """Weight and output of every expert, in a block that has experts."""
        row, view = tower.row, partial(tower.shown, where="experts")
        experts = tower.part(layer, "mlp", row.experts)
        if experts is None:
            return
        self._experts(experts, f"{name}.hook_expert_out", view)
        if row.router is not None:
            self._output(tower.part(layer, "mlp", row.router), f"{name}.hook_router", view)
            return
        point = hook_point(self.root, f"{name}.hook_router")

        def tap(module: nn.Module, args: tuple) -> tuple | None:
            return (
                rerouted(module, args, partial(fire, point, view=view))
                if listening(point)
                else None
            )

        self.handles.append(experts.register_forward_pre_hook(tap))

    def _lay_attention(self, tower: Tower, layer: int, part: str, prefix: str, eager: bool) -> None:
        row, view = tower.row, tower.shown
        core = tower.part(layer, part, row.core)
        heads, name = tower.heads(layer), f"{tower.prefix}blocks.{layer}.{part}"
        if core is None:
            return
        fused = None if prefix else tower.linear(layer, "qkv")
        if fused is not None:
            points = [f"{name}.hook_{letter}" for letter in "qkv"]
            self._parts(fused, points, row.qkv_layout, "three", view, three=3, head=heads)
        else:
            self._lay_heads(tower, layer, prefix, name)
        points = {
            step: hook_point(self.root, f"{name}.hook_{step}")
            for step in ("rot_q", "rot_k", "attn_scores", "pattern", "z")
        }
        scores = points.pop("attn_scores")
        hooks = AttentionHooks(scores=scores, eager=eager, pack=lambda: tower.pack, **points)
        attention.attach(core, hooks)
        self.attentions.append(core)
        self._result(tower.linear(layer, f"{prefix}o"), f"{name}.hook_result", heads, view)

    def _lay_heads(self, tower: Tower, layer: int, prefix: str, name: str) -> None:
        d_head, view = tower.d_head(layer), tower.shown
        for letter in "qkv":
            module = tower.linear(layer, prefix + letter)
            if letter == "q" and tower.row.q_gate:
                points, layout = [f"{name}.hook_q", f"{name}.hook_gate"], "(head part d_head)"
            else:
                points, layout = [f"{name}.hook_{letter}"], "(part head d_head)"
            sizes = {"part": len(points), "d_head": d_head}
            self._parts(module, points, layout, "part", view, **sizes)

    # Taps ------------------------------------------------------------------------------------

    def _enter(self, block: nn.Module, tower: Tower) -> None:
        """Note the shape of what enters a block: inside it, positions may be flattened."""

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tower.shape = (args[0] if args else kwargs[_first(kwargs)]).shape

        self.handles.append(block.register_forward_pre_hook(tap, with_kwargs=True))

    def _added(
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

    def _deepstack(self, tower: Tower, layer: int) -> None:
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

    def _input(
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

    def _output(
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

    def _parts(
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

    def _residual(self, module: nn.Module | None, name: str, view: View) -> None:
        """The residual stream where it enters a module, edited in place: the skip sees it too."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if listening(point):
                stream = args[0] if args else kwargs[_first(kwargs)]
                stream.copy_(fire(point, stream, view))

        self.handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))

    def _norm(
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
            plain = _affine(centred / scale, module, kind)
            return replaced(output, plain, _affine(new, module, kind))

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def _result(self, module: nn.Linear | None, name: str, n_heads: int, view: View) -> None:
        """Every head's own addition to the residual stream, computed only for listeners."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            weight: Tensor = module.weight  # type: ignore[assignment]
            z = rearrange(args[0], "... (head d) -> ... head d", head=n_heads)
            per_head = rearrange(weight, "d_model (head d) -> head d d_model", head=n_heads)
            result = einsum(z, per_head, "... head d, head d d_model -> ... head d_model")
            summed = fire(point, result, view).sum(-2)
            bias = module.bias
            new = summed if bias is None else summed + bias  # type: ignore[operator]
            old = result.sum(-2) if bias is None else result.sum(-2) + bias  # type: ignore[operator]
            return replaced(output, old, new)

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def _experts(self, module: nn.Module | None, name: str, view: View) -> None:
        """Every expert's own addition, computed only for listeners."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            each, combine = expert_outputs(module, args, output)
            return replaced(output, combine(each), combine(fire(point, each, view)))

        self.handles.append(module.register_forward_hook(tap, prepend=True))


def _first(kwargs: dict[str, Any]) -> str:
    """The name of the first tensor among a module's keyword arguments."""
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))


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

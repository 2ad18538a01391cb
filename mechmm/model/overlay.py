"""Lays TransformerLens hook points over an unmodified Hugging Face model.

Every hook point is fed by a PyTorch hook on a module that the family row names, or by the attention
function. Three kinds of tap:

- a value that a module takes or gives goes to the hook point, and what comes back takes its place;
- `hook_resid_mid` sits on the residual stream between attention and MLP, which is no module's own
  output: the tensor that enters `ln2` is the one that the block's skip connection adds later, so an
  edit is written into it in place and reaches both;
- what a module computes inside (`hook_scale`, `hook_normalized`, `hook_result`) is computed again
  from its input when somebody listens, and replaces the module's output only where it was edited.

Taps come before the recorders that `transformers` itself installs, so that recorded hidden states
show edits too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mechmm.model import attention
from mechmm.model.attention import AttentionHooks, fire, listening, with_strides
from mechmm.model.families import Norm, Projector
from mechmm.model.tower import Tower

Change = Callable[[Tensor], Tensor]


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

    def lay_tower(self, tower: Tower, eager: bool) -> None:
        """All hook points of one stack."""
        prefix, row = tower.prefix, tower.row
        self._output(tower.module(row.embed), f"{prefix}hook_embed")
        self._norm(tower.module(row.ln_pre), f"{prefix}ln_pre", row.norm)
        for layer in range(len(tower.blocks)):
            self._lay_block(tower, layer, eager)
        self._norm(tower.module(row.ln_final), f"{prefix}ln_final", row.norm)

    def lay_projector(self, root: nn.Module, prefix: str, row: Projector) -> None:
        """All hook points of one projector."""
        self._input(root, f"{prefix}.hook_in")
        if row.pre is not None:
            self._output(root.get_submodule(row.pre), f"{prefix}.hook_pre")
        if row.post is not None:
            self._input(root.get_submodule(row.post), f"{prefix}.hook_post")
        self._output(root, f"{prefix}.hook_out")

    def _lay_block(self, tower: Tower, layer: int, eager: bool) -> None:
        row, block = tower.row, tower.blocks[layer]
        name = f"{tower.prefix}blocks.{layer}"
        self._input(block, f"{name}.hook_resid_pre")
        self._norm(tower.module(row.ln1, layer), f"{name}.ln1", row.norm)
        self._lay_attention(tower, layer, f"{name}.attn", eager)
        self._norm(tower.module(row.ln1_post, layer), f"{name}.ln1_post", row.norm)
        self._output(tower.module(row.ln1_post or row.attn, layer), f"{name}.hook_attn_out")
        self._residual(tower.module(row.ln2, layer), f"{name}.hook_resid_mid")
        self._input(tower.module(row.ln2, layer), f"{name}.hook_mlp_in")
        self._norm(tower.module(row.ln2, layer), f"{name}.ln2", row.norm)
        hidden = "mlp_gate" if row.mlp_gate is not None else "mlp_in"
        self._output(tower.linear(layer, hidden), f"{name}.mlp.hook_pre")
        if row.mlp_gate is not None:
            self._output(tower.linear(layer, "mlp_in"), f"{name}.mlp.hook_pre_linear")
        self._input(tower.linear(layer, "mlp_out"), f"{name}.mlp.hook_post")
        self._norm(tower.module(row.ln2_post, layer), f"{name}.ln2_post", row.norm)
        self._output(tower.module(row.ln2_post or row.mlp, layer), f"{name}.hook_mlp_out")
        self._output(block, f"{name}.hook_resid_post")
        for part in ("attn", "mlp"):
            node = self.root.get_submodule(f"{name}.{part}")
            assert isinstance(node, Component)
            node.weights = tower.weights(layer, part)

    def _lay_attention(self, tower: Tower, layer: int, name: str, eager: bool) -> None:
        module, d_head = tower.module(tower.row.attn, layer), tower.cfg.d_head
        assert module is not None
        for part in "qkv":
            self._heads(tower.linear(layer, part), f"{name}.hook_{part}", d_head)
        points = {
            part: hook_point(self.root, f"{name}.hook_{part}")
            for part in ("rot_q", "rot_k", "attn_scores", "pattern", "z")
        }
        scores = points.pop("attn_scores")
        attention.attach(module, AttentionHooks(scores=scores, eager=eager, **points))
        self.attentions.append(module)
        self._result(tower.linear(layer, "o"), f"{name}.hook_result", tower.cfg.n_heads)

    def _input(self, module: nn.Module | None, name: str, change: Change | None = None) -> None:
        """What enters a module."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not listening(point):
                return None
            if args:
                return (fire(point, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": fire(point, kwargs["hidden_states"])}

        self.handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))

    def _output(self, module: nn.Module | None, name: str) -> None:
        """What a module gives, or the first part of it."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Any) -> Any:
            if not listening(point):
                return None
            if isinstance(output, tuple):
                return (fire(point, output[0]), *output[1:])
            return fire(point, output)

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def _heads(self, module: nn.Module | None, name: str, d_head: int) -> None:
        """What a projection gives, seen as [batch, pos, head, d_head]."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not listening(point):
                return None
            heads = rearrange(output, "... (head d) -> ... head d", d=d_head)
            return rearrange(fire(point, heads), "... head d -> ... (head d)")

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def _residual(self, module: nn.Module | None, name: str) -> None:
        """The residual stream where it enters a norm, edited in place: the skip sees it too."""
        if module is None:
            return
        point = hook_point(self.root, name)

        def tap(module: nn.Module, args: tuple) -> None:
            if listening(point):
                args[0].copy_(fire(point, args[0]))

        self.handles.append(module.register_forward_pre_hook(tap))

    def _norm(self, module: nn.Module | None, name: str, kind: Norm) -> None:
        """The scale and the normalised value inside a norm."""
        if module is None:
            return
        scale_point = hook_point(self.root, f"{name}.hook_scale")
        point = hook_point(self.root, f"{name}.hook_normalized")

        def tap(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not (listening(scale_point) or listening(point)):
                return None
            centred, scale = _moments(args[0], module, kind)
            new_scale = fire(scale_point, scale)
            normalized = centred / new_scale
            new = fire(point, normalized)
            plain = _affine(centred / scale, module, kind)
            return _replaced(output, plain, _affine(new, module, kind))

        self.handles.append(module.register_forward_hook(tap, prepend=True))

    def _result(self, module: nn.Linear | None, name: str, n_heads: int) -> None:
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
            summed = fire(point, result).sum(-2)
            bias = module.bias
            new = summed if bias is None else summed + bias  # type: ignore[operator]
            old = result.sum(-2) if bias is None else result.sum(-2) + bias  # type: ignore[operator]
            return _replaced(output, old, new)

        self.handles.append(module.register_forward_hook(tap, prepend=True))


def _replaced(output: Tensor, computed: Tensor, new: Tensor) -> Tensor:
    """The output of a module whose inside was computed again.

    Elements that no edit changed keep the module's own value exactly; gradients flow through the
    computed one, and so through the hook point.
    """
    kept = output.detach() + (new - computed.detach())
    new = torch.where(new == computed, kept, new).to(output.dtype)
    return with_strides(new, output.stride())


def _moments(x: Tensor, module: nn.Module, kind: Norm) -> tuple[Tensor, Tensor]:
    """The (centred) input of a norm in float32, and its scale [..., 1]."""
    x = x.float()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return x, (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # type: ignore[operator]


def _affine(normalized: Tensor, module: nn.Module, kind: Norm) -> Tensor:
    """What a norm makes of the normalised value."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if kind == "rms":
        return weight * normalized.to(weight.dtype)
    if kind == "rms_plus_one":
        return (normalized * (1.0 + weight.float())).to(weight.dtype)
    return (normalized * weight.float() + module.bias.float()).to(weight.dtype)  # type: ignore[union-attr]

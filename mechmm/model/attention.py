"""The one attention function for every tower of every family.

It is registered with `transformers` as the implementation `"mechmm"` and computes

    scores = q k^T * scaling + mask,   pattern = softmax(scores),   z = pattern v

firing a hook at every step that somebody listens to; what follows a hook uses the edited value.
Where nobody listens to scores or pattern, the stock scaled-dot-product function runs, so patterns
cost nothing unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_fn
from transformer_lens.hook_points import HookPoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mechmm.model.packing import Back, Pack, unpacked

NAME = "mechmm"
PACKED = "mechmm_flash"
"""For towers that pack: told that a flash kernel runs, they call attention once for all chunks."""
View = Callable[[Tensor], tuple[Tensor, Back]]
"""A value as users see it, and the way back."""


@dataclass(frozen=True)
class AttentionHooks:
    """The hook points inside one attention module.

    `eager` is set when the wrapped model ran eager attention: then numbers stay eager throughout.
    `pack` gives the packing of the run in progress, or None.
    """

    rot_q: HookPoint
    rot_k: HookPoint
    scores: HookPoint
    pattern: HookPoint
    z: HookPoint
    eager: bool
    pack: Callable[[], Pack | None]

    def view(self, value: Tensor) -> tuple[Tensor, Back]:
        """Queries, keys and z [batch, pos, head, d_head] as users see them."""
        pack = self.pack()
        return (value, _same) if pack is None else unpacked(value, pack.blocks, 1)


States = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""


Compute = Callable[[States, Tensor | None], Tensor]
"""(states, mask) -> z [batch, pos, head, d_head]."""


@dataclass(frozen=True)
class Options:
    """What turns scores into a pattern."""

    scaling: float
    dropout: float
    softcap: float | None


@runtime_checkable
class Reentry(Protocol):
    """Stands between a run of some positions alone and attention, which sees all of them."""

    def attend(
        self, states: States, mask: Tensor | None, causal: bool, compute: Attention
    ) -> Tensor:
        """z of the run's positions, computed with whatever states and masks it takes.

        Args:
            states, mask: those of the run; `causal`: what no mask means.
        """
        ...


_HOOKS: WeakKeyDictionary[nn.Module, AttentionHooks] = WeakKeyDictionary()
_REENTRIES: WeakKeyDictionary[nn.Module, Reentry] = WeakKeyDictionary()


def register() -> None:
    """Make our names known to `transformers`; done when the first model is wrapped."""
    for name in (NAME, PACKED):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, sdpa_mask)


def attach(module: nn.Module, hooks: AttentionHooks) -> None:
    """Say which hook points an attention module fires."""
    _HOOKS[module] = hooks


def detach(module: nn.Module) -> None:
    """Forget an attention module."""
    _HOOKS.pop(module, None)


@contextmanager
def reentering(module: nn.Module, reentry: Reentry) -> Iterator[None]:
    """While it lasts, an attention module computes with what a re-entry gives it."""
    _REENTRIES[module] = reentry
    try:
        yield
    finally:
        _REENTRIES.pop(module, None)


def listening(hook: HookPoint) -> bool:
    """Whether anything, forward or backward, listens at a hook point."""
    return bool(hook._forward_hooks or hook._backward_hooks)


def _same(value: Tensor) -> Tensor:
    return value


def fire(hook: HookPoint, value: Tensor, view: View | None = None) -> Tensor:
    """The value that everything downstream sees; an in-place edit stays out of the original."""
    if not listening(hook):
        return value
    shown, back = (value, _same) if view is None else view(value)
    new = back(hook(with_strides(shown, shown.stride())))
    laid_out = new.stride() == value.stride() or new.shape != value.shape
    return new if laid_out else with_strides(new, value.stride())


def with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with given strides: in another memory layout the same product may round otherwise."""
    if any(step == 0 and size > 1 for step, size in zip(strides, value.shape, strict=True)):
        return value.clone()
    empty = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return empty.copy_(value)


def _fire_heads_first(hook: HookPoint, value: Tensor, view: View) -> Tensor:
    """Fire a hook whose users see [batch, pos, head, d_head] on [batch, head, pos, d_head]."""
    return fire(hook, value.transpose(1, 2), view).transpose(1, 2) if listening(hook) else value


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with hooks, in the calling convention of `transformers`.

    Args:
        query: [batch, head, pos, d_head]; key, value: [batch, key-value head, key pos, d_head].
        attention_mask: boolean (true = attend) or additive [batch, 1, pos, key pos], or None for
            causal or full attention, as the module's `is_causal` says.

    Returns:
        z [batch, pos, head, d_head], and the pattern where it was computed.
    """
    hooks, states = _HOOKS.get(module), (query, key, value)
    ends = kwargs.pop("cu_seq_lens_q", None)
    lengths = None if ends is None else (ends[1:] - ends[:-1]).tolist()
    rest = (dropout, scaling, is_causal)
    if hooks is None:
        return _stock(module, states, attention_mask, lengths=lengths, rest=rest, **kwargs)
    query = _fire_heads_first(hooks.rot_q, query, hooks.view)
    key = _fire_heads_first(hooks.rot_k, key, hooks.view)
    states = (query, key, value)
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = Options(scale, dropout, kwargs.get("softcap"))
    stock = partial(_stock, module, lengths=lengths, rest=rest, **kwargs)
    compute = Attention(hooks, options, causal, lengths, stock)
    reentry = _REENTRIES.get(module)
    if reentry is None:
        z = compute(states, attention_mask)
    else:
        z = reentry.attend(states, attention_mask, causal, compute)
    return fire(hooks.z, z, hooks.view), compute.shown


@dataclass(eq=False)
class Attention:
    """What one attention module does with states that are given to it.

    Attributes:
        hooks, options: the module's.
        causal: what no mask means.
        lengths: of the chunks of a packed sequence, or None.
        stock: `transformers`' own function.
        shown: the pattern of the last call, where it was computed.
    """

    hooks: AttentionHooks
    options: Options
    causal: bool
    lengths: list[int] | None
    stock: Callable[[States, Tensor | None], tuple[Tensor, Tensor | None]]
    shown: Tensor | None = None

    def __call__(self, states: States, mask: Tensor | None) -> Tensor:
        """z [batch, pos, head, d_head]."""
        hooks = self.hooks
        if hooks.eager or listening(hooks.scores) or listening(hooks.pattern):
            z, self.shown = _stepwise(hooks, states, mask, self.causal, self.lengths, self.options)
        else:
            z, self.shown = self.stock(states, mask)
        return z

    def pattern(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """The pattern that nobody changes [batch, head, pos, key pos]."""
        mask = _additive_mask(mask, query, key, self.causal)
        return _eager(None, (query, key, key), mask, self.options)[1]


def _chunks(states: States, lengths: list[int]) -> Iterator[States]:
    query, key, value = (tensor.split(lengths, dim=2) for tensor in states)
    return zip(query, key, value, strict=True)


def _stock(
    module: nn.Module,
    states: States,
    mask: Tensor | None,
    *,
    lengths: list[int] | None,
    rest: tuple[Any, ...],
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`transformers`' own scaled-dot-product attention, chunk by chunk where the model packs."""
    if lengths is None:
        return sdpa_attention_forward(module, *states, mask, *rest, **kwargs)
    rest = (mask, *rest)
    parts = [sdpa_attention_forward(module, *c, *rest)[0] for c in _chunks(states, lengths)]
    return torch.cat(parts, dim=1), None


def _stepwise(
    hooks: AttentionHooks,
    states: States,
    mask: Tensor | None,
    causal: bool,
    lengths: list[int] | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """z and the pattern, with every step as users see it."""
    pack = hooks.pack()
    if pack is None:
        return _eager(hooks, states, _additive_mask(mask, *states[:2], causal), options)
    z = _eager_by_chunk(states, mask, lengths, options)
    if not (listening(hooks.scores) or listening(hooks.pattern)):
        return z, None
    seen = _packed_mask(pack, mask, lengths, states[0])
    return _packed(hooks, pack, z, states, seen, options), None


def _eager_by_chunk(
    states: States, mask: Tensor | None, lengths: list[int] | None, options: Options
) -> Tensor:
    """z of a packed sequence as the model's own eager attention gives it."""
    if lengths is None:
        return _eager(None, states, _additive_mask(mask, *states[:2], False), options)[0]
    parts = [_eager(None, chunk, None, options)[0] for chunk in _chunks(states, lengths)]
    return torch.cat(parts, dim=1)


def _packed(
    hooks: AttentionHooks, pack: Pack, z: Tensor, states: States, mask: Tensor, options: Options
) -> Tensor:
    """z after hooks on scores and patterns, which show one block-diagonal matrix an image.

    Where no edit changed it, z keeps the value that the model's own chunks give, exactly.
    """
    shown = [unpacked(tensor.transpose(1, 2), pack.blocks, 1) for tensor in states]
    query, key, value = (tensor.transpose(1, 2) for tensor, _ in shown)
    back = shown[2][1]
    plain, edited = (
        back(_eager(points, (query, key, value), mask, options)[0]) for points in (None, hooks)
    )
    return replaced(z, plain, edited)


def _packed_mask(
    pack: Pack, mask: Tensor | None, lengths: list[int] | None, query: Tensor
) -> Tensor:
    """What patches of an image see of each other: [image, 1, patch, patch], additive."""
    index = pack.blocks.to(query.device)
    there, place = index >= 0, index.clamp(min=0)
    if mask is not None:
        whole = mask[0, 0]
        seen = whole if whole.dtype == torch.bool else whole == 0
        visible = seen[place[:, :, None], place[:, None, :]]
    else:
        sizes = torch.tensor(lengths, device=query.device)
        chunk = torch.arange(len(sizes), device=query.device).repeat_interleave(sizes)[place]
        visible = chunk[:, :, None] == chunk[:, None, :]
    return _additive((visible & there[:, :, None] & there[:, None, :])[:, None], query)


def replaced(output: Tensor, computed: Tensor, new: Tensor) -> Tensor:
    """The output of something whose inside was computed again.

    Elements that no edit changed keep the model's own value exactly; gradients flow through the
    computed one, and so through the hook point.
    """
    kept = output.detach() + (new - computed.detach())
    new = torch.where(new == computed, kept, new).to(output.dtype)
    return with_strides(new, output.stride())


def _eager(
    hooks: AttentionHooks | None, states: States, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Step by step as `transformers`' eager attention, in the same order of operations."""
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores + mask
    scores = scores if hooks is None else fire(hooks.scores, scores)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = pattern if hooks is None else fire(hooks.pattern, pattern)
    pattern = dropout_fn(pattern, p=options.dropout, training=options.dropout > 0)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


def _additive_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What `transformers`' eager attention would have been given."""
    q_len, k_len = query.shape[2], key.shape[2]
    if mask is None and causal and q_len > 1:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()[None, None]
    return mask if mask is None or mask.dtype != torch.bool else _additive(mask, query)


def _additive(visible: Tensor, query: Tensor) -> Tensor:
    """A boolean mask as what is added to scores."""
    lowest = torch.finfo(query.dtype).min
    zeros = torch.zeros(visible.shape, dtype=query.dtype, device=visible.device)
    return zeros.masked_fill(~visible, lowest)

"""The one attention function for every tower of every family.

It is registered with `transformers` as the implementation `"mechmm"` and computes

    scores = q k^T * scaling + mask,   pattern = softmax(scores),   z = pattern v

firing a hook at every step that somebody listens to; what follows a hook uses the edited value.
Where nobody listens to scores or pattern, the stock scaled-dot-product function runs, so patterns
cost nothing unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_fn
from transformer_lens.hook_points import HookPoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mechmm"


@dataclass(frozen=True)
class AttentionHooks:
    """The hook points inside one attention module.

    `eager` is set when the wrapped model ran eager attention: then numbers stay eager throughout.
    """

    rot_q: HookPoint
    rot_k: HookPoint
    scores: HookPoint
    pattern: HookPoint
    z: HookPoint
    eager: bool


_HOOKS: WeakKeyDictionary[nn.Module, AttentionHooks] = WeakKeyDictionary()


def register() -> None:
    """Make `"mechmm"` known to `transformers`; done when the first model is wrapped."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attach(module: nn.Module, hooks: AttentionHooks) -> None:
    """Say which hook points an attention module fires."""
    _HOOKS[module] = hooks


def detach(module: nn.Module) -> None:
    """Forget an attention module."""
    _HOOKS.pop(module, None)


def listening(hook: HookPoint) -> bool:
    """Whether anything, forward or backward, listens at a hook point."""
    return bool(hook._forward_hooks or hook._backward_hooks)


def fire(hook: HookPoint, value: Tensor) -> Tensor:
    """The value that everything downstream sees; an in-place edit stays out of the original."""
    if not listening(hook):
        return value
    new = hook(with_strides(value, value.stride()))
    laid_out = new.stride() == value.stride() or new.shape != value.shape
    return new if laid_out else with_strides(new, value.stride())


def with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with given strides: in another memory layout the same product may round otherwise."""
    if any(step == 0 and size > 1 for step, size in zip(strides, value.shape, strict=True)):
        return value.clone()
    empty = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return empty.copy_(value)


def _fire_heads_first(hook: HookPoint, value: Tensor) -> Tensor:
    """Fire a hook whose users see [batch, pos, head, d_head] on [batch, head, pos, d_head]."""
    return fire(hook, value.transpose(1, 2)).transpose(1, 2) if listening(hook) else value


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
    hooks = _HOOKS.get(module)
    if hooks is None:
        arguments = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return sdpa_attention_forward(*arguments, **kwargs)
    query = _fire_heads_first(hooks.rot_q, query)
    key = _fire_heads_first(hooks.rot_k, key)
    if hooks.eager or listening(hooks.scores) or listening(hooks.pattern):
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _additive_mask(attention_mask, query, key, bool(causal))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        z, pattern = _eager(hooks, query, key, value, mask, scale, dropout, kwargs.get("softcap"))
    else:
        arguments = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        z, pattern = sdpa_attention_forward(*arguments, **kwargs)
    return fire(hooks.z, z), pattern


def _eager(
    hooks: AttentionHooks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Step by step as `transformers`' eager attention, in the same order of operations."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    scores = fire(hooks.scores, scores)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = dropout_fn(fire(hooks.pattern, pattern), p=dropout, training=dropout > 0)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


def _additive_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What `transformers`' eager attention would have been given."""
    q_len, k_len = query.shape[2], key.shape[2]
    if mask is None and causal and q_len > 1:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)

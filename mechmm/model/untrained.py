"""The same architecture before training: the control of what training has put into a model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from mechmm.model.hooked import HookedMultimodal

STD = 0.02
"""Deviation of matrices that the architecture would start at a constant."""


def untrained(model: HookedMultimodal, seed: int = 0) -> HookedMultimodal:
    """A hooked model of the same architecture and processor, with weights drawn anew.

    They are drawn as `transformers` initialises them; matrices that it starts at a constant
    (Gemma 3's projector, at 0), which would keep the picture out, are drawn with deviation `STD`.
    The global random state is left alone. It takes as much memory as the model itself.

    Args:
        seed: same seed, same weights.
    """
    config = deepcopy(model.config)
    _forget_attention(config)
    kind: Any = type(model.hf_model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        fresh = kind._from_config(config, dtype=model.dtype)
        _draw_constants(fresh)
    return HookedMultimodal.from_hf(fresh.to(model.device).eval(), model.processor)


def _forget_attention(config: Any) -> None:
    """Take our attention function off a config and all configs inside it."""
    config._attn_implementation_internal = None
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            _forget_attention(part)


def _draw_constants(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        constant = parameter.ndim > 1 and bool((parameter == parameter.flatten()[0]).all())
        if constant and "norm" not in name:
            parameter.normal_(0.0, STD)

"""The same architecture before training: the control of what training has put into a model."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import found

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


def restored(fresh: HookedMultimodal, model: HookedMultimodal) -> Iterator[tuple[str, ...]]:
    """Give an untrained model the trained weights, one part after another from the inputs up.

    Backwards this is the cascade of Adebayo et al. 1810.03292: weights drawn anew from the logits
    down. It needs no third model.

    Args:
        fresh: of the same architecture; it is changed.

    Yields:
        The parts whose weights are drawn anew, from the logits down: at first all, at last one.
    """
    new, old = (dict(m.hf_model.named_parameters()) for m in (fresh, model))
    parts = _parts(model)
    left = list(parts)
    yield tuple(left)
    while len(left) > 1:
        for path in parts[left.pop()]:
            new[path].data.copy_(old[path].data)
        yield tuple(left)


def _parts(model: HookedMultimodal) -> dict[str, list[str]]:
    """Paths of all parameters by part, from the logits down: the unembedding with the final norm,
    the language model's blocks, projectors, the other towers' blocks, and embeddings with all
    else. A parameter that two parts share belongs to the first."""
    first, *others = sorted(model.towers.items(), key=lambda item: item[0] != LANGUAGE)
    end = [first[1].unembed, found(first[1].root, first[1].row.ln_final)]
    modules: list[tuple[str, Any]] = [("unembedding", one) for one in end]
    modules += _blocks(*first)
    projectors = (row.root for row in model.family.projectors.values())
    modules += [("projector", model.hf_model.get_submodule(path)) for path in projectors]
    modules += [block for tower in reversed(others) for block in _blocks(*tower)]
    modules.append(("embeddings and the rest", model.hf_model))
    paths = {id(value): path for path, value in model.hf_model.named_parameters()}
    parts: dict[str, list[str]] = {}
    for name, module in modules:
        own = [] if module is None else [paths.pop(id(p), None) for p in module.parameters()]
        parts.setdefault(name, []).extend(path for path in own if path is not None)
    return {name: own for name, own in parts.items() if own}


def _blocks(name: str, tower: Any) -> list[tuple[str, nn.Module]]:
    """The blocks of a tower, the last first."""
    return [(f"{name} {n}", block) for n, block in reversed(list(enumerate(tower.blocks)))]


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

"""How much the last position of prompts attends to every other, without keeping whole patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import last_logits
from mechmm.engine.flow import Edit
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal


@torch.no_grad()
def attending(
    model: HookedMultimodal, batch: Batch, layers: Sequence[int]
) -> tuple[Float[Tensor, "prompt vocab"], Float[Tensor, "layer prompt key"]]:
    """Logits after every prompt, and the weights of its last position in some layers of the
    language model, the mean over heads."""
    rows, last = torch.arange(len(batch)), batch.layout.last
    found: list[Tensor] = []

    def catch(pattern: Tensor, hook: Any) -> None:
        found.append(pattern[rows, :, last].float().mean(1))

    prefix = model.towers[LANGUAGE].prefix
    hooks: list[Edit] = [(f"{prefix}blocks.{layer}.attn.hook_pattern", catch) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        logits = last_logits(model, batch)
    return logits, torch.stack(found)

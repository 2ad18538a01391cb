"""Logits contrasted with those of a distorted prompt (Leng et al. 2311.16922)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def contrasted(
    logits: Float[Tensor, "batch vocab"],
    distorted: Float[Tensor, "batch vocab"],
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Float[Tensor, "batch vocab"]:
    """Logits of the next token, contrasted with those after the distorted prompt.

    Raises:
        ValueError: a negative alpha; a beta outside [0, 1].
    """
    check_strength(alpha, beta)
    p, q = logits.log_softmax(-1), distorted.log_softmax(-1)
    least = p.amax(-1, keepdim=True) + torch.tensor(beta, device=p.device).log()
    return ((1 + alpha) * p - alpha * q).masked_fill(p < least, -torch.inf)


def check_strength(alpha: float, beta: float) -> None:
    """Refuse strengths that mean nothing.

    Raises:
        ValueError: a negative alpha; a beta outside [0, 1].
    """
    if alpha < 0 or not 0 <= beta <= 1:
        raise ValueError(
            f"alpha is {alpha} and beta {beta}; alpha is 0 or more (0: no contrast), and beta a "
            "share of the largest probability, in [0, 1]"
        )

"""Some examples to choose on, the others to report on."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor


def chosen_on(count: int, share: float, seed: int, least: int = 2) -> Bool[Tensor, " example"]:
    """A random part of the pairs to choose on.

    Raises:
        ValueError: a share that leaves fewer than `least` on either side.
    """
    size = round(share * count)
    if not least <= size <= count - least:
        raise ValueError(
            f"train={share} leaves {size} of {count} pairs to choose on and {count - size} to "
            f"report on; both need at least {least}"
        )
    train = torch.zeros(count, dtype=torch.bool)
    train[torch.as_tensor(np.random.default_rng(seed).permutation(count)[:size])] = True
    return train

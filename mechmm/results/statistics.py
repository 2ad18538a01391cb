"""Intervals over examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

_NUMBERS = 2**24
"""Numbers that a chunk of resampled values may hold (64 MiB in float32)."""
_RESAMPLES_AT_ONCE = 64


def bootstrap_interval(
    values: Shaped[Tensor, "*cell example"] | Shaped[np.ndarray, "*cell example"],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Percentile bootstrap interval of the mean over examples (Efron & Tibshirani 1993, ch. 13).

    Every cell is resampled with the same draws of examples, so the result does not depend on
    which other cells are asked for. Nothing is left out silently: a cell with a NaN in any example
    has NaN bounds, and so has every cell when there is only one example, from which no spread can
    be known. Where all examples agree the interval is that one point.

    Args:
        values: one number per example, on the last axis; booleans count as 0 and 1.
        confidence: share of resampled means inside the interval, between 0 and 1.
        resamples: number of bootstrap samples.
        seed: same seed, same interval.

    Returns:
        The lower and the upper bound, on the device of the values.

    Raises:
        ValueError: no example axis, no examples, or a confidence outside (0, 1).
    """
    # Imported here because transformer_lens takes seconds to import.
    from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

    numbers = _as_float(torch.as_tensor(values))
    if numbers.ndim == 0 or numbers.shape[-1] == 0:
        raise ValueError(f"values of shape {tuple(numbers.shape)} have no examples to resample")
    cells, examples = (
        numbers.flatten(0, -2) if numbers.ndim > 1 else numbers[None],
        numbers.shape[-1],
    )
    at_once = max(1, min(_RESAMPLES_AT_ONCE, _NUMBERS // examples))
    low, high = torch.full((2, len(cells)), torch.nan, dtype=cells.dtype, device=cells.device)
    step = _cells_at_once(examples, at_once, resamples)
    for part in (slice(i, i + step) for i in range(0, len(cells), step)):
        low[part], high[part] = bootstrap_ci(
            cells[part],
            confidence=confidence,
            n_resamples=resamples,
            generator=derive_generator(seed),
            chunk_size=at_once,
        )
    unknown = cells.isnan().any(-1) | (examples == 1)
    shape = numbers.shape[:-1]
    return (
        low.masked_fill(unknown, torch.nan).reshape(shape),
        high.masked_fill(unknown, torch.nan).reshape(shape),
    )


def share_interval(
    changes: Float[Tensor, "*cell example"], scale: float | Float[Tensor, "..."]
) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """95 % interval of mean changes over a scale, one or one per cell, which may be negative: (low,
    high)."""
    ends = torch.stack(bootstrap_interval(changes)) / scale
    return ends.amin(0).numpy(), ends.amax(0).numpy()


def beside_draws(
    values: Float[Tensor, "cell example"],
    random: Float[Tensor, "cell draw example"],
    base: Float[Tensor, " example"],
) -> dict[str, float | np.ndarray]:
    """Columns of a table of cells: the mean (`value`) and its 95 % interval over examples (`low`,
    `high`), the mean, smallest and largest mean of random draws (`random_mean`, `random_low`,
    `random_high`), and the mean without any (`base`)."""
    low, high = bootstrap_interval(values)
    draws = random.mean(-1)
    return {
        "value": values.mean(1).numpy(),
        "low": low.numpy(),
        "high": high.numpy(),
        "random_mean": draws.mean(1).numpy(),
        "random_low": draws.amin(1).numpy(),
        "random_high": draws.amax(1).numpy(),
        "base": float(base.mean()),
    }


def rank_correlation(
    one: Float[Tensor, "example place"],
    other: Float[Tensor, "example place"],
    present: Bool[Tensor, "example place"],
) -> Float[Tensor, " example"]:
    """Spearman's rank correlation of two maps over the places that an example has; NaN where one
    of them is constant."""
    found = torch.full((len(one),), torch.nan)
    for example, there in enumerate(present):
        ranks = [pd.Series(v[example, there].double().numpy()).rank() for v in (one, other)]
        if all(rank.nunique() > 1 for rank in ranks):
            found[example] = float(ranks[0].corr(ranks[1]))
    return found


def _as_float(values: Tensor) -> Tensor:
    """At least float32: means of half-precision numbers would be too coarse."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _cells_at_once(examples: int, resamples_at_once: int, resamples: int) -> int:
    # torch.quantile refuses more than 2**24 numbers, so the resampled means are bounded too.
    return max(1, _NUMBERS // max(examples * resamples_at_once, resamples))

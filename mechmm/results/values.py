"""What figures are given, as arrays; and numbers and names as figures show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape, unescape
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

Labels: TypeAlias = Sequence[Any]
"""Shown as `str` writes them; they may repeat."""
Range: TypeAlias = tuple[float, float]
"""(low, high)."""


def array(values: Any) -> np.ndarray:
    """In double precision, off the device and the graph."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def null_range(null: Range | None) -> Range | None:
    """The null itself; ValueError if it is not two numbers."""
    if null is not None and (len(null) != 2 or not np.isfinite(array(null)).all()):
        raise ValueError(f"the null {null} is not two numbers; pass (low, high), or None for none")
    return null


def interval_of(low: Any, high: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The interval of every value, low and high [2, ...]; NaN where there is none."""
    if (low is None) != (high is None):
        raise ValueError("one bound of the interval is missing; give both or none")
    if low is None:
        return np.full((2, *shape), np.nan)
    low, high = array(low), array(high)
    if low.shape != shape or high.shape != shape:
        raise ValueError(f"bounds of shapes {low.shape}, {high.shape} for values of shape {shape}")
    known = np.isfinite(low) & np.isfinite(high)
    return np.where(known, np.stack([low, high]), np.nan)


def numbers(values: np.ndarray) -> np.ndarray:
    """As text, all with the decimals that suit the largest: two for effects around 1."""
    size = math.floor(math.log10(largest(values)))
    form = f".{max(0, 2 - size if size >= 0 else 1 - size)}f" if size > -5 else ".1e"

    def text(value: float) -> str:
        if math.isnan(value):
            return "no value"
        shown = format(value, form)
        zero = math.isfinite(value) and not float(shown)
        return format(0.0, form) if zero else shown.replace("-", "−")

    return np.array([text(value) for value in values.flat], dtype=object).reshape(values.shape)


def largest(values: np.ndarray) -> float:
    """The largest finite magnitude; 1 where there is none."""
    known = np.abs(values[np.isfinite(values)])
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def between(low: float, high: float) -> str:
    """`−0.02 to 0.03`; nothing where a bound is not known."""
    ends = np.array([low, high])
    return "" if np.isnan(ends).any() else " to ".join(numbers(ends))


def label(name: Any, longest: int = 40) -> str:
    """Cut in the middle if too long; escaped, because plotly reads `<image>` as markup."""
    text, half = str(name), longest // 2
    cut = text if len(text) <= longest else f"{text[:half]}…{text[1 - half :]}"
    return escape(cut, quote=False)


def pixels(labels: Iterable[str]) -> float:
    """Room for the longest label; East Asian letters are about twice as wide."""
    widths = [sum(13.5 if ord(c) > 0x2E7F else 7.3 for c in unescape(text)) for text in labels]
    return max(widths, default=0.0)

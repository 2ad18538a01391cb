"""Headlines in words: numbers, what they are held against, and the verdict on a prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

NULLS = ("random", "null")
"""What the columns of controls begin with: `random_mean`, `null_low`."""


def number_text(value: Any) -> str:
    """A number with three digits that say something."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:.0f}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(2, 2 - math.floor(math.log10(abs(value))))}f}"


def verdict_of(headlines: Sequence[Mapping[str, Any]]) -> str:
    """How many headlines are as expected, and which are not."""
    judged = [headline for headline in headlines if headline.get("agrees") is not None]
    if not judged:
        return "Verdict: none, as no headline says what is expected of it."
    odd = [str(headline["name"]) for headline in judged if not headline["agrees"]]
    if not odd:
        return f"Verdict: agrees with the prediction, in all of {len(judged)} headlines."
    right = len(judged) - len(odd)
    which = "; ".join(odd)
    return f"Verdict: disagrees with the prediction. {right} of {len(judged)} headlines agree, not: {which}."


def control_of(headline: Mapping[str, Any], table: pd.DataFrame) -> str:
    """What the same rows of the table say of the control, if they are one row and say it."""
    rows = table
    for column, value in (headline.get("where") or {}).items():
        rows = rows[rows[column].astype(str) == str(value)] if column in rows else rows
    if len(rows) != 1:
        return ""
    row, column = rows.iloc[0], headline.get("column", "value")
    for prefix in (f"{column}_{null}" for null in NULLS):
        if said := _control(row, prefix):
            return said
    return next(filter(None, (_control(row, null) for null in NULLS)), "")


def _control(row: pd.Series, prefix: str) -> str:
    mean, low, high = (row.get(f"{prefix}_{end}") for end in ("mean", "low", "high"))
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    kind = "random" if prefix.endswith("random") else "null"
    ends = f"{number_text(float(low))} to {number_text(float(high))}"
    known = mean is not None and not pd.isna(mean)
    return f"control ({kind}): " + (f"{number_text(float(mean))} ({ends})" if known else ends)

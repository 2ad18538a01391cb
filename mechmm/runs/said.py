"""Headlines in words: numbers, what they are held against, and the verdict on a prediction."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
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
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"{Decimal(value):.2e}"
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
    odd = [str(headline.get("name")) for headline in judged if not headline["agrees"]]
    if not odd:
        return f"Verdict: agrees with the prediction, in all of {len(judged)} headlines."
    right = len(judged) - len(odd)
    which = f"{right} of {len(judged)} headlines agree, not: {'; '.join(odd)}"
    return f"Verdict: disagrees with the prediction. {which}."


def expectation(text: Any) -> str:
    """`<= 0.35` as a reader writes it."""
    return str(text).replace("<=", "≤").replace(">=", "≥")


def control_of(headline: Mapping[str, Any], table: pd.DataFrame) -> str:
    """What the table says of the control of a headline; nothing where it does not say.

    Of one row: its columns `random_low`, `null_low` and so on. Of rows that are not the null: the
    rows that are, and else are alike.
    """
    where, column = dict(headline.get("where") or {}), headline.get("column", "value")
    rows = _where(table, where)
    if len(rows) == 1:
        prefixes = [*(f"{column}_{null}" for null in NULLS), *NULLS]
        said = next(filter(None, (_control(rows.iloc[0], prefix) for prefix in prefixes)), "")
        if said:
            return said
    if column in table and str(where.pop("null", None)) == "False" and "null" in table:
        values = _where(table, {**where, "null": True})[column].dropna()
        ends = {"mean": values.mean(), "low": values.min(), "high": values.max()}
        return _control(pd.Series({f"null_{end}": value for end, value in ends.items()}), "null")
    return ""


def _where(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column].astype(str) == str(value)] if column in table else table
    return table


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings as `a.b` -> text; None is left out."""
    if isinstance(value, Mapping):
        parts = [flat(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    if value is None:
        return {}
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _control(row: pd.Series, prefix: str) -> str:
    names = {end: f"{prefix}_{end}" for end in ("mean", "low", "high")}
    found = {end: float(row[name]) for end, name in names.items() if name in row.index}
    known = {end: number_text(value) for end, value in found.items() if not math.isnan(value)}
    if "low" not in known or "high" not in known:
        return ""
    kind = "random" if prefix.endswith("random") else "null"
    ends = f"{known['low']} to {known['high']}"
    return f"control ({kind}): " + (f"{known['mean']} ({ends})" if "mean" in known else ends)

"""Headlines: single numbers read off tables, each beside what was predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechmm.results.statistics import bootstrap_interval
from mechmm.runs.config import Headline
from mechmm.runs.expectation import Expectation

AGREE, DISAGREE, NONE = "all expectations agree", "some expectations disagree", "none stated"
_RESAMPLES = 1000


class HeadlineError(ValueError):
    """A headline asks for what the table does not have."""


def measured(headline: Headline, table: pd.DataFrame) -> dict[str, Any]:
    """A headline's value, interval and verdict, as JSON has them.

    The interval is a 95 % bootstrap over rows; of one row, what its own columns say; None where
    there is none (of an extreme or a count).

    Raises:
        HeadlineError: no such column, no row that fits, or no numbers.
    """
    rows = _selected(headline, table)
    values = _numbers(headline, rows)
    value = _statistic(headline.statistic, values)
    low, high = _interval(headline, rows, values)
    expected = None if headline.expect is None else Expectation.read(headline.expect)
    return {
        "name": headline.name,
        "step": headline.step,
        "value": _finite(value),
        "low": _finite(low),
        "high": _finite(high),
        "n": len(rows),
        "expect": headline.expect,
        "agrees": None if expected is None else expected.agrees(value),
    }


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """Of all headlines that state an expectation."""
    stated = [one["agrees"] for one in found if one["agrees"] is not None]
    return NONE if not stated else AGREE if all(stated) else DISAGREE


def check_columns(headline: Headline, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a named index as a column.

    Raises:
        HeadlineError: a column that it does not have, with those it has.
    """
    if table.index.name is not None:
        table = table.reset_index()
    wanted = [headline.column, *headline.where, *([headline.minus] if headline.minus else [])]
    wanted += [name for name in (headline.low, headline.high) if name not in ("low", "high", "")]
    for name in wanted:
        if name not in table.columns:
            there = ", ".join(map(str, table.columns))
            raise _error(headline, f"has no column {name!r}; it has {there}")
    return table


def _selected(headline: Headline, table: pd.DataFrame) -> pd.DataFrame:
    table = check_columns(headline, table)
    keep = pd.Series(True, index=table.index)
    for name, value in headline.where.items():
        fits = _fits(table[name], value)
        if not fits.any():
            known = ", ".join(map(repr, table[name].dropna().unique()[:20].tolist()))
            raise _error(headline, f"has no row with {name} = {value!r}; there is {known}")
        keep &= fits
    if not keep.any():
        raise _error(headline, f"has no row that fits all of {dict(headline.where)}")
    return table[keep]


def _fits(column: pd.Series, value: Any) -> pd.Series:
    """Which rows have a value; numbers may be compared with one in words."""
    if isinstance(value, str) and pd.api.types.is_numeric_dtype(column):
        try:
            expected = Expectation.read(value)
        except ValueError:
            return pd.Series(False, index=column.index)
        numbers = column.to_numpy(dtype=float, na_value=np.nan)
        return pd.Series(
            [expected.agrees(number) for number in numbers.tolist()], index=column.index
        )
    return (column == value).fillna(False).astype(bool)


def _numbers(headline: Headline, rows: pd.DataFrame) -> np.ndarray:
    if headline.statistic == "count":
        return np.ones(len(rows))
    found = []
    for name in (headline.column, headline.minus):
        if name is not None and not pd.api.types.is_numeric_dtype(rows[name]):
            raise _error(headline, f"has no numbers in column {name!r}")
        found.append(0.0 if name is None else rows[name].to_numpy(dtype=float, na_value=np.nan))
    return found[0] - found[1]


def _statistic(name: str, values: np.ndarray) -> float:
    return float(len(values)) if name == "count" else float(getattr(np, name)(values))


def _interval(headline: Headline, rows: pd.DataFrame, values: np.ndarray) -> tuple[float, float]:
    statistic = headline.statistic
    if statistic in ("count", "max", "min"):
        return math.nan, math.nan
    if len(values) == 1:
        return _own(headline, rows, headline.low), _own(headline, rows, headline.high)
    if statistic == "mean":
        low, high = bootstrap_interval(values)
        return float(low), float(high)
    if statistic == "median":
        rng = np.random.default_rng(0)
        draws = np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1)
        return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))
    return math.nan, math.nan


def _own(headline: Headline, rows: pd.DataFrame, column: str) -> float:
    """What a single row says of its interval, less what is subtracted; NaN for no column at all."""
    if column == "":
        return math.nan
    if column not in rows.columns:
        return math.nan
    less = 0.0 if headline.minus is None else float(rows[headline.minus].iloc[0])
    value = rows[column].iloc[0]
    return math.nan if pd.isna(value) else float(value) - less


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _error(headline: Headline, message: str) -> HeadlineError:
    return HeadlineError(
        f"headline {headline.name!r}: the table of step {headline.step!r} {message}"
    )

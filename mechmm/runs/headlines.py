"""Headlines: single numbers read off tables, each beside what was predicted."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechmm.results.statistics import bootstrap_interval
from mechmm.runs.config import Headline
from mechmm.runs.expectation import Expectation

AGREE, DISAGREE, NONE = "all expectations agree", "some expectations disagree", "none stated"
_RESAMPLES = 1000


class HeadlineError(ValueError):
    """A headline asks for what the table does not have.

    Attributes:
        key: of the headline, that is to be mended: `column`, `where.layer`.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


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
    for key, name in _columns(headline):
        if name not in table.columns:
            there = ", ".join(map(str, table.columns))
            raise _error(headline, f"has no column {name!r}; it has {there}", key)
    return table


def _columns(headline: Headline) -> Iterator[tuple[str, str]]:
    """The columns that a headline names, each after the key that names it."""
    yield "column", headline.column
    yield from (("where", name) for name in headline.where)
    if headline.minus:
        yield "minus", headline.minus
    for key in ("low", "high"):
        name = getattr(headline, key)
        if name not in ("low", "high", ""):
            yield key, name


def all_measured(
    asked: Sequence[Headline], tables: Mapping[str, Mapping[str, pd.DataFrame]], folder: Path
) -> list[dict[str, Any]]:
    """All headlines of a run.

    Args:
        tables: by step and name of the table.
        folder: of the run.

    Raises:
        HeadlineError: every headline that cannot be measured, and how to mend it.
    """
    found, wrong = [], []
    for number, headline in enumerate(asked):
        try:
            found.append(measured(headline, tables[headline.step][headline.table]))
        except HeadlineError as error:
            plain = re.fullmatch(r"[\w -]+", headline.name) is not None
            key = f"headlines.{headline.name if plain else number}.{error.key}=VALUE"
            wrong.append((str(error), shlex.quote(key)))
    if wrong:
        said = "\n".join(message for message, _ in wrong)
        keys = " ".join(key for _, key in wrong)
        raise HeadlineError(
            f"{said}\nevery step is done and its result is kept; mend what was asked with: "
            f"mechmm run --resume {folder} {keys}"
        )
    return found


def _selected(headline: Headline, table: pd.DataFrame) -> pd.DataFrame:
    table = check_columns(headline, table)
    keep = pd.Series(True, index=table.index)
    for name, value in headline.where.items():
        fits = _fits(table[name], value)
        if not fits.any():
            known = ", ".join(map(repr, table[name].dropna().unique()[:20].tolist()))
            raise _error(
                headline, f"has no row with {name} = {value!r}; there is {known}", f"where.{name}"
            )
        keep &= fits
    if not keep.any():
        raise _error(headline, f"has no row that fits all of {dict(headline.where)}", "where")
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
    for key, name in (("column", headline.column), ("minus", headline.minus)):
        if name is not None and not pd.api.types.is_numeric_dtype(rows[name]):
            raise _error(headline, f"has no numbers in column {name!r}", key)
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


def _error(headline: Headline, message: str, key: str) -> HeadlineError:
    return HeadlineError(
        f"headline {headline.name!r}: the table of step {headline.step!r} {message}", key
    )

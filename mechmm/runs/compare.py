"""Two saved results, number by number.

Of two arrays `a` and `b` of one shape, `largest = max |a - b|`, and `relative = largest / max(|a|,
|b|)` over the whole array: a difference counts against the largest value there is, because values
near zero have no digits of their own. NaN equals NaN. Texts and booleans are equal or not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechmm.runs.leaves import Leaf, column, leaves
from mechmm.runs.paths import RESULTS

COLUMNS = ("step", "field", "same", "largest", "relative", "where", "first", "second", "why")
UNEQUAL = math.inf
"""The relative difference of what no number can tell apart: texts, shapes, presence."""


def values(first: Path, second: Path, *, partial: bool = False) -> pd.DataFrame:
    """One row per field of every result and column of every table, as in `Difference`; where
    partial, of those alone that the first still has."""
    rows = []
    steps = [_steps(folder) for folder in (first, second)]
    for step in dict.fromkeys((*steps[0], *steps[1])):
        found = [_step(folder, step) for folder in (first, second)]
        for name in found[0] if partial else dict.fromkeys((*found[0], *found[1])):
            rows.append({"step": step, "field": name, **compare(*(f.get(name) for f in found))})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _steps(folder: Path) -> list[str]:
    """Steps with a result or a table."""
    paths = [p for p in (folder / RESULTS).glob("*") if p.is_dir() or p.suffix == ".csv"]
    return sorted({p.stem for p in paths})


def _step(folder: Path, step: str) -> dict[str, Leaf]:
    """A result's fields, and the columns of its table."""
    place, path = folder / RESULTS / step, folder / RESULTS / f"{step}.csv"
    found = leaves(place) if place.is_dir() else {}
    if path.is_file():
        try:
            table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        except (ValueError, OSError) as error:
            raise ValueError(f"the table {path} is damaged: {error}") from error
        found |= {f"table.{name}": column(table[name]) for name in table.columns}
    return found


def compare(a: Leaf | None, b: Leaf | None) -> dict[str, Any]:
    """The rest of a row of `values`."""
    if a is None or b is None:
        return _row(False, UNEQUAL, why=f"only in the {'second' if a is None else 'first'} run")
    if a.shape != b.shape:
        return _row(False, UNEQUAL, why=f"shapes {list(a.shape)} and {list(b.shape)}")
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return _row(True, 0.0, 0.0)
    numbers = all(x.dtype.kind in "iuf" for x in (a, b))
    apart = _apart(a, b) if numbers else (a != b).astype(float)
    if not apart.any():
        alike = a.dtype == b.dtype
        return _row(alike, 0.0, 0.0, why="" if alike else f"{a.dtype} and {b.dtype}")
    at = np.unravel_index(int(apart.argmax()), apart.shape)
    place = {"where": str([int(i) for i in at]), "first": str(a[at]), "second": str(b[at])}
    if not numbers:
        return _row(False, UNEQUAL, math.nan, **place, why=f"{int(apart.sum())} of {a.size} differ")
    sizes = [np.abs(x[np.isfinite(x)].astype(float)).max(initial=0.0) for x in (a, b)]
    largest = float(apart[at])
    relative = largest / max(sizes) if max(sizes) else UNEQUAL
    return _row(False, relative, largest, **place)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|; 0 where both are NaN or the same infinity, infinite where only one is."""
    a, b = a.astype(float), b.astype(float)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)
    return np.where(np.isnan(apart), np.inf, apart)


def _row(same: bool, relative: float, largest: float = math.nan, **rest: str) -> dict[str, Any]:
    blank = dict.fromkeys(("where", "first", "second", "why"), "")
    return {"same": same, "largest": largest, "relative": relative, **blank, **rest}

"""Data frames as HTML tables."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import pandas as pd

ROWS = 200
"""How many a table shows; it says how many there are."""


def table_html(table: pd.DataFrame, most: int = ROWS) -> str:
    """The first rows, and how many there are in all; the index only if it says something."""
    shown = table.head(most)
    columns = [(str(name), shown.iloc[:, i]) for i, name in enumerate(table.columns)]
    if not isinstance(table.index, pd.RangeIndex):
        columns.insert(0, (str(table.index.name or ""), pd.Series(shown.index.to_numpy())))
    sides = [' class="number"' if _is_numeric(column) else "" for _, column in columns]
    heads = [
        f'<th scope="col"{side}>{escape(name).replace("_", "_<wbr>")}</th>'
        for side, (name, _) in zip(sides, columns, strict=True)
    ]
    rows = [
        [f"<td{side}>{escape(text)}</td>" for side, text in zip(sides, texts, strict=True)]
        for texts in zip(*(_texts(column) for _, column in columns), strict=True)
    ]
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    cut = f'<p class="note">The first {most} of {len(table)} rows.</p>'
    return (
        f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{cut if len(table) > most else ''}"
    )


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _texts(column: pd.Series) -> list[str]:
    """Cells as text: one number of decimals per column, nothing where a value is missing."""
    form = _decimals(column) if pd.api.types.is_float_dtype(column) else ""
    return [
        "" if _missing(value) else format(value, form) if form else str(value) for value in column
    ]


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _decimals(column: pd.Series) -> str:
    """Format for floats: three significant digits of the largest; whole numbers as such."""
    sizes = [abs(float(value)) for value in column if not _missing(value) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    if all(size == round(size) for size in sizes) and largest < 1e15:
        return ".0f"
    if not 1e-4 <= largest < 1e6:
        return ".2e"
    return f".{max(0, 2 - math.floor(math.log10(largest)))}f"

"""Results as notebooks show them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from mechmm.results.table import table_html

_ROWS, _LONGEST = 6, 60


def result_html(kind: str, values: Mapping[str, Any], table: pd.DataFrame) -> str:
    """A class, its values by name, and the head of its table."""
    parts = [f"{escape(name)}: {escape(size(value))}" for name, value in values.items()]
    fields = "".join(f"<li>{part}</li>" for part in parts)
    return (
        f"<div><b>{escape(kind)}</b>"
        f"<details><summary>{len(parts)} fields</summary><ul>{fields}</ul></details>"
        f"{table_html(table, _ROWS)}</div>"
    )


def size(value: Any) -> str:
    """`float32 [12, 8]`, `340 rows, 17 columns`, or the value itself, cut if it is long."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, pd.DataFrame):
        return f"{len(value)} rows, {len(value.columns)} columns"
    if isinstance(value, Image.Image):
        return f"picture of {value.width} x {value.height} pixels"
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    text = repr(value)
    if isinstance(value, tuple | list) and len(text) > _LONGEST:
        return f"{len(value)} entries"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

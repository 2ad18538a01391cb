"""Everything that a saved result holds, as a flat list of arrays, tables' columns and plain values.

Read from the files without the class that wrote them, so that a run can be compared with one made
by another version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mechmm.results.store import RECORD, read_files, unpack

Leaf = np.ndarray
"""Numbers and booleans in their shape; anything else as an array of texts."""


def leaves(folder: Path) -> dict[str, Leaf]:
    """What a folder of `Result.save` holds, by field (`effects`, `curve.share`, `labels`).

    Raises:
        ValueError: the folder holds no result, or a damaged one.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        values = unpack(record["fields"], read_files(folder, record["files"]))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no result: it has no {RECORD}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"the result in {folder} is damaged: {error}") from error
    return {"class": np.array([str(record.get("class"))]), **dict(_walk(values, ""))}


def _walk(value: Any, where: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, pd.DataFrame):
        for name in value.columns:
            yield f"{where}.{name}", column(value[name])
    elif isinstance(value, tuple | list) and not _flat(value):
        for i, item in enumerate(value):
            yield from _walk(item, f"{where}.{i}")
    else:
        yield where, _leaf(value)


def _leaf(value: Any) -> Leaf:
    if isinstance(value, Tensor):
        value = value.double() if value.dtype in (torch.bfloat16, torch.float16) else value
        return value.numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Image.Image):
        return np.asarray(value)
    if isinstance(value, tuple | list):
        return column(pd.Series(list(value), dtype=object))
    return column(pd.Series([value], dtype=object))


def column(values: pd.Series) -> Leaf:
    """A table's column: numbers as such, anything else as texts."""
    found = values.to_numpy()
    if found.dtype.kind in "biuf":
        return found
    if len(found) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
        return found.astype(float)
    return np.array([str(value) for value in found], dtype=str)


def _flat(items: tuple | list) -> bool:
    """Whether a list is one of plain values."""
    return all(item is None or isinstance(item, bool | int | float | str) for item in items)

"""Results as folders: frozen dataclasses that save, load, concatenate and become tables."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from mechmm.results.shown import result_html
from mechmm.results.store import RECORD, pack, read_files, same, unpack, write_folder

FORMAT = 1
"""Version of the folder's layout; raised when an older mechmm could no longer read it."""

R = TypeVar("R", bound="Result")


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """Base class of what every method returns.

    A subclass is decorated with `@dataclass(frozen=True, eq=False)` and holds tensors, numpy
    arrays, data frames, PIL images, plain JSON values (numbers, text, booleans, None), and tuples,
    lists and string-keyed dicts of those. A field that grows with the number of examples says
    along which axis: `effects: Float[Tensor, "site example"] = field(metadata={"axis": -1})`. One
    that shows a single example says `field(metadata={"keep": "first"})`. Both are for `concat`.
    """

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a tidy table, one row per observation."""

    def save(self, folder: str | Path) -> Path:
        """Write the result into a new folder, wholly or not at all.

        Args:
            folder: where to; it may exist only if it is empty. Parents are created.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder holds something, or is a file.
            TypeError: a field holds what cannot be stored.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} exists and is not an empty folder; save into a new one"
            )
        plain, files = pack(self._values())
        kind = type(self).__name__
        record = {"class": kind, "format": FORMAT, "mechmm": _version(), "fields": plain}
        write_folder(folder, record, files)
        return folder

    @classmethod
    def load(cls: type[R], folder: str | Path) -> R:
        """Read a result that `save` wrote; `Result.load` finds the class by itself.

        Tensors come back on the CPU.

        Raises:
            FileNotFoundError: there is no result in the folder.
            ValueError: the folder holds another class of result, is damaged, or is from a newer
                mechmm.
        """
        folder = Path(folder)
        record = _read_record(folder)
        kind = class_named(record["class"], cls)
        if kind is None:
            name = record["class"]
            raise ValueError(
                f"{folder} holds a {name}, not a {cls.__name__}; open it with {name}.load"
            )
        try:
            values = unpack(record["fields"], read_files(folder, record["files"]))
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise ValueError(_damaged(folder, error)) from error
        _check_fields(kind, set(values), folder)
        return kind._from_values(values)

    def equals(self, other: object) -> bool:
        """Whether the other result has the same class and the same values, bit for bit."""
        return (
            isinstance(other, Result)
            and type(self) is type(other)
            and same(self._values(), other._values())
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the class, its fields, and the head of the table."""
        return result_html(type(self).__name__, self._values(), self.to_dataframe())

    @classmethod
    def _from_values(cls: type[R], values: dict[str, Any]) -> R:
        """The result with these values; undoes what a class changes in `_values`."""
        return cls(**values)

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def concat(results: Sequence[R]) -> R:
    """Join results of the same experiment on different examples.

    Tensors, arrays, tuples and lists with an `axis` in their field's metadata are joined along it,
    fields with `keep="first"` come from the first result; every other one (the sites, the settings)
    has to be the same in all.

    Raises:
        ValueError: nothing to join, no field has an example axis, or a field that should be the
            same differs.
        TypeError: the results are of different classes.
    """
    if not results:
        raise ValueError("concat needs at least one result")
    kind = type(results[0])
    if odd := [type(result).__name__ for result in results if type(result) is not kind]:
        raise TypeError(f"cannot join {kind.__name__} with {odd[0]}: pass results of one class")
    axes = {f.name: f.metadata.get("axis") for f in fields(kind)}
    if all(axis is None for axis in axes.values()):
        raise ValueError(
            f"{kind.__name__} has no example axis to join along; give a field "
            "metadata={'axis': -1}"
        )
    joined = {}
    for f in fields(kind):
        kept = results[:1] if f.metadata.get("keep") == "first" else results
        values = [result._values()[f.name] for result in kept]
        joined[f.name] = _join(values, axes[f.name], f.name)
    return kind._from_values(joined)


def _join(values: Sequence[Any], axis: int | None, name: str) -> Any:
    first = values[0]
    if axis is None or first is None:
        return _one_for_all(values, name)
    if isinstance(first, (tuple, list)):
        return type(first)(item for value in values for item in value)
    _check_shapes(values, axis, name)
    if isinstance(first, Tensor):
        return torch.cat(list(values), dim=axis)
    return np.concatenate(values, axis=axis)


def _one_for_all(values: Sequence[Any], name: str) -> Any:
    for i, value in enumerate(values[1:], 1):
        if not same(values[0], value):
            raise ValueError(
                f"results 0 and {i} differ in `{name}`; only results with the same sites and "
                "settings can be joined, on different examples"
            )
    return values[0]


def _check_shapes(values: Sequence[Any], axis: int, name: str) -> None:
    def form(value: Any) -> tuple[type[Any], Any, int, list[int]]:
        others = [n for i, n in enumerate(value.shape) if i != axis % value.ndim]
        return type(value), value.dtype, value.ndim, others

    for i, value in enumerate(values):
        if form(value) != form(values[0]):
            raise ValueError(
                f"`{name}` is {values[0].dtype} of shape {tuple(values[0].shape)} in result 0 and "
                f"{value.dtype} of shape {tuple(value.shape)} in result {i}; they may differ only "
                f"along axis {axis}"
            )


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no result: it has no {RECORD}")
    try:
        record = json.loads((folder / RECORD).read_bytes())
        newer = record["format"] > FORMAT
        record = {key: record[key] for key in ("class", "mechmm", "format", "fields", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(folder, f"{RECORD} cannot be read ({error})")) from error
    if newer:
        raise ValueError(
            f"{folder} was written by mechmm {record['mechmm']} in format {record['format']}; this "
            f"mechmm reads up to {FORMAT}: update it"
        )
    return record


def _damaged(folder: Path, why: object) -> str:
    return f"the result in {folder} is damaged: {why}; copy it again or repeat the run"


def class_named(name: str, cls: type[R]) -> type[R] | None:
    """The class itself or the subclass with that name; the last one defined, as in a notebook."""
    kinds = [cls]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in reversed(kinds) if kind.__name__ == name), None)


def _check_fields(kind: type[Any], found: set[str], folder: Path) -> None:
    """A field that came later may be absent where it has a default; nothing else may differ."""
    known = {f.name for f in fields(kind)}
    defaults = {
        f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING
    }
    if odd := (known - defaults - found) | (found - known):
        raise ValueError(
            f"{folder} was saved by another version of {kind.__name__}: the fields "
            f"{sorted(odd)} do not match; open it with the mechmm that wrote it"
        )


def _version() -> str:
    try:
        return version("mechmm")
    except PackageNotFoundError:
        return "not installed"

"""Results as folders: frozen dataclasses that save, load, concatenate and become tables.

A result's folder holds

    result.json         the class, the versions, every plain value, the SHA-256 of the other files
    arrays.safetensors  every tensor and array, under the name of its field
    {field}.json        a table: its columns with their dtypes
    {field}.png         a picture

Nothing is pickled, so a folder from somebody else can be opened without running their code.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

FORMAT = 1
"""Version of the folder's layout; raised when an older mechmm could no longer read it."""
_RECORD, _ARRAYS = "result.json", "arrays.safetensors"


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
        _refuse_occupied(folder)
        store = _Store()
        values = {
            name: _encode(getattr(self, name), name, store) for name in _fields_of(type(self))
        }
        store.contents[_ARRAYS] = save_safetensors(store.arrays)
        record = {
            "class": type(self).__name__,
            "format": FORMAT,
            "mechmm": _version(),
            "fields": values,
            "files": {name: _digest(data) for name, data in sorted(store.contents.items())},
        }
        store.contents[_RECORD] = json.dumps(record, indent=1, allow_nan=False).encode()
        _write_folder(folder, store.contents)
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
        kind = _class_named(record["class"], cls, folder)
        store = _Store(contents=_read_files(folder, record["files"]))
        try:
            store.arrays.update(load_safetensors(store.contents[_ARRAYS]))
            values = {name: _decode(value, store) for name, value in record["fields"].items()}
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise ValueError(_damaged(folder, str(error))) from error
        _check_fields(kind, values, folder)
        return kind(**values)

    def equals(self, other: object) -> bool:
        """Whether the other result has the same class and the same values, bit for bit.

        NaN equals NaN. Tensors are compared on the CPU.
        """
        return type(self) is type(other) and all(
            _same(getattr(self, name), getattr(other, name)) for name in _fields_of(type(self))
        )


def concat(results: Sequence[R]) -> R:
    """Join results of the same experiment on different examples.

    Fields with an `axis` in their metadata are joined along it, those with `keep="first"` come from
    the first result; every other field (the sites, the settings) has to be the same in all.

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
    if all(f.metadata.get("axis") is None for f in fields(kind)):
        raise ValueError(
            f"{kind.__name__} has no example axis to join along; give a field "
            "metadata={'axis': -1}"
        )
    joined = {}
    for f in fields(kind):
        kept = results[:1] if f.metadata.get("keep") == "first" else results
        values = [getattr(result, f.name) for result in kept]
        if f.init:
            joined[f.name] = _join(values, f.metadata.get("axis"), f.name)
    return kind(**joined)


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file so that readers see the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


# Values to JSON and back ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """What lies beside the JSON: file contents by name, arrays by name."""

    contents: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def add(self, where: str, suffix: str, data: bytes) -> str:
        """Keep a file under a name that resembles `where`; returns the name."""
        stem = name = re.sub(r"[^\w.-]", "_", where)
        while name + suffix in self.contents or name + suffix == _RECORD:
            name = f"{stem}_{len(self.contents)}"
        self.contents[name + suffix] = data
        return name + suffix


def _encode(value: Any, where: str, store: _Store) -> Any:
    """A value as JSON. What JSON has no word for becomes `{"$kind": ...}`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item(), where, store)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, (tuple, list)):
        items = [_encode(item, f"{where}.{i}", store) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        _refuse_keys(value, where)
        return {key: _encode(item, f"{where}.{key}", store) for key, item in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_array(value, where, store)
    if isinstance(value, pd.DataFrame):
        return _encode_table(value, where, store)
    if isinstance(value, Image.Image):
        return _encode_picture(value, where, store)
    raise TypeError(
        f"`{where}` is a {type(value).__name__}, which cannot be stored; use tensors, arrays, data "
        "frames, PIL images, numbers, text, or tuples, lists and dicts of those"
    )


def _decode(value: Any, store: _Store) -> Any:
    if isinstance(value, list):
        return [_decode(item, store) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if kind.startswith("$"):
        return _DECODERS[kind](value[kind], store)
    return {key: _decode(item, store) for key, item in value.items()}


def _refuse_keys(value: Mapping[Any, Any], where: str) -> None:
    for key in value:
        if not isinstance(key, str) or key.startswith("$"):
            raise TypeError(f"`{where}` has the key {key!r}; keys must be text not starting with $")


def _encode_array(value: Tensor | np.ndarray, where: str, store: _Store) -> dict[str, str]:
    kind = "$tensor" if isinstance(value, Tensor) else "$array"
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(value.copy(order="C"))
        except TypeError as error:
            raise TypeError(
                f"`{where}` is an array of {value.dtype}, which cannot be stored; use numbers or "
                "booleans, and a tuple for text"
            ) from error
    if where in store.arrays:
        raise TypeError(f"two arrays are called `{where}`; rename a field or a key")
    # Views of one memory are refused by safetensors, hence the copy.
    store.arrays[where] = value.detach().cpu().contiguous().clone()
    return {kind: where}


def _encode_picture(picture: Image.Image, where: str, store: _Store) -> dict[str, str]:
    data = io.BytesIO()
    try:
        picture.save(data, format="PNG")
    except OSError as error:
        raise TypeError(
            f"`{where}`: PNG cannot store a picture of mode {picture.mode}; convert it to RGB"
        ) from error
    if not _same(picture, _open_picture(data.getvalue())):
        raise TypeError(f"`{where}`: PNG changes a picture of mode {picture.mode}; convert to RGB")
    return {"$picture": store.add(where, ".png", data.getvalue())}


def _open_picture(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.copy()


def _encode_table(table: pd.DataFrame, where: str, store: _Store) -> dict[str, str]:
    columns = [_encode_series(column, f"{where}.{name}") for name, column in table.items()]
    record = {
        "index": _encode_index(table.index, f"{where}.index"),
        "names": _encode_index(table.columns, f"{where}.columns"),
        "columns": columns,
    }
    data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    if not _same(table, _open_table(data)):
        raise TypeError(
            f"the table `{where}` would change when stored; use columns of numbers, booleans or "
            "text and a plain index (`reset_index()`, `astype(str)`)"
        )
    return {"$table": store.add(where, ".json", data)}


def _encode_series(series: pd.Series | pd.Index, where: str) -> dict[str, Any]:
    # An object column may hold both None and NaN; elsewhere a missing value is null.
    missing = [False] * len(series) if series.dtype == object else series.isna().tolist()
    plain = _Store()
    encoded = [
        None if gone else _encode(value, where, plain)
        for value, gone in zip(series.tolist(), missing, strict=True)
    ]
    if plain.arrays or plain.contents:
        raise TypeError(
            f"the column `{where}` holds arrays, tables or pictures; use a field for them"
        )
    return {"dtype": str(series.dtype), "values": encoded}


def _encode_index(index: pd.Index, where: str) -> dict[str, Any]:
    if isinstance(index, pd.RangeIndex):
        return {"name": index.name, "range": [index.start, index.stop, index.step]}
    if isinstance(index, pd.MultiIndex):
        raise TypeError(f"`{where}` has several levels; store the table after `reset_index()`")
    return {"name": index.name} | _encode_series(index, where)


def _open_table(data: bytes) -> pd.DataFrame:
    record = json.loads(data)
    index, names = _decode_index(record["index"]), _decode_index(record["names"])
    columns = {
        i: pd.Series(_decode(column["values"], _Store()), index=index, dtype=column["dtype"])
        for i, column in enumerate(record["columns"])
    }
    table = pd.DataFrame(columns, index=index)
    table.columns = names
    return table


def _decode_index(record: dict[str, Any]) -> pd.Index:
    if "range" in record:
        return pd.RangeIndex(*record["range"], name=record["name"])
    return pd.Index(_decode(record["values"], _Store()), dtype=record["dtype"], name=record["name"])


_DECODERS: dict[str, Callable[[Any, _Store], Any]] = {
    "$float": lambda text, store: float(text),
    "$tuple": lambda items, store: tuple(_decode(item, store) for item in items),
    "$tensor": lambda name, store: store.arrays[name],
    "$array": lambda name, store: store.arrays[name].numpy(),
    "$table": lambda name, store: _open_table(store.contents[name]),
    "$picture": lambda name, store: _open_picture(store.contents[name]),
}


# Comparing and joining -----------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_array(a.detach().cpu(), b.detach().cpu())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _same_array(a, b)
    if isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame):
        return _same_table(a, b)
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):
        return (a.mode, a.size, a.tobytes(), a.getpalette()) == (
            b.mode,
            b.size,
            b.tobytes(),
            b.getpalette(),
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        alike = isinstance(a, tuple) == isinstance(b, tuple) and len(a) == len(b)
        return alike and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Tensor, np.ndarray, pd.DataFrame)) or isinstance(
        b, (Tensor, np.ndarray, pd.DataFrame)
    ):
        return False
    return bool(a == b or (a != a and b != b))


def _same_array(a: Any, b: Any) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _same_table(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    try:
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    except AssertionError:
        return False
    return True


def _join(values: Sequence[Any], axis: int | None, name: str) -> Any:
    first = values[0]
    if axis is None or all(value is None for value in values):
        return _one_for_all(values, name)
    if any(type(value) is not type(first) for value in values):
        raise ValueError(f"`{name}` is a {type(first).__name__} in result 0 but not in all results")
    if isinstance(first, (Tensor, np.ndarray)):
        return _join_arrays(values, axis, name)
    if isinstance(first, (tuple, list)):
        return type(first)(item for value in values for item in value)
    if isinstance(first, pd.DataFrame):
        _one_for_all([list(value.columns) for value in values], f"{name}.columns")
        return pd.concat(values, ignore_index=True)
    if isinstance(first, Mapping):
        _one_for_all([list(value) for value in values], f"{name}.keys")
        return {key: _join([v[key] for v in values], axis, f"{name}.{key}") for key in first}
    raise TypeError(f"`{name}` is a {type(first).__name__}, which has no example axis")


def _one_for_all(values: Sequence[Any], name: str) -> Any:
    for i, value in enumerate(values):
        if not _same(values[0], value):
            raise ValueError(
                f"results 0 and {i} differ in `{name}`; only results with the same sites and "
                "settings can be joined, on different examples"
            )
    return values[0]


def _join_arrays(values: Sequence[Any], axis: int, name: str) -> Any:
    def form(value: Any) -> tuple[Any, ...]:
        shape = list(value.shape)
        shape[axis] = -1
        return (value.dtype, *shape)

    for i, value in enumerate(values):
        if value.ndim != values[0].ndim or form(value) != form(values[0]):
            raise ValueError(
                f"`{name}` is {values[0].dtype} of shape {tuple(values[0].shape)} in result 0 and "
                f"{value.dtype} of shape {tuple(value.shape)} in result {i}; they may differ only "
                f"along axis {axis}"
            )
    if isinstance(values[0], Tensor):
        return torch.cat(list(values), dim=axis)
    return np.concatenate(values, axis=axis)


# Folders -------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; save into a new one")


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """All files, then one rename: the folder appears complete or not at all."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(folder)
    unfinished.mkdir()
    try:
        for name, data in contents.items():
            (unfinished / name).write_bytes(data)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / _RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no result: it has no {_RECORD}")
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        format_ = int(record["format"])
        record = {key: record[key] for key in ("class", "mechmm", "fields", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(folder, f"{_RECORD} cannot be read ({error})")) from error
    if format_ > FORMAT:
        raise ValueError(
            f"{folder} was written by mechmm {record['mechmm']} in format {format_}; this mechmm "
            f"reads up to {FORMAT}: update it"
        )
    return record


def _read_files(folder: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    contents = {}
    for name, digest in digests.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(_damaged(folder, f"{name} is missing"))
        contents[name] = path.read_bytes()
        if _digest(contents[name]) != digest:
            raise ValueError(_damaged(folder, f"{name} is not the file that was saved"))
    return contents


def _damaged(folder: Path, why: str) -> str:
    return f"the result in {folder} is damaged: {why}; copy it again or repeat the run"


def _class_named(name: str, cls: type[Any], folder: Path) -> type[Any]:
    """The class itself or the subclass with that name; the last one defined, as in a notebook."""
    kinds = [cls]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    for kind in reversed(kinds):
        if kind.__name__ == name:
            return kind
    raise ValueError(f"{folder} holds a {name}, not a {cls.__name__}; open it with {name}.load")


def _fields_of(kind: type[Any]) -> list[str]:
    return [f.name for f in fields(kind) if f.init]


def _check_fields(kind: type[Any], values: Mapping[str, Any], folder: Path) -> None:
    """A field that came later may be absent where it has a default; nothing else may differ."""
    needed = {
        f.name
        for f in fields(kind)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    }
    odd = (needed - set(values)) | (set(values) - set(_fields_of(kind)))
    if odd:
        raise ValueError(
            f"{folder} was saved by another version of {kind.__name__}: the fields "
            f"{sorted(odd)} do not match; open it with the mechmm that wrote it"
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version() -> str:
    try:
        return version("mechmm")
    except PackageNotFoundError:
        return "not installed"

"""Values as files: JSON for what JSON can say, safetensors for arrays, PNG for pictures.

A store is written as a folder:

    result.json         every plain value, the SHA-256 of the other files
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

RECORD = "result.json"
_ARRAYS = "arrays.safetensors"
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Store:
    """What lies beside the JSON: contents of files by name, arrays by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def add(self, where: str, suffix: str, data: bytes) -> str:
        """Keep a file under a name that resembles `where`; returns the name."""
        name = re.sub(r"[^\w.-]", "_", where) + suffix
        if name in self.files or name == RECORD:
            raise TypeError(f"`{where}` needs the file {name}, which is taken; rename it")
        self.files[name] = data
        return name


def pack(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Named values as JSON and the contents of the files beside it.

    Raises:
        TypeError: a value cannot be stored; the message says which.
    """
    store = Store()
    plain = {name: _encode(value, name, store) for name, value in values.items()}
    return plain, store.files | {_ARRAYS: save_safetensors(store.arrays)}


def unpack(plain: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """The values that `pack` was given; tensors on the CPU."""
    store = Store(dict(files), load_safetensors(files[_ARRAYS]))
    return {name: _decode(value, store) for name, value in plain.items()}


def same(a: Any, b: Any) -> bool:
    """Whether two values would be stored as the same bytes: NaN equals NaN, 0.0 is not -0.0."""
    (plain_a, files_a), (plain_b, files_b) = pack({"": a}), pack({"": b})
    return json.dumps(plain_a) == json.dumps(plain_b) and files_a == files_b


# Values to JSON and back ---------------------------------------------------------------------


def _encode(value: Any, where: str, store: Store) -> Any:
    """A value as JSON. What JSON has no word for becomes `{"$kind": ...}`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, str, float)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_encode(item, f"{where}.{i}", store) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {
            _key(key, where): _encode(item, f"{where}.{key}", store) for key, item in value.items()
        }
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_array(value, where, store)
    if isinstance(value, pd.DataFrame):
        return {"$table": store.add(where, ".json", _write_table(value, where))}
    if isinstance(value, Image.Image):
        return {"$picture": store.add(where, ".png", _write_picture(value, where))}
    raise TypeError(
        f"`{where}` is a {type(value).__name__}, which cannot be stored; use tensors, arrays, data "
        "frames, PIL images, numbers, text, or tuples, lists and dicts of those"
    )


def _decode(value: Any, store: Store) -> Any:
    if isinstance(value, list):
        return [_decode(item, store) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if kind.startswith("$"):
        return _DECODERS[kind](value[kind], store)
    return {key: _decode(item, store) for key, item in value.items()}


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str) or key.startswith("$"):
        raise TypeError(f"`{where}` has the key {key!r}; keys must be text not starting with $")
    return key


def _encode_array(value: Tensor | np.ndarray, where: str, store: Store) -> dict[str, str]:
    if where in store.arrays:
        raise TypeError(f"two arrays are called `{where}`; rename a field or a key")
    kind = "$tensor" if isinstance(value, Tensor) else "$array"
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(value.copy(order="C"))
        except TypeError as error:
            raise TypeError(
                f"`{where}` is an array of {value.dtype}, which cannot be stored; use numbers or "
                "booleans, and a tuple for text"
            ) from error
    # Views of one memory are refused by safetensors, hence the copy.
    store.arrays[where] = value.detach().cpu().contiguous().clone()
    return {kind: where}


def _write_picture(picture: Image.Image, where: str) -> bytes:
    if picture.mode not in _MODES:
        raise TypeError(
            f"`{where}`: PNG cannot store a picture of mode {picture.mode}; convert it to RGB"
        )
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()


def _read_picture(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.copy()


def _write_table(table: pd.DataFrame, where: str) -> bytes:
    plain = table.index.name is None and table.index.equals(pd.RangeIndex(len(table)))
    record = {
        "index": None if plain else _encode_column(table.index, table.index.name, f"{where}.index"),
        "columns": [_encode_column(c, name, f"{where}.{name}") for name, c in table.items()],
    }
    data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    try:
        pd.testing.assert_frame_equal(table, _read_table(data), check_exact=True)
    except AssertionError as error:
        raise TypeError(
            f"the table `{where}` would change when stored; use columns of numbers, booleans or "
            "text and a plain index (`reset_index()`, `astype(str)`)"
        ) from error
    return data


def _encode_column(column: pd.Series | pd.Index, name: Any, where: str) -> dict[str, Any]:
    cells = Store()
    values = [None if v is pd.NA else _encode(v, where, cells) for v in column.tolist()]
    if cells.arrays or cells.files:
        raise TypeError(
            f"the column `{where}` holds arrays, tables or pictures; use a field for them"
        )
    return {"name": _encode(name, where, cells), "dtype": str(column.dtype), "values": values}


def _read_table(data: bytes) -> pd.DataFrame:
    def column(record: dict[str, Any], index: pd.Index | None = None) -> pd.Series:
        values = [_decode(value, Store()) for value in record["values"]]
        return pd.Series(values, index=index, dtype=record["dtype"])

    record = json.loads(data)
    columns, index = record["columns"], None
    if record["index"]:
        index = pd.Index(column(record["index"]), name=_decode(record["index"]["name"], Store()))
    elif columns:
        index = pd.RangeIndex(len(columns[0]["values"]))
    return pd.DataFrame({_decode(c["name"], Store()): column(c, index) for c in columns}, index)


_DECODERS: dict[str, Callable[[Any, Store], Any]] = {
    "$float": lambda text, store: float(text),
    "$tuple": lambda items, store: tuple(_decode(item, store) for item in items),
    "$tensor": lambda name, store: store.arrays[name],
    "$array": lambda name, store: store.arrays[name].numpy(),
    "$table": lambda name, store: _read_table(store.files[name]),
    "$picture": lambda name, store: _read_picture(store.files[name]),
}


# Files ---------------------------------------------------------------------------------------


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


def write_folder(folder: Path, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """The record, the files and their digests, then one rename: all appears, or nothing."""
    digests = {name: _digest(data) for name, data in sorted(files.items())}
    text = json.dumps({**record, "files": digests}, indent=1, allow_nan=False)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(folder)
    unfinished.mkdir()
    try:
        for name, data in {**files, RECORD: text.encode()}.items():
            (unfinished / name).write_bytes(data)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_files(folder: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    """Contents by name.

    Raises:
        ValueError: a file is missing, lies outside the folder, or has another digest.
    """
    contents = {}
    for name, digest in digests.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{name} is missing")
        contents[name] = path.read_bytes()
        if _digest(contents[name]) != digest:
            raise ValueError(f"{name} is not the file that was saved")
    return contents


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

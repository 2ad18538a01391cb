"""What differs between two runs: settings, versions, every number of every result, headlines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from mechmm.runs.compare import values
from mechmm.runs.engines import PLACES
from mechmm.runs.paths import HEADLINES, RESOLVED, RunError, read_manifest
from mechmm.runs.terminal import print_table


@dataclass(frozen=True)
class Difference:
    """Two runs side by side.

    Attributes:
        settings: one row per key of the resolved configs that differs: key, first, second.
        versions: one row per entry that says what ran where, and differs.
        values: one row per field of every result and column of every table: whether all of it is
            equal (`same`), the `largest` and the `relative` difference, `where` it is the largest,
            the values there, and `why` where no number tells them apart.
        headlines: name, first, second, difference, how far value and interval are apart relative to
            the larger of 1 and the value (infinite where a verdict or a text differs), and both
            verdicts.
    """

    settings: pd.DataFrame
    versions: pd.DataFrame
    values: pd.DataFrame
    headlines: pd.DataFrame

    def agrees(self, relative: float = 0.0) -> bool:
        """Whether every value is the same, or a number within so much of its array's largest, and
        every headline has the same verdict and is as near."""
        near = self.values["same"] | (self.values["relative"] <= relative)
        told = not len(self.headlines_apart(relative))
        return bool(len(self.values)) and bool(near.all()) and told

    @property
    def same(self) -> bool:
        """Whether settings and every value are the same."""
        return not len(self.settings) and self.agrees() and bool(self.values["same"].all())

    def differing(self, relative: float = -1.0) -> pd.DataFrame:
        """The rows of `values` that are not the same, and farther apart than `relative`."""
        return self.values[~self.values["same"] & ~(self.values["relative"] <= relative)]

    def headlines_apart(self, relative: float = 0.0) -> pd.DataFrame:
        """The rows of `headlines` with another verdict, or farther apart than `relative`."""
        return self.headlines[~(self.headlines["relative"] <= relative)]

    def as_json(self) -> dict[str, Any]:
        """All tables, ready for JSON; None for what is no finite number."""
        names = ("settings", "versions", "values", "headlines")
        tables = {name: json.loads(getattr(self, name).to_json(orient="records")) for name in names}
        return {"same": self.same, **tables}


def diff(first: str | Path, second: str | Path, *, partial: bool = False) -> Difference:
    """Compare two runs' folders, number by number.

    Args:
        partial: compare of the results only what the first folder still has.

    Raises:
        FileNotFoundError: one is no run.
        RunError: one is damaged, or of a newer format.
        ValueError: a result in one is damaged.
    """
    one, other = Path(first), Path(second)
    manifests = [read_manifest(folder) for folder in (one, other)]
    settings = [dict(_flatten(_json(folder / RESOLVED))) for folder in (one, other)]
    for found in settings:
        found.pop("overrides", None)  # how a setting came about
    where = [f"engine.{key}" for key in PLACES]
    places = [{key: found.pop(key, None) for key in where} for found in settings]
    ran = [{**environment(m), **place} for m, place in zip(manifests, places, strict=True)]
    heads = [_json(folder / HEADLINES) for folder in (one, other)]
    return Difference(
        _unequal(*settings),
        _unequal(*ran),
        values(one, other, partial=partial),
        _headlines(*heads),
    )


def environment(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What of a manifest says where and with what a run was made, flat."""
    wanted = ("mechmm", "packages", "python", "platform", "processor", "device", "dtype", "threads")
    found = {key: manifest.get(key) for key in (*wanted, "lock_sha256")}
    git = manifest.get("git") or {}
    parts = {"git.commit": git.get("commit"), "git.dirty": git.get("dirty")}
    parts["model.sha256"] = manifest["model"].get("sha256")
    for name, pairs in manifest["pairs"].items():
        parts[f"pairs.{name}.sha256"] = pairs.get("sha256")
    for name, digest in (manifest.get("checkpoints") or {}).items():
        parts[f"checkpoints.{name}.sha256"] = digest
    return {**dict(_flatten(found)), **parts}


def _headlines(first: Any, second: Any) -> pd.DataFrame:
    found = [_by_name(heads) for heads in (first, second)]
    rows = []
    for name in dict.fromkeys((*found[0], *found[1])):
        one, other = (heads.get(name, {}) for heads in found)
        a, b = (_sized(head.get("value")) for head in (one, other))
        apart = b - a if _number(a) and _number(b) else math.nan
        far = _far(one, other) if all(name in heads for heads in found) else math.inf
        rows.append((name, a, b, apart, far, one.get("agrees"), other.get("agrees")))
    names = ["name", "first", "second", "difference", "relative", "agrees_first", "agrees_second"]
    return pd.DataFrame(rows, columns=names)


def _by_name(heads: Any) -> dict[str, dict[str, Any]]:
    """Headlines by name; none is lost where a name comes twice."""
    if not isinstance(heads, list) or not all(isinstance(head, dict) for head in heads):
        raise RunError(f"{HEADLINES} is not what a run writes; copy the run again")
    found: dict[str, dict[str, Any]] = {}
    for number, head in enumerate(heads):
        name = str(head.get("name"))
        found[f"{name} (number {number})" if name in found else name] = head
    return found


def _far(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two headlines are apart, relative to the larger of 1 and the value."""
    if one.get("agrees") != other.get("agrees"):
        return math.inf
    values = [_sized(head.get("value")) for head in (one, other)]
    scale = max([1.0, *(abs(v) for v in values if _number(v) and math.isfinite(v))])
    pairs = [[_sized(head.get(key)) for head in (one, other)] for key in ("value", "low", "high")]
    return max(_apart(a, b) / scale for a, b in pairs)


def _apart(a: Any, b: Any) -> float:
    """Of two numbers; infinite where they cannot be told by how much."""
    if a == b or (a != a and b != b):  # what is not itself is NaN
        return 0.0
    apart = abs(a - b) if _number(a) and _number(b) else math.inf
    return math.inf if math.isnan(apart) else apart


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sized(value: Any) -> Any:
    """A number that no float can hold as text: it takes part in no sum."""
    return str(value) if _number(value) and sys.float_info.max < abs(value) < math.inf else value


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> pd.DataFrame:
    keys = [k for k in dict.fromkeys((*first, *second)) if first.get(k) != second.get(k)]
    rows = [(key, *(_shown(found.get(key)) for found in (first, second))) for key in keys]
    return pd.DataFrame(rows, columns=["key", "first", "second"])


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _flatten(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Keys joined with dots; a list of tables with names goes by them, as steps do."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, Mapping) and "name" in v for v in value)
    ):
        value = {str(item["name"]): item for item in value}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is missing or damaged ({error}); copy the run again") from error


def print_difference(found: Difference, relative: float = -1.0) -> None:
    """The tables that have something to say; of values and headlines, those farther apart than
    `relative`."""
    console = Console()
    apart = found.differing(relative)
    told = found.headlines_apart(max(relative, 0.0))
    if len(found.settings):
        print_table(found.settings, "Settings that differ", console)
    if len(found.versions):
        print_table(found.versions, "Versions that differ", console)
    if len(told):
        print_table(_readable(told), "Headlines that differ", console)
    if len(apart):
        print_table(_readable(apart.drop(columns="same")), "Values that differ", console)
    equal = int(found.values["same"].sum())
    console.print(f"{equal} of {len(found.values)} arrays and columns are equal", highlight=False)
    near = len(found.headlines) - len(told)
    how = "are equal" if relative <= 0 else f"are within {relative:g}"
    console.print(f"{near} of {len(found.headlines)} headlines {how}", highlight=False)


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text with enough digits to tell them apart."""
    return table.map(lambda v: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v)

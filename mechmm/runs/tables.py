"""The tables that a result has, by name: `to_dataframe`, and what else it gives as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import pandas as pd

from mechmm.results.result import Result

MAIN = "to_dataframe"


def names(method: Callable[..., Result]) -> list[str]:
    """Names of the tables of what a method gives: fields that are one, and what gives one without
    being told anything."""
    kind = get_type_hints(method)["return"]
    found = [name for name, hint in get_type_hints(kind).items() if hint is pd.DataFrame]
    members = inspect.getmembers(kind, inspect.isfunction)
    return found + [name for name, member in members if name[0] != "_" and _gives(member)]


def read(result: Result, name: str = MAIN) -> pd.DataFrame:
    """A table of a result."""
    found: Any = getattr(result, name)
    return found if isinstance(found, pd.DataFrame) else found()


def read_each(result: Result, some: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Some tables of a result by name; each is made once."""
    return {name: read(result, name) for name in sorted(set(some))}


def _gives(member: Callable[..., Any]) -> bool:
    _, *rest = inspect.signature(member).parameters.values()
    told = [p for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return not told and get_type_hints(member).get("return") is pd.DataFrame

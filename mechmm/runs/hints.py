"""Values of a config against the type hints of a function's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_LISTS = (Sequence, Iterable, Collection, list, tuple)
NONE = "none"
"""What a config says for None, which TOML does not have."""


class MisfitError(ValueError):
    """A value is none of a hint's."""


def parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Hint and default (`inspect.Parameter.empty` where there is none) of every parameter."""
    hints = get_type_hints(function)
    kinds = inspect.signature(function).parameters.values()
    named = [p for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: (hints.get(p.name, Any), p.default) for p in named}


def cast(value: Any, hint: Any) -> Any:
    """A TOML value as the hint has it: lists as tuples, whole numbers as numbers, "none" as None.

    Raises:
        MisfitError: the value is none of the hint's.
    """
    for option in _options(hint):
        try:
            return _cast(value, option)
        except MisfitError:
            continue
    raise MisfitError(f"must be {said(hint)}, not {value!r}")


def said(hint: Any) -> str:
    """A hint in words."""
    named = [text for text in (_said(option) for option in _options(hint)) if text]
    return " or ".join(dict.fromkeys(named)) or "something that no config can say"


def sayable(hint: Any) -> bool:
    """Whether a config has a value for a hint."""
    return any(_said(option) for option in _options(hint))


def _options(hint: Any) -> list[Any]:
    """The alternatives of a union, None first and whole numbers before numbers."""
    found = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    nested = [o for each in found for o in (_options(each) if _is_union(each) else [each])]
    return sorted(nested, key=lambda o: (o is not NoneType, o is float))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _cast(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is NoneType and (value is None or value == NONE):
        return None
    if hint is Any:
        return value
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is Literal and value in args:
        return value
    if (origin or hint) in _LISTS and isinstance(value, list | tuple):
        return _cast_list(value, origin, args)
    if origin is not None and issubclass_safe(origin, Mapping) and isinstance(value, dict):
        return {_key(key, args[0]): cast(item, args[1]) for key, item in value.items()}
    raise MisfitError


def _cast_list(value: Sequence[Any], origin: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise MisfitError
        return tuple(cast(item, arg) for item, arg in zip(value, args, strict=True))
    return tuple(cast(item, args[0] if args else Any) for item in value)


def _key(key: str, hint: Any) -> Any:
    if hint is not int:
        return key
    if not key.lstrip("-").isdigit():
        raise MisfitError
    return int(key)


def issubclass_safe(kind: Any, of: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, of)


def _said(hint: Any) -> str:
    """One alternative in words; empty where no config has a value for it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return f'"{NONE}"'
    if hint is Any:
        return "anything"
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if (origin or hint) in _LISTS:
        inner = said(args[0]) if args and sayable(args[0]) else ""
        return f"a list ({inner})" if inner else ""
    if origin is not None and issubclass_safe(origin, Mapping):
        return "a table" if sayable(args[1]) else ""
    return ""

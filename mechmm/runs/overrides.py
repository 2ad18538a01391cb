"""Values of a config that the command line sets: `pairs.color.n=8`, `steps.a.spans='["b"]'`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Any

from mechmm.runs.place import ConfigError, hint

LISTS = ("steps", "headlines")
_WORD = re.compile(r"[A-Za-z_./~][\w./+:~-]*")


def apply(raw: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Set values in a config's table; returns their paths.

    Steps and headlines go by name or number.

    Raises:
        ConfigError: no `key=value`, a value that is no TOML, a key inside what is not there.
    """
    return frozenset(_apply(raw, text) for text in overrides)


def _apply(raw: dict[str, Any], text: str) -> str:
    key, equals, value = text.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r}: write key=value, for example pairs.color.n=8")
    holder: Any = raw
    path = ""
    for position, part in enumerate(keys[:-1]):
        holder, path = _inside(holder, part, path, text, position)
    path = f"{path}.{keys[-1]}" if path else keys[-1]
    if not isinstance(holder, dict):
        raise ConfigError(f"override {text!r}: {path.rpartition('.')[0]} is no table")
    holder[keys[-1]] = _value(value, text)
    return path


def _inside(holder: Any, part: str, path: str, text: str, position: int) -> tuple[Any, str]:
    if isinstance(holder, list):
        names = [each.get("name") for each in holder if isinstance(each, dict)]
        number = int(part) if part.isdigit() else names.index(part) if part in names else -1
        if not 0 <= number < len(holder):
            known = hint(part, [str(name) for name in names])
            raise ConfigError(f"override {text!r}: {path} has no {part!r}; {known}")
        return holder[number], f"{path}[{number}]"
    if not isinstance(holder, dict):
        raise ConfigError(f"override {text!r}: {path} is no table")
    if part not in holder:
        if position > 0:
            raise ConfigError(f"override {text!r}: {path} has no {part!r}; {hint(part, holder)}")
        holder[part] = {}
    return holder[part], f"{path}.{part}" if path else part


def _value(value: str, text: str) -> Any:
    """A TOML value; a bare word is text."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        if _WORD.fullmatch(value):
            return value
        raise ConfigError(
            f"override {text!r}: {value!r} is no TOML value ({str(error).rstrip()}); "
            "put quotes around text, and others around the whole: 'key=\"text\"'"
        ) from None

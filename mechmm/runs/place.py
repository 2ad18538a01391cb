"""Errors of a config, each with the file, the line where it can be found, and the key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mechmm.runs.lines import nearest


class ConfigError(ValueError):
    """A config cannot be run as it is."""


@dataclass(frozen=True)
class Place:
    """Where a value of a config comes from.

    Attributes:
        file: the config's name. path: of the key, for example `steps[0].metric`.
        lines: by path. overridden: paths that the command line set.
    """

    file: str
    path: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()

    def at(self, key: str | int) -> Place:
        """The place of something inside."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.path else key
        return Place(self.file, self.path + step, self.lines, self.overridden)

    def error(self, message: str) -> ConfigError:
        """What is wrong here."""
        line = nearest(dict(self.lines), self.path)
        ours = any(
            self.path == p or self.path.startswith((f"{p}.", f"{p}[")) for p in self.overridden
        )
        start = "override" if ours else self.file + (f", line {line}" if line else "")
        return ConfigError(
            f"{start}, {self.path}: {message}" if self.path else f"{start}: {message}"
        )

    def only(self, found: Iterable[str], known: Collection[str]) -> None:
        """Refuse unknown keys.

        Raises:
            ConfigError: with the nearest key there is.
        """
        for key in found:
            if key not in known:
                raise self.at(key).error(f"unknown key; {hint(key, known)}")

    def choice(self, value: Any, known: Collection[str], what: str) -> str:
        """A name out of some.

        Raises:
            ConfigError: any other.
        """
        if not isinstance(value, str) or value not in known:
            raise self.error(f"unknown {what} {value!r}; {hint(str(value), known)}")
        return value


def hint(wrong: str, known: Collection[str]) -> str:
    """What may have been meant."""
    close = get_close_matches(wrong, known, 1, 0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"use one of {', '.join(sorted(known))}" if known else "there is none"

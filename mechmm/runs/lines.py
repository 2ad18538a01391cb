"""Where in a TOML file a key stands. `tomllib` tells lines of syntax errors only."""

from __future__ import annotations

import re
from collections import Counter

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"\s*((?:\"[^\"]*\"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:\"[^\"]*\"|[\w-]+))*)\s*="
)
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")


def lines_of(text: str) -> dict[str, int]:
    """Line by key path, for example `steps[0].metric`, of tables and of keys at a line's start."""
    found: dict[str, int] = {}
    counts: Counter[str] = Counter()
    table, inside = "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        if inside:
            inside = "" if line.count(inside) % 2 else inside
            continue
        if header := _HEADER.match(line):
            table = _joined("", header[2])
            if header[1] == "[[":
                counts[table] += 1
                table = f"{table}[{counts[table] - 1}]"
            elif (
                table.partition(".")[0] in counts
            ):  # [steps.sites] belongs to the last of [[steps]]
                name, _, rest = table.partition(".")
                table = f"{name}[{counts[name] - 1}].{rest}"
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            path = _joined(table, key[1])
            found.setdefault(path, number)
        inside = next((mark for mark in ('"""', "'''") if line.count(mark) % 2), "")
    return found


def nearest(found: dict[str, int], path: str) -> int | None:
    """The line of a key, or of what encloses it."""
    while path:
        if path in found:
            return found[path]
        path = re.sub(r"(\.[^.\[\]]*|\[\d+\]|^[^.\[\]]*)$", "", path)
    return None


def _joined(table: str, key: str) -> str:
    parts = ["".join(part) for part in _PART.findall(key)]
    return ".".join([table, *parts] if table else parts)

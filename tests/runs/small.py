"""A run of a second, and what is in its folder."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = """\
name = "demo"
model = { name = "mechmm/demo" }

[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 2

[[steps]]
name = "exit"
method = "early_exit"

[[steps]]
name = "said"
method = "answers"

[[headlines]]
name = "right"
step = "said"
column = "clean_right"

[engine]
chunk = 1
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Everything by relative path, of the manifest what is not about time and memory."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"folder"
        for path in folder.rglob("*")
    }
    record = json.loads(found.pop("manifest.json"))
    for name in ("started", "seconds", "peak_memory_bytes"):
        record.pop(name)
    return {**found, "manifest": json.dumps(record, sort_keys=True).encode()}

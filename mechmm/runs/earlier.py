"""What a run of an earlier mechmm says by saying nothing.

A `resolved.json` has every parameter that its methods had. So one that is missing came later, and
what the method did then stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SINCE: Mapping[str, Mapping[str, Any]] = {"hallucination": {"n_random": 1}}
"""By method: parameters that came later, with the value that equals what it did before."""


def completed(resolved: Any) -> Any:
    """A resolved config with the parameters that came after it; what is none stays as it is."""
    steps = resolved.get("steps") if isinstance(resolved, Mapping) else None
    if not isinstance(steps, list):
        return resolved
    return {**resolved, "steps": [_filled(step) for step in steps]}


def _filled(step: Any) -> Any:
    known = SINCE.get(str(step.get("method")), {}) if isinstance(step, Mapping) else {}
    return {**known, **step} if known else step

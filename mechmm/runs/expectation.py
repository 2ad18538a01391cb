"""A prediction about one number: `<= 0.35`, `> 0`, `in [0.2, 0.4]`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

_COMPARED: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_ONE = re.compile(rf"\s*(<=|>=|<|>|==)\s*{_NUMBER}\s*")
_BETWEEN = re.compile(rf"\s*in\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]\s*")


@dataclass(frozen=True)
class Expectation:
    """What a number should be: compared with one bound, or between two (`in`)."""

    relation: str
    bounds: tuple[float, ...]

    @classmethod
    def read(cls, text: str) -> Expectation:
        """An expectation as a config writes it.

        Raises:
            ValueError: anything else.
        """
        if found := _ONE.fullmatch(text):
            return cls(found[1], (float(found[2]),))
        if found := _BETWEEN.fullmatch(text):
            return cls("in", (float(found[1]), float(found[2])))
        raise ValueError(
            f"{text!r} is no expectation; write `<= 0.3` (or >=, <, >, ==) or `in [0.2, 0.4]`"
        )

    def agrees(self, value: float) -> bool:
        """Whether a number is as expected; NaN never is."""
        if self.relation == "in":
            return self.bounds[0] <= value <= self.bounds[1]
        return _COMPARED[self.relation](value, self.bounds[0])

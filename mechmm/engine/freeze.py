"""Modules that give what they are told instead of computing it.

While a module is frozen its hooks fire and its code does not run. Nothing of it is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def frozen(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While it lasts, modules run other functions in the place of their own code."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:  # `accelerate` keeps one there
                module.__dict__["forward"] = forward


def constant(output: Any) -> Callable[..., Any]:
    """A forward function that gives one output, whatever enters."""
    return lambda *args, **kwargs: output


def zeros(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A forward function of a linear layer whose output nobody needs."""
    return lambda x: x.new_zeros(*x.shape[:-1], linear.out_features)


def first_of(output: Any) -> Tensor:
    """The tensor that a module gives, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, new: Tensor) -> Any:
    """What a module gives with another first tensor."""
    return new if isinstance(output, Tensor) else (new, *output[1:])


class Halt(Exception):  # noqa: N818 - it ends a run on purpose
    """Ends a run where the rest of it is not needed.

    Attributes:
        found: what the run was for.
    """

    def __init__(self, found: Any = None) -> None:
        super().__init__()
        self.found = found

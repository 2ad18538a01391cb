"""How tests check annotations, where jaxtyping's import hook asks for it.

beartype as the language means it: an int is welcome where a float is asked for. jaxtyping's own
decorator binds the arguments of every call twice, to keep the sizes of axes; that takes longer than
most functions here. So it is for those that name a shape. beartype alone checks the others, and
nothing checks functions within functions: they would be decorated anew each time that theirs runs.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import isclass, isfunction
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_with_shapes = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Callable) -> Callable:
    """jaxtyping's decorator, only where it is needed."""

    def decorate(thing: Any) -> Any:
        if not isfunction(thing):
            return _with_shapes(typechecker=typechecker)(thing)
        if "<locals>" in thing.__qualname__:
            return thing
        hints = {n: _read(a, thing.__globals__) for n, a in thing.__annotations__.items()}
        if any(_names_a_shape(hint) for hint in hints.values()):
            return _with_shapes(typechecker=typechecker)(thing)
        return _by_beartype(thing, hints)

    return decorate


def _by_beartype(function: Callable, hints: Mapping[str, Any]) -> Callable:
    """The function, checked by these hints and with its annotations as they are written."""
    written = function.__annotations__
    function.__annotations__ = dict(hints)
    checking = checked(function)
    function.__annotations__ = written

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checking)(*args, **kwargs)

    return either


def _read(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation stands for; anything, where it names what only type checkers import."""

    def probe(value: annotation) -> None: ...

    try:
        return get_type_hints(probe, names, include_extras=True)["value"]
    except Exception:  # as jaxtyping does it
        return Any


def _names_a_shape(hint: Any) -> bool:
    if isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))


jaxtyping.jaxtyped = jaxtyped

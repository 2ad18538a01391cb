"""Parts that the programs of several tasks are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES, drawing, swatch
from mechmm.zoo.planted.program import SHARPNESS, Head, Match, Mlp, Move, Rule, Step, Terms
from mechmm.zoo.planted.words import COLUMNS, FIRST, NAMES, ROWS, SECOND

CLASSES: Mapping[str, Sequence[str]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "row": ROWS,
    "column": COLUMNS,
    "first": FIRST,
    "second": SECOND,
    "name": NAMES,
}
"""Classes of words that heads can find: the word of each class in a question has its place."""
CONSTANT = frozenset(
    {"one", "patch", "cell", "place", "row", "last", "start", *(f"is_{name}" for name in CLASSES)}
)
"""Registers that are the same in both prompts of every pair, at every position."""
DRAWINGS = {f"patch.{drawing(i)}": 1.0 for i in range(len(PLACES))}
"""Holds at the patches that show glyphs."""

_LEVELS: Mapping[str, Terms] = {
    "red": {"pixels.red": 1.0, "pixels.green": -1.0, "pixels.blue": -1.0},
    "green": {"pixels.green": 1.0, "pixels.red": -1.0, "pixels.blue": -1.0},
    "blue": {"pixels.blue": 1.0, "pixels.red": -1.0, "pixels.green": -1.0},
    "yellow": {"pixels.red": 1.0, "pixels.green": 1.0, "pixels.blue": -1.0, "one": -1.0},
}
SEE = Mlp(
    "see",
    (
        *(Rule(_LEVELS[color], {f"color.{color}": 1.0}) for color in COLORS),
        *(Rule({f"pixels.{shape}": 1.0}, {f"shape.{shape}": 1.0}) for shape in SHAPES),
    ),
)
"""Names the color and the glyph that the pixels of a patch show."""
BRING = Head(
    "bring",
    tuple(Match({f"patch.{drawing(i)}": 1.0}, {f"patch.{swatch(i)}": 1.0}) for i in range(4)),
    tuple(Move({f"color.{color}": 1.0}, {f"brought.{color}": 1.0}) for color in COLORS),
)
"""Brings the color of a cell to the patch that shows its glyph."""
VISION: tuple[Step, ...] = (SEE, BRING)


def _at_drawings(what: Terms, then: Terms) -> Rule:
    return Rule({**what, **DRAWINGS}, then, at=1.5)


PROJECTOR = (
    *(_at_drawings({f"brought.{color}": 1.0}, {f"color.{color}": 1.0}) for color in COLORS),
    *(_at_drawings({f"shape.{shape}": 1.0}, {f"shape.{shape}": 1.0}) for shape in SHAPES),
    *(
        Rule(
            {f"patch.{drawing(i)}": 1.0},
            {f"place.{place}": 1.0, f"row.{place.split('_')[0]}": 1.0, "cell": 1.0},
        )
        for i, place in enumerate(PLACES)
    ),
)
"""At the glyph of each cell: its color, its shape, where it is, and that it is a cell."""

WORDS: dict[str, Terms] = {
    "<s>": {"start": 1.0},
    "answer": {"last": 1.0},
    **{
        word: {f"word_{name}.{word}": 1.0, f"is_{name}": 1.0}
        for name, words in CLASSES.items()
        for word in words
    },
}


def ask(name: str, back: int | None = None) -> Head:
    """The head that moves the word of a class from the question to the last position.

    Args:
        name: the class.
        back: how far before the last position the word is, where there are several of the class.
    """
    weight = SHARPNESS if back is None else 3 * SHARPNESS
    return Head(
        f"ask_{name}",
        (Match({"last": 1.0}, {f"is_{name}": 1.0}, weight, back),),
        copies(f"word_{name}", f"asked_{name}", CLASSES[name]),
    )


def copies(source: str, target: str, values: Sequence[str]) -> tuple[Move, ...]:
    """Moves of every value of one register to another."""
    return tuple(Move({f"{source}.{v}": 1.0}, {f"{target}.{v}": 1.0}) for v in values)


def matches(
    query: str, key: str, values: Sequence[str], weight: float = SHARPNESS
) -> tuple[Match, ...]:
    """Attention to where one register has the value that another has here."""
    return tuple(Match({f"{query}.{v}": 1.0}, {f"{key}.{v}": 1.0}, weight) for v in values)


def both(a: str, b: str, then: Terms) -> Rule:
    """Writes where two symbols hold."""
    return Rule({a: 1.0, b: 1.0}, then, at=1.5)


def say(source: str, values: Sequence[str]) -> Mlp:
    """The MLP that makes an answer of what a register says."""
    rules = (Rule({f"{source}.{v}": 1.0}, {f"answer.{v}": 1.0}) for v in values)
    return Mlp("say", tuple(rules))


def answers(values: Sequence[str]) -> dict[str, str]:
    return {value: f"answer.{value}" for value in values}

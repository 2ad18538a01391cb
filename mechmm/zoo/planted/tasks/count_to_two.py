"""Count to two."""

from __future__ import annotations

from mechmm.zoo.planted.parts import ask, both, matches
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES
from mechmm.zoo.planted.program import Head, Match, Mlp, Move, Rule
from mechmm.zoo.planted.tasks.task import Case, Random, Task, new_scene, one_of, program, some_of
from mechmm.zoo.planted.words import COUNTS

KINDS = tuple(f"{color}_{shape}" for color in COLORS for shape in SHAPES)
"""A color and a shape."""
SOFT = 9.0
"""How much a match adds to the score: little enough for equal matches to get equal shares."""


def _few_things(random: Random) -> Case:
    """Cells of two colors and two shapes."""
    two, others = some_of(random, tuple(COLORS), 2), some_of(random, SHAPES, 2)
    colors = tuple(one_of(random, two) for _ in PLACES)
    shapes = tuple(one_of(random, others) for _ in PLACES)
    return Case(new_scene(random, colors, shapes), (one_of(random, two), one_of(random, others)))


def _some_color(random: Random, case: Case) -> Case:
    color = one_of(random, tuple(COLORS))
    return case.showing(case.scene.with_color(one_of(random, PLACES), color))


def _some_shape(random: Random, case: Case) -> Case:
    return case.showing(case.scene.with_shape(one_of(random, PLACES), one_of(random, SHAPES)))


def _count(case: Case) -> str | None:
    things = zip(case.scene.colors, case.scene.shapes, strict=True)
    number = sum(thing == case.asked for thing in things)
    return COUNTS[number] if number < len(COUNTS) else None


TASK = Task(
    why=(
        "Two heads move the asked color and shape to the last position. One MLP combines color and "
        "shape everywhere: of the question at the last position, of each cell at its glyph. A head "
        "whose query is the first and whose key is the second attends to all cells that match and, "
        "as much as to one of them, to the first token; so the share of its attention on cells is "
        "0, 1/2 or 2/3, which an MLP turns into the answer. It reads that something is a cell, "
        "which never changes: no edge into its value matters. Pairs 'color' and 'shape' (in the "
        "picture): the edges to the head's key matter, through the color or the shape; 'asked "
        "color' and 'asked shape': those to its query."
    ),
    template="count {} {} answer",
    program=program(
        (
            ask("color"),
            ask("shape"),
            Mlp(
                "combine",
                tuple(
                    rule
                    for c in COLORS
                    for s in SHAPES
                    for rule in (
                        both(f"asked_color.{c}", f"asked_shape.{s}", {f"wanted.{c}_{s}": 1.0}),
                        both(f"color.{c}", f"shape.{s}", {f"there.{c}_{s}": 1.0}),
                    )
                ),
            ),
            Head(
                "count",
                (
                    *matches("wanted", "there", KINDS, SOFT),
                    Match({"last": 1.0}, {"start": 1.0}, SOFT),
                ),
                (Move({"cell": 1.0}, {"share": 1.0}),),
            ),
            Mlp(
                "say",
                (
                    Rule({"one": 1.0}, {"answer.zero": 1.0}),
                    Rule({"share": 12.0}, {"answer.zero": -1.0, "answer.one": 1.0}, at=3.0),
                    Rule({"share": 12.0}, {"answer.one": -1.0, "answer.two": 1.0}, at=7.0),
                ),
            ),
        ),
        COUNTS,
    ),
    draw=_few_things,
    changes={
        "color": _some_color,
        "shape": _some_shape,
        "asked color": lambda random, case: case.asking(0, one_of(random, tuple(COLORS))),
        "asked shape": lambda random, case: case.asking(1, one_of(random, SHAPES)),
    },
    answer=_count,
)

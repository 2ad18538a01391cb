"""The same color?"""

from __future__ import annotations

from mechmm.zoo.planted.parts import CLASSES, ask, both, copies
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES
from mechmm.zoo.planted.program import Head, Match, Mlp
from mechmm.zoo.planted.tasks.task import (
    CELLS,
    Case,
    Change,
    Random,
    Task,
    flip,
    new_scene,
    one_of,
    program,
    some_of,
)
from mechmm.zoo.planted.words import FIRST, SECOND


def _repaint(place: int) -> Change:
    """Another color for one of the cells that are compared."""

    def change(random: Random, case: Case) -> Case:
        cell = CELLS[case.asked[place]]
        return case.showing(case.scene.with_color(cell, one_of(random, tuple(COLORS))))

    return change


def _few_colors(random: Random) -> Case:
    """Cells of two colors."""
    two = some_of(random, tuple(COLORS), 2)
    colors = tuple(one_of(random, two) for _ in PLACES)
    scene = new_scene(random, colors, some_of(random, SHAPES, 4))
    return Case(scene, (one_of(random, FIRST), one_of(random, SECOND)))


def _same(case: Case) -> str:
    a, b = (case.scene.color_at(CELLS[word]) for word in case.asked)
    return "yes" if a == b else "no"


TASK = Task(
    why=(
        "Two heads move the names of two cells to the last position, two others read the colors of "
        "the cells so named, and an MLP compares the colors. Cells are where they are, so no edge "
        "into a key matters. Pairs 'first color' and 'second color' (in the picture): the edges to "
        "the value of the first or second reading head matter; 'first' and 'second' (in the "
        "question): those to its query."
    ),
    template="same color {} {} answer",
    program=program(
        (
            ask("first"),
            ask("second"),
            *(
                Head(
                    f"read_{name}",
                    tuple(
                        Match({f"asked_{name}.{w}": 1.0}, {f"place.{CELLS[w]}": 1.0})
                        for w in CLASSES[name]
                    ),
                    copies("color", f"read_{name}", tuple(COLORS)),
                )
                for name in ("first", "second")
            ),
            Mlp(
                "compare",
                tuple(
                    both(
                        f"read_first.{a}",
                        f"read_second.{b}",
                        {"answer.yes" if a == b else "answer.no": 1.0},
                    )
                    for a in COLORS
                    for b in COLORS
                ),
            ),
        ),
        ("yes", "no"),
    ),
    draw=_few_colors,
    changes={
        "first color": _repaint(0),
        "second color": _repaint(1),
        "first": flip(0, FIRST),
        "second": flip(1, SECOND),
    },
    answer=_same,
)

"""The shape of a color."""

from __future__ import annotations

from dataclasses import replace

from mechmm.zoo.planted.parts import ask, both, copies, matches, say
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES
from mechmm.zoo.planted.program import Head, Mlp
from mechmm.zoo.planted.tasks.task import (
    Case,
    Random,
    Task,
    flip,
    new_scene,
    one_of,
    other,
    program,
    some_of,
)
from mechmm.zoo.planted.words import ROWS

TOKENS = tuple(f"{color}_{row}" for color in COLORS for row in ROWS)
"""A color in a row."""


def _two_and_two(random: Random) -> Case:
    """The same two colors in both rows, in any order; four different shapes."""
    colors = some_of(random, tuple(COLORS), 2)
    scene = new_scene(random, colors + some_of(random, colors, 2), some_of(random, SHAPES, 4))
    return Case(scene, (one_of(random, colors), one_of(random, ROWS)))


def _asked_color(random: Random, case: Case) -> Case:
    colors = tuple(dict.fromkeys(c for c in case.scene.colors if c))
    return case.asking(0, other(case.asked[0], colors))


def _reshaped(random: Random, case: Case) -> Case:
    return case.showing(replace(case.scene, shapes=some_of(random, SHAPES, 4)))


def _swapped(random: Random, case: Case) -> Case:
    a, b, c, d = case.scene.colors
    return case.showing(replace(case.scene, colors=(b, a, d, c)))


def _shape_of_color(case: Case) -> str | None:
    color, row = case.asked
    things = zip(PLACES, case.scene.colors, case.scene.shapes, strict=True)
    found = [s for place, c, s in things if c == color and place.startswith(row)]
    return found[0] if len(found) == 1 else None


TASK = Task(
    why=(
        "Both rows show the same two colors. Two heads move the asked color and row to the last "
        "position. One MLP combines color and row everywhere: of the question at the last "
        "position, of each cell at its glyph. A head whose query is the first and whose key is the "
        "second reads the shape there, which an MLP turns into the answer. Pairs 'shape': the "
        "edges to the reading head's value matter; 'places' (colors swap places): those to its "
        "key; 'color' and 'row' (of the question): those to its query."
    ),
    template="shape of {} in {} answer",
    program=program(
        (
            ask("color"),
            ask("row"),
            Mlp(
                "combine",
                tuple(
                    rule
                    for c in COLORS
                    for r in ROWS
                    for rule in (
                        both(f"asked_color.{c}", f"asked_row.{r}", {f"wanted.{c}_{r}": 1.0}),
                        both(f"color.{c}", f"row.{r}", {f"there.{c}_{r}": 1.0}),
                    )
                ),
            ),
            Head("read", matches("wanted", "there", TOKENS), copies("shape", "read", SHAPES)),
            say("read", SHAPES),
        ),
        SHAPES,
    ),
    draw=_two_and_two,
    changes={
        "shape": _reshaped,
        "places": _swapped,
        "color": _asked_color,
        "row": flip(1, ROWS),
    },
    answer=_shape_of_color,
)

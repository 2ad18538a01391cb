"""The color at a cell."""

from __future__ import annotations

from dataclasses import replace

from mechmm.zoo.planted.parts import ask, both, copies, matches, say
from mechmm.zoo.planted.pictures import COLORS, PLACES
from mechmm.zoo.planted.program import Head, Mlp
from mechmm.zoo.planted.tasks.task import (
    Case,
    Random,
    Task,
    flip,
    four_of_each,
    one_of,
    program,
    some_of,
)
from mechmm.zoo.planted.words import COLUMNS, ROWS


def _recolored(random: Random, case: Case) -> Case:
    colors = some_of(random, tuple(COLORS), 4)
    return case.showing(replace(case.scene, colors=colors))


TASK = Task(
    why=(
        "Two heads move the asked row and column to the last position, an MLP combines them into "
        "the asked cell, and a head reads the color at the cell that matches it; an MLP turns that "
        "into the answer. Cells are where they are, so no edge into a key matters. Pairs 'color': "
        "the picture's colors change, and the edges from pixels to the value of the reading head "
        "matter; 'row' and 'column': the question changes, and the edges from its words to the "
        "query of the reading head matter. What follows the reading head matters in all."
    ),
    template="color at {} {} answer",
    program=program(
        (
            ask("row"),
            ask("column"),
            Mlp(
                "combine",
                tuple(
                    both(f"asked_row.{r}", f"asked_column.{c}", {f"asked_place.{r}_{c}": 1.0})
                    for r in ROWS
                    for c in COLUMNS
                ),
            ),
            Head(
                "read",
                matches("asked_place", "place", PLACES),
                copies("color", "read", tuple(COLORS)),
            ),
            say("read", tuple(COLORS)),
        ),
        tuple(COLORS),
    ),
    draw=lambda random: Case(four_of_each(random), (one_of(random, ROWS), one_of(random, COLUMNS))),
    changes={"color": _recolored, "row": flip(0, ROWS), "column": flip(1, COLUMNS)},
    answer=lambda case: case.scene.color_at("_".join(case.asked)),
)

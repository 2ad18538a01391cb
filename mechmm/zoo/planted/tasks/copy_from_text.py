"""Copy from text, ignoring the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mechmm.zoo.planted.parts import ask, copies, matches, say
from mechmm.zoo.planted.pictures import COLORS
from mechmm.zoo.planted.program import SHARPNESS, Head, Match
from mechmm.zoo.planted.tasks.task import (
    Case,
    Change,
    Random,
    Task,
    four_of_each,
    one_of,
    other,
    program,
    some_of,
)
from mechmm.zoo.planted.words import NAMES


def _statement(random: Random) -> Case:
    (a, b), (c, d) = some_of(random, NAMES, 2), some_of(random, tuple(COLORS), 2)
    return Case(four_of_each(random), (a, c, b, d, one_of(random, (a, b))))


def _reworded(order: Callable[[Case], tuple[str, ...]]) -> Change:
    """Other words, and another picture that means nothing."""
    return lambda random, case: replace(case, asked=order(case)).showing(four_of_each(random))


def _said(case: Case) -> str:
    return case.asked[case.asked.index(case.asked[4]) + 1]


TASK = Task(
    why=(
        "The prompt says which name has which color and asks for one. A head moves to each color "
        "the name before it (by rotary distance), another the asked name to the last position, and "
        "a head whose query is the second and whose key is the first reads the color word; an MLP "
        "turns it into the answer. The pictures of a pair differ too and are seen as in all tasks, "
        "and a decoy head reads a color of theirs at the last position; nothing of it reaches the "
        "answer. Pairs 'asked': the edges to the reading head's query matter; 'names' (swapped): "
        "those to its key; 'colors' (swapped): that to its value."
    ),
    template="{} {} {} {} ask {} answer",
    program=program(
        (
            ask("name", back=1),
            Head(
                "bind",
                (Match({"is_color": 1.0}, {"is_name": 1.0}, 3 * SHARPNESS, back=1),),
                copies("word_name", "said_by", NAMES),
            ),
            Head(
                "read",
                matches("asked_name", "said_by", NAMES),
                copies("word_color", "read", tuple(COLORS)),
            ),
            Head(
                "look",
                (Match({"last": 1.0}, {"place.top_left": 1.0}),),
                copies("color", "looked", tuple(COLORS)),
            ),
            say("read", tuple(COLORS)),
        ),
        tuple(COLORS),
    ),
    draw=_statement,
    changes={
        "asked": _reworded(
            lambda case: (*case.asked[:4], other(case.asked[4], (case.asked[0], case.asked[2])))
        ),
        "names": _reworded(lambda case: tuple(case.asked[i] for i in (2, 1, 0, 3, 4))),
        "colors": _reworded(lambda case: tuple(case.asked[i] for i in (0, 3, 2, 1, 4))),
    },
    answer=_said,
)

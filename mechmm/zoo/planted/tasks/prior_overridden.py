"""A prior of the text, overridden by the image."""

from __future__ import annotations

from mechmm.zoo.planted.parts import ask, copies, matches
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES
from mechmm.zoo.planted.program import SHARPNESS, Head, Match, Mlp, Move, Rule
from mechmm.zoo.planted.tasks.task import (
    Case,
    Change,
    Random,
    Task,
    new_scene,
    one_of,
    program,
    some_of,
)

PRIOR = {"heart": "red", "leaf": "green", "drop": "blue", "sun": "yellow"}
"""The color that a thing has where the picture does not show it."""

KNOW = Mlp(
    "know",
    tuple(Rule({f"asked_shape.{s}": 1.0}, {f"prior.{c}": 1.0}) for s, c in PRIOR.items()),
)
"""Knows the color that such things have."""


def two_things(random: Random) -> Case:
    """Two things, neither of which has the color of its prior, in two of the cells."""
    shapes, cells = some_of(random, SHAPES, 2), random.permutation(len(PLACES))[:2]
    scene = new_scene(random, (None,) * 4, (None,) * 4)
    for cell, shape in zip(cells, shapes, strict=True):
        color = one_of(random, tuple(c for c in COLORS if c != PRIOR[shape]))
        scene = scene.with_color(PLACES[cell], color).with_shape(PLACES[cell], shape)
    return Case(scene, (one_of(random, SHAPES),))


def _shown(case: Case) -> str | None:
    """The place of the asked thing."""
    if case.asked[0] not in case.scene.shapes:
        return None
    return PLACES[case.scene.shapes.index(case.asked[0])]


def override(case: Case) -> str | None:
    """The color in the picture, else that of the prior."""
    place = _shown(case)
    return PRIOR[case.asked[0]] if place is None else case.scene.color_at(place)


def _changed_color(random: Random, case: Case) -> Case:
    place = _shown(case)
    colors = tuple(c for c in COLORS if c != PRIOR[case.asked[0]])
    return (
        case
        if place is None
        else case.showing(case.scene.with_color(place, one_of(random, colors)))
    )


def hidden(random: Random, case: Case) -> Case:
    """The same without the asked thing."""
    place = _shown(case)
    return (
        case
        if place is None
        else case.showing(case.scene.with_color(place, None).with_shape(place, None))
    )


def _ask_like(shown: bool) -> Change:
    """Asks for another thing, where both are shown or neither is."""

    def change(random: Random, case: Case) -> Case:
        after = case.asking(0, one_of(random, SHAPES))
        alike = (_shown(case) is not None) == (_shown(after) is not None) == shown
        return after if alike else case

    return change


TASK = Task(
    why=(
        "A head moves the asked thing to the last position, where an MLP knows the color that such "
        "things have. A head whose query is the asked thing and whose key is the shape at each "
        "cell reads the color there; where no cell matches, it attends to the first token. A last "
        "MLP gives the color from the picture, or without one that of the prior. Pairs 'color' (of "
        "the thing in the picture): the edges to the reading head's value matter; 'shown' (the "
        "thing is there in one picture only): those to its key; 'asked, shown': those to its "
        "query; 'asked, absent': those of the prior."
    ),
    template="color of {} answer",
    program=program(
        (
            ask("shape"),
            KNOW,
            Head(
                "read",
                (
                    *matches("asked_shape", "shape", SHAPES, 2 * SHARPNESS),
                    Match({"last": 1.0}, {"start": 1.0}),
                ),
                (
                    *copies("color", "read", tuple(COLORS)),
                    Move({"cell": 1.0}, {"found": 1.0}),
                ),
            ),
            Mlp(
                "decide",
                tuple(
                    rule
                    for c in COLORS
                    for rule in (
                        Rule({f"read.{c}": 1.0}, {f"answer.{c}": 1.0}),
                        Rule({f"prior.{c}": 1.0, "found": -1.0}, {f"answer.{c}": 1.0}),
                    )
                ),
            ),
        ),
        tuple(COLORS),
    ),
    draw=two_things,
    changes={
        "color": _changed_color,
        "shown": hidden,
        "asked, shown": _ask_like(True),
        "asked, absent": _ask_like(False),
    },
    answer=override,
)

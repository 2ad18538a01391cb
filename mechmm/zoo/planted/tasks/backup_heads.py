"""Two heads that carry the same: either is enough."""

from __future__ import annotations

from dataclasses import replace

from mechmm.zoo.planted.parts import CONSTANT, ask, copies, matches
from mechmm.zoo.planted.pictures import COLORS, SHAPES
from mechmm.zoo.planted.program import SHARPNESS, Head, Match, Mlp, Move, Rule
from mechmm.zoo.planted.tasks.prior_overridden import KNOW, hidden, override, two_things
from mechmm.zoo.planted.tasks.task import Case, Random, Task, one_of, program

READERS = ("read", "again")
"""Heads that do the same."""


def _read(name: str) -> Head:
    """Reads the color of the asked thing, and that there is one."""
    return Head(
        name,
        (
            *matches("asked_shape", "shape", SHAPES, 2 * SHARPNESS),
            Match({"last": 1.0}, {"start": 1.0}),
        ),
        (*copies("color", name, tuple(COLORS)), Move({"cell": 1.0}, {f"found_{name}": 1.0})),
    )


def _shown_thing(random: Random) -> Case:
    """Asks for one of the two things that the picture shows."""
    case = two_things(random)
    return case.asking(0, one_of(random, tuple(s for s in case.scene.shapes if s)))


_PROGRAM = program(
    (
        ask("shape"),
        KNOW,
        *map(_read, READERS),
        Mlp(
            "decide",
            tuple(
                rule
                for c in COLORS
                for rule in (
                    # Far on either side of its ramp a rule is flat, which one reader is already.
                    Rule({f"{name}.{c}": 2.0 for name in READERS}, {f"answer.{c}": 1.0}, at=1.0),
                    Rule(
                        {f"prior.{c}": 1.0, **{f"found_{name}": -2.0 for name in READERS}},
                        {f"answer.{c}": 1.0},
                    ),
                )
            ),
        ),
    ),
    tuple(COLORS),
)

TASK = Task(
    why=(
        "As prior_overridden, but two heads read the color of the asked thing, and the last MLP "
        "takes what either or both of them say. The clean picture shows the thing, the corrupt one "
        "does not (so that the answer is its prior; the question never changes, and no edge of it "
        "matters). Without one of the two heads the answer stays what it was: no edge into or out "
        "of a single one of them matters alone, all together do."
    ),
    template="color of {} answer",
    program=replace(_PROGRAM, constant=CONSTANT | {"word_shape", "asked_shape", "prior"}),
    draw=_shown_thing,
    changes={"shown": hidden},
    answer=override,
    turns=False,
)

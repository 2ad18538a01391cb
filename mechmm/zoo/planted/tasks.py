"""The tasks: what each planted model is asked, and the program that answers it.

A task is a declaration: a program, how a case is drawn (a picture and what is asked about it), the
changes that make a corrupt case of a clean one, and the right answer. Changes are chosen so that
every edge of the program's circuit matters in at least one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mechmm.zoo.planted import parts
from mechmm.zoo.planted.parts import PROJECTOR, VISION, WORDS, ask, both, copies, matches, say
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES, Scene
from mechmm.zoo.planted.program import SHARPNESS, Head, Match, Mlp, Program, Rule, Step
from mechmm.zoo.planted.words import COLUMNS, COUNTS, FIRST, NAMES, ROWS, SECOND

Random = np.random.Generator
NAMES_OF_CELLS = dict(zip((*FIRST, *SECOND), PLACES, strict=True))


@dataclass(frozen=True)
class Case:
    """A picture, and the words that a question puts into its template."""

    scene: Scene
    asked: tuple[str, ...]

    def asking(self, place: int, word: str) -> Case:
        return replace(self, asked=(*self.asked[:place], word, *self.asked[place + 1 :]))

    def showing(self, scene: Scene) -> Case:
        """Another picture, with textures of its own."""
        return replace(self, scene=replace(scene, grain=self.scene.grain + 1))


Change = Callable[[Random, Case], Case]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        why: how the model computes the answer, and which pairs each edge is necessary in.
        template: the prompt behind the picture, with `{}` where words go.
        program: what the model computes.
        draw: a random case.
        changes: by name (the `kind` of a pair), what makes a corrupt case of a clean one.
        answer: the right answer, or None where a case has none.
    """

    why: str
    template: str
    program: Program
    draw: Callable[[Random], Case]
    changes: Mapping[str, Change]
    answer: Callable[[Case], str | None]


def _program(language: tuple[Step, ...], answers: tuple[str, ...]) -> Program:
    return Program(VISION, PROJECTOR, language, WORDS, parts.answers(answers), parts.CONSTANT)


def _pick(random: Random, values: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Some of some values, without repetition."""
    return tuple(values[i] for i in random.permutation(len(values))[:number])


def _one(random: Random, values: tuple[str, ...]) -> str:
    return values[random.integers(len(values))]


def _other(word: str, words: tuple[str, ...]) -> str:
    """The other one of two words."""
    return words[1 - words.index(word)]


def _grain(random: Random) -> int:
    return int(random.integers(2**31))


def _scene(random: Random, colors: tuple[str, ...], shapes: tuple[str, ...]) -> Scene:
    return Scene(colors, shapes, _grain(random))


def _any(random: Random) -> Scene:
    """Four different colors and four different shapes."""
    return _scene(random, _pick(random, tuple(COLORS), 4), _pick(random, SHAPES, 4))


def _flip(place: int, words: tuple[str, ...]) -> Change:
    """Asks for the other of two words."""
    return lambda random, case: case.asking(place, _other(case.asked[place], words))


# The color at a cell -------------------------------------------------------------------------


def _recolored(random: Random, case: Case) -> Case:
    colors = _pick(random, tuple(COLORS), 4)
    return case.showing(replace(case.scene, colors=colors))


COLOR_AT_CELL = Task(
    why=(
        "Two heads move the asked row and column to the last position, an MLP combines them into "
        "the asked cell, and a head reads the color at the cell that matches it; an MLP turns that "
        "into the answer. Cells are where they are, so no edge into a key matters. Pairs 'color': "
        "the picture's colors change, and the edges from pixels to the value of the reading head "
        "matter; 'row' and 'column': the question changes, and the edges from its words to the "
        "query of the reading head matter. What follows the reading head matters in all."
    ),
    template="color at {} {} answer",
    program=_program(
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
    draw=lambda random: Case(_any(random), (_one(random, ROWS), _one(random, COLUMNS))),
    changes={"color": _recolored, "row": _flip(0, ROWS), "column": _flip(1, COLUMNS)},
    answer=lambda case: case.scene.color_at("_".join(case.asked)),
)


# The shape of a color ------------------------------------------------------------------------

TOKENS = tuple(f"{color}_{row}" for color in COLORS for row in ROWS)
"""A color in a row."""


def _two_and_two(random: Random) -> Case:
    """The same two colors in both rows, in any order; four different shapes."""
    colors = _pick(random, tuple(COLORS), 2)
    scene = _scene(random, colors + _pick(random, colors, 2), _pick(random, SHAPES, 4))
    return Case(scene, (_one(random, colors), _one(random, ROWS)))


def _asked_color(random: Random, case: Case) -> Case:
    colors = tuple(dict.fromkeys(c for c in case.scene.colors if c))
    return case.asking(0, _other(case.asked[0], colors))


def _reshaped(random: Random, case: Case) -> Case:
    return case.showing(replace(case.scene, shapes=_pick(random, SHAPES, 4)))


def _swapped(random: Random, case: Case) -> Case:
    a, b, c, d = case.scene.colors
    return case.showing(replace(case.scene, colors=(b, a, d, c)))


def _shape_of_color(case: Case) -> str | None:
    color, row = case.asked
    things = zip(PLACES, case.scene.colors, case.scene.shapes, strict=True)
    found = [s for place, c, s in things if c == color and place.startswith(row)]
    return found[0] if len(found) == 1 else None


SHAPE_OF_COLOR = Task(
    why=(
        "Both rows show the same two colors. Two heads move the asked color and row to the last "
        "position. One MLP combines color and row everywhere: of the question at the last "
        "position, of each cell at its glyph. A head whose query is the first and whose key is the "
        "second reads the shape there, which an MLP turns into the answer. Pairs 'shape': the "
        "edges to the reading head's value matter; 'places' (colors swap places): those to its "
        "key; 'color' and 'row' (of the question): those to its query."
    ),
    template="shape of {} in {} answer",
    program=_program(
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
        "row": _flip(1, ROWS),
    },
    answer=_shape_of_color,
)


# The same color? -----------------------------------------------------------------------------


def _repaint(place: int) -> Change:
    """Another color for one of the cells that are compared."""

    def change(random: Random, case: Case) -> Case:
        cell = NAMES_OF_CELLS[case.asked[place]]
        return case.showing(case.scene.with_color(cell, _one(random, tuple(COLORS))))

    return change


def _few_colors(random: Random) -> Case:
    """Cells of two colors."""
    two = _pick(random, tuple(COLORS), 2)
    colors = tuple(_one(random, two) for _ in PLACES)
    scene = _scene(random, colors, _pick(random, SHAPES, 4))
    return Case(scene, (_one(random, FIRST), _one(random, SECOND)))


def _same(case: Case) -> str:
    a, b = (case.scene.color_at(NAMES_OF_CELLS[word]) for word in case.asked)
    return "yes" if a == b else "no"


SAME_COLOR = Task(
    why=(
        "Two heads move the names of two cells to the last position, two others read the colors of "
        "the cells so named, and an MLP compares the colors. Cells are where they are, so no edge "
        "into a key matters. Pairs 'first color' and 'second color' (in the picture): the edges to "
        "the value of the first or second reading head matter; 'first' and 'second' (in the "
        "question): those to its query."
    ),
    template="same color {} {} answer",
    program=_program(
        (
            ask("first"),
            ask("second"),
            *(
                Head(
                    f"read_{name}",
                    tuple(
                        Match({f"asked_{name}.{w}": 1.0}, {f"place.{NAMES_OF_CELLS[w]}": 1.0})
                        for w in parts.CLASSES[name]
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
        "first": _flip(0, FIRST),
        "second": _flip(1, SECOND),
    },
    answer=_same,
)


# Count to two --------------------------------------------------------------------------------

KINDS = tuple(f"{color}_{shape}" for color in COLORS for shape in SHAPES)
"""A color and a shape."""


def _few_things(random: Random) -> Case:
    """Cells of two colors and two shapes."""
    two, others = _pick(random, tuple(COLORS), 2), _pick(random, SHAPES, 2)
    colors = tuple(_one(random, two) for _ in PLACES)
    shapes = tuple(_one(random, others) for _ in PLACES)
    return Case(_scene(random, colors, shapes), (_one(random, two), _one(random, others)))


def _some_color(random: Random, case: Case) -> Case:
    color = _one(random, tuple(COLORS))
    return case.showing(case.scene.with_color(_one(random, PLACES), color))


def _some_shape(random: Random, case: Case) -> Case:
    return case.showing(case.scene.with_shape(_one(random, PLACES), _one(random, SHAPES)))


def _count(case: Case) -> str | None:
    number = list(zip(case.scene.colors, case.scene.shapes, strict=True)).count(case.asked)
    return COUNTS[number] if number < len(COUNTS) else None


COUNT = Task(
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
    program=_program(
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
                (*matches("wanted", "there", KINDS), Match({"last": 1.0}, {"start": 1.0})),
                (parts.Move({"cell": 1.0}, {"share": 1.0}),),
            ),
            Mlp(
                "say",
                (
                    Rule({"one": 1.0}, {"answer.zero": 1.0}),
                    Rule({"share": 6.0}, {"answer.zero": -1.0, "answer.one": 1.0}, at=1.5),
                    Rule({"share": 6.0}, {"answer.one": -1.0, "answer.two": 1.0}, at=3.5),
                ),
            ),
        ),
        COUNTS,
    ),
    draw=_few_things,
    changes={
        "color": _some_color,
        "shape": _some_shape,
        "asked color": lambda random, case: case.asking(0, _one(random, tuple(COLORS))),
        "asked shape": lambda random, case: case.asking(1, _one(random, SHAPES)),
    },
    answer=_count,
)


# Copy from text, ignoring the image ----------------------------------------------------------


def _statement(random: Random) -> Case:
    (a, b), (c, d) = _pick(random, NAMES, 2), _pick(random, tuple(COLORS), 2)
    return Case(_any(random), (a, c, b, d, _one(random, (a, b))))


def _reworded(order: Callable[[Case], tuple[str, ...]]) -> Change:
    """Other words, and another picture that means nothing."""
    return lambda random, case: replace(case, asked=order(case)).showing(_any(random))


def _said(case: Case) -> str:
    return case.asked[case.asked.index(case.asked[4]) + 1]


COPY_FROM_TEXT = Task(
    why=(
        "The prompt says which name has which color and asks for one. A head moves to each color "
        "the name before it (by rotary distance), another the asked name to the last position, and "
        "a head whose query is the second and whose key is the first reads the color word; an MLP "
        "turns it into the answer. Both pictures of a pair differ, are seen as well as in the other "
        "tasks, and a head reads their colors at the last position; nothing of it reaches the "
        "answer. Pairs 'asked': the edges to the reading head's query matter; 'names' (swapped): "
        "those to its key; 'colors' (swapped): that to its value."
    ),
    template="{} {} {} {} ask {} answer",
    program=_program(
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
            lambda case: (*case.asked[:4], _other(case.asked[4], (case.asked[0], case.asked[2])))
        ),
        "names": _reworded(lambda case: tuple(case.asked[i] for i in (2, 1, 0, 3, 4))),
        "colors": _reworded(lambda case: tuple(case.asked[i] for i in (0, 3, 2, 1, 4))),
    },
    answer=_said,
)


# A prior of the text, overridden by the image ------------------------------------------------

PRIOR = {"heart": "red", "leaf": "green", "drop": "blue", "sun": "yellow"}
"""The color that a thing has where the picture does not show it."""


def _two_things(random: Random) -> Case:
    """Two things, neither of which has the color of its prior, in two of the cells."""
    shapes, cells = _pick(random, SHAPES, 2), random.permutation(len(PLACES))[:2]
    scene = Scene((None,) * 4, (None,) * 4, _grain(random))
    for cell, shape in zip(cells, shapes, strict=True):
        color = _one(random, tuple(c for c in COLORS if c != PRIOR[shape]))
        scene = scene.with_color(PLACES[cell], color).with_shape(PLACES[cell], shape)
    return Case(scene, (_one(random, SHAPES),))


def _shown(case: Case) -> str | None:
    """The place of the asked thing."""
    if case.asked[0] not in case.scene.shapes:
        return None
    return PLACES[case.scene.shapes.index(case.asked[0])]


def _override(case: Case) -> str | None:
    place = _shown(case)
    return PRIOR[case.asked[0]] if place is None else case.scene.color_at(place)


def _changed_color(random: Random, case: Case) -> Case:
    place = _shown(case)
    colors = tuple(c for c in COLORS if c != PRIOR[case.asked[0]])
    return case if place is None else case.showing(
        case.scene.with_color(place, _one(random, colors))
    )


def _hidden(random: Random, case: Case) -> Case:
    place = _shown(case)
    return case if place is None else case.showing(
        case.scene.with_color(place, None).with_shape(place, None)
    )


def _ask_like(shown: bool) -> Change:
    """Asks for another thing, where both are shown or neither is."""

    def change(random: Random, case: Case) -> Case:
        after = case.asking(0, _one(random, SHAPES))
        alike = (_shown(case) is not None) == (_shown(after) is not None) == shown
        return after if alike else case

    return change


PRIOR_OVERRIDDEN = Task(
    why=(
        "A head moves the asked thing to the last position, where an MLP knows the color that such "
        "things have. A head whose query is the asked thing and whose key is the shape at each "
        "cell reads the color there; where no cell matches, it attends to the first token. A last "
        "MLP gives the color from the picture, or without one that of the prior. Pairs 'color' (of "
        "the thing in the picture): the edges to the reading head's value matter; 'shown' (the "
        "thing is there in one picture only): those to its key; 'asked, shown': those to its query; "
        "'asked, absent': those of the prior."
    ),
    template="color of {} answer",
    program=_program(
        (
            ask("shape"),
            Mlp(
                "know",
                tuple(
                    Rule({f"asked_shape.{s}": 1.0}, {f"prior.{c}": 1.0}) for s, c in PRIOR.items()
                ),
            ),
            Head(
                "read",
                (
                    *matches("asked_shape", "shape", SHAPES, 2 * SHARPNESS),
                    Match({"last": 1.0}, {"start": 1.0}),
                ),
                (
                    *copies("color", "read", tuple(COLORS)),
                    parts.Move({"cell": 1.0}, {"found": 1.0}),
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
    draw=_two_things,
    changes={
        "color": _changed_color,
        "shown": _hidden,
        "asked, shown": _ask_like(True),
        "asked, absent": _ask_like(False),
    },
    answer=_override,
)

TASKS: Mapping[str, Task] = {
    "color_at_cell": COLOR_AT_CELL,
    "shape_of_color": SHAPE_OF_COLOR,
    "same_color": SAME_COLOR,
    "count_to_two": COUNT,
    "copy_from_text": COPY_FROM_TEXT,
    "prior_overridden": PRIOR_OVERRIDDEN,
}

"""Questions about scenes: a template, the words filled in, and the answer that a scene gives.

A question has an answer only where it is well posed ("what color is the circle?" needs exactly
one circle), so a minimal pair is any one-attribute edit of a scene after which the same question
has another answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

from mechmm.data.scenes import CELLS, COLORS, SHAPES, Scene, Thing

NOTHING = "nothing"
PRIOR = {"heart": "red", "star": "yellow", "diamond": "blue"}
"""The language prior of the demo model: what it answers about a shape that it cannot see."""


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    Attributes:
        template: the text, with `{}` for each word of `Question.about`.
        asked: the indices of the things that decide the answer.
        answer: the answer in a scene, or None where the question is not well posed.
        options: every `about` that may be asked of a scene.
    """

    template: str
    asked: Callable[[Scene, tuple[str, ...]], tuple[int, ...]]
    answer: Callable[[Scene, tuple[str, ...]], str | None]
    options: Callable[[Scene], Iterator[tuple[str, ...]]]


@dataclass(frozen=True)
class Question:
    """A question of one kind about some words, for example `Question("color", ("circle",))`."""

    kind: str
    about: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return KINDS[self.kind].template.format(*self.about)

    def answer(self, scene: Scene) -> str | None:
        """The answer in `scene`, one word, or None where the question is not well posed."""
        return KINDS[self.kind].answer(scene, self.about)

    def asked(self, scene: Scene) -> tuple[int, ...]:
        """Indices into `scene.things` of the things that decide the answer."""
        return KINDS[self.kind].asked(scene, self.about)


def questions(scene: Scene, kind: str) -> list[Question]:
    """Every well-posed question of one kind about a scene."""
    found = [Question(kind, about) for about in KINDS[kind].options(scene)]
    return [question for question in found if question.answer(scene) is not None]


def _named(scene: Scene, about: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for word in about for i, t in enumerate(scene.things) if t.shape == word)


def _colored(scene: Scene, about: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(scene.things) if t.color == about[0])


def _in_cell(scene: Scene, about: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(scene.things) if CELLS[t.cell] == about[0])


def _digits(scene: Scene, about: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(scene.things) if t.digit is not None)


def _beside(scene: Scene, about: tuple[str, ...]) -> tuple[int, ...]:
    named = _named(scene, about)
    if len(named) != 1:
        return ()
    shape = scene.things[named[0]]
    near = (
        i
        for i in _digits(scene, about)
        if scene.things[i].row == shape.row and abs(scene.things[i].column - shape.column) == 1
    )
    return (*near, named[0])


def _one(value: Callable[[Thing], str | None], asked) -> Callable:
    """The value of the only thing asked about."""

    def answer(scene: Scene, about: tuple[str, ...]) -> str | None:
        found = asked(scene, about)
        return value(scene.things[found[0]]) if len(found) == 1 else None

    return answer


def _two(compare: Callable[[Thing, Thing], str | None]) -> Callable:
    """A comparison of two things, each the only one of its shape."""

    def answer(scene: Scene, about: tuple[str, ...]) -> str | None:
        found = _named(scene, about)
        if len(found) != 2 or any(len(_named(scene, (word,))) != 1 for word in about):
            return None
        return compare(scene.things[found[0]], scene.things[found[1]])

    return answer


def _cell_answer(scene: Scene, about: tuple[str, ...]) -> str:
    found = _in_cell(scene, about)
    return scene.things[found[0]].name if found else NOTHING


def _beside_answer(scene: Scene, about: tuple[str, ...]) -> str | None:
    found = _beside(scene, about)
    return scene.things[found[0]].name if len(found) == 2 else None


def _horizontal(a: Thing, b: Thing) -> str | None:
    return None if a.column == b.column else "left" if a.column < b.column else "right"


def _vertical(a: Thing, b: Thing) -> str | None:
    return None if a.row == b.row else "above" if a.row < b.row else "below"


def _shapes_in(scene: Scene) -> Iterator[tuple[str, ...]]:
    return ((word,) for word in sorted({t.shape for t in scene.things if t.shape}))


def _shape_pairs_in(scene: Scene) -> Iterator[tuple[str, ...]]:
    return permutations([word for (word,) in _shapes_in(scene)], 2)


def _each(words) -> Callable[[Scene], Iterator[tuple[str, ...]]]:
    return lambda scene: ((word,) for word in words)


KINDS: dict[str, Kind] = {
    "color": Kind("what color is the {} ?", _named, _one(lambda t: t.color, _named), _shapes_in),
    "shape": Kind("what shape is {} ?", _colored, _one(lambda t: t.shape, _colored), _each(COLORS)),
    "cell": Kind("what is in {} ?", _in_cell, _cell_answer, _each(CELLS)),
    "where": Kind("where is the {} ?", _named, _one(lambda t: CELLS[t.cell], _named), _shapes_in),
    "count": Kind(
        "how many things are {} ?",
        _colored,
        lambda scene, about: str(len(_colored(scene, about))),
        _each(COLORS),
    ),
    "same": Kind(
        "are the {} and the {} the same color ?",
        _named,
        _two(lambda a, b: "yes" if a.color == b.color else "no"),
        _shape_pairs_in,
    ),
    "horizontal": Kind(
        "is the {} left or right of the {} ?", _named, _two(_horizontal), _shape_pairs_in
    ),
    "vertical": Kind("is the {} above or below the {} ?", _named, _two(_vertical), _shape_pairs_in),
    "digit": Kind(
        "what digit is shown ?", _digits, _one(lambda t: t.name, _digits), lambda scene: iter([()])
    ),
    "beside": Kind("what digit is beside the {} ?", _beside, _beside_answer, _shapes_in),
}
"""The question kinds by name."""

TWO_HOPS = ("beside",)
"""Kinds that the demo model was trained on and has not learned: it picks one of the two digits."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "cell": (*SHAPES, *"0123456789", NOTHING),
    "where": CELLS,
    "count": tuple("012345"),
    "same": ("yes", "no"),
    "horizontal": ("left", "right"),
    "vertical": ("above", "below"),
    "digit": tuple("0123456789"),
    "beside": tuple("0123456789"),
}
"""Every answer that a kind can have."""

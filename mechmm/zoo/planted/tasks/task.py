"""What a task is: a program, how its cases are drawn and changed, and the right answers.

Changes make a corrupt case of a clean one. They are chosen so that every edge of the program's
circuit matters in at least one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mechmm.zoo.planted.parts import CONSTANT, PROJECTOR, VISION, WORDS, answers
from mechmm.zoo.planted.pictures import COLORS, PLACES, SHAPES, Scene
from mechmm.zoo.planted.program import Program, Step
from mechmm.zoo.planted.words import FIRST, SECOND

Random = np.random.Generator
CELLS = dict(zip((*FIRST, *SECOND), PLACES, strict=True))
"""Where the cells are that have names."""


@dataclass(frozen=True)
class Case:
    """A picture, and the words that a question puts into its template."""

    scene: Scene
    asked: tuple[str, ...]

    def asking(self, place: int, word: str) -> Case:
        """Another word at one place of the question."""
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
        turns: whether either case of a pair may be the clean one, or only the drawn one.
    """

    why: str
    template: str
    program: Program
    draw: Callable[[Random], Case]
    changes: Mapping[str, Change]
    answer: Callable[[Case], str | None]
    turns: bool = True


def program(language: tuple[Step, ...], said: tuple[str, ...]) -> Program:
    """A program whose vision tower and projector see what all tasks need, and the words that it
    may say."""
    return Program(VISION, PROJECTOR, language, WORDS, answers(said), CONSTANT)


T = TypeVar("T")


def some_of(random: Random, values: tuple[T, ...], number: int) -> tuple[T, ...]:
    """Some of some values, without repetition, in any order."""
    return tuple(values[i] for i in random.permutation(len(values))[:number])


def one_of(random: Random, values: tuple[T, ...]) -> T:
    return values[random.integers(len(values))]


def other(word: str, words: tuple[str, ...]) -> str:
    """The other one of two words."""
    return words[1 - words.index(word)]


def flip(place: int, words: tuple[str, ...]) -> Change:
    """Asks for the other of two words."""
    return lambda random, case: case.asking(place, other(case.asked[place], words))


def new_scene(
    random: Random, colors: tuple[str | None, ...], shapes: tuple[str | None, ...]
) -> Scene:
    """A picture with textures of its own."""
    return Scene(colors, shapes, int(random.integers(2**31)))


def four_of_each(random: Random) -> Scene:
    """Four different colors and four different shapes."""
    return new_scene(random, some_of(random, tuple(COLORS), 4), some_of(random, SHAPES, 4))

"""Random scenes, questions about them, and exact minimal pairs.

A minimal pair differs in one attribute of one thing (its color, its shape, its cell or its digit),
so that whatever separates the two pictures is what the question asks about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mechmm.data.digits import digit_label, split, with_label
from mechmm.data.questions import KINDS, PRIOR, Question, questions
from mechmm.data.scenes import CELLS, COLORS, GRID, SHAPES, Scene, Thing

HELD_OUT = frozenset((color, SHAPES[(3 * i + 1) % 8]) for i, color in enumerate(COLORS))
"""Shape-color combinations that the demo model never sees in training, in picture or text."""

ATTRIBUTE = {
    "color": "color",
    "shape": "shape",
    "cell": "name",
    "where": "cell",
    "count": "color",
    "same": "color",
    "horizontal": "cell",
    "vertical": "cell",
    "digit": "name",
    "beside": "name",
}
"""What a minimal pair of each kind changes."""


@dataclass(frozen=True)
class Sampler:
    """How scenes are drawn.

    Attributes:
        part: which handwritten digits may appear, `"train"` or `"test"`.
        combos: `"seen"` combinations of shape and color, those `"unseen"` in training, or `"all"`.
        prior: share of the shapes of `PRIOR` that have their prior color.
    """

    part: str = "test"
    combos: str = "seen"
    prior: float = 0.6

    def scene(self, rng: np.random.Generator, kind: str) -> Scene:
        """A random scene that suits one kind of question."""
        if kind == "beside":
            return self._beside_scene(rng)
        n_digits = 1 if kind == "digit" else int(rng.random() < 0.3)
        n_shapes = int(rng.integers(0 if kind == "digit" else 2, 6 - n_digits))
        cells = [int(cell) for cell in rng.permutation(len(CELLS))[: n_shapes + n_digits]]
        names = rng.choice(SHAPES, n_shapes, replace=bool(rng.random() < 0.2))
        few = 4 if kind in ("count", "same") else len(COLORS) + 1
        palette = rng.choice(list(COLORS), int(rng.integers(1, few)), replace=False)
        things = [self._shape(rng, cells.pop(), str(name), palette) for name in names]
        things += [self._digit(rng, cell) for cell in cells]
        return Scene(tuple(things[i] for i in rng.permutation(len(things))))

    def ask(self, rng: np.random.Generator, kind: str) -> tuple[Scene, Question]:
        """A random scene and one well-posed question of `kind`, answers balanced."""
        while True:
            scene = self.scene(rng, kind)
            question = self.question(rng, scene, kind)
            if question is not None:
                return scene, question

    def question(self, rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
        """One well-posed question of `kind` about `scene`: first the answer, then the question."""
        found = questions(scene, kind)
        if not found:
            return None
        answers = sorted({str(question.answer(scene)) for question in found})
        answer = answers[rng.integers(len(answers))]
        found = [question for question in found if question.answer(scene) == answer]
        return found[rng.integers(len(found))]

    def pair(self, rng: np.random.Generator, kind: str) -> tuple[Scene, Scene, Question]:
        """A clean scene, the same with one attribute of one thing changed, and a question that
        the two answer differently.

        Raises:
            ValueError: for an unknown kind of question.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
        while True:
            scene, question = self.ask(rng, kind)
            edits = [
                other
                for other in self._edits(rng, scene, question)
                if question.answer(other) not in (None, question.answer(scene))
            ]
            if edits:
                return scene, edits[rng.integers(len(edits))], question

    def _edits(
        self, rng: np.random.Generator, scene: Scene, question: Question
    ) -> Iterator[Scene]:
        attribute = ATTRIBUTE[question.kind]
        for i in question.asked(scene) or range(len(scene.things)):
            thing = scene.things[i]
            if attribute == "cell":
                taken = {other.cell for other in scene.things}
                yield from (scene.replace(i, cell=c) for c in range(len(CELLS)) if c not in taken)
            elif thing.digit is not None and attribute == "name":
                others = [d for d in "0123456789" if d != thing.name]
                label = str(rng.choice(others))
                yield scene.replace(i, digit=int(rng.choice(with_label(label, self.part))))
            elif thing.shape is not None and thing.color is not None:
                for color, shape in (
                    [(color, thing.shape) for color in COLORS]
                    if attribute == "color"
                    else [(thing.color, shape) for shape in SHAPES]
                ):
                    if self._allowed(color, shape):
                        yield scene.replace(i, color=color, shape=shape)

    def _allowed(self, color: str, shape: str) -> bool:
        return self.combos == "all" or ((color, shape) in HELD_OUT) == (self.combos == "unseen")

    def _shape(self, rng: np.random.Generator, cell: int, shape: str, palette) -> Thing:
        color = str(rng.choice(palette))
        if shape in PRIOR and rng.random() < self.prior:
            color = PRIOR[shape]
        while not self._allowed(color, shape):
            color = str(rng.choice(list(COLORS)))
        scale = float(rng.uniform(0.7, 0.92))
        return Thing(cell, shape, color, scale=scale, shift=_shift(rng, scale))

    def _digit(self, rng: np.random.Generator, cell: int) -> Thing:
        index, scale = int(rng.choice(split(self.part))), float(rng.uniform(0.8, 1.0))
        angle = float(rng.uniform(-10, 10))
        return Thing(cell, digit=index, scale=scale, shift=_shift(rng, scale), angle=angle)

    def _beside_scene(self, rng: np.random.Generator) -> Scene:
        """Two rows, each with a shape and a digit next to each other, and one more shape."""
        rows = rng.permutation(GRID)[:3]
        names = [str(name) for name in rng.choice(SHAPES, 3, replace=False)]
        things = []
        for row, name in zip(rows[:2], names, strict=False):
            column = int(rng.integers(GRID - 1))
            left, right = (int(row) * GRID + column + step for step in rng.permutation(2))
            things += [self._shape(rng, left, name, list(COLORS)), self._digit(rng, right)]
        cell = int(rows[2]) * GRID + int(rng.integers(GRID))
        things.append(self._shape(rng, cell, names[2], list(COLORS)))
        return Scene(tuple(things[i] for i in rng.permutation(len(things))))


def _shift(rng: np.random.Generator, scale: float) -> tuple[float, float]:
    """A random shift that keeps the thing inside its cell."""
    room = max(0.0, 0.98 - scale) / 2
    return float(rng.uniform(-room, room)), float(rng.uniform(-room, room))


def prompt(question: Question, scene: Scene | None = None) -> str:
    """The text put to a model: about a picture, or about `scene` described in words."""
    context = "<image>" if scene is None else scene.describe()
    return f"{context} {question.text} answer :"


__all__ = ["ATTRIBUTE", "HELD_OUT", "Sampler", "digit_label", "prompt"]

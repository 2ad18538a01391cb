"""Random scenes, questions about them, and exact minimal pairs.

A minimal pair differs in one attribute of one thing (its color, its shape, its cell or its digit),
so that whatever separates the two pictures is what the question asks about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from mechmm.data.digits import split, with_label
from mechmm.data.pairs import Pair, PairDataset, Prompt
from mechmm.data.questions import KINDS, PRIOR, Question, questions
from mechmm.data.scenes import CELLS, COLORS, GRID, PIXELS, SHAPES, Scene, Thing
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import Box, TokenLayout, Where, Words

Form = Literal["image", "text"]
"""Whether a scene is shown or told."""
Spans = Literal["things", "data"]
"""Whether single things of a scene are spans, or the whole of it is."""

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
            ValueError: for an unknown kind of question; for one whose pairs change a color or a
                shape where only unseen combinations may appear.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")
        if self.combos == "unseen" and ATTRIBUTE[kind] in ("color", "shape"):
            raise ValueError(
                f"pairs of kind {kind!r} change a {ATTRIBUTE[kind]}, but every shape has only one "
                "unseen color; use combos='all', or another kind"
            )
        while True:
            scene, question = self.ask(rng, kind)
            edits = [
                other
                for other in self._edits(rng, scene, question)
                if question.answer(other) not in (None, question.answer(scene))
            ]
            if edits:
                return scene, edits[rng.integers(len(edits))], question

    def _edits(self, rng: np.random.Generator, scene: Scene, question: Question) -> Iterator[Scene]:
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
            left, right = (int(row) * GRID + column + int(step) for step in rng.permutation(2))
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


def pairs(
    model: HookedMultimodal,
    kind: str,
    n: int,
    seed: int = 0,
    form: Form = "image",
    sampler: Sampler | None = None,
    spans: Spans = "things",
) -> PairDataset:
    """Random minimal pairs of one kind of question, shown as pictures or told in words.

    Spans: `object` is the thing that changes. In a picture it is the whole cell; where the thing
    moves, `object` is its cell in the clean picture and `object_corrupt` the one in the corrupt
    picture. In a text it is the thing's description. `distractor` is a thing that neither changes
    nor is asked about, where there is one apart from the others on the model's grid of patches.
    With `spans="data"` there is one span instead, `data`: the whole picture, or all that is told
    of it before the question.

    Labels: `kind`, `form` and `asked`, the words that the question is about.

    Args:
        model: what to align the pairs for.
        kind: a key of `mechmm.data.questions.KINDS`.
        n: how many pairs; the first ones of a seed are the same for every `n`.
        form: `"image"`, or `"text"` for the same scenes described in words.
        sampler: how scenes are drawn; default: `Sampler()`, whose digits the demo model never saw.
        spans: which places have names.

    Raises:
        ValueError: an unknown kind, form or spans; fewer than one pair.
        PairError: where the model's tokenizer does not align the pair.
    """
    if form not in get_args(Form):
        raise ValueError(f"unknown form {form!r}; use one of {', '.join(get_args(Form))}")
    if spans not in get_args(Spans):
        raise ValueError(f"unknown spans {spans!r}; use one of {', '.join(get_args(Spans))}")
    if n < 1:
        raise ValueError(f"{n} pairs were asked for; ask for at least 1")
    drawn = _drawn(kind, n, seed, sampler)
    made = [scene_pair(model, *one, form=form) for one in drawn]
    if spans == "data":
        made = [
            _with_data(pair, clean, form) for pair, (clean, _, _) in zip(made, drawn, strict=True)
        ]
    return PairDataset(made, model)


def scenes(kind: str, n: int, seed: int = 0, sampler: Sampler | None = None) -> list[Scene]:
    """The clean scenes of `pairs` with the same arguments.

    Raises:
        ValueError: an unknown kind; fewer than one scene.
    """
    if n < 1:
        raise ValueError(f"{n} scenes were asked for; ask for at least 1")
    return [clean for clean, _, _ in _drawn(kind, n, seed, sampler)]


def concepts(scenes: Sequence[Scene]) -> dict[str, list[list[Box]]]:
    """Where every color, shape and digit is that some scenes show: for each scene the cells of the
    things that have it. Names: `color red`, `shape ring`, `digit 7`; and `thing`, for all of them.
    """
    found: dict[str, list[list[Box]]] = {"thing": [[] for _ in scenes]}
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            kind = "digit" if thing.digit is not None else "shape"
            names = ["thing", f"{kind} {thing.name}"]
            names += [f"color {thing.color}"] * (thing.color is not None)
            for name in names:
                own = found.setdefault(name, [[] for _ in scenes])
                own[number].append(_cell_box(thing))
    return dict(sorted(found.items()))


def _drawn(
    kind: str, n: int, seed: int, sampler: Sampler | None
) -> list[tuple[Scene, Scene, Question]]:
    """Clean and corrupt scenes and the question asked of both."""
    sampler = sampler if sampler is not None else Sampler()
    rng = np.random.default_rng(seed)
    return [sampler.pair(rng, kind) for _ in range(n)]


def scene_pair(
    model: HookedMultimodal, clean: Scene, corrupt: Scene, question: Question, form: Form = "image"
) -> Pair:
    """Two scenes that differ in one thing, and a question that they answer differently.

    Spans and labels are as in `pairs`.

    Raises:
        ValueError: scenes that do not differ in exactly one thing, or one that has no answer.
    """
    changes = [a != b for a, b in zip(clean.things, corrupt.things, strict=True)]
    if sum(changes) != 1 or None in (question.answer(clean), question.answer(corrupt)):
        raise ValueError(
            f"{question.text!r}: the scenes differ in {sum(changes)} things and are answered "
            f"{question.answer(clean)!r} and {question.answer(corrupt)!r}; change exactly one "
            "thing, so that the question keeps an answer"
        )
    if form == "text":
        return _text_pair(clean, corrupt, question)
    picture = model.encode(model.image_token, clean.render()).layout
    return _image_pair(clean, corrupt, question, model.image_token, picture)


def color_pairs(
    model: HookedMultimodal, n: int, seed: int = 0, form: Form = "image"
) -> PairDataset:
    """Minimal pairs that differ in the color of the thing asked about; see `pairs`."""
    return pairs(model, "color", n, seed, form)


def _with_data(pair: Pair, clean: Scene, form: Form) -> Pair:
    """A pair whose only span is the whole scene."""
    shown, told = Box(0, 0, PIXELS, PIXELS), Words(clean.describe())
    return replace(pair, spans={"data": shown if form == "image" else told})


def prior_pairs(
    model: HookedMultimodal, n: int, seed: int = 0, form: Form = "image"
) -> PairDataset:
    """Sight against expectation: the thing asked about has another color than its shape mostly has
    (`mechmm.data.questions.PRIOR`); in the corrupt scene it has the expected one.

    The answer is the color that is there, the foil the one that language expects; spans and labels
    are as in `pairs`.

    Raises:
        ValueError: an unknown form; fewer than one pair.
    """
    if form not in get_args(Form) or n < 1:
        raise ValueError(f"form is {form!r} and n {n}; use image or text, and at least 1 pair")
    rng, found = np.random.default_rng(seed), []
    while len(found) < n:
        clean, question = Sampler(prior=0.0).ask(rng, "color")
        expected = PRIOR.get(question.about[0])
        if expected not in (None, question.answer(clean)):
            corrupt = clean.replace(question.asked(clean)[0], color=expected)
            found.append(scene_pair(model, clean, corrupt, question, form))
    return PairDataset(found, model)


def _text_pair(clean: Scene, corrupt: Scene, question: Question) -> Pair:
    changed = _changed(clean, corrupt)
    spans: dict[str, Where] = {"object": Words(clean.things[changed].describe())}
    for index in _bystanders(clean, question, changed):
        spans.setdefault("distractor", Words(clean.things[index].describe()))
    prompts = [Prompt(prompt(question, scene)) for scene in (clean, corrupt)]
    return _pair(prompts, (clean, corrupt), question, spans, "text")


def _image_pair(
    clean: Scene, corrupt: Scene, question: Question, token: str, picture: TokenLayout
) -> Pair:
    """A pair of pictures; `picture` is the layout of one, to tell which cells share patches."""
    changed = _changed(clean, corrupt)
    spans = {"object": _cell_box(clean.things[changed])}
    further = [("object_corrupt", corrupt.things[changed])]
    further += [("distractor", clean.things[i]) for i in _bystanders(clean, question, changed)]
    for name, thing in further:
        if name not in spans and _apart(picture, _cell_box(thing), spans.values()):
            spans[name] = _cell_box(thing)
    text = prompt(question).replace("<image>", token)
    prompts = [Prompt(text, (scene.render(),)) for scene in (clean, corrupt)]
    return _pair(prompts, (clean, corrupt), question, spans, "image")


def _pair(
    prompts: Sequence[Prompt],
    scenes: tuple[Scene, Scene],
    question: Question,
    spans: Mapping[str, Where],
    form: Form,
) -> Pair:
    clean, corrupt = prompts
    answer, foil = (str(question.answer(scene)) for scene in scenes)
    meta = {"kind": question.kind, "form": form, "asked": " ".join(question.about)}
    return Pair(clean, corrupt, answer, foil, spans, meta)


def _changed(clean: Scene, corrupt: Scene) -> int:
    """Index of the one thing that differs."""
    things = zip(clean.things, corrupt.things, strict=True)
    return next(i for i, (one, other) in enumerate(things) if one != other)


def _bystanders(scene: Scene, question: Question, changed: int) -> Iterator[int]:
    """Things that neither change nor are asked about."""
    asked = question.asked(scene)
    return (i for i in range(len(scene.things)) if i != changed and i not in asked)


def _cell_box(thing: Thing) -> Box:
    side = PIXELS / GRID
    left, top = thing.column * side, thing.row * side
    return Box(left, top, left + side, top + side)


def _apart(picture: TokenLayout, box: Box, others: Iterable[Box]) -> bool:
    """Whether a box shares no patch with the others."""
    taken = {cell for other in others for cell in picture.cells(other)}
    return taken.isdisjoint(picture.cells(box))


__all__ = [
    "ATTRIBUTE",
    "HELD_OUT",
    "Form",
    "Sampler",
    "Spans",
    "color_pairs",
    "concepts",
    "pairs",
    "prior_pairs",
    "prompt",
    "scene_pair",
    "scenes",
]

"""How often the demo model is right, per kind of question, on scenes that it has never seen.

Digits come from scikit-learn's test split, which training never draws from. Pictures go through
the model's own processor, as a user's would.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from mechmm.data.digits import split
from mechmm.data.metrics import last_logits
from mechmm.data.questions import KINDS, PRIOR, TWO_HOPS, Question
from mechmm.data.scenes import Scene
from mechmm.data.shapes import HELD_OUT, Sampler, prompt
from mechmm.model.hooked import HookedMultimodal

Asked = tuple[Scene, Question]
Draw = Callable[[np.random.Generator], Asked]
COMBINATIONS = {shape: color for color, shape in HELD_OUT}


def evaluate(
    model: HookedMultimodal, n: int = 500, seed: int = 0, batch_size: int = 64
) -> pd.DataFrame:
    """Accuracy of the model's first answer token among its whole vocabulary.

    Args:
        n: questions per row of the table; the row of digits asks every test image once.
        seed: of the scenes; they are drawn apart from those of training.

    Returns:
        Columns: about (what is measured), kind, form (image or text), n, accuracy.
    """
    rows = []
    for kind in KINDS:
        about = "two hops, not learned" if kind in TWO_HOPS else "fresh scenes"
        for form in ("image", "text"):
            rows.append(_row(model, about, kind, form, _fresh(kind, n, seed), batch_size))
    rows.append(_row(model, "every test digit", "digit", "image", _digits(seed), batch_size))
    for about, draw in OTHERS.items():
        for form in ("image", "text"):
            asked = _drawn(draw, n, seed)
            rows.append(_row(model, about, "color", form, asked, batch_size))
    return pd.DataFrame(rows)


def _row(model, about: str, kind: str, form: str, asked: list[Asked], batch_size: int) -> dict:
    right = 0
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts = [prompt(q, None if form == "image" else s) for s, q in part]
        pictures = [scene.render() for scene, _ in part] if form == "image" else []
        answers = predictions(model, texts, pictures)
        right += sum(a == _answer(asked) for a, asked in zip(answers, part, strict=True))
    return {
        "about": about,
        "kind": kind,
        "form": form,
        "n": len(asked),
        "accuracy": right / len(asked),
    }


@torch.no_grad()
def predictions(model: HookedMultimodal, texts: list[str], pictures: list) -> list[str]:
    """The word that the model gives the highest logit, per prompt."""
    logits = last_logits(model, model.encode(texts, pictures))
    words = model.to_string(logits.argmax(-1, keepdim=True))
    return [word.strip() for word in words]


def _generator(seed: int) -> np.random.Generator:
    """Apart from every generator of training, whose seeds are (seed, phase, step)."""
    return np.random.default_rng([2412, 2104, seed])


def _fresh(kind: str, n: int, seed: int) -> list[Asked]:
    return _drawn(lambda rng: Sampler("test").ask(rng, kind), n, seed)


def _drawn(draw: Draw, n: int, seed: int) -> list[Asked]:
    rng = _generator(seed)
    return [draw(rng) for _ in range(n)]


def _digits(seed: int) -> list[Asked]:
    """Every test image once, in a random scene."""
    return [
        (_with_digit(scene, index), question)
        for index, (scene, question) in zip(
            split("test"), _fresh("digit", len(split("test")), seed), strict=True
        )
    ]


def _with_digit(scene: Scene, index: int) -> Scene:
    place = next(i for i, thing in enumerate(scene.things) if thing.digit is not None)
    return scene.replace(place, digit=index)


def _unseen(rng: np.random.Generator) -> Asked:
    """The asked shape in the one color that training never gave it."""
    scene, question = Sampler("test").ask(rng, "color")
    place = question.asked(scene)[0]
    return scene.replace(place, color=COMBINATIONS[question.about[0]]), question


def _conflict(rng: np.random.Generator) -> Asked:
    """A shape with a language prior, in another color."""
    while True:
        scene, question = Sampler("test", prior=0.0).ask(rng, "color")
        if PRIOR.get(question.about[0]) not in (None, question.answer(scene)):
            return scene, question


def _absent(rng: np.random.Generator) -> Asked:
    """A question about a shape with a language prior that the scene does not show."""
    while True:
        scene = Sampler("test").scene(rng, "color")
        missing = [shape for shape in PRIOR if all(shape != t.shape for t in scene.things)]
        if missing:
            return scene, Question("color", (missing[rng.integers(len(missing))],))


def _answer(asked: Asked) -> str | None:
    """The right answer, or the prior's where the scene has none."""
    scene, question = asked
    return question.answer(scene) or PRIOR.get(question.about[0])


OTHERS: dict[str, Draw] = {
    "unseen combination": _unseen,
    "against the prior": _conflict,
    "prior, shape absent": _absent,
}
"""Further questions about color, by what they measure."""

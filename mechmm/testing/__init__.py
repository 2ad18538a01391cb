"""Tiny random models of every family, their inputs, and checks that nothing is left behind.

For tests of this package and of code built on it. A model is made from config classes in
milliseconds, without a download. Its weights are drawn wide enough that every part of it matters:
the defaults of `transformers` leave attention almost uniform and some projectors at zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mechmm.data.pairs import Pair, PairDataset, Prompt
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing.checks import assert_no_hooks
from mechmm.testing.processors import tiny_processor
from mechmm.testing.tiny import RECIPES, tiny_hf, tiny_inputs
from mechmm.testing.vocabulary import SPECIAL, WORDS, tiny_tokenizer

SIDE = 32
"""Pixels of the pictures of tiny pairs."""

__all__ = [
    "RECIPES",
    "SPECIAL",
    "WORDS",
    "assert_no_hooks",
    "tiny",
    "tiny_hf",
    "tiny_inputs",
    "tiny_pairs",
    "tiny_processor",
    "tiny_tokenizer",
]


def tiny(family: str = "llava", **options: Any) -> HookedMultimodal:
    """A tiny hooked model with a real processor.

    Args:
        family: a name in `RECIPES`.
        **options: of `tiny_hf`.

    Raises:
        ValueError: for a family, vision tower or language model that has no tiny version.
    """
    hf_model = tiny_hf(family, **options)
    return HookedMultimodal.from_hf(hf_model, tiny_processor(hf_model))


def tiny_pairs(
    family: str = "llava", n: int = 2, seed: int = 0, **options: Any
) -> tuple[HookedMultimodal, PairDataset]:
    """A tiny model, and pairs that ask it about two pictures of noise.

    Args:
        **options: of `tiny_hf`.
    """
    model, rng = tiny(family, **options), np.random.default_rng(seed)
    text = f"{model.image_token} what color is the circle ? answer :"

    def prompt() -> Prompt:
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Prompt(text, (Image.fromarray(pixels),))

    pairs = [Pair(prompt(), prompt(), "red", "blue") for _ in range(n)]
    return model, PairDataset(pairs, model)

"""What a tiny model is made from: the recipe of one family, and sizes that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mechmm.testing.vocabulary import SPECIAL, WORDS, token

PIXELS, PATCH = 32, 8
VOCABULARY = len(SPECIAL) + len(WORDS)


@dataclass(frozen=True)
class Maker:
    """How to make the inputs of one kind of medium.

    Attributes:
        inputs: (config, number of media, random generator) -> the model's inputs for them, float32.
        tokens: (config, these inputs) -> for each medium, the ids that stand for it in a prompt,
            with whatever the family's own processor puts around and between them.
    """

    inputs: Callable[[Any, int, torch.Generator], dict[str, Tensor]]
    tokens: Callable[[Any, Mapping[str, Tensor]], list[list[int]]]


def _as_they_are(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs


@dataclass(frozen=True)
class Tiny:
    """The recipe of one family.

    Attributes:
        architecture: class in `transformers`.
        config: (options) -> its config. Every recipe takes `heads`, `key_value_heads`, `layers`
            (of the language model) and `vision_layers`, and options of its own.
        makers: by kind of medium: `"image"`, `"video"`, `"audio"`.
        text: whether the model reads text.
        finish: (config, inputs) -> the inputs with what else the model takes (token types, ...).
    """

    architecture: str
    config: Callable[..., PreTrainedConfig]
    makers: Mapping[str, Maker]
    text: bool = True
    finish: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = field(default=_as_they_are)


def text_sizes(heads: int, key_value_heads: int, layers: int) -> dict[str, Any]:
    """Sizes and token ids of a tiny language model, as config entries."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": token("<pad>"),
        "bos_token_id": token("<s>"),
        "eos_token_id": token("</s>"),
    }


def vision_sizes(layers: int, heads: int = 4) -> dict[str, Any]:
    """Sizes of a tiny vision tower (32 x 32 pixels, 4 x 4 patches), as config entries."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": PIXELS,
        "patch_size": PATCH,
    }


def random_pixels(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Normal numbers of a shape."""
    return torch.randn(tuple(shape), generator=random)

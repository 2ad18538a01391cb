"""Tiny random models of every family, and ready inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mechmm.model.families import FAMILIES
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import encoders, fused, packed, single, tiles
from mechmm.testing.recipes import Tiny
from mechmm.testing.vocabulary import SPECIAL, WORDS

RECIPES: dict[str, Tiny] = {
    **single.RECIPES,
    **tiles.RECIPES,
    **packed.RECIPES,
    **encoders.RECIPES,
    **fused.RECIPES,
}
"""The recipe of each family by its short name."""


def recipe_of(hf_model: PreTrainedModel) -> Tiny:
    """The recipe of a model; where recipes share an architecture, the one named after its tower."""
    architecture = type(hf_model).__name__
    found = {n: r for n, r in RECIPES.items() if r.architecture == architecture}
    vision = getattr(hf_model.config, "vision_config", None)
    return found.get(getattr(vision, "model_type", ""), next(iter(found.values())))


def tiny_hf(
    family: str = "llava",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A tiny Hugging Face model with random weights, in evaluation mode, on the CPU.

    Args:
        family: a name in `RECIPES`.
        attention: `"sdpa"` or `"eager"`.
        dtype: of the parameters.
        seed: of the weights; the global random state is left alone.
        **options: of the family's recipe: `heads`, `key_value_heads`, `layers`, `vision_layers`,
            and for LLaVA `vision`, `text`, `vision_feature_layer`, `select`.

    Raises:
        ValueError: for a family, vision tower or language model that has no tiny version.
    """
    recipe = single.chosen("family", family, RECIPES)
    kind: Any = getattr(transformers, recipe.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not by name where it is the default: transformers then takes it where a part supports it.
        implementation = None if attention == "sdpa" else attention
        model = kind._from_config(recipe.config(**options), attn_implementation=implementation)
        _widen(model)
    return _cast(model, dtype).eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Real parameters and buffers in a dtype; complex ones (Llama 4's rotary) stay as they are."""
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return model


TABLES = (
    "embed_tokens",
    "token_embedding",
    "shared",
    "position_embedding",
    "pos_embed",
    "tile_embedding",
    "tile_positional_embedding",
)
"""Parts of the names of tables, whose rows are drawn as wide as activations."""
CENTRES = {"A_log": -2.0, "logit_scale": 2.0}
"""Where vectors are drawn around, if not around the mean that the model initialises them to."""


@torch.no_grad()
def _widen(model: PreTrainedModel) -> None:
    """Draw matrices with a gain of 1.5, vectors and norms around the mean that they start at."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".")[-1]
        if parameter.ndim < 2 or "norm" in name:
            parameter.normal_(CENTRES.get(last, float(parameter.float().mean())), 0.2)
        elif "quantize" in name:
            parameter.normal_(0.0, 0.2)
        else:
            parameter.normal_(0.0, 1.5 * _fan_in(name, parameter) ** -0.5)


def _fan_in(name: str, parameter: Tensor) -> int:
    """How many inputs an output of a matrix, convolution, table or expert is a sum of."""
    if any(table in name for table in TABLES):
        return 1
    if "experts" in name and parameter.ndim == 3:
        llama4 = "feed_forward" in name  # [expert, in, out]; elsewhere [expert, out, in]
        return parameter.shape[1 if llama4 else 2]
    return parameter[0].numel()


def tiny_inputs(
    model: HookedMultimodal | PreTrainedModel,
    images_per_prompt: Sequence[int] = (1,),
    words: Sequence[int] | int = 6,
    *,
    kind: str = "image",
    padding_side: str = "left",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Ready inputs without a processor: random words and media, placeholders where they belong.

    Args:
        model: a tiny model, hooked or not.
        images_per_prompt: how many media each prompt has; one prompt per entry.
        words: how many words follow the media, for all prompts or per prompt.
        kind: of the media: `"image"`, `"video"` or `"audio"`.
        padding_side: where shorter prompts are padded.
        seed: of words and media.

    Returns:
        `input_ids`, `attention_mask` [batch, pos], the media, and what else the model takes.

    Raises:
        ValueError: where `words` and `images_per_prompt` have different lengths.
    """
    hf_model = model.hf_model if isinstance(model, HookedMultimodal) else model
    config, recipe = hf_model.config, recipe_of(hf_model)
    counts = [words] * len(images_per_prompt) if isinstance(words, int) else list(words)
    if len(counts) != len(images_per_prompt):
        raise ValueError(f"words has {len(counts)} entries for {len(images_per_prompt)} prompts")
    random = torch.Generator().manual_seed(seed)
    media, pieces = {}, []
    if sum(images_per_prompt):
        maker = single.chosen("medium", kind, recipe.makers)
        media = maker.inputs(config, sum(images_per_prompt), random)
        pieces = maker.tokens(config, media)
    left = iter(pieces)
    rows = [
        _prompt([next(left) for _ in range(images)], n, random)
        for images, n in zip(images_per_prompt, counts, strict=True)
    ]
    texts = _padded(rows, padding_side) if recipe.text else {}
    inputs = recipe.finish(config, {**texts, **media})
    if recipe.text and _takes_positions(hf_model):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    cast = {k: v.to(hf_model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return {name: value.to(hf_model.device) for name, value in cast.items()}


def _takes_positions(hf_model: PreTrainedModel) -> bool:
    """Whether a model is given the positions of its tokens, rather than to compute its own."""
    family = FAMILIES.get(type(hf_model).__name__)
    accepted = "position_ids" in inspect.signature(hf_model.forward).parameters
    return accepted and family is not None and not family.own_positions


def _prompt(media: Sequence[Sequence[int]], words: int, random: torch.Generator) -> list[int]:
    """`<s>`, then a word and the tokens of each medium, then words."""
    drawn = torch.randint(len(WORDS), (len(media) + words,), generator=random) + len(SPECIAL)
    ids = [SPECIAL.index("<s>")]
    for word, tokens in zip(drawn.tolist(), media, strict=False):
        ids += [word, *tokens]
    return ids + drawn[len(media) :].tolist()


def _padded(rows: Sequence[Sequence[int]], side: str) -> dict[str, Int[Tensor, "batch pos"]]:
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        blank = [SPECIAL.index("<pad>")] * (width - len(row))
        ids.append([*blank, *row] if side == "left" else [*row, *blank])
        real, off = [1] * len(row), [0] * len(blank)
        mask.append([*off, *real] if side == "left" else [*real, *off])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

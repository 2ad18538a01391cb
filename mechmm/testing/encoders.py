"""Tiny encoders without a language model: towers of pictures, alone or beside one of text.

Options of the language model (`heads`, `layers`) are those of the text tower; of an encoder that
has none, `heads` are those of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    PreTrainedConfig,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from mechmm.testing.recipes import (
    PATCH,
    PIXELS,
    Maker,
    Tiny,
    random_pixels,
    text_sizes,
    vision_sizes,
)
from mechmm.testing.vocabulary import token

WIDTH, HEADS = 48, 6
"""Of the vision towers that stand beside one of text, other than those of the latter."""
SHAPES = (2, 6), (5, 3), (4, 4)
"""Rows and columns of patches of SigLIP 2's first picture, the second, the third, and again."""
MOST = 16
"""Patches that its pictures are padded to."""
WIDE = PIXELS * 3 // 4
"""Columns of pixels of pictures that need not be square."""


def text_tower(heads: int, layers: int) -> dict[str, Any]:
    """Sizes of a tiny text tower, as config entries; a text ends with `<end>`."""
    sizes = {**text_sizes(heads, heads, layers), "eos_token_id": token("<end>")}
    return {
        k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "tie_word_embeddings")
    }


def vision_tower(layers: int) -> dict[str, Any]:
    """Sizes of a tiny vision tower, as config entries."""
    return {**vision_sizes(layers, HEADS), "hidden_size": WIDTH, "intermediate_size": 40}


def clip_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> CLIPConfig:
    """CLIP: the text is read at its end, the picture at its class token."""
    return CLIPConfig(
        vision_config=vision_tower(vision_layers),
        text_config=text_tower(heads, layers),
        projection_dim=24,
    )


def siglip_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> SiglipConfig:
    """SigLIP: the text is read at the last position, the picture by a head that attends."""
    return SiglipConfig(
        vision_config=vision_tower(vision_layers),
        text_config={**text_tower(heads, layers), "projection_size": WIDTH},
    )


def siglip2_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Siglip2Config:
    """SigLIP 2: the same, with pictures of any shape."""
    return Siglip2Config(
        vision_config={**shapeless(vision_tower(vision_layers)), "num_patches": MOST},
        text_config={**text_tower(heads, layers), "projection_size": WIDTH},
    )


def clip_vision_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> CLIPVisionConfig:
    """CLIP's vision tower alone."""
    return CLIPVisionConfig(**vision_sizes(vision_layers, heads), projection_dim=24)


def siglip_vision_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> SiglipVisionConfig:
    """SigLIP's vision tower alone."""
    return SiglipVisionConfig(**vision_sizes(vision_layers, heads))


def siglip2_vision_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Siglip2VisionConfig:
    """SigLIP 2's vision tower alone."""
    return Siglip2VisionConfig(**shapeless(vision_sizes(vision_layers, heads)), num_patches=MOST)


def vit_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> ViTConfig:
    """A vision transformer for pictures that are not square."""
    sizes = {**vision_sizes(vision_layers, heads), "image_size": (PIXELS, WIDE), "num_labels": 5}
    return ViTConfig(**sizes, pooler_output_size=24)


def dinov2_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    swiglu: bool = False,
) -> Dinov2Config:
    """DINOv2: a scale behind attention and MLP; position embeddings fitted to the picture.

    Args:
        swiglu: whether the MLP is gated, as in the largest checkpoint.
    """
    sizes = {**vision_sizes(vision_layers, heads), "num_labels": 5}
    del sizes["intermediate_size"]
    return Dinov2Config(**sizes, mlp_ratio=2, use_swiglu_ffn=swiglu)


def dinov3_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    gated: bool = False,
) -> DINOv3ViTConfig:
    """DINOv3: 4 registers between the class token and the patches, which alone are rotary.

    Args:
        gated: whether the MLP is gated, as in the larger checkpoints.
    """
    sizes = vision_sizes(vision_layers, heads)
    return DINOv3ViTConfig(**sizes, num_register_tokens=4, use_gated_mlp=gated)


def shapeless(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a vision tower without a size of its pictures."""
    return {name: size for name, size in sizes.items() if name != "image_size"}


def square_pictures(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, channel, row, column]."""
    return {"pixel_values": random_pixels((number, 3, PIXELS, PIXELS), random)}


def tall_pictures(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """The same with fewer columns than rows."""
    return {"pixel_values": random_pixels((number, 3, PIXELS, WIDE), random)}


def padded_patches(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, patch, row * column * channel], what is real of it, and shapes."""
    shapes = torch.tensor([SHAPES[i % len(SHAPES)] for i in range(number)])
    real = torch.arange(MOST) < shapes.prod(-1, keepdim=True)
    pixels = random_pixels((number, MOST, 3 * PATCH**2), random) * real[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": real.int(), "spatial_shapes": shapes}


def no_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Nothing stands for a picture in the text."""
    return [[] for _ in inputs["pixel_values"]]


def ended(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts `<end>` in the place of the last token of each text."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
    ids[torch.arange(len(ids)), last] = token("<end>")
    return {**inputs, "input_ids": ids}


def _alone(
    architecture: str,
    config: Callable[..., PreTrainedConfig],
    pictures: Callable[[Any, int, torch.Generator], dict[str, Tensor]],
) -> Tiny:
    """The recipe of an encoder of pictures alone."""
    return Tiny(architecture, config, {"image": Maker(pictures, no_tokens)}, text=False)


SQUARE = {"image": Maker(square_pictures, no_tokens)}
PADDED = {"image": Maker(padded_patches, no_tokens)}

RECIPES: dict[str, Tiny] = {
    "clip": Tiny("CLIPModel", clip_config, SQUARE, finish=ended),
    "siglip": Tiny("SiglipModel", siglip_config, SQUARE, finish=ended),
    "siglip2": Tiny("Siglip2Model", siglip2_config, PADDED, finish=ended),
    "clip_vision_model": _alone("CLIPVisionModel", clip_vision_config, square_pictures),
    "clip_vision_projection": _alone(
        "CLIPVisionModelWithProjection", clip_vision_config, square_pictures
    ),
    "siglip_vision_model": _alone("SiglipVisionModel", siglip_vision_config, square_pictures),
    "siglip2_vision_model": _alone("Siglip2VisionModel", siglip2_vision_config, padded_patches),
    "vit": _alone("ViTModel", vit_config, tall_pictures),
    "vit_classifier": _alone("ViTForImageClassification", vit_config, tall_pictures),
    "dinov2": _alone("Dinov2Model", dinov2_config, tall_pictures),
    "dinov2_classifier": _alone("Dinov2ForImageClassification", dinov2_config, tall_pictures),
    "dinov3_vit": _alone("DINOv3ViTModel", dinov3_config, tall_pictures),
}

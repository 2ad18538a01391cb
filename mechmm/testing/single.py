"""Tiny models of families that show every picture whole, in one piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
    VideoLlavaConfig,
    VipLlavaConfig,
)
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
)

from mechmm.model.grids import single
from mechmm.testing.recipes import (
    PIXELS,
    Maker,
    Tiny,
    random_pixels,
    text_sizes,
    vision_sizes,
)
from mechmm.testing.vocabulary import token

TEXTS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "cohere2": Cohere2Config,
    "smollm3": SmolLM3Config,
}
VISIONS: dict[str, Callable[..., PreTrainedConfig]] = {
    "clip": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
}
FRAMES = 3
SIZES = ((24, 32), (32, 16), (16, 24))
"""Heights and widths that the pictures of a prompt take in turn, where they may differ."""


def chosen(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of a table.

    Raises:
        ValueError: for a name that it has not, with those it has.
    """
    if name not in table:
        raise ValueError(f"no tiny {what} {name!r}; there are {', '.join(sorted(table))}")
    return table[name]


def one_picture(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, channel, row, column]."""
    return {"pixel_values": random_pixels((number, 3, PIXELS, PIXELS), random)}


def one_video(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values_videos` [video, frame, channel, row, column]."""
    shape = (number, FRAMES, 3, PIXELS, PIXELS)
    return {"pixel_values_videos": random_pixels(shape, random)}


def llava_config(
    *,
    vision: str = "clip",
    text: str = "llama",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] = -1,
    select: str = "default",
) -> LlavaConfig:
    """LLaVA of any vision tower and language model in `VISIONS` and `TEXTS`.

    Args:
        vision_feature_layer: which vision layer feeds the projector.
        select: whether its first position is dropped (`"default"`) or kept (`"full"`).
    """
    return LlavaConfig(
        vision_config=chosen("vision tower", vision, VISIONS)(**vision_sizes(vision_layers)),
        text_config=chosen("language model", text, TEXTS)(
            **text_sizes(heads, key_value_heads, layers)
        ),
        image_token_index=token("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=select,  # type: ignore[arg-type]
        tie_word_embeddings=False,
    )


def llava_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [[token("<image>")] * medium.tokens for medium in single.llava(config, inputs)]


def vipllava_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] | None = None,
) -> VipLlavaConfig:
    """ViP-LLaVA: the projector reads several vision layers, by default the last but one and 1."""
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes(vision_layers)),
        text_config=LlamaConfig(**text_sizes(heads, key_value_heads, layers)),
        image_token_index=token("<image>"),
        vision_feature_layer=[-2, 1] if vision_feature_layer is None else vision_feature_layer,
        tie_word_embeddings=False,
    )


def vipllava_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    media = single.llava_without_first(config, inputs)
    return [[token("<image>")] * medium.tokens for medium in media]


def video_llava_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] = -2,
    select: str = "default",
) -> VideoLlavaConfig:
    """Video-LLaVA: two towers of the same kind, one for images and one for frames."""
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**vision_sizes(vision_layers)),
        text_config=LlamaConfig(**text_sizes(heads, key_value_heads, layers)),
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=select,  # type: ignore[arg-type]
        tie_word_embeddings=False,
    )


def video_llava_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [[token("<video>")] * medium.tokens for medium in single.frames(config, inputs)]


def gemma_sizes(heads: int, key_value_heads: int, layers: int) -> dict[str, Any]:
    """Sizes of a tiny Gemma, whose heads together are wider than the residual stream."""
    return {
        **text_sizes(heads, key_value_heads, layers),
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def gemma2_sizes(heads: int, key_value_heads: int, layers: int) -> dict[str, Any]:
    """Sizes of a tiny Gemma 2: caps low enough to matter, a window shorter than a picture."""
    return {
        **gemma_sizes(heads, key_value_heads, layers),
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 15.0,
        "sliding_window": 12,
    }


def paligemma_config(
    *,
    text: str = "gemma2",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> PaliGemmaConfig:
    """PaliGemma: over Gemma (`text="gemma"`) or Gemma 2."""
    sizes, kind = chosen(
        "language model",
        text,
        {"gemma": (gemma_sizes, GemmaConfig), "gemma2": (gemma2_sizes, Gemma2Config)},
    )
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(vision_layers), vision_use_head=False),
        text_config=kind(**sizes(heads, key_value_heads, layers)),
        image_token_index=token("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def paligemma_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [[token("<image>")] * medium.tokens for medium in single.patches(config, inputs)]


def all_prefix(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`token_type_ids` of a prompt without an answer: every position sees every other."""
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def gemma3_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Gemma3Config:
    """Gemma 3: windows and full attention in turn, cells of 2 x 2 patches."""
    kinds = ("sliding_attention", "full_attention")
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    return Gemma3Config(
        vision_config=SiglipVisionConfig(
            **{**vision_sizes(vision_layers), "patch_size": 4}, vision_use_head=False
        ),
        text_config=Gemma3TextConfig(
            **gemma_sizes(heads, key_value_heads, layers),
            query_pre_attn_scalar=16,
            sliding_window=12,
            layer_types=[kinds[layer % 2] for layer in range(layers)],
            rope_parameters=ropes,
        ),
        mm_tokens_per_image=16,
        boi_token_index=token("<start>"),
        eoi_token_index=token("<end>"),
        image_token_index=token("<image>"),
        tie_word_embeddings=False,
    )


def gemma3_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [
        [token("<start>"), *[token("<image>")] * medium.tokens, token("<end>")]
        for medium in single.averaged(config, inputs)
    ]


def images_together(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`token_type_ids`: the positions of one image see each other."""
    ones = (inputs["input_ids"] == config.image_token_id).long()
    return {**inputs, "token_type_ids": ones}


def idefics2_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Idefics2Config:
    """Idefics2: a resampler with grouped queries, a language model with windows."""
    return Idefics2Config(
        vision_config=Idefics2VisionConfig(**vision_sizes(vision_layers)),
        perceiver_config=Idefics2PerceiverConfig(
            hidden_size=32,
            resampler_n_latents=5,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=12,
            num_key_value_heads=2,
        ),
        text_config=MistralConfig(**text_sizes(heads, key_value_heads, layers), sliding_window=12),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
    )


def pictures_of_many_sizes(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """Pictures of one prompt, padded with zeros to the largest, and which pixels are real."""
    sizes = [SIZES[i % len(SIZES)] for i in range(number)]
    tall, wide = (max(size) for size in zip(*sizes, strict=True))
    pixels, mask = torch.zeros(1, number, 3, tall, wide), torch.zeros(1, number, tall, wide).long()
    for i, (height, width) in enumerate(sizes):
        pixels[0, i, :, :height, :width] = random_pixels((3, height, width), random)
        mask[0, i, :height, :width] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def idefics2_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    around = token("<break>")
    return [
        [around, *[token("<image>")] * medium.tokens, around]
        for medium in single.resampled(config, inputs)
    ]


def images_by_prompt(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures in rows by prompt, with empty ones where a prompt has fewer than another."""
    if "pixel_values" not in inputs:
        return inputs
    filled = (inputs["input_ids"] == config.image_token_id).sum(-1)
    counts = (filled // config.perceiver_config.resampler_n_latents).tolist()

    def by_prompt(flat: Tensor) -> Tensor:
        rows = flat[0].split(counts)
        blank = [(0, 0) * (flat.ndim - 2) + (0, max(counts) - len(row)) for row in rows]
        return torch.stack([pad(row, missing) for row, missing in zip(rows, blank, strict=True)])

    media = {name: by_prompt(inputs[name]) for name in ("pixel_values", "pixel_attention_mask")}
    return {**inputs, **media}


RECIPES: dict[str, Tiny] = {
    "llava": Tiny(
        "LlavaForConditionalGeneration", llava_config, {"image": Maker(one_picture, llava_tokens)}
    ),
    "vipllava": Tiny(
        "VipLlavaForConditionalGeneration",
        vipllava_config,
        {"image": Maker(one_picture, vipllava_tokens)},
    ),
    "video_llava": Tiny(
        "VideoLlavaForConditionalGeneration",
        video_llava_config,
        {
            "image": Maker(one_picture, llava_tokens),
            "video": Maker(one_video, video_llava_tokens),
        },
    ),
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        paligemma_config,
        {"image": Maker(one_picture, paligemma_tokens)},
        finish=all_prefix,
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        gemma3_config,
        {"image": Maker(one_picture, gemma3_tokens)},
        finish=images_together,
    ),
    "idefics2": Tiny(
        "Idefics2ForConditionalGeneration",
        idefics2_config,
        {"image": Maker(pictures_of_many_sizes, idefics2_tokens)},
        finish=images_by_prompt,
    ),
}

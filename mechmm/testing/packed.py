"""Tiny models of families that pack the patches of all pictures into one sequence.

Pictures and videos have different sizes, so that towers that swap rows and columns are found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm46VConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PaddleOCRVLConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from mechmm.model.grids import Medium, packed
from mechmm.testing.recipes import (
    PATCH,
    Maker,
    Tiny,
    random_pixels,
    text_sizes,
    vision_sizes,
)
from mechmm.testing.vocabulary import SPECIAL, token

IMAGE_GRIDS = (6, 10), (10, 4), (4, 6)
"""Rows and columns of patches of the first picture, the second, the third, the first again."""
VIDEO_GRIDS = (3, 4, 6), (2, 6, 4)
"""The same of videos, frames first."""
WIDTH, HEADS = 48, 6
"""Of the vision towers, other than those of the language models."""
SPECIAL_TOKENS = {
    "image_token_id": token("<image>"),
    "video_token_id": token("<video>"),
    "tie_word_embeddings": False,
}
QWEN_TOKENS = {
    **SPECIAL_TOKENS,
    "vision_start_token_id": token("<start>"),
    "vision_end_token_id": token("<end>"),
}
GLM_TOKENS = {
    **SPECIAL_TOKENS,
    "image_start_token_id": token("<start>"),
    "image_end_token_id": token("<end>"),
    "video_start_token_id": token("<tile>"),
    "video_end_token_id": token("<break>"),
}
TIMESTAMP = len(SPECIAL)
"""A word, in place of the time that stands beside each frame of a video."""


def square_sizes(layers: int) -> dict[str, Any]:
    """Sizes of a tiny tower whose config has those of square pictures, as config entries."""
    return {**vision_sizes(layers, HEADS), "hidden_size": WIDTH, "intermediate_size": 40}


def pixtral_vision(layers: int) -> PixtralVisionConfig:
    """The tower of Pixtral and Mistral 3, pictures of any size, rows and columns rotary."""
    return PixtralVisionConfig(**square_sizes(layers))


def pixtral_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> LlavaConfig:
    """LLaVA around Pixtral's tower; heads of the language model wider than their share."""
    return LlavaConfig(
        vision_config=pixtral_vision(vision_layers),
        text_config=MistralConfig(**text_sizes(heads, key_value_heads, layers), head_dim=16),
        image_token_index=token("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def mistral3_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Mistral3Config:
    """Mistral 3: Pixtral's tower and a projector that merges 2 x 2 patches."""
    return Mistral3Config(
        vision_config=pixtral_vision(vision_layers),
        text_config=MistralConfig(**text_sizes(heads, key_value_heads, layers), head_dim=16),
        image_token_index=token("<image>"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def rotary(heads: int, share: float = 1.0, **options: Any) -> dict[str, Any]:
    """Rotary settings with axes of time, rows and columns for a language model of width 32.

    Args:
        heads: of the language model.
        share: of each head that is rotated.
        **options: further entries.
    """
    frequencies = (int(32 // heads * share) + 1) // 2
    third = frequencies // 3
    partial = {"partial_rotary_factor": share} if share < 1 else {}
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [frequencies - 2 * third, third, third],
        **partial,
        **options,
    }


def grid_sizes(layers: int) -> dict[str, Any]:
    """Sizes of a tiny tower that is told the grids of its pictures, as config entries."""
    return {
        "depth": layers,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
    }


def qwen2_vl_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Qwen2VLConfig:
    """Qwen2-VL: full attention in every picture and every frame."""
    sizes = grid_sizes(vision_layers)
    del sizes["out_hidden_size"], sizes["intermediate_size"]
    return Qwen2VLConfig(
        vision_config={**sizes, "embed_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2},
        text_config={
            **text_sizes(heads, key_value_heads, layers),
            "rope_parameters": rotary(heads),
        },
        **QWEN_TOKENS,
    )


def qwen2_5_vl_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL: windows of 4 x 4 patches, and full attention in every second block."""
    return Qwen2_5_VLConfig(
        vision_config={
            **grid_sizes(vision_layers),
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": list(range(1, vision_layers, 2)),
            "tokens_per_second": 2,
        },
        text_config={
            **text_sizes(heads, key_value_heads, layers),
            "rope_parameters": rotary(heads),
        },
        **QWEN_TOKENS,
    )


def qwen3_vl_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 3, vision_layers: int = 3
) -> Qwen3VLConfig:
    """Qwen3-VL: features of early vision blocks are added after early language blocks."""
    return Qwen3VLConfig(
        vision_config=_deepstack_sizes(layers, vision_layers),
        text_config=_qwen3_text(heads, key_value_heads, layers),
        **QWEN_TOKENS,
    )


def qwen3_vl_moe_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 3, vision_layers: int = 3
) -> Qwen3VLMoeConfig:
    """The same with 4 experts, 2 of which see a token; the second block's MLP is a single one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3VLMoeConfig(
        vision_config=_deepstack_sizes(layers, vision_layers),
        text_config={
            **_qwen3_text(heads, key_value_heads, layers),
            **experts,
            "mlp_only_layers": [1],
        },
        **QWEN_TOKENS,
    )


def _deepstack_sizes(layers: int, vision_layers: int) -> dict[str, Any]:
    """What is added after the last language block would not reach the answer, so nothing is."""
    return {
        **grid_sizes(vision_layers),
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": list(range(min(2, layers - 1, vision_layers))),
    }


def _qwen3_text(heads: int, key_value_heads: int, layers: int) -> dict[str, Any]:
    return {
        **text_sizes(heads, key_value_heads, layers),
        "head_dim": 32 // heads,
        "rope_parameters": rotary(heads, mrope_interleaved=True),
    }


def qwen3_5_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Qwen3_5Config:
    """Qwen3.5: linear attention in every second block, gated and partly rotary in the others."""
    return Qwen3_5Config(
        vision_config={**grid_sizes(vision_layers), "num_position_embeddings": 25},
        text_config={
            **text_sizes(heads, key_value_heads, layers),
            "head_dim": 32 // heads,
            "layer_types": (["linear_attention", "full_attention"] * layers)[-layers:],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "rope_parameters": rotary(heads, 0.75, mrope_interleaved=True),
        },
        **QWEN_TOKENS,
    )


def _glm_configs(
    heads: int, key_value_heads: int, layers: int, vision_layers: int
) -> dict[str, Any]:
    return {
        "vision_config": {
            **grid_sizes(vision_layers),
            "model_type": "glm4v_vision",
            "image_size": 4 * PATCH,
            "attention_bias": True,
        },
        "text_config": {
            **text_sizes(heads, key_value_heads, layers),
            "model_type": "glm4v_text",
            "rope_parameters": rotary(heads, 0.75),
        },
        **GLM_TOKENS,
    }


def glm4v_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Glm4vConfig:
    """GLM-4.1V: norms before and after attention and MLP, partly rotary."""
    return Glm4vConfig(**_glm_configs(heads, key_value_heads, layers, vision_layers))


def glm46v_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> Glm46VConfig:
    """GLM-4.6V Flash: the stacks of GLM-4.1V."""
    return Glm46VConfig(**_glm_configs(heads, key_value_heads, layers, vision_layers))


def paddleocr_vl_config(
    *, heads: int = 4, key_value_heads: int = 2, layers: int = 2, vision_layers: int = 3
) -> PaddleOCRVLConfig:
    """PaddleOCR-VL: a SigLIP that keeps the patches row by row."""
    return PaddleOCRVLConfig(
        vision_config={**square_sizes(vision_layers), "spatial_merge_size": 2},
        text_config={
            **text_sizes(heads, key_value_heads, layers),
            "head_dim": 32 // heads,
            "rope_parameters": rotary(heads),
        },
        **QWEN_TOKENS,
    )


def sized_pictures(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, channel, row, column], padded, and `image_sizes` in pixels."""
    sizes = torch.tensor([IMAGE_GRIDS[i % len(IMAGE_GRIDS)] for i in range(number)]) * PATCH
    height, width = sizes.amax(0).tolist()
    pixels = torch.zeros(number, 3, height, width)
    for picture, (rows, columns) in zip(pixels, sizes.tolist(), strict=True):
        picture[:, :rows, :columns] = random_pixels((3, rows, columns), random)
    return {"pixel_values": pixels, "image_sizes": sizes}


def sized_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """A break after every row of tokens but the last, after which the picture ends."""
    found = []
    for medium in packed.images_by_size(config, inputs):
        row = [token("<image>")] * medium.views[0].columns + [token("<break>")]
        found.append([*(row * medium.views[0].rows)[:-1], token("<end>")])
    return found


def flat_images(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [patch, channel * frame * row * column] and `image_grid_thw`."""
    grids = [(1, *IMAGE_GRIDS[i % len(IMAGE_GRIDS)]) for i in range(number)]
    frames = config.vision_config.temporal_patch_size
    pixels = _flat_patches(grids, (3 * frames * PATCH**2,), random)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}


def flat_videos(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values_videos` [patch, channel * frame * row * column] and `video_grid_thw`."""
    grids = [VIDEO_GRIDS[i % len(VIDEO_GRIDS)] for i in range(number)]
    frames = config.vision_config.temporal_patch_size
    pixels = _flat_patches(grids, (3 * frames * PATCH**2,), random)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}


def timed_videos(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """The same with the seconds between frames."""
    return {
        **flat_videos(config, number, random),
        "second_per_grid_ts": torch.full((number,), 0.5),
    }


def square_patches(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [patch, channel, row, column] and `image_grid_thw`."""
    grids = [(1, *IMAGE_GRIDS[i % len(IMAGE_GRIDS)]) for i in range(number)]
    pixels = _flat_patches(grids, (3, PATCH, PATCH), random)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}


def _flat_patches(
    grids: list[tuple[int, int, int]], shape: tuple[int, ...], random: torch.Generator
) -> Tensor:
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    return random_pixels((patches, *shape), random)


def image_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """A start, the image, an end."""
    media = packed.images_by_grid(config, inputs)
    return [_framed(token("<image>"), medium.tokens) for medium in media]


def video_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """A start, the whole video, an end (Qwen2-VL)."""
    media = packed.videos_by_grid(config, inputs)
    return [_framed(token("<video>"), medium.tokens) for medium in media]


def timed_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """A time, a start, a frame, an end for each frame (Qwen3-VL)."""
    media = packed.videos_by_grid(config, inputs)
    return [_frames(medium, token("<video>"), before=[TIMESTAMP]) for medium in media]


def glm_video_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """The video's start; a start, a frame, an end and a time for each frame; the video's end.

    Frames are filled in where the prompt has image tokens.
    """
    media = packed.videos_by_frame(config, inputs)
    start, end = [config.video_start_token_id], [config.video_end_token_id]
    frames = [_frames(medium, token("<image>"), after=[TIMESTAMP]) for medium in media]
    return [[*start, *tokens, *end] for tokens in frames]


def _framed(placeholder: int, number: int) -> list[int]:
    return [token("<start>"), *[placeholder] * number, token("<end>")]


def _frames(
    medium: Medium,
    placeholder: int,
    before: list[int] | None = None,
    after: list[int] | None = None,
) -> list[int]:
    pieces = [
        [*(before or ()), *_framed(placeholder, view.tokens), *(after or ())]
        for view in medium.views
    ]
    return [token for piece in pieces for token in piece]


def token_types(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds `mm_token_type_ids` [batch, pos]: 1 where an image is, 2 where a video."""
    ids = inputs["input_ids"]
    types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    return {**inputs, "mm_token_type_ids": types}


def glm_token_types(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same where image tokens between a video's start and end are the video's."""
    ids = inputs["input_ids"]
    begun = (ids == config.video_start_token_id).cumsum(-1)
    in_video = begun > (ids == config.video_end_token_id).cumsum(-1)
    types = (ids == config.image_token_id) * (1 + in_video.long())
    return {**inputs, "mm_token_type_ids": types}


def _grid_family(
    architecture: str,
    config: Callable[..., PreTrainedConfig],
    video: Maker,
    finish: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = token_types,
) -> Tiny:
    """The recipe of a family that is told the grids of images and videos."""
    makers = {"image": Maker(flat_images, image_tokens), "video": video}
    return Tiny(architecture, config, makers, finish=finish)


WHOLE = Maker(flat_videos, video_tokens)
TIMED = Maker(timed_videos, video_tokens)
BY_FRAME = Maker(flat_videos, timed_tokens)
GLM = Maker(flat_videos, glm_video_tokens)
SIZED = {"image": Maker(sized_pictures, sized_tokens)}
SQUARE = {"image": Maker(square_patches, image_tokens)}

RECIPES: dict[str, Tiny] = {
    "pixtral": Tiny("LlavaForConditionalGeneration", pixtral_config, SIZED),
    "mistral3": Tiny("Mistral3ForConditionalGeneration", mistral3_config, SIZED),
    "qwen2_vl": _grid_family("Qwen2VLForConditionalGeneration", qwen2_vl_config, WHOLE),
    "qwen2_5_vl": _grid_family("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl_config, TIMED),
    "qwen3_vl": _grid_family("Qwen3VLForConditionalGeneration", qwen3_vl_config, BY_FRAME),
    "qwen3_vl_moe": _grid_family(
        "Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe_config, BY_FRAME
    ),
    "qwen3_5": _grid_family("Qwen3_5ForConditionalGeneration", qwen3_5_config, BY_FRAME),
    "glm4v": _grid_family("Glm4vForConditionalGeneration", glm4v_config, GLM, glm_token_types),
    "glm46v": _grid_family("Glm46VForConditionalGeneration", glm46v_config, GLM, glm_token_types),
    "paddleocr_vl": Tiny(
        "PaddleOCRVLForConditionalGeneration", paddleocr_vl_config, SQUARE, finish=token_types
    ),
}

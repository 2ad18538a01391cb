"""Tiny models of families that cut pictures into tiles.

Pictures of one call differ in size and in how their tiles lie, more of them beside each other than
below, or the other way round, so that rows taken for columns cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    DeepseekVLConfig,
    Idefics3Config,
    InternVLConfig,
    JanusConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Llama4Config,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    Ovis2Config,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig, Llama4VisionConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from mechmm.model.grids import Media, tiles
from mechmm.testing.recipes import (
    PATCH,
    PIXELS,
    VOCABULARY,
    Maker,
    Tiny,
    random_pixels,
    text_sizes,
    vision_sizes,
)
from mechmm.testing.single import TEXTS, chosen, one_picture
from mechmm.testing.vocabulary import token

Inputs = dict[str, Tensor]

ARRANGEMENTS = ((2, 3), (1, 1), (3, 1))
"""Rows and columns of the tiles of the first picture, the second, the third, the first again ..."""
SIZES = ((40, 90), (100, 50), (48, 24))
"""Height and width of pictures in pixels, likewise."""
FRAMES = 3


def counted(grids: Callable[[Any, Any], Media], name: str) -> Callable[..., list[list[int]]]:
    """Tokens of media: as many placeholders as their grids have cells."""
    return lambda config, inputs: [[token(name)] * m.tokens for m in grids(config, inputs)]


# LLaVA-NeXT and its successors: grids put together from tiles, a newline after each row.


def pictures_of_sizes(config: Any, number: int, random: torch.Generator) -> Inputs:
    """`pixel_values` [image, tile, channel, row, column], `image_sizes` [image, height and width].

    Missing tiles are zero.
    """
    sizes = torch.tensor(list(islice(cycle(SIZES), number)))
    media = tiles.anyres(config, {"image_sizes": sizes})
    most, side = max(medium.tower_rows for medium in media), config.vision_config.image_size
    pixels = random_pixels((number, most, 3, side, side), random)
    for image, medium in zip(pixels, media, strict=True):
        image[medium.tower_rows :] = 0
    return {"pixel_values": pixels, "image_sizes": sizes}


def videos(config: Any, number: int, random: torch.Generator) -> Inputs:
    """`pixel_values_videos` [video, frame, channel, row, column]."""
    side = config.vision_config.image_size
    return {"pixel_values_videos": random_pixels((number, FRAMES, 3, side, side), random)}


def pinpoints(side: int) -> list[list[int]]:
    """Resolutions of one row of two or three tiles, two rows of three, and as many columns."""
    shapes = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2))
    return [[rows * side, columns * side] for rows, columns in shapes]


def llava_next_config(
    *,
    text: str = "mistral",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] = -2,
    kind: Callable[..., PreTrainedConfig] = LlavaNextConfig,
    **options: Any,
) -> PreTrainedConfig:
    """LLaVA-NeXT: tiles of 3 x 3 patches."""
    side = 3 * PATCH
    return kind(
        vision_config=CLIPVisionConfig(**{**vision_sizes(vision_layers), "image_size": side}),
        text_config=chosen("language model", text, TEXTS)(
            **text_sizes(heads, key_value_heads, layers)
        ),
        image_token_index=token("<image>"),
        image_grid_pinpoints=pinpoints(side),
        vision_feature_layer=vision_feature_layer,
        tie_word_embeddings=False,
        **options,
    )


def llava_next_video_config(*, text: str = "llama", **options: Any) -> PreTrainedConfig:
    """LLaVA-NeXT-Video: tiles of 5 x 5 patches, 2 x 2 cells of a frame of a video."""
    config = llava_next_config(
        text=text, kind=LlavaNextVideoConfig, video_token_index=token("<video>"), **options
    )
    config.vision_config.image_size = side = 5 * PATCH
    config.image_grid_pinpoints = pinpoints(side)[:2]
    return config


def llava_onevision_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> LlavaOnevisionConfig:
    """LLaVA-OneVision: tiles of 3 x 3 patches; more than two tiles are made smaller."""
    side = 3 * PATCH
    vision = {**vision_sizes(vision_layers), "image_size": side, "vision_use_head": False}
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**text_sizes(heads, key_value_heads, layers)),
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        image_grid_pinpoints=pinpoints(side),
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=False,
    )


# Tiles one after the other, with tokens between them.


def arrangements(rows_of_tower: int) -> Iterator[tuple[int, int]]:
    """How the tiles of each picture lie, given how many rows of the tower all of them take."""
    for rows, columns in cycle(ARRANGEMENTS):
        if rows_of_tower <= 0:
            return
        yield rows, columns
        rows_of_tower -= taken(rows, columns)


def taken(rows: int, columns: int) -> int:
    """Rows of the tower that a picture takes: its tiles and, beside several, the whole picture."""
    return rows * columns + (rows * columns > 1)


def tiled_pictures(config: Any, number: int, random: torch.Generator) -> Inputs:
    """`pixel_values` [tile, channel, row, column]."""
    total = sum(taken(*shape) for shape in islice(cycle(ARRANGEMENTS), number))
    return {"pixel_values": random_pixels((total, 3, PIXELS, PIXELS), random)}


def between(write: Callable[[list[int], int, int], list[int]], merge: int = 2) -> Any:
    """Tokens of pictures, given what one writes for (the tokens of a tile, rows, columns)."""

    def tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
        tile = [token("<image>")] * (PIXELS // PATCH // merge) ** 2
        shapes = arrangements(len(inputs["pixel_values"]))
        return [write(tile, rows, columns) for rows, columns in shapes]

    return tokens


def joined(tile: list[int], rows: int, columns: int) -> list[int]:
    return [token("<start>"), *tile * taken(rows, columns), token("<end>")]


def marked(tile: list[int], rows: int, columns: int) -> list[int]:
    return [token("<start>"), *[token("<tile>"), *tile] * taken(rows, columns), token("<end>")]


def broken(tile: list[int], rows: int, columns: int) -> list[int]:
    return [token("<start>"), *[*tile, token("<break>")] * taken(rows, columns), token("<end>")]


def in_rows(tile: list[int], rows: int, columns: int) -> list[int]:
    """A mark before each tile, one of another kind before the whole picture."""
    around, line = token("<start>"), [token("<break>")]
    row = [around, token("<tile>"), *tile] * columns + line
    cut = [*row * rows] if rows * columns > 1 else []
    return [*cut, around, token("<row>"), *tile, around]


def separated(tile: list[int], rows: int, columns: int) -> list[int]:
    row = [*[*tile, token("<break>")] * (columns - 1), *tile, token("<row>")]
    cut = [*row * rows, token("<tile>")] if rows * columns > 1 else [token("<tile>")]
    return [token("<start>"), *cut, *tile, token("<end>")]


def indicated(tile: list[int], rows: int, columns: int) -> list[int]:
    row = [*[*tile, token("<break>")] * (columns - 1), *tile]
    cut = [*[*row, token("<row>")] * (rows - 1), *row] if rows * columns > 1 else []
    return [token("<start>"), *tile, token("<tile>"), *cut, token("<end>")]


def by_prompt(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of media [row, ...] dealt out to prompts: [prompt, row, ...], missing ones zero."""
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(counts)), batch_first=True)


def tiles_by_prompt(config: Any, inputs: Inputs) -> Inputs:
    """`pixel_values` [prompt, tile, ...], `pixel_attention_mask` [prompt, tile, row, column]."""
    if "pixel_values" not in inputs:
        return inputs
    tile = (PIXELS // PATCH // config.scale_factor) ** 2
    counts = (inputs["input_ids"] == config.image_token_id).sum(-1) // tile
    pixels = by_prompt(inputs["pixel_values"], counts.tolist())
    return {**inputs, "pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


def idefics3_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    kind: Callable[..., PreTrainedConfig] = Idefics3Config,
    vision: Callable[..., PreTrainedConfig] = Idefics3VisionConfig,
) -> PreTrainedConfig:
    """Idefics3 and SmolVLM."""
    return kind(
        vision_config=vision(**vision_sizes(vision_layers)),
        text_config=LlamaConfig(**text_sizes(heads, key_value_heads, layers)),
        image_token_id=token("<image>"),
        pad_token_id=token("<pad>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )


def smolvlm_config(**options: Any) -> PreTrainedConfig:
    return idefics3_config(kind=SmolVLMConfig, vision=SmolVLMVisionConfig, **options)


def internvl_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    norm: str = "rms_norm",
    qk_norm: bool = True,
) -> InternVLConfig:
    """InternVL.

    Args:
        norm: of the vision tower: `"rms_norm"` (the 6B tower) or `"layer_norm"` (the 300M one).
        qk_norm: whether it normalizes queries and keys (the 6B tower).
    """
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **vision_sizes(vision_layers), norm_type=norm, use_qk_norm=qk_norm, attention_bias=True
        ),
        text_config=Qwen2Config(**text_sizes(heads, key_value_heads, layers)),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
    )


def cohere2(heads: int, key_value_heads: int, layers: int) -> Cohere2Config:
    """Cohere2: parallel blocks; every other one sees 16 tokens and has rotary positions, the others
    see all tokens and have none."""
    kinds = ("sliding_attention", "full_attention")
    return Cohere2Config(
        **text_sizes(heads, key_value_heads, layers),
        sliding_window=16,
        layer_types=list(islice(cycle(kinds), layers)),
    )


def aya_vision_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> AyaVisionConfig:
    return AyaVisionConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(vision_layers), vision_use_head=False),
        text_config=cohere2(heads, key_value_heads, layers),
        image_token_index=token("<image>"),
        tie_word_embeddings=False,
        alignment_intermediate_size=48,  # type: ignore[call-arg]
    )


def cohere2_vision_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Cohere2VisionConfig:
    return Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(vision_layers)),
        text_config=cohere2(heads, key_value_heads, layers),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
        alignment_intermediate_size=48,
    )


def llama4_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    experts: int = 4,
    experts_per_token: int = 2,
) -> Llama4Config:
    """Llama 4: every other block has experts, sees all tokens and has no rotary positions; the
    others have a dense MLP, see the tokens of one chunk of 16, and normalize queries and keys."""
    others = [int(layer % 2 == 0) for layer in range(layers)]
    text = Llama4TextConfig(
        **text_sizes(heads, key_value_heads, layers),
        head_dim=32 // heads,
        intermediate_size_mlp=40,
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
        interleave_moe_layer_step=2,
        no_rope_layers=others,
        layer_types=["chunked_attention" if rope else "full_attention" for rope in others],
        attention_chunk_size=16,
    )
    vision = Llama4VisionConfig(
        **{**vision_sizes(vision_layers), "intermediate_size": 4 * 32},
        projector_input_dim=40,
        projector_output_dim=40,
        vision_output_dim=40,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Llama4Config(
        vision_config=vision,
        text_config=text,
        boi_token_index=token("<start>"),
        eoi_token_index=token("<end>"),
        image_token_index=token("<image>"),
    )


def ovis2_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Ovis2Config:
    """Ovis2: each cell is a mixture of 40 visual words."""
    indicators = [token(name) for name in ("<start>", "<tile>", "<break>", "<row>", "<end>")]
    return Ovis2Config(
        vision_config=Ovis2VisionConfig(
            **vision_sizes(vision_layers),
            vocab_size=40 + len(indicators),
            hidden_stride=2,
            num_visual_indicator_tokens=len(indicators),
            qkv_bias=True,
            mlp_bias=True,
        ),
        text_config=Qwen2Config(**text_sizes(heads, key_value_heads, layers)),
        image_token_id=token("<image>"),
        visual_indicator_token_ids=indicators,
        vocab_size=VOCABULARY,
        hidden_size=32,
        tie_word_embeddings=False,
    )


# LFM2-VL: tiles, and pictures in their own proportions, as rows of patches.

NATIVE = (2, 6)
"""Rows and columns of patches of a whole picture."""


def native_pictures(config: Any, number: int, random: torch.Generator) -> Inputs:
    """`pixel_values` [tile, patch, pixels], `spatial_shapes` [tile, rows and columns],
    `pixel_attention_mask` [tile, patch]."""
    side = PIXELS // PATCH
    shapes = []
    for rows, columns in islice(cycle(ARRANGEMENTS), number):
        shapes += [(side, side)] * (taken(rows, columns) - 1) + [NATIVE]
    real = torch.tensor(shapes).prod(-1)
    mask = torch.arange(int(real.max())) < real[:, None]
    pixels = random_pixels((*mask.shape, 3 * PATCH * PATCH), random) * mask[..., None]
    return {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": mask.long(),
    }


def native_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """A mark before each tile and each whole picture beside tiles."""
    left = iter((inputs["spatial_shapes"].prod(-1) // config.downsample_factor**2).tolist())
    written = []
    for rows, columns in arrangements(len(inputs["pixel_values"])):
        marks = [token("<tile>")] * (rows * columns > 1)
        inside = [[*marks, *[token("<image>")] * next(left)] for _ in range(taken(rows, columns))]
        written.append([token("<start>"), *chain.from_iterable(inside), token("<end>")])
    return written


def lfm2_vl_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Lfm2VlConfig:
    """LFM2-VL: every other block a short convolution instead of attention."""
    vision = {**vision_sizes(vision_layers), "num_patches": 16, "vision_use_head": False}
    del vision["image_size"]
    kinds = ("conv", "full_attention")
    text = Lfm2Config(
        **text_sizes(heads, key_value_heads, layers),
        layer_types=list(islice(cycle(kinds), layers)),
        block_auto_adjust_ff_dim=False,
    )
    return Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**vision),
        text_config=text,
        image_token_id=token("<image>"),
        projector_hidden_size=40,
        tie_word_embeddings=False,
    )


# Mllama: pictures are read by cross attention.

RATIOS = [[1, 1], [1, 2], [2, 1], [2, 3], [3, 2]]
"""Rows and columns of tiles, by aspect ratio id (from 1)."""
RATIO_IDS = (4, 3, 1)


def attended_pictures(config: Any, number: int, random: torch.Generator) -> Inputs:
    """`pixel_values` [image, tile, channel, row, column], `aspect_ratio_ids` [image].

    Missing tiles are zero.
    """
    ids = torch.tensor(list(islice(cycle(RATIO_IDS), number)))
    most = config.vision_config.max_num_tiles
    pixels = random_pixels((number, most, 3, PIXELS, PIXELS), random)
    there = torch.arange(most) < torch.tensor(RATIOS)[ids - 1].prod(-1)[:, None]
    return {"pixel_values": pixels * there[..., None, None, None], "aspect_ratio_ids": ids}


def attention_to_tiles(config: Any, inputs: Inputs) -> Inputs:
    """Images by prompt, and masks: `aspect_ratio_mask` [prompt, image, tile] which tiles there are,
    `cross_attention_mask` [prompt, pos, image, tile] which of them each token attends to: those of
    the image before it, and of those right before that one."""
    if "pixel_values" not in inputs:
        return inputs
    is_image = inputs["input_ids"] == config.image_token_id
    counts = is_image.sum(-1).tolist()
    dealt = {name: by_prompt(inputs[name], counts) for name in ("pixel_values", "aspect_ratio_ids")}
    ratios = torch.tensor([[0, 0], *RATIOS])[dealt["aspect_ratio_ids"]]
    there = torch.arange(config.vision_config.max_num_tiles) < ratios.prod(-1)[..., None]
    reads = torch.zeros(*is_image.shape, there.shape[1], dtype=torch.bool)
    for prompt, row in enumerate(is_image):
        places = row.nonzero().flatten().tolist()
        for image, start in reversed(list(enumerate(places))):
            end = places[image + 1] if image + 1 < len(places) else len(row)
            reads[prompt, start:end, image] = True
            if end == start + 1 and image + 1 < len(places):
                reads[prompt, :, image] |= reads[prompt, :, image + 1]
    seen = there.clone()
    seen[..., 0] = True  # a missing image keeps one tile, as the processor has it
    masks = {
        "aspect_ratio_mask": seen.long(),
        "cross_attention_mask": (reads[..., None] & there[:, None]).long(),
    }
    return {**inputs, **dealt, **masks}


def mllama_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 3,
    vision_layers: int = 2,
    global_layers: int = 2,
) -> MllamaConfig:
    """Mllama: every other block (from the second) reads the picture.

    Args:
        global_layers: gated blocks of the vision tower, after `vision_layers` others.
    """
    vision = MllamaVisionConfig(
        **vision_sizes(vision_layers),
        num_global_layers=global_layers,
        intermediate_layers_indices=list(range(vision_layers)),
        vision_output_dim=32 * (1 + vision_layers),
        max_num_tiles=6,
        supported_aspect_ratios=RATIOS,
    )
    text = MllamaTextConfig(
        **text_sizes(heads, key_value_heads, layers),
        cross_attention_layers=list(range(1, layers, 2)),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=token("<image>"))


# Pictures shown whole, in one piece.


def deepseek_vl_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> DeepseekVLConfig:
    return DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(vision_layers), vision_use_head=False),
        text_config=LlamaConfig(**text_sizes(heads, key_value_heads, layers)),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
    )


def janus_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> JanusConfig:
    """Janus, with a decoder of images that reading them leaves unused."""
    vision = vision_sizes(vision_layers)
    del vision["intermediate_size"]
    return JanusConfig(
        vision_config=JanusVisionConfig(**vision, mlp_ratio=1.5, projection_dim=32, depth=2),
        vq_config=JanusVQVAEConfig(
            num_embeddings=16,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=LlamaConfig(**text_sizes(heads, key_value_heads, layers)),
        image_token_id=token("<image>"),
        tie_word_embeddings=False,
    )


def _images(
    architecture: str, config: Any, inputs: Any, tokens: Any, finish: Any = None, **makers: Maker
) -> Tiny:
    """A recipe of a family that reads images, and what else `makers` says."""
    kinds = {"image": Maker(inputs, tokens), **makers}
    return Tiny(architecture, config, kinds, **({"finish": finish} if finish else {}))


ANYRES = (pictures_of_sizes, counted(tiles.anyres, "<image>"))
WHOLE = (one_picture, counted(tiles.untiled, "<image>"))

RECIPES: dict[str, Tiny] = {
    "llava_next": _images("LlavaNextForConditionalGeneration", llava_next_config, *ANYRES),
    "llava_next_video": _images(
        "LlavaNextVideoForConditionalGeneration",
        llava_next_video_config,
        *ANYRES,
        video=Maker(videos, counted(tiles.averaged_frames, "<video>")),
    ),
    "llava_onevision": _images(
        "LlavaOnevisionForConditionalGeneration",
        llava_onevision_config,
        *ANYRES,
        video=Maker(videos, counted(tiles.halved_frames, "<video>")),
    ),
    "idefics3": _images(
        "Idefics3ForConditionalGeneration",
        idefics3_config,
        tiled_pictures,
        between(in_rows),
        tiles_by_prompt,
    ),
    "smolvlm": _images(
        "SmolVLMForConditionalGeneration",
        smolvlm_config,
        tiled_pictures,
        between(in_rows),
        tiles_by_prompt,
    ),
    "internvl": _images(
        "InternVLForConditionalGeneration", internvl_config, tiled_pictures, between(joined)
    ),
    "aya_vision": _images(
        "AyaVisionForConditionalGeneration", aya_vision_config, tiled_pictures, between(marked)
    ),
    "cohere2_vision": _images(
        "Cohere2VisionForConditionalGeneration",
        cohere2_vision_config,
        tiled_pictures,
        between(broken),
    ),
    "mllama": _images(
        "MllamaForConditionalGeneration",
        mllama_config,
        attended_pictures,
        lambda config, inputs: [[token("<image>")]] * len(inputs["pixel_values"]),
        attention_to_tiles,
    ),
    "llama4": _images(
        "Llama4ForConditionalGeneration", llama4_config, tiled_pictures, between(separated)
    ),
    "ovis2": _images(
        "Ovis2ForConditionalGeneration", ovis2_config, tiled_pictures, between(indicated)
    ),
    "lfm2_vl": _images(
        "Lfm2VlForConditionalGeneration", lfm2_vl_config, native_pictures, native_tokens
    ),
    "deepseek_vl": _images("DeepseekVLForConditionalGeneration", deepseek_vl_config, *WHOLE),
    "janus": _images("JanusForConditionalGeneration", janus_config, *WHOLE),
}

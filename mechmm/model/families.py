"""Multimodal architectures, one row each: where their towers, projectors and placeholders are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mechmm.model.grids import Medium, encoders, fused, packed, single, tiles
from mechmm.model.rows import Family, MediumInput, Projector, Stack
from mechmm.model.stacks import STACKS

Grids = Callable[[Any, Mapping[str, Any]], list[Medium]]


def _chosen_layers(config: Any) -> tuple[int, ...]:
    """The hidden states that the projector reads (`vision_feature_layer`)."""
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    return tuple(layer if layer >= 0 else layers + 1 + layer for layer in chosen)


def _behind_chosen_layer(config: Any) -> dict[str, str]:
    """What lies behind the vision layers that the projector reads."""
    layers, last = config.vision_config.num_hidden_layers, max(_chosen_layers(config))
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    reason = f"the projector reads vision layer {chosen} (vision_feature_layer)"
    behind = "|".join(str(layer) for layer in range(last, layers))
    found = {r"(vision|video)\.ln_final\..*": reason}
    return found | ({rf"(vision|video)\.blocks\.({behind})\..*": reason} if behind else {})


_CHOSEN: Mapping[str, Any] = {"reads": _chosen_layers, "unread": _behind_chosen_layer}


def _cancelled_scales(config: Any) -> dict[str, str]:
    """Mllama's cross-attention norms its queries: their scale before that cancels."""
    layers = "|".join(str(layer) for layer in config.text_config.cross_attention_layers)
    reason = "cross-attention norms its queries, which cancels their scale"
    return {rf"blocks\.({layers})\.ln1\.hook_scale": reason}


def _before_final_norm(config: Any) -> dict[str, str]:
    return {r"vision\.ln_final\..*": "the output is read before the final norm"}


LANGUAGE_MODEL = {"language": "model.language_model"}
TWO_LAYERS = {"projector": Projector("model.multi_modal_projector", "linear_1", "linear_2")}
"""A projector of two linear layers, under the usual names."""
MERGER = Projector("model.visual.merger", "linear_fc1", "linear_fc2")


def _images(grids: Grids, placeholder: str | None = "image_token_id") -> MediumInput:
    return MediumInput("image", "pixel_values", placeholder, grids)


def _videos(grids: Grids, placeholder: str = "video_token_id") -> MediumInput:
    return MediumInput("video", "pixel_values_videos", placeholder, grids)


def _llava_images(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """LLaVA with any vision tower: Pixtral's keeps the proportions of pictures."""
    sized = config.vision_config.model_type == "pixtral"
    return (packed.images_by_size if sized else single.llava)(config, inputs)


def _llava_like(architecture: str, *media: MediumInput, **options: Any) -> Family:
    """A tower, a projector of two layers and a language model, under LLaVA's names."""
    options.setdefault("projectors", TWO_LAYERS)
    towers = {"vision": "model.vision_tower", **LANGUAGE_MODEL}
    return Family(architecture, towers, media, **options)


def _qwen_like(architecture: str, *media: MediumInput, **options: Any) -> Family:
    """A packed tower with a patch merger and a language model with several rotary axes."""
    options.setdefault("projectors", {"projector": MERGER})
    towers = {"vision": "model.visual", **LANGUAGE_MODEL}
    return Family(architecture, towers, media, own_positions=True, **options)


def _connected(architecture: str, grids: Grids, connector: str, **options: Any) -> Family:
    """A tower, a connector that shuffles pixels, and a language model, under Idefics' names."""
    towers = {"vision": "model.vision_model", "language": "model.text_model"}
    projectors = {"projector": Projector(connector)}
    return Family(architecture, towers, (_images(grids),), projectors, **options)


def _deepstack(config: Any) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


def _deepstack_reads(config: Any) -> tuple[int, ...]:
    indexes = config.vision_config.deepstack_visual_indexes
    return (*(index + 1 for index in indexes), config.vision_config.depth)


def _mllama_reads(config: Any) -> tuple[int, ...]:
    """What the global transformer makes of the last one is no longer the same stream."""
    vision = config.vision_config
    return (*vision.intermediate_layers_indices, vision.num_hidden_layers)


_QWEN_MEDIA = (_images(packed.images_by_grid), _videos(packed.videos_by_grid))
_ENCODED = _images(encoders.patches, None)


def _dual(architecture: str, images: MediumInput, projectors: Mapping[str, Projector]) -> Family:
    """Two encoders whose ends are compared."""
    return Family(
        architecture,
        {"vision": "vision_model", "text": "text_model"},
        (images,),
        projectors,
        unembed=None,
        output="logits_per_image",
        resume="encoder",
    )


def _vision(architecture: str, root: str, output: str, **options: Any) -> Family:
    """A vision encoder alone."""
    images = options.pop("images", _ENCODED)
    options |= {"unembed": None, "output": output, "resume": "encoder"}
    return Family(architecture, {"vision": root}, (images,), **options)


_TOKENIZER = {"image tokenizer": "it chooses codes, through which no gradient flows"}

_ROWS = (
    # A tower whose features take the places of placeholders
    _llava_like("LlavaForConditionalGeneration", _images(_llava_images), **_CHOSEN),
    _llava_like(
        "VipLlavaForConditionalGeneration",
        _images(single.llava_without_first),
        **_CHOSEN,
    ),
    Family(
        "VideoLlavaForConditionalGeneration",
        {"vision": "model.image_tower", "video": "model.video_tower", **LANGUAGE_MODEL},
        (
            _images(single.llava),
            _videos(single.frames),
        ),
        TWO_LAYERS,
        **_CHOSEN,
    ),
    _llava_like("LlavaNextForConditionalGeneration", _images(tiles.anyres), **_CHOSEN),
    _llava_like(
        "LlavaNextVideoForConditionalGeneration",
        _images(tiles.anyres),
        _videos(tiles.averaged_frames),
        **_CHOSEN,
    ),
    _llava_like(
        "LlavaOnevisionForConditionalGeneration",
        _images(tiles.anyres),
        _videos(tiles.halved_frames),
        **_CHOSEN,
    ),
    _llava_like(
        "InternVLForConditionalGeneration",
        _images(tiles.unmarked_tiles),
        **_CHOSEN,
    ),
    _llava_like(
        "AyaVisionForConditionalGeneration",
        _images(tiles.lone_marks),
        **_CHOSEN,
    ),
    _llava_like("Cohere2VisionForConditionalGeneration", _images(tiles.lone_marks)),
    _llava_like(
        "Lfm2VlForConditionalGeneration",
        _images(tiles.native_tiles),
        projectors={},
        resume="recurrent",
        absent={
            "projector": "it is called once per tile, with tiles of different sizes",
            "patterns of convolution blocks": "they have none; hook_attn_out is there",
        },
    ),
    _llava_like(
        "Mistral3ForConditionalGeneration",
        _images(packed.images_by_size),
        **_CHOSEN,
    ),
    _llava_like(
        "PaliGemmaForConditionalGeneration",
        _images(single.patches),
        resume="both ways",
        projectors={"projector": Projector("model.multi_modal_projector")},
    ),
    _llava_like(
        "Gemma3ForConditionalGeneration",
        _images(single.averaged),
        resume="image spans",
        projectors={"projector": Projector("model.multi_modal_projector")},
    ),
    Family(
        "Ovis2ForConditionalGeneration",
        {"vision": "model.vision_tower.transformer", **LANGUAGE_MODEL},
        (_images(tiles.indicated_tiles),),
        {"projector": Projector("model.visual_embeddings_table")},
    ),
    Family(
        "DeepseekVLForConditionalGeneration",
        {"vision": "model.vision_model", **LANGUAGE_MODEL},
        (_images(tiles.untiled),),
        {"projector": Projector("model.aligner", "linear1", "linear2")},
    ),
    Family(
        "JanusForConditionalGeneration",
        {"vision": "model.vision_model", **LANGUAGE_MODEL},
        (_images(tiles.untiled),),
        {"projector": Projector("model.aligner", "fc1", "hidden_layers.0")},
    ),
    _connected("Idefics3ForConditionalGeneration", tiles.row_marks, "model.connector"),
    _connected("SmolVLMForConditionalGeneration", tiles.row_marks, "model.connector"),
    Family(
        "Llama4ForConditionalGeneration",
        {"vision": "vision_model", "language": "language_model.model"},
        (_images(tiles.separated_tiles),),
        {
            "adapter": Projector("vision_model.vision_adapter", "mlp.fc1", "mlp.fc2"),
            "projector": Projector("multi_modal_projector"),
        },
        unembed="language_model.lm_head",
    ),
    # Packed towers
    _qwen_like(
        "Qwen2VLForConditionalGeneration",
        *_QWEN_MEDIA,
        projectors={"projector": Projector("model.visual.merger", "mlp.0", "mlp.2")},
    ),
    _qwen_like(
        "Qwen2_5_VLForConditionalGeneration",
        *_QWEN_MEDIA,
        projectors={"projector": Projector("model.visual.merger", "mlp.0", "mlp.2")},
    ),
    *(
        _qwen_like(
            architecture,
            *_QWEN_MEDIA,
            projectors={
                "projector": MERGER,
                "deepstack": replace(MERGER, root="model.visual.deepstack_merger_list"),
            },
            deepstack=_deepstack,
            reads=_deepstack_reads,
        )
        for architecture in (
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
        )
    ),
    _qwen_like(
        "Qwen3_5ForConditionalGeneration",
        *_QWEN_MEDIA,
        resume="recurrent",
        absent={"patterns of linear-attention blocks": "they have none; hook_attn_out is there"},
    ),
    *(
        _qwen_like(
            architecture,
            _images(packed.images_by_grid),
            _videos(packed.videos_by_frame, "image_token_id"),
            projectors={"projector": Projector("model.visual.merger", "gate_proj", "down_proj")},
        )
        for architecture in ("Glm4vForConditionalGeneration", "Glm46VForConditionalGeneration")
    ),
    Family(
        "PaddleOCRVLForConditionalGeneration",
        {"vision": "model.visual.vision_model", **LANGUAGE_MODEL},
        (_images(packed.images_by_grid),),
        {"projector": Projector("model.projector")},
        own_positions=True,
    ),
    # A stack between the tower and the language model, or attention across
    Family(
        "Idefics2ForConditionalGeneration",
        {
            "vision": "model.vision_model",
            "resampler": "model.connector.perceiver_resampler",
            "language": "model.text_model",
        },
        (_images(single.resampled),),
        {
            "projector": Projector(
                "model.connector.modality_projection", "gate_proj", "down_proj", last=False
            )
        },
    ),
    *(
        Family(
            architecture,
            {"vision": "vision_model", "qformer": "qformer", "language": language},
            (_images(fused.queries),),
            {"projector": Projector("language_projection", tower="qformer")},
            unembed="language_model.lm_head",
            absent=absent,
        )
        for architecture, language, absent in (
            ("Blip2ForConditionalGeneration", "language_model.model.decoder", {}),
            (
                "InstructBlipForConditionalGeneration",
                "language_model.model",
                {"MLP of the Q-Former's words": "hook_mlp_out and mlp.* are those of its queries"},
            ),
        )
    ),
    Family(
        "MllamaForConditionalGeneration",
        {"vision": "model.vision_model", **LANGUAGE_MODEL},
        (_images(tiles.attended_tiles, "image_token_index"),),
        {"projector": Projector("model.multi_modal_projector", last=False)},
        resume="cross",
        reads=_mllama_reads,
        unread=_cancelled_scales,
    ),
    Family(
        "Florence2ForConditionalGeneration",
        {
            "vision": "model.vision_tower",
            "encoder": "model.language_model.encoder",
            "language": "model.language_model.decoder",
        },
        (_images(fused.mean_and_patches),),
        {"projector": Projector("model.multi_modal_projector")},
        resume="encoder-decoder",
        stacks={"encoder": "bart_encoder", "language": "bart_decoder"},
    ),
    Family(
        "Qwen2AudioForConditionalGeneration",
        {"audio": "model.audio_tower", **LANGUAGE_MODEL},
        (MediumInput("audio", "input_features", "audio_token_id", fused.sound),),
        {"projector": Projector("model.multi_modal_projector", tower="audio")},
    ),
    # Early fusion: images are tokens of a codebook
    Family(
        "ChameleonForConditionalGeneration",
        {"language": "model"},
        (_images(fused.codes),),
        absent=_TOKENIZER,
    ),
    Family(
        "Emu3ForConditionalGeneration",
        {"language": "model.text_model"},
        (_images(fused.codes_by_row),),
        absent=_TOKENIZER,
    ),
    # Encoders
    _dual(
        "CLIPModel",
        _ENCODED,
        {
            "vision_projection": Projector("visual_projection", last=False),
            "text_projection": Projector("text_projection", tower="text", last=False),
        },
    ),
    _dual("SiglipModel", _ENCODED, {"pooler": Projector("vision_model.head", last=False)}),
    _dual(
        "Siglip2Model",
        _images(encoders.padded_patches, None),
        {"pooler": Projector("vision_model.head", last=False)},
    ),
    _vision("CLIPVisionModel", "", "last_hidden_state", unread=_before_final_norm),
    _vision(
        "CLIPVisionModelWithProjection",
        "vision_model",
        "image_embeds",
        projectors={"projector": Projector("visual_projection", last=False)},
    ),
    _vision("SiglipVisionModel", "", "last_hidden_state"),
    _vision(
        "Siglip2VisionModel",
        "",
        "last_hidden_state",
        images=_images(encoders.padded_patches, None),
    ),
    _vision("ViTModel", "", "last_hidden_state"),
    _vision("ViTForImageClassification", "vit", "logits"),
    _vision("Dinov2Model", "", "last_hidden_state"),
    _vision("Dinov2ForImageClassification", "dinov2", "logits"),
    _vision("DINOv3ViTModel", "", "last_hidden_state"),
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in _ROWS}
"""Architectures by class name."""


class UnknownArchitectureError(ValueError):
    """The architecture, or one of its stacks, has no row yet."""


def family_of(architecture: str) -> Family:
    """The row of an architecture.

    Raises:
        UnknownArchitectureError: with the nearest rows and how to add one.
    """
    if architecture not in FAMILIES:
        raise UnknownArchitectureError(
            f"no row for architecture {architecture!r}; nearest: "
            f"{_nearest(architecture, FAMILIES)} (`mechmm families` lists all rows). To add it, "
            "write one Family row in mechmm/model/families.py (CONTRIBUTING.md, 'Add a model "
            "family') and pass the model to HookedMultimodal.from_hf"
        )
    return FAMILIES[architecture]


def stack_of(model_type: str, prefix: str, config: Any = None) -> Stack:
    """The row of a tower by its config's `model_type`.

    Raises:
        UnknownArchitectureError: naming the tower, the nearest rows and how to add one.
    """
    if model_type not in STACKS:
        raise UnknownArchitectureError(
            f"tower {prefix!r}: no row for model_type {model_type!r}; nearest: "
            f"{_nearest(model_type, STACKS)}. To add it, write one Stack row in "
            "mechmm/model/stacks.py (CONTRIBUTING.md, 'Add a model family')"
        )
    row = STACKS[model_type]
    return row if isinstance(row, Stack) else row(config)


def _nearest(name: str, table: dict) -> str:
    return ", ".join(difflib.get_close_matches(name, table, n=4, cutoff=0.0))

"""Real processors for tiny models, made offline: one word a token, pictures of a few patches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from mechmm.model.processors import MissingVideoProcessor, without_videos
from mechmm.testing.recipes import PATCH, PIXELS
from mechmm.testing.vocabulary import SPECIAL, tiny_tokenizer, token

ENDED = "<s> $A <end>"
"""What encoders make of a text."""
TEXT_LENGTH = 16
"""Tokens that SigLIP's texts are padded to."""
BRACKETED = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
"""Names of a picture's token and of those around it, as tokenizers have them."""


def tokenizer(
    renamed: Mapping[str, str] | None = None,
    /,
    *,
    form: str = "<s> $A",
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer of the small vocabulary.

    Args:
        renamed: special tokens that a processor knows under a name of its own, by ours.
        form: what every text (`$A`) becomes.
        **options: of the tokenizer: special tokens by the attribute that a processor asks for
            (`image_token="<image>"`), or settings.
    """
    renamed = dict(renamed or {})
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"] = {renamed.get(k, k): i for k, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["content"] = renamed.get(added["content"], added["content"])
    core = Tokenizer.from_str(json.dumps(state))
    marks = [(name, token(name)) for name in form.split() if name != "$A"]
    core.post_processor = TemplateProcessing(single=form, special_tokens=marks)
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **{**named, **options})
    # Only a tokenizer that was loaded knows its own name, which processors ask for.
    with TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)


def _size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _stretched(kind: str, side: int = PIXELS, **options: Any) -> Any:
    """An image processor that resizes to a square, whatever the proportions."""
    if kind.startswith(("CLIP", "VideoLlava")):
        options = {"do_center_crop": False, "crop_size": _size(side), **options}
    return getattr(transformers, kind)(size=_size(side), **options)


def _cropping(kind: str, side: int = PIXELS, **options: Any) -> Any:
    """An image processor that resizes the shortest edge and crops at the centre."""
    size = {"shortest_edge": side}
    return getattr(transformers, kind)(size=size, crop_size=_size(side), **options)


def _videoless(kind: str, *parts: Any, **options: Any) -> Any:
    """A processor of a class that takes videos, with nothing to read them."""
    return without_videos(getattr(transformers, kind))(*parts, **options)


# Pictures shown whole


def _llava(config: Any) -> Any:
    vision = config.vision_config.model_type
    if vision == "pixtral":  # its processor needs torchvision
        return None
    clip = vision == "clip_vision_model"
    return transformers.LlavaProcessor(
        _stretched("CLIPImageProcessorPil" if clip else "SiglipImageProcessorPil"),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy=getattr(config, "vision_feature_select_strategy", "default"),
        num_additional_image_tokens=int(clip),
    )


def _video_llava(config: Any) -> Any:
    return _videoless(
        "VideoLlavaProcessor",
        _stretched("VideoLlavaImageProcessor"),
        MissingVideoProcessor(),
        tokenizer(),
        patch_size=PATCH,
    )


def _paligemma(config: Any) -> Any:
    cells = (PIXELS // PATCH) ** 2
    images = _stretched("SiglipImageProcessorPil", image_seq_length=cells)
    return transformers.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))


def _gemma3(config: Any) -> Any:
    cells = config.mm_tokens_per_image
    images = _stretched("Gemma3ImageProcessorPil")
    return transformers.Gemma3Processor(images, tokenizer(**BRACKETED), image_seq_length=cells)


def _idefics2(config: Any) -> Any:
    images = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 16, "longest_edge": PIXELS}, do_image_splitting=False
    )
    return transformers.Idefics2Processor(
        images,
        tokenizer(image_token="<image>", image_boundary_token="<break>"),
        image_seq_len=config.perceiver_config.resampler_n_latents,
    )


def _squared(kind: str, config: Any) -> Any:
    """DeepSeek-VL and Janus, which pad pictures to squares."""
    return getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{kind}ImageProcessorPil")(size=_size(PIXELS), min_size=PATCH),
        tokenizer(**BRACKETED),
        num_image_tokens=(PIXELS // PATCH) ** 2,
    )


# Pictures cut into tiles


def _pinpointed(kind: str, config: Any) -> Any:
    """LLaVA-NeXT and LLaVA-OneVision: tiles of the size of the tower's pictures."""
    side = config.vision_config.image_size
    return _cropping(kind, side, image_grid_pinpoints=config.image_grid_pinpoints)


NEXT = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _llava_next(config: Any) -> Any:
    images = _pinpointed("LlavaNextImageProcessorPil", config)
    return transformers.LlavaNextProcessor(images, tokenizer(), **NEXT)


def _llava_next_video(config: Any) -> Any:
    parts = MissingVideoProcessor(), _pinpointed("LlavaNextImageProcessorPil", config), tokenizer()
    return _videoless("LlavaNextVideoProcessor", *parts, **NEXT)


def _llava_onevision(config: Any) -> Any:
    side = config.vision_config.image_size
    images = _stretched(
        "LlavaOnevisionImageProcessorPil", side, image_grid_pinpoints=config.image_grid_pinpoints
    )
    return _videoless(
        "LlavaOnevisionProcessor",
        images,
        tokenizer(),
        MissingVideoProcessor(),
        num_image_tokens=(side // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


def _idefics3(config: Any) -> Any:
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * PIXELS}, max_image_size={"longest_edge": PIXELS}
    )
    names = {
        "<start>": "<fake_token_around_image>",
        "<row>": "<global-img>",
        "<tile>": "<row_1_col_1>",
        "<break>": "\n",
        "<end>": "<end_of_utterance>",
    }
    cells = (PIXELS // PATCH // config.scale_factor) ** 2
    return transformers.Idefics3Processor(images, tokenizer(names), image_seq_len=cells)


def _internvl(config: Any) -> Any:
    names = {
        "start_image_token": "<start>",
        "end_image_token": "<end>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    return _videoless(
        "InternVLProcessor",
        _stretched("GotOcr2ImageProcessorPil", max_patches=6),
        tokenizer(**names),
        MissingVideoProcessor(),
        image_seq_length=4,
    )


def _aya(config: Any) -> Any:
    names = {
        "<image>": "<|IMG_PATCH|>",
        "<start>": "<|START_OF_IMG|>",
        "<end>": "<|END_OF_IMG|>",
        "<tile>": "TILE_1",
        "<row>": "TILE_GLOBAL",
    }
    return transformers.AyaVisionProcessor(
        _stretched("GotOcr2ImageProcessorPil", max_patches=6),
        tokenizer(names),
        patch_size=PATCH,
        img_size=PIXELS,
        downsample_factor=config.downsample_factor,
    )


def _ovis2(config: Any) -> Any:
    names = ("IMG_ATOM", "IMG_START", "IMG_GRID", "IMG_COL", "IMG_ROW", "IMG_END")
    ours = ("<image>", "<start>", "<tile>", "<break>", "<row>", "<end>")
    renamed = {old: f"<{new}>" for old, new in zip(ours, names, strict=True)}
    images = _stretched("Ovis2ImageProcessorPil", crop_to_patches=True, max_patches=6)
    return transformers.Ovis2Processor(images, tokenizer(renamed), image_seq_length=4)


def _mllama(config: Any) -> Any:
    most = config.vision_config.max_num_tiles
    known = [list(ratio) for ratio in get_all_supported_aspect_ratios(most)]
    if config.vision_config.supported_aspect_ratios != known:
        return None  # the processor would write other ids than the model knows
    images = transformers.MllamaImageProcessorPil(size=_size(PIXELS), max_image_tiles=most)
    return transformers.MllamaProcessor(images, tokenizer(image_token="<image>"))


# Packed towers

PACKED = {
    "patch_size": PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2},
}
"""Pictures of 4 to 16 cells."""


def _gridded(processor: str, images: str, config: Any) -> Any:
    """Qwen-VL and GLM-4V, which keep proportions."""
    names = {"<tile>": "<|begin_of_video|>", "<break>": "<|end_of_video|>"}
    return _videoless(
        f"{processor}Processor",
        getattr(transformers, f"{images}ImageProcessorPil")(**PACKED),
        tokenizer(names, image_token="<image>", video_token="<video>"),
        MissingVideoProcessor(),
    )


def _paddleocr(config: Any) -> Any:
    return transformers.PaddleOCRVLProcessor(
        transformers.PaddleOCRVLImageProcessorPil(**PACKED), tokenizer(image_token="<image>")
    )


# Q-Formers, an encoder and a decoder, codes, sound


def _blip_2(config: Any) -> Any:
    images = _stretched("BlipImageProcessorPil")
    return transformers.Blip2Processor(images, tokenizer(), config.num_query_tokens)


def _instructblip(config: Any) -> Any:
    parts = _stretched("BlipImageProcessorPil"), tokenizer(), tokenizer()
    return transformers.InstructBlipProcessor(*parts, config.num_query_tokens)


def _florence2(config: Any) -> Any:
    images = _stretched("CLIPImageProcessorPil", image_seq_length=1 + (PIXELS // 8) ** 2)
    return transformers.Florence2Processor(images, tokenizer(image_token="<image>"))


def _chameleon(config: Any) -> Any:
    return transformers.ChameleonProcessor(
        _cropping("ChameleonImageProcessorPil"),
        tokenizer(sep_token="</s>", **BRACKETED),
        image_seq_length=(PIXELS // 4) ** 2,
    )


def _emu3(config: Any) -> Any:
    shrink = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    images = transformers.Emu3ImageProcessor(
        min_pixels=(4 * shrink) ** 2, max_pixels=(8 * shrink) ** 2, spatial_factor=shrink
    )
    around = {"image_wrapper_token": "<tile>", "eof_token": "<break>"}
    made = transformers.Emu3Processor(images, tokenizer(form="$A", **BRACKETED, **around))
    made.downsample_ratio = shrink
    return made


def _qwen2_audio(config: Any) -> Any:
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins, hop_length=400, chunk_length=1
    )
    return transformers.Qwen2AudioProcessor(extractor, tokenizer(audio_token="<audio>"))


# Encoders


def _clip(config: Any) -> Any:
    return transformers.CLIPProcessor(_cropping("CLIPImageProcessorPil"), tokenizer(form=ENDED))


def _siglip(config: Any) -> Any:
    """Texts without a mask, padded to the same length, as the model was trained."""
    lengths = {"model_input_names": ["input_ids"], "model_max_length": TEXT_LENGTH}
    texts = tokenizer(form=ENDED, **lengths)
    return transformers.SiglipProcessor(_stretched("SiglipImageProcessorPil"), texts)


def _siglip2(config: Any) -> Any:
    sizes = {"patch_size": PATCH, "max_num_patches": config.vision_config.num_patches}
    made: Any = transformers.Siglip2Processor(_siglip2_images(config), tokenizer(form=ENDED))
    made.images_kwargs = {**made.images_kwargs, **sizes}  # which it prefers to its parts'
    return made


def _siglip2_images(config: Any) -> Any:
    most = getattr(config, "vision_config", config).num_patches
    return transformers.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=most)


def _vit(config: Any) -> Any:
    height, width = config.image_size
    return transformers.ViTImageProcessorPil(size={"height": height, "width": width})


def _alone(kind: str, config: Any) -> Any:
    return (_stretched if kind.startswith("Siglip") else _cropping)(kind)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "LlavaForConditionalGeneration": _llava,
    "VipLlavaForConditionalGeneration": _llava,
    "VideoLlavaForConditionalGeneration": _video_llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaNextVideoForConditionalGeneration": _llava_next_video,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "InternVLForConditionalGeneration": _internvl,
    "AyaVisionForConditionalGeneration": _aya,
    "PaliGemmaForConditionalGeneration": _paligemma,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Ovis2ForConditionalGeneration": _ovis2,
    "DeepseekVLForConditionalGeneration": partial(_squared, "DeepseekVL"),
    "JanusForConditionalGeneration": partial(_squared, "Janus"),
    "Idefics2ForConditionalGeneration": _idefics2,
    "Idefics3ForConditionalGeneration": _idefics3,
    "MllamaForConditionalGeneration": _mllama,
    **{
        f"{name}ForConditionalGeneration": partial(_gridded, processor, images)
        for name, processor, images in (
            ("Qwen2VL", "Qwen2VL", "Qwen2VL"),
            ("Qwen2_5_VL", "Qwen2_5_VL", "Qwen2VL"),
            ("Qwen3VL", "Qwen3VL", "Qwen2VL"),
            ("Qwen3VLMoe", "Qwen3VL", "Qwen2VL"),
            ("Qwen3_5", "Qwen3VL", "Qwen2VL"),
            ("Glm4v", "Glm4v", "Glm4v"),
            ("Glm46V", "Glm46V", "Glm46V"),
        )
    },
    "PaddleOCRVLForConditionalGeneration": _paddleocr,
    "Blip2ForConditionalGeneration": _blip_2,
    "InstructBlipForConditionalGeneration": _instructblip,
    "Florence2ForConditionalGeneration": _florence2,
    "ChameleonForConditionalGeneration": _chameleon,
    "Emu3ForConditionalGeneration": _emu3,
    "Qwen2AudioForConditionalGeneration": _qwen2_audio,
    "CLIPModel": _clip,
    "SiglipModel": _siglip,
    "Siglip2Model": _siglip2,
    "CLIPVisionModel": partial(_alone, "CLIPImageProcessorPil"),
    "CLIPVisionModelWithProjection": partial(_alone, "CLIPImageProcessorPil"),
    "SiglipVisionModel": partial(_alone, "SiglipImageProcessorPil"),
    "Siglip2VisionModel": _siglip2_images,
    "ViTModel": _vit,
    "ViTForImageClassification": _vit,
    "Dinov2Model": partial(_alone, "BitImageProcessorPil"),
    "Dinov2ForImageClassification": partial(_alone, "BitImageProcessorPil"),
}
"""By architecture. Those that are not here need torchvision or another package."""


def tiny_processor(model: PreTrainedModel) -> Any:
    """A real processor for a tiny model: one token a word, pictures of a few patches.

    None for a family whose processor needs more than is installed with mechmm (`MAKERS`).
    """
    make = MAKERS.get(type(model).__name__)
    return None if make is None else make(model.config)

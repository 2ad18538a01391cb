"""Real processors for tiny models, made offline."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    SiglipImageProcessorPil,
)

from mechmm.testing.recipes import PATCH, PIXELS
from mechmm.testing.vocabulary import tiny_tokenizer


def tiny_processor(model: PreTrainedModel) -> LlavaProcessor:
    """A real processor for a tiny model: one token a word, pictures resized to 32 x 32 pixels."""
    config: Any = model.config
    clip = config.vision_config.model_type == "clip_vision_model"
    size = {"height": PIXELS, "width": PIXELS}
    crop = {"do_center_crop": False, "crop_size": size} if clip else {}
    kind = CLIPImageProcessorPil if clip else SiglipImageProcessorPil
    return LlavaProcessor(
        kind(size=size, **crop),
        tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
    )

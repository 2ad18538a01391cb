"""The vocabulary of planted models, and the config and processor that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mechmm.zoo.planted.pictures import COLORS, PATCH, PIXELS, SHAPES, SIDE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
FIRST, SECOND = ("a1", "a2"), ("b1", "b2")
"""Names of the two cells above, and of the two below."""
NAMES = ("ann", "bob", "cleo", "dan")
COUNTS = ("zero", "one", "two")
FILLERS = ("color", "shape", "same", "count", "at", "in", "of", "ask", "answer", "yes", "no")
WORDS = (*COLORS, *SHAPES, *ROWS, *COLUMNS, *FIRST, *SECOND, *NAMES, *COUNTS, *FILLERS)
VOCABULARY = (*SPECIAL, *WORDS)


def build_config(vision: Mapping[str, Any], text: Mapping[str, Any], read: int) -> LlavaConfig:
    """A LLaVA of these words and pictures.

    Args:
        vision, text: sizes of both towers. read: the vision layer that the projector reads.
    """
    ids = {word: VOCABULARY.index(word) for word in SPECIAL}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=PIXELS, patch_size=PATCH),
        text_config=LlamaConfig(
            **text,
            vocab_size=len(VOCABULARY),
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
            tie_word_embeddings=False,
        ),
        image_token_index=ids["<image>"],
        vision_feature_layer=read,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE**2,
        tie_word_embeddings=False,
    )


def build_processor() -> LlavaProcessor:
    """One token a word, `<s>` first; pixels from -1 to 1."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    names = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": token for name, token in names.items()},
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=128,
    )
    # Only a tokenizer that was loaded knows its own name, which processors ask for.
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    size, half = {"height": PIXELS, "width": PIXELS}, (0.5, 0.5, 0.5)
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

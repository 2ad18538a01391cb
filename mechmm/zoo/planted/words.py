"""The vocabulary of planted models, and their processor."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from mechmm.zoo.planted.pictures import COLORS, PATCH, PIXELS, SHAPES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
FIRST, SECOND = ("a1", "a2"), ("b1", "b2")
"""Names of the two cells above, and of the two below."""
NAMES = ("ann", "bob", "cleo", "dan")
COUNTS = ("zero", "one", "two")
FILLERS = ("color", "shape", "same", "count", "at", "in", "of", "ask", "answer", "yes", "no")
WORDS = (*COLORS, *SHAPES, *ROWS, *COLUMNS, *FIRST, *SECOND, *NAMES, *COUNTS, *FILLERS)
VOCABULARY = (*SPECIAL, *WORDS)


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

"""The demo model before training: its vocabulary, processor and architecture.

A LLaVA: CLIP vision tower (4 layers, d_model 96, 8 x 8 patches), two-layer projector, Llama
language model (6 layers, d_model 128, 8 heads, 4 key-value heads). The last vision layer feeds the
projector, so that every layer of the tower matters.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mechmm.data.questions import ANSWERS, KINDS
from mechmm.data.scenes import CELLS, COLORS, PIXELS, SHAPES

PATCHES = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
MEAN = STD = (0.5, 0.5, 0.5)


def vocabulary() -> list[str]:
    """Special tokens, then every word of a template, a scene description or an answer."""
    templates = " ".join(kind.template for kind in KINDS.values())
    words = {*re.findall(r"[a-z]+|\?", templates), *"0123456789", *COLORS, *SHAPES, *CELLS}
    words |= {answer for answers in ANSWERS.values() for answer in answers}
    return [*SPECIAL, *sorted(words | {"answer", "digit", "in", ",", ".", ":"})]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; text is lower-cased, punctuation stands alone, `<s>` comes first."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[?.,:]"), "isolated"),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    names = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": token for name, token in names.items()},
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """The processor as `AutoProcessor.from_pretrained` will load it."""
    size = {"height": PIXELS, "width": PIXELS}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    with TemporaryDirectory() as folder:
        build_tokenizer().save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PIXELS // PATCHES,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% if message.role == 'user' %}"
            "{% for part in message.content %}"
            "{{ '<image>' if part.type == 'image' else part.text }} "
            "{% endfor %}answer :{% endif %}{% endfor %}"
        ),
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained model, in float32."""
    words = vocabulary()
    ids = {word: words.index(word) for word in SPECIAL}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PIXELS // PATCHES,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES * PATCHES,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Model and processor in Hugging Face format."""
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)

"""Tiny random models of every family, their inputs, and checks that nothing is left behind.

For tests of this package and of code built on it. A model is made from config classes in
milliseconds, without a download. Its weights are drawn wide enough that every part of it matters:
the defaults of `transformers` leave attention almost uniform and some projectors at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mechmm.model import attention
from mechmm.model.families import family_of
from mechmm.model.hooked import HookedMultimodal

PIXELS, PATCH = 32, 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
SENTENCE = (
    "what color is the shape left of right above below in and a : , . ? answer yes no red blue "
    "green black circle square star moon one two three four"
)
WORDS = SENTENCE.split()
TEXTS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
VISIONS: dict[str, Callable[..., PreTrainedConfig]] = {
    "clip": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
RECORDER = "transformers.utils.output_capturing"
"""Where `transformers` keeps the hooks that it installs by itself to record hidden states."""


def tiny(family: str = "llava", **options: Any) -> HookedMultimodal:
    """A tiny hooked model with a real processor.

    Args:
        family: `"llava"`.
        **options: of `tiny_hf`.

    Raises:
        ValueError: for a family, vision tower or language model that has no tiny version.
    """
    hf_model = tiny_hf(family, **options)
    return HookedMultimodal.from_hf(hf_model, tiny_processor(hf_model))


def tiny_hf(
    family: str = "llava",
    *,
    vision: str = "clip",
    text: str = "llama",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] = -1,
    select: str = "default",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A tiny Hugging Face model with random weights, in evaluation mode, on the CPU.

    Pictures of 32 x 32 pixels make 4 x 4 patches; d_model is 32 in every tower.

    Args:
        family: `"llava"`.
        vision: `"clip"` (with a class token) or `"siglip"` (without).
        text: `"llama"`, `"mistral"` or `"qwen2"` (the last has biases on q, k and v).
        heads, key_value_heads: of the language model; as many, fewer or one key-value head.
        layers, vision_layers: number of blocks.
        vision_feature_layer, select: of LLaVA: which vision layer feeds the projector, and whether
            its first position is dropped (`"default"`) or kept (`"full"`).
        attention: `"sdpa"` or `"eager"`.
        dtype: of the parameters.
        seed: of the weights; the global random state is left alone.

    Raises:
        ValueError: for a family, vision tower or language model that has no tiny version.
    """
    _known("family", family, BUILDERS)
    config = BUILDERS[family](
        _vision_config(vision, vision_layers),
        _text_config(text, heads, key_value_heads, layers),
        vision_feature_layer,
        select,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=attention
        )
        _widen(model)
    return model.to(dtype).eval()


def _known(what: str, name: str, table: dict[str, Any]) -> None:
    if name not in table:
        raise ValueError(f"no tiny {what} {name!r}; there are {', '.join(sorted(table))}")


def _vision_config(name: str, layers: int) -> PreTrainedConfig:
    _known("vision tower", name, VISIONS)
    return VISIONS[name](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
    )


def _text_config(name: str, heads: int, key_value_heads: int, layers: int) -> PreTrainedConfig:
    _known("language model", name, TEXTS)
    pad, bos, eos = (SPECIAL.index(token) for token in ("<pad>", "<s>", "</s>"))
    return TEXTS[name](
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def _llava(
    vision: PreTrainedConfig, text: PreTrainedConfig, layer: int | list[int], select: Any
) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        tie_word_embeddings=False,
    )


BUILDERS: dict[str, Callable[..., PreTrainedConfig]] = {"llava": _llava}
"""The config of each family from its towers' configs."""


@torch.no_grad()
def _widen(model: PreTrainedModel) -> None:
    """Draw matrices with a gain of 1.5, and biases and norm weights away from 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            is_table = "embed_tokens" in name or "position_embedding" in name
            fan_in = 1 if is_table else parameter[0].numel()
            parameter.normal_(0.0, 1.5 * fan_in**-0.5)
        else:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2)


# Processor and inputs ------------------------------------------------------------------------


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


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small vocabulary, punctuation alone, `<s>` first."""
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>")
    )
    splits = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(r"[?.,:]"), "isolated"),
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    names = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=["<image>"],
        **{f"{name}_token": token for name, token in names.items()},
    )
    # Only a tokenizer that was loaded knows its own name, which processors ask for.
    with TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny_inputs(
    model: HookedMultimodal | PreTrainedModel,
    images_per_prompt: Sequence[int] = (1,),
    words: Sequence[int] | int = 6,
    *,
    padding_side: str = "left",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Ready inputs without a processor: random words and pixels, placeholders where they belong.

    Args:
        model: a tiny model, hooked or not.
        images_per_prompt: how many images each prompt has; one prompt per entry.
        words: how many words follow the images, for all prompts or per prompt.
        padding_side: where shorter prompts are padded.
        seed: of words and pixels.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` [batch, pos], and `pixel_values`
        [image, channel, row, column] where there is any image.

    Raises:
        ValueError: where `words` and `images_per_prompt` have different lengths.
    """
    hf_model = model.hf_model if isinstance(model, HookedMultimodal) else model
    counts = [words] * len(images_per_prompt) if isinstance(words, int) else list(words)
    if len(counts) != len(images_per_prompt):
        raise ValueError(f"words has {len(counts)} entries for {len(images_per_prompt)} prompts")
    random = torch.Generator().manual_seed(seed)
    shape = (sum(images_per_prompt), 3, PIXELS, PIXELS)
    pixels = torch.randn(shape, generator=random).to(hf_model.device, hf_model.dtype)
    grids = family_of(type(hf_model).__name__).grids(hf_model.config, {"pixel_values": pixels})
    per_image = grids[0].tokens if grids else 0
    rows = [
        _prompt(images, per_image, n, random)
        for images, n in zip(images_per_prompt, counts, strict=True)
    ]
    inputs = {k: v.to(hf_model.device) for k, v in _padded(rows, padding_side).items()}
    return inputs | ({"pixel_values": pixels} if len(pixels) else {})


def _prompt(images: int, per_image: int, words: int, random: torch.Generator) -> list[int]:
    """`<s>`, then a word and the placeholders of each image, then words."""
    drawn = torch.randint(len(WORDS), (images + words,), generator=random) + len(SPECIAL)
    ids = [SPECIAL.index("<s>")]
    for word in drawn[:images].tolist():
        ids += [word, *[SPECIAL.index("<image>")] * per_image]
    return ids + drawn[images:].tolist()


def _padded(rows: Sequence[Sequence[int]], side: str) -> dict[str, Int[Tensor, "batch pos"]]:
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        blank = [SPECIAL.index("<pad>")] * (width - len(row))
        ids.append([*blank, *row] if side == "left" else [*row, *blank])
        real, off = [1] * len(row), [0] * len(blank)
        mask.append([*off, *real] if side == "left" else [*real, *off])
    attention_mask = torch.tensor(mask)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": attention_mask,
        "position_ids": positions,
    }


# Checks --------------------------------------------------------------------------------------


def assert_no_hooks(hf_model: PreTrainedModel) -> None:
    """Refuse a Hugging Face model on which anything of ours is left.

    The recorders that `transformers` installs by itself do not count.

    Raises:
        AssertionError: naming every module with a hook, a config or an attention module of ours.
    """
    left = []
    for name, module in hf_model.named_modules():
        for kind in HOOKS:
            hooks = getattr(module, kind).values()
            left += [
                f"{name}: {kind[1:]} {h}"
                for h in hooks
                if getattr(h, "__module__", None) != RECORDER
            ]
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == attention.NAME:
            left.append(f"{name}: config with attention {attention.NAME!r}")
        if module in attention._HOOKS:
            left.append(f"{name}: attention hooks")
    assert not left, "left behind on the model:\n" + "\n".join(left)

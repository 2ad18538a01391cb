"""Tiny models with Q-Formers, early fusion, an encoder and a decoder, or audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    ChameleonConfig,
    ChameleonVQVAEConfig,
    Emu3Config,
    Florence2Config,
    InstructBlipConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2Config,
    T5Config,
)
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from mechmm.model.grids import fused
from mechmm.testing.recipes import (
    VOCABULARY,
    Maker,
    Tiny,
    random_pixels,
    text_sizes,
    vision_sizes,
)
from mechmm.testing.single import chosen, one_picture
from mechmm.testing.vocabulary import SPECIAL, token

QUERIES = 6
CODES = 16
"""Entries of a tiny codebook; their tokens follow the vocabulary of text."""
CLIPS = (40, 27, 14)
"""Frames that the clips of a batch last in turn; the longest fills the tower."""
MEL = 8
DECODED = 3


def opt(heads: int, key_value_heads: int, layers: int) -> PreTrainedConfig:
    """OPT, which has no grouped queries."""
    sizes = text_sizes(heads, key_value_heads, layers)
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    return OPTConfig(**sizes)


def llama(heads: int, key_value_heads: int, layers: int) -> PreTrainedConfig:
    return LlamaConfig(**text_sizes(heads, key_value_heads, layers))


def t5(heads: int, key_value_heads: int, layers: int) -> PreTrainedConfig:
    """Flan-T5, which has no grouped queries; its heads are wider than the residual stream."""
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 48,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
        "feed_forward_proj": "gated-gelu",
        # Outputs are not scaled; `transformers` ties the embedding and the output all the same.
        "tie_word_embeddings": False,
        "pad_token_id": token("<pad>"),
        "eos_token_id": token("</s>"),
        "decoder_start_token_id": token("<pad>"),
    }
    return T5Config(**sizes)


LANGUAGE = {"opt": opt, "llama": llama, "t5": t5}


def qformer_sizes(layers: int) -> dict[str, Any]:
    """Sizes of a tiny Q-Former, narrower than the vision tower; every other layer sees images."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "cross_attention_frequency": 2,
    }


def blip_2_config(
    *,
    text: str = "opt",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    qformer_layers: int = 3,
) -> Blip2Config:
    """BLIP-2 over OPT, or over T5 (`text="t5"`), which reads the prompt in its encoder."""
    language = chosen("language model", text, LANGUAGE)
    return Blip2Config(
        vision_config=Blip2VisionConfig(**vision_sizes(vision_layers)),
        qformer_config=Blip2QFormerConfig(**qformer_sizes(qformer_layers)),
        text_config=language(heads, key_value_heads, layers),
        num_query_tokens=QUERIES,
        image_token_index=token("<image>"),
    )


def instructblip_config(
    *,
    text: str = "llama",
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    qformer_layers: int = 3,
) -> InstructBlipConfig:
    """InstructBLIP over Llama (Vicuna), or over T5 (`text="t5"`)."""
    language = chosen("language model", text, LANGUAGE)
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**vision_sizes(vision_layers)),
        qformer_config=InstructBlipQFormerConfig(**qformer_sizes(qformer_layers)),
        text_config=language(heads, key_value_heads, layers),
        num_query_tokens=QUERIES,
        image_token_index=token("<image>"),
    )


def query_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [[token("<image>")] * medium.tokens for medium in fused.queries(config, inputs)]


def with_decoder(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`decoder_input_ids`, where the language model has a decoder: its first token, then words."""
    if not config.text_config.is_encoder_decoder:
        return inputs
    batch = len(inputs["input_ids"])
    words = len(SPECIAL) + torch.arange(batch * DECODED).reshape(batch, DECODED)
    start = torch.full((batch, 1), config.text_config.decoder_start_token_id)
    return {**inputs, "decoder_input_ids": torch.cat([start, words], 1)}


def with_instruction(config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the Q-Former reads: the words of its prompt, once for every image of the prompt."""
    ids = inputs["input_ids"]
    images = (ids == config.image_token_id).sum(-1) // config.num_query_tokens
    is_word = ids >= len(SPECIAL)
    length = int(is_word.sum(-1).max())
    order = is_word.long().argsort(dim=-1, descending=True, stable=True)[:, :length]
    mask = is_word.gather(1, order).long()
    words = ids.gather(1, order) * mask + token("<pad>") * (1 - mask)
    read = {"qformer_input_ids": words, "qformer_attention_mask": mask}
    repeated = {name: value.repeat_interleave(images, 0) for name, value in read.items()}
    return with_decoder(config, {**inputs, **repeated})


def florence2_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 3,
) -> Florence2Config:
    """Florence-2: two stages of blocks, the second with all of them but one; BART."""
    return Florence2Config(
        vision_config=Florence2VisionConfig(
            depths=[1, vision_layers - 1],
            patch_size=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[3, 1],
            patch_prenorm=[False, True],
            embed_dim=[16, 32],
            num_heads=[2, 4],
            num_groups=[2, 4],
            window_size=3,
            mlp_ratio=1.5,
            projection_dim=32,
            max_position_embeddings=8,
            max_temporal_embeddings=4,
        ),
        text_config=BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=256,
            pad_token_id=token("<pad>"),
            bos_token_id=token("<s>"),
            eos_token_id=token("</s>"),
            decoder_start_token_id=token("</s>"),
            forced_eos_token_id=None,
        ),
        image_token_id=token("<image>"),
    )


def tall_picture(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, channel, 48 rows, 32 columns]."""
    return {"pixel_values": random_pixels((number, 3, 48, 32), random)}


def florence2_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [[token("<image>")] * m.tokens for m in fused.mean_and_patches(config, inputs)]


def chameleon_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    swin_norm: bool = False,
) -> ChameleonConfig:
    """Chameleon: `vision_layers` residual blocks at each of three resolutions.

    Args:
        swin_norm: whether norms come after attention and MLP (the 34B model).
    """
    # The code is spelled in the name's letters, A for 0; the last letter does not count.
    names = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(i)) + "Z" for i in range(CODES)]
    return ChameleonConfig(
        **{**text_sizes(heads, key_value_heads, layers), "vocab_size": VOCABULARY + CODES},
        swin_norm=swin_norm,
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=8,
            resolution=32,
            base_channels=32,
            channel_multiplier=[1, 1, 2],
            num_res_blocks=vision_layers,
        ),
        vocabulary_map={"<image>": token("<image>")}
        | {name: VOCABULARY + i for i, name in enumerate(names)},
    )


def wide_picture(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [image, channel, 16 rows, 24 columns]."""
    return {"pixel_values": random_pixels((number, 3, 16, 24), random)}


def chameleon_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [
        [token("<start>"), *[token("<image>")] * medium.tokens, token("<end>")]
        for medium in fused.codes(config, inputs)
    ]


def emu3_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 1,
) -> Emu3Config:
    """Emu3: `vision_layers` residual blocks at each of two resolutions, attention at the last."""
    names = [f"<|visual token {i:06d}|>" for i in range(CODES)]
    sizes = {**text_sizes(heads, key_value_heads, layers), "vocab_size": VOCABULARY + CODES}
    return Emu3Config(
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=16,
            temporal_downsample_factor=4,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=vision_layers,
            attn_resolutions=[1],
            hidden_size=32,
        ),
        text_config=Emu3TextConfig(**sizes),
        vocabulary_map={"<image>": token("<image>"), "<|extra_200|>": token("<row>")}
        | {name: VOCABULARY + i for i, name in enumerate(names)},
    )


def small_pictures_of_many_sizes(
    config: Any, number: int, random: torch.Generator
) -> dict[str, Tensor]:
    """`pixel_values`, padded with zeros to the largest picture, and `image_sizes` in pixels."""
    sizes = [((6, 10), (12, 6), (8, 4))[i % 3] for i in range(number)]
    pixels = torch.zeros(number, 3, *(max(size) for size in zip(*sizes, strict=True)))
    for picture, (height, width) in zip(pixels, sizes, strict=True):
        picture[:, :height, :width] = random_pixels((3, height, width), random)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def emu3_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [
        [token("<start>"), *[token("<image>")] * medium.tokens, token("<break>"), token("<end>")]
        for medium in fused.codes_by_row(config, inputs)
    ]


def qwen2_audio_config(
    *,
    heads: int = 4,
    key_value_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
) -> Qwen2AudioConfig:
    """Qwen2-Audio: `vision_layers` are those of its audio tower."""
    return Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=MEL,
            encoder_layers=vision_layers,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            d_model=32,
            max_source_positions=max(CLIPS) // 2,
        ),
        text_config=Qwen2Config(**text_sizes(heads, key_value_heads, layers)),
        audio_token_index=token("<audio>"),
    )


def clips(config: Any, number: int, random: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms [clip, bin, frame], padded to the longest there may be, and real frames."""
    lengths = torch.tensor([CLIPS[i % len(CLIPS)] for i in range(number)])
    mask = (torch.arange(max(CLIPS)) < lengths[:, None]).long()
    features = random_pixels((number, MEL, max(CLIPS)), random) * mask[:, None]
    return {"input_features": features, "feature_attention_mask": mask}


def qwen2_audio_tokens(config: Any, inputs: Mapping[str, Tensor]) -> list[list[int]]:
    return [
        [token("<start>"), *[token("<audio>")] * medium.tokens, token("<end>")]
        for medium in fused.sound(config, inputs)
    ]


RECIPES: dict[str, Tiny] = {
    "blip-2": Tiny(
        "Blip2ForConditionalGeneration",
        blip_2_config,
        {"image": Maker(one_picture, query_tokens)},
        finish=with_decoder,
    ),
    "instructblip": Tiny(
        "InstructBlipForConditionalGeneration",
        instructblip_config,
        {"image": Maker(one_picture, query_tokens)},
        finish=with_instruction,
    ),
    "florence2": Tiny(
        "Florence2ForConditionalGeneration",
        florence2_config,
        {"image": Maker(tall_picture, florence2_tokens)},
        finish=with_decoder,
    ),
    "chameleon": Tiny(
        "ChameleonForConditionalGeneration",
        chameleon_config,
        {"image": Maker(wide_picture, chameleon_tokens)},
    ),
    "emu3": Tiny(
        "Emu3ForConditionalGeneration",
        emu3_config,
        {"image": Maker(small_pictures_of_many_sizes, emu3_tokens)},
    ),
    "qwen2_audio": Tiny(
        "Qwen2AudioForConditionalGeneration",
        qwen2_audio_config,
        {"audio": Maker(clips, qwen2_audio_tokens)},
    ),
}

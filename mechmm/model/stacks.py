"""Transformer stacks, one row per kind, by the `model_type` of their own config.

A new combination of known towers needs no new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mechmm.model.packing import Packing, in_groups, in_rows, in_windows
from mechmm.model.rows import Stack

# Language models -----------------------------------------------------------------------------

GATED_DECODER = Stack(
    embed="embed_tokens",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_final="norm",
    mlp_gate="gate_proj",
    norm="rms",
)
EXPERTS_DECODER = replace(
    GATED_DECODER,
    mlp_gate="gate_proj?",
    mlp_in="up_proj?",
    mlp_out="down_proj?",
    experts="experts?",
)
GEMMA_DECODER = replace(GATED_DECODER, norm="rms_plus_one")
SANDWICH_DECODER = replace(
    GEMMA_DECODER,
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
)
GLM_DECODER = replace(
    GATED_DECODER,
    ln1_post="post_self_attn_layernorm",
    ln2_post="post_mlp_layernorm",
    mlp_gate=None,
    mlp_in="gate_up_proj",
    mlp_in_layout="(two d_mlp)",
)
LINEAR_DECODER = replace(
    GEMMA_DECODER, attn="self_attn?", attn_out="self_attn|linear_attn", q_gate=True
)
CONVOLUTION_DECODER = replace(  # LFM2
    GATED_DECODER,
    ln1="operator_norm",
    ln2="ffn_norm",
    ln_final="embedding_norm",
    attn="self_attn?",
    attn_out="self_attn|conv",
    o="out_proj",
    mlp="feed_forward",
    mlp_in="w3",
    mlp_gate="w1",
    mlp_out="w2",
)
PARALLEL_DECODER = replace(GATED_DECODER, ln2=None, norm="layer")
CROSS_DECODER = replace(  # Mllama: some blocks attend to the picture instead of to the text
    GATED_DECODER, attn="self_attn?", cross_attn="cross_attn?", gated=True
)
LLAMA4_DECODER = replace(
    GATED_DECODER,
    mlp="feed_forward",
    mlp_gate="gate_proj|shared_expert.gate_proj",
    mlp_in="up_proj|shared_expert.up_proj",
    mlp_out="down_proj|shared_expert.down_proj",
    router="router?",
    experts="experts?",
)
SWIN_DECODER = replace(  # Chameleon 30B: norms behind attention and MLP
    GATED_DECODER,
    ln1=None,
    ln2=None,
    ln1_post="input_layernorm",
    ln2_post="post_attention_layernorm",
    mid="mlp",
)
FEED_FORWARD_DECODER = Stack(  # OPT
    embed="embed_tokens",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    ln_final="final_layer_norm?",
    o="out_proj",
    mlp="",
    mlp_in="fc1",
    mlp_out="fc2",
    mlp_out_at="fc2",
)

# Encoder and decoder with norms behind the additions -------------------------------------------

BART_ENCODER = replace(
    FEED_FORWARD_DECODER,
    embed="<layernorm_embedding",
    ln_pre="layernorm_embedding",
    ln_final=None,
    post_norm=True,
)
BART_DECODER = replace(
    BART_ENCODER,
    embed="embed_tokens",
    cross_attn="encoder_attn",
    ln_cross="encoder_attn_layer_norm",
    sizes={"n_heads": "decoder_attention_heads"},
)
QFORMER = Stack(
    blocks=("encoder.layer",),
    embed="<encoder.layer.0",
    ln_pre="layernorm?",
    ln1="attention.output.LayerNorm",
    attn="attention",
    attn_out="attention.output.dense",
    q="attention.query",
    k="attention.key",
    v="attention.value",
    o="output.dense",
    core="attention",
    cross_attn="crossattention",
    cross_attn_out="crossattention.output.dense",
    ln_cross="crossattention.output.LayerNorm",
    ln2="output_query.LayerNorm",
    mlp="",
    mlp_in="intermediate_query.dense",
    mlp_out="output_query.dense",
    mlp_out_at="output_query.dense",
    post_norm=True,
)

# Vision and audio encoders -------------------------------------------------------------------

SIGLIP_ENCODER = Stack(
    blocks=("encoder.layers",),
    embed="embeddings",
    ln1="layer_norm1",
    ln2="layer_norm2",
    ln_final="post_layernorm?",
    o="out_proj",
    mlp_in="fc1",
    mlp_out="fc2",
)
CLIP_ENCODER = replace(SIGLIP_ENCODER, ln_pre="pre_layrnorm", pooled=True)
TEXT_ENCODER = replace(SIGLIP_ENCODER, ln_final="final_layer_norm")
BLIP_ENCODER = replace(SIGLIP_ENCODER, q=None, k=None, v=None, qkv="qkv", o="projection")
VIT_ENCODER = Stack(
    embed="embeddings",
    ln1="layernorm_before",
    ln2="layernorm_after",
    ln_final="layernorm",
    attn="attention",
    mlp_in="fc1",
    mlp_out="fc2",
)
DINO_ENCODER = Stack(
    blocks=("encoder.layer",),
    embed="embeddings",
    ln1="norm1",
    ln2="norm2",
    ln_final="layernorm",
    attn="attention",
    attn_out="layer_scale1",
    mlp_in="fc1|up_proj",
    mlp_gate="gate_proj?",
    mlp_out="fc2|down_proj",
    mlp_out_at="layer_scale2",
)
DINO3_ENCODER = replace(DINO_ENCODER, blocks=("model.layer",), ln_final="norm")
INTERN_ENCODER = Stack(
    blocks=("encoder.layer",),
    embed="embeddings",
    ln1="layernorm_before",
    ln2="layernorm_after",
    ln_final="layernorm?",
    attn="attention",
    o="projection_layer",
    attn_out="attention",
    mlp_in="fc1",
    mlp_out="fc2",
    gated=True,
)
PIXTRAL_ENCODER = Stack(
    blocks=("transformer.layers",),
    embed="<ln_pre",
    ln_pre="ln_pre",
    ln1="attention_norm",
    ln2="ffn_norm",
    attn="attention",
    mlp="feed_forward",
    mlp_gate="gate_proj",
    norm="rms",
    packed=Packing(in_rows, axis=1, chunked=False),
)
QWEN_ENCODER = Stack(
    blocks=("blocks",),
    embed="patch_embed",
    ln1="norm1",
    ln2="norm2",
    attn="attn",
    q=None,
    k=None,
    v=None,
    qkv="qkv",
    o="proj",
    mlp_in="fc1|linear_fc1",
    mlp_out="fc2|linear_fc2",
    packed=Packing(in_groups),
)
GATED_QWEN_ENCODER = replace(
    QWEN_ENCODER, mlp_in="up_proj", mlp_gate="gate_proj", mlp_out="down_proj", norm="rms"
)
WINDOW_ENCODER = replace(GATED_QWEN_ENCODER, packed=Packing(in_windows))
GLM_ENCODER = replace(GATED_QWEN_ENCODER, embed="embeddings", ln_final="post_layernorm")
LLAMA4_ENCODER = Stack(
    blocks=("model.layers",),
    embed="patch_embedding",
    embed_layout="tile one pos d -> (tile one) pos d",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_pre="layernorm_pre",
    ln_final="layernorm_post",
    mlp_in="fc1",
    mlp_out="fc2",
)
MLLAMA_ENCODER = Stack(
    blocks=("transformer.layers", "global_transformer.layers"),
    embed="<transformer.layers.0",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_final="layernorm_post",
    mlp_in="fc1",
    mlp_out="fc2",
    gated=True,
)
DAVIT_ENCODER = Stack(  # Florence-2: attention within windows, then between channels
    blocks=("blocks.*.*.*",),
    embed="convs.0",
    stream_layout="image d row column -> image (row column) d",
    ln1="norm1",
    ln2="norm2",
    attn="window_attn|channel_attn",
    q=None,
    k=None,
    v=None,
    qkv="qkv",
    o="proj",
    mlp="ffn",
    mlp_in="fc1",
    mlp_out="fc2",
)
AUDIO_ENCODER = Stack(
    embed="<layers.0",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    ln_final="layer_norm",
    o="out_proj",
    mlp="",
    mlp_in="fc1",
    mlp_out="fc2",
    mlp_out_at="fc2",
)
OVIS_ENCODER = replace(
    SIGLIP_ENCODER,
    ln1="rms_norm1",
    ln2="rms_norm2",
    ln_final="rms_norm",
    attn="attention",
    mlp="ffn",
    mlp_in="up_proj",
    mlp_gate="gate_proj",
    mlp_out="down_proj",
    norm="rms",
)
RESAMPLER = Stack(  # Idefics2: latents attend to the picture and to each other at once
    ln1="input_latents_norm",
    ln2="post_attention_layernorm",
    ln_final="norm",
    attn=None,
    cross_attn="self_attn",
    mlp_gate="gate_proj",
    norm="rms",
    sizes={"n_heads": "resampler_n_heads", "d_head": "resampler_head_dim"},
)


def _chameleon(config: Any) -> Stack:
    return replace(SWIN_DECODER if config.swin_norm else GATED_DECODER, embed="<layers.0")


def _internvl(config: Any) -> Stack:
    return replace(INTERN_ENCODER, norm="rms" if config.norm_type == "rms_norm" else "layer")


def _opt(config: Any) -> Stack:
    return replace(FEED_FORWARD_DECODER, post_norm=not config.do_layer_norm_before)


STACKS: dict[str, Stack | Callable[[Any], Stack]] = {
    "llama": GATED_DECODER,
    "mistral": GATED_DECODER,
    "qwen2": GATED_DECODER,
    "qwen3": GATED_DECODER,
    "smollm3": GATED_DECODER,
    "qwen3_moe": EXPERTS_DECODER,
    "qwen2_vl_text": GATED_DECODER,
    "qwen2_5_vl_text": GATED_DECODER,
    "qwen3_vl_text": GATED_DECODER,
    "qwen3_vl_moe_text": EXPERTS_DECODER,
    "qwen3_5_text": LINEAR_DECODER,
    "paddleocr_vl_text": GATED_DECODER,
    "glm4v_text": GLM_DECODER,
    "emu3_text_model": replace(GATED_DECODER, embed="<layers.0"),
    "chameleon": _chameleon,
    "gemma": GEMMA_DECODER,
    "gemma2": SANDWICH_DECODER,
    "gemma3_text": SANDWICH_DECODER,
    "cohere2": PARALLEL_DECODER,
    "lfm2": CONVOLUTION_DECODER,
    "mllama_text_model": CROSS_DECODER,
    "llama4_text": LLAMA4_DECODER,
    "ovis2_vision": OVIS_ENCODER,
    "janus_vision_model": replace(SIGLIP_ENCODER, o="projection_layer"),
    "opt": _opt,
    "bart_encoder": BART_ENCODER,
    "bart_decoder": BART_DECODER,
    "blip_2_qformer": QFORMER,
    "instructblip_qformer": QFORMER,
    "idefics2_perceiver": RESAMPLER,
    "clip_vision_model": CLIP_ENCODER,
    "clip_text_model": TEXT_ENCODER,
    "siglip_vision_model": SIGLIP_ENCODER,
    "siglip_text_model": TEXT_ENCODER,
    "siglip2_vision_model": SIGLIP_ENCODER,
    "siglip2_text_model": TEXT_ENCODER,
    "idefics2_vision": SIGLIP_ENCODER,
    "idefics3_vision": SIGLIP_ENCODER,
    "smolvlm_vision": SIGLIP_ENCODER,
    "blip_2_vision_model": BLIP_ENCODER,
    "instructblip_vision_model": BLIP_ENCODER,
    "vit": VIT_ENCODER,
    "dinov2": DINO_ENCODER,
    "dinov3_vit": DINO3_ENCODER,
    "internvl_vision": _internvl,
    "pixtral": PIXTRAL_ENCODER,
    "qwen2_vl_vision": replace(QWEN_ENCODER, sizes={"d_model": "embed_dim"}),
    "qwen2_5_vl_vision": WINDOW_ENCODER,
    "qwen3_vl_vision": QWEN_ENCODER,
    "qwen3_vl_moe_vision": QWEN_ENCODER,
    "qwen3_5_vision": QWEN_ENCODER,
    "glm4v_vision": GLM_ENCODER,
    "paddleocr_vl_vision": replace(SIGLIP_ENCODER, packed=Packing(in_groups)),
    "florence_vision": DAVIT_ENCODER,
    "llama4_vision_model": LLAMA4_ENCODER,
    "mllama_vision_model": MLLAMA_ENCODER,
    "qwen2_audio_encoder": AUDIO_ENCODER,
}
"""Rows by `model_type`; a function of the config where one type has several orders of norms."""

"""One row per architecture: where its towers, projector and placeholders are.

Two tables. `STACKS` describes a transformer stack by the `model_type` of its own config, so that a
new combination of known towers needs no new row. `FAMILIES` describes a multimodal architecture:
where its stacks and its projector hang. All entries are module paths; a dotted path is relative to
the thing the row describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mechmm.model.grids import Grid, one_grid_per_image

Norm = Literal["layer", "rms", "rms_plus_one"]
"""`rms_plus_one`: the weight is stored as its difference from one (Gemma)."""


@dataclass(frozen=True)
class Stack:
    """A transformer stack, paths relative to its root module.

    Attributes:
        blocks: the `ModuleList`s of blocks, in order.
        embed: module whose output enters the residual stream.
        ln_pre: norm before the first block; ln_final: norm after the last.
        ln1, attn, ln1_post, ln2, mlp, ln2_post: inside a block; the `_post` ones are the norms
            of sandwich blocks, after attention and after the MLP.
        q, k, v, o: projections inside `attn`; `qkv` instead of the first three where one layer
            computes all of them, laid out as `qkv_layout` (einops, without batch and position).
        mlp_in, mlp_gate, mlp_out: inside `mlp`; gated MLPs have all three.
        norm: how the norms compute.
    """

    embed: str
    ln1: str
    ln2: str
    ln_final: str | None
    q: str | None = "q_proj"
    k: str | None = "k_proj"
    v: str | None = "v_proj"
    o: str = "o_proj"
    mlp_in: str = "up_proj"
    mlp_out: str = "down_proj"
    mlp_gate: str | None = None
    blocks: tuple[str, ...] = ("layers",)
    attn: str = "self_attn"
    mlp: str = "mlp"
    norm: Norm = "layer"
    ln_pre: str | None = None
    ln1_post: str | None = None
    ln2_post: str | None = None
    qkv: str | None = None
    qkv_layout: str = "(three head d_head)"


@dataclass(frozen=True)
class Projector:
    """The map from a tower to the language model, paths relative to its root.

    Attributes:
        root: module that takes tower features and gives language model embeddings.
        pre: module whose output is the hidden layer before the activation, or None.
        post: module whose input is the hidden layer after the activation, or None.
    """

    root: str
    pre: str | None = None
    post: str | None = None


@dataclass(frozen=True)
class Family:
    """A multimodal architecture, paths relative to the Hugging Face model.

    Attributes:
        architecture: the class name in `transformers`, as in `config.architectures`.
        language: root of the language model's stack, whose hooks have no prefix.
        towers: root of every other stack, by the prefix of its hooks.
        projectors: by prefix.
        unembed: the output layer.
        placeholder: name of the config entry with the token id that an image fills.
        pixels: name of the model input with the picture.
        grids: the patch grid of every image of a batch, from (config, model inputs).
        unread: (config) -> hook name patterns that this configuration leaves unread, each with
            the reason.
    """

    architecture: str
    language: str
    towers: Mapping[str, str]
    projectors: Mapping[str, Projector]
    unembed: str = "lm_head"
    placeholder: str = "image_token_id"
    pixels: str = "pixel_values"
    grids: Callable[[Any, Mapping[str, Any]], list[Grid]] = one_grid_per_image
    unread: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})


def _llava_unread(config: Any) -> dict[str, str]:
    """What lies behind the vision layer that the projector reads."""
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    last = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
    reason = f"the projector reads vision layer {chosen} (vision_feature_layer)"
    behind = "|".join(str(layer) for layer in range(last, layers))
    found = {r"vision\.ln_final\..*": reason}
    return found | ({rf"vision\.blocks\.({behind})\..*": reason} if behind else {})


GATED_DECODER = Stack(
    embed="embed_tokens",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_final="norm",
    mlp_gate="gate_proj",
    norm="rms",
)
SIGLIP_ENCODER = Stack(
    blocks=("encoder.layers",),
    embed="embeddings",
    ln1="layer_norm1",
    ln2="layer_norm2",
    ln_final="post_layernorm",
    o="out_proj",
    mlp_in="fc1",
    mlp_out="fc2",
)
CLIP_ENCODER = Stack(**{**vars(SIGLIP_ENCODER), "ln_pre": "pre_layrnorm"})

STACKS: dict[str, Stack] = {
    "llama": GATED_DECODER,
    "mistral": GATED_DECODER,
    "qwen2": GATED_DECODER,
    "clip_vision_model": CLIP_ENCODER,
    "siglip_vision_model": SIGLIP_ENCODER,
}
"""Transformer stacks by the `model_type` of their config."""

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlavaForConditionalGeneration",
            language="model.language_model",
            towers={"vision": "model.vision_tower"},
            projectors={
                "projector": Projector("model.multi_modal_projector", "linear_1", "linear_2")
            },
            unread=_llava_unread,
        ),
    )
}
"""Multimodal architectures by class name."""


class UnknownArchitectureError(ValueError):
    """The architecture, or one of its stacks, has no row yet."""


def family_of(architecture: str) -> Family:
    """The row of an architecture.

    Raises:
        UnknownArchitectureError: with the rows that exist and how to add one.
    """
    if architecture not in FAMILIES:
        raise UnknownArchitectureError(
            f"no row for architecture {architecture!r}; known: {', '.join(sorted(FAMILIES))}. "
            "To add it, write one Family row in mechmm/model/families.py (CONTRIBUTING.md, "
            "'Add a model family') and pass the model to HookedMultimodal.from_hf"
        )
    return FAMILIES[architecture]


def stack_of(model_type: str, prefix: str) -> Stack:
    """The row of a tower by its config's `model_type`.

    Raises:
        UnknownArchitectureError: naming the tower, the rows that exist and how to add one.
    """
    if model_type not in STACKS:
        raise UnknownArchitectureError(
            f"tower {prefix!r}: no row for model_type {model_type!r}; known: "
            f"{', '.join(sorted(STACKS))}. To add it, write one Stack row in "
            "mechmm/model/families.py (CONTRIBUTING.md, 'Add a model family')"
        )
    return STACKS[model_type]

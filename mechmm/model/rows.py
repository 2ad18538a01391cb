"""What a row says: one `Stack` per kind of transformer stack, one `Family` per architecture.

All entries are module paths, relative to the thing that the row describes. In a path, `a|b` means
the first of the two that a block has, and a `?` at the end that some models have no such module; a
path without it must exist in at least one block, or wrapping the model is refused with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mechmm.model.grids import Medium
from mechmm.model.packing import Packing

VERIFIED = "5.23.0"
"""The version of `transformers` with which the rows were last run through the conformance suite."""
Norm = Literal["layer", "rms", "rms_plus_one"]
"""`rms_plus_one`: the weight is stored as its difference from one (Gemma)."""


RESUME = {
    "causal": "at a block; keys and values of earlier positions hold",
    "image spans": "at a block; images see themselves both ways: keys and values hold before them",
    "both ways": "at a block; the whole prompt sees itself, so no keys and values hold",
    "recurrent": "at a block; linear-attention blocks keep a state instead of keys and values",
    "cross": "at a block; the picture comes in by cross-attention at every such block",
    "encoder-decoder": "at a block of the decoder; the encoder's output holds",
    "encoder": "at a block; all positions see each other",
}
"""What a run that enters at a block may reuse, by kind."""


@dataclass(frozen=True)
class Stack:
    """A transformer stack, paths relative to its root module.

    Attributes:
        blocks: the `ModuleList`s of blocks, in order; each `.*` at the end of a path stands for the
            children of what the path before it says.
        embed: module whose output enters the residual stream (position embeddings included where
            that module adds them).
        embed_layout: how its output lies where not as [batch, pos, d_model], in einops.
        stream_layout: the same for what enters and leaves a block.
        ln_pre: norm before the first block; ln_final: norm after the last.
        ln1, attn, ln1_post, ln2, mlp, ln2_post: inside a block; the `_post` ones are the norms
            of sandwich blocks, after attention and after the MLP. Without `ln2` attention and MLP
            are parallel and read the same norm.
        cross_attn, ln_cross: attention to another tower, and the norm before it.
        attn_out, cross_attn_out, mlp_out_at: modules whose output is added to the residual stream,
            where it is not the module itself or its post-norm (layer scale, linear attention).
        q, k, v, o: projections inside `attn`; `qkv` instead of the first three where one layer
            computes all of them, laid out as `qkv_layout` (einops, without batch and position);
            `q_gate`: the query projection gives a gate of the same size after each head's query.
        cross_q, cross_k, cross_v, cross_o: the same inside `cross_attn`; default: as in `attn`.
        mlp_in, mlp_gate, mlp_out: inside `mlp`; gated MLPs have all three; `mlp_in_layout`: how one
            layer gives gate and input.
        experts: inside a mixture-of-experts `mlp`, given the chosen experts and their weights;
            `router`: module that gives the weight of every expert, where `experts` is not.
        norm: how the norms compute.
        post_norm: the norms stand behind the additions, on the residual stream (BERT, BART).
        core: module inside `attn` and `cross_attn` that computes the pattern, where not itself.
        mid: module that the residual stream enters between attention and MLP; default: `ln2`.
        gated: what attention and MLP give is multiplied by a gate before it is added.
        pooled: the final norm is given one position of each sequence, not the whole stream.
        packed: how a tower that packs the patches of all images in one sequence orders them.
        sizes: entries of the config under another name than usual, by TransformerLens's name.
    """

    ln1: str | None
    embed: str | None = None
    ln2: str | None = None
    ln_final: str | None = None
    embed_layout: str | None = None
    stream_layout: str | None = None
    q: str | None = "q_proj"
    k: str | None = "k_proj"
    v: str | None = "v_proj"
    o: str | None = "o_proj"
    cross_q: str | None = None
    cross_k: str | None = None
    cross_v: str | None = None
    cross_o: str | None = None
    mlp_in: str | None = "up_proj"
    mlp_out: str | None = "down_proj"
    mlp_gate: str | None = None
    mlp_in_layout: str | None = None
    blocks: tuple[str, ...] = ("layers",)
    attn: str | None = "self_attn"
    cross_attn: str | None = None
    ln_cross: str | None = None
    mlp: str | None = "mlp"
    attn_out: str | None = None
    cross_attn_out: str | None = None
    mlp_out_at: str | None = None
    router: str | None = None
    experts: str | None = None
    norm: Norm = "layer"
    ln_pre: str | None = None
    ln1_post: str | None = None
    ln2_post: str | None = None
    qkv: str | None = None
    qkv_layout: str = "(three head d_head)"
    q_gate: bool = False
    post_norm: bool = False
    core: str = ""
    mid: str | None = None
    gated: bool = False
    pooled: bool = False
    packed: Packing | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Projector:
    """The map from a tower to the language model, paths relative to its root.

    Attributes:
        root: module that takes tower features and gives language model embeddings; a `ModuleList`
            of such modules gets one numbered set of hooks each.
        pre: module whose output is the hidden layer before the activation, or None.
        post: module whose input is the hidden layer after the activation, or None.
        tower: the tower that it reads.
        last: whether its tokens are what takes the places of placeholders.
    """

    root: str
    pre: str | None = None
    post: str | None = None
    tower: str = "vision"
    last: bool = True


@dataclass(frozen=True)
class MediumInput:
    """One kind of medium that a model takes.

    Attributes:
        kind: `"image"`, `"video"` or `"audio"`.
        pixels: name of the model input with it.
        placeholder: entry of the config with the token id that it fills; None: it fills none.
        grids: (config, model inputs) -> the media of a batch in order, each with its views.
    """

    kind: str
    pixels: str
    placeholder: str | None
    grids: Callable[[Any, Mapping[str, Any]], list[Medium]]


@dataclass(frozen=True)
class Family:
    """A multimodal architecture, paths relative to the Hugging Face model.

    Attributes:
        architecture: the class name in `transformers`, as in `config.architectures`.
        towers: root of every stack by name; the hooks of `"language"` have no prefix, those of the
            others their name.
        media: what it sees and hears.
        projectors: by prefix of their hooks.
        unembed: the output layer, or None.
        output: entry of the model's output that `forward` returns.
        own_positions: whether the model computes its position ids from the inputs (rotary axes of
            rows, columns and frames), so that none are passed.
        resume: a key of `RESUME`: what a run that enters at a later block may reuse.
        deepstack: (config) -> number of language blocks after which vision features are added.
        stacks: name in `STACKS` of towers whose config does not tell it, by tower.
        absent: parts of the model that have no hooks -> why.
        reads: (config) -> which hidden states of the seeing tower are read by something else than
            its next block: `i` is what enters block `i`. Empty: what leaves the last block.
        unread: (config) -> hook name patterns that this configuration leaves unread, each with
            the reason.
    """

    architecture: str
    towers: Mapping[str, str]
    media: tuple[MediumInput, ...]
    projectors: Mapping[str, Projector] = field(default_factory=dict)
    unembed: str | None = "lm_head"
    output: str = "logits"
    own_positions: bool = False
    resume: str = "causal"
    deepstack: Callable[[Any], int] = field(default=lambda config: 0)
    stacks: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    reads: Callable[[Any], tuple[int, ...]] = field(default=lambda config: ())
    unread: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})

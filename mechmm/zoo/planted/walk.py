"""A LLaVA of CLIP and Llama as a sum over edges, with gradients: what training by interchange runs.

Along every edge a reader gets what its writer writes in this run, or what the same writer wrote in
another one. One call runs a batch whose examples have different edges swapped:

    x_v = sum over writers u of (u + swap[u -> v] (u_other - u)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mechmm.results.graph import Graph

Stacked = Float[Tensor, "writer batch pos d_model"]


@dataclass(frozen=True)
class Run:
    """The logits at the last position, and what every writer wrote, by tower."""

    logits: Float[Tensor, "batch vocab"]
    seen: Float[Tensor, "seer batch patch d_vision"]
    said: Float[Tensor, "sayer batch pos d_model"]


def walk(
    model: Any,
    graph: Graph,
    pixels: Float[Tensor, "batch channel height width"],
    ids: Int[Tensor, "batch pos"],
    swap: Float[Tensor, "batch edge"] | None = None,
    other: Run | None = None,
) -> Run:
    """Run a batch of prompts of one length, with one picture each.

    Args:
        model: a `LlavaForConditionalGeneration` that reads one vision layer without its first
            token.
        graph: its edges.
        swap: 1 where an edge carries what its writer wrote in `other`.
    """
    parts = _by_block(graph, swap)
    sight = _see(model, pixels, _Stream(other.seen if other else None, parts))
    features = model.model.multi_modal_projector(sight.read(lambda x: x)[0][:, 1:])
    speech = _Stream(other.said if other else None, parts)
    logits = _say(model, ids, features, speech)
    return Run(logits, torch.cat(sight.written), torch.cat(speech.written))


def _by_block(graph: Graph, swap: Tensor | None) -> list[Float[Tensor, "batch writer reader"]]:
    """Which edges are swapped, for the readers of every block in turn."""
    if swap is None:
        return []
    parts = swap.split([block.size for block in graph.blocks], dim=1)
    return [p.unflatten(1, b.shape[1:]) for p, b in zip(parts, graph.blocks, strict=True)]


def _see(model: Any, pixels: Tensor, stream: _Stream) -> _Stream:
    """The vision tower up to the layer that is read."""
    tower, config = model.model.vision_tower, model.config
    layer, blocks = config.vision_feature_layer, len(tower.encoder.layers)
    stream.write(tower.pre_layrnorm(tower.embeddings(pixels))[None])
    for block in tower.encoder.layers[: layer if layer >= 0 else blocks + 1 + layer]:
        heads = config.vision_config.num_attention_heads
        q, k, v = _heads(block.self_attn, stream.read(block.layer_norm1), heads)
        z = scaled_dot_product_attention(q, k, v)
        stream.write(*_out(block.self_attn.out_proj, z))
        stream.write(block.mlp(stream.read(block.layer_norm2)[0])[None])
    return stream


def _say(model: Any, ids: Tensor, features: Tensor, stream: _Stream) -> Tensor:
    """The language model; logits at the last position."""
    llama, image = model.model.language_model, ids == model.config.image_token_index
    words = llama.embed_tokens(ids).masked_fill(image[..., None], 0.0)
    shown = torch.zeros_like(words).masked_scatter(image[..., None], features)
    stream.write(torch.stack([shown, words]))
    turn = llama.rotary_emb(words, torch.arange(ids.shape[1])[None])
    for block in llama.layers:
        heads = model.config.text_config.num_attention_heads
        q, k, v = _heads(block.self_attn, stream.read(block.input_layernorm), heads)
        z = scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        stream.write(*_out(block.self_attn.o_proj, z))
        stream.write(block.mlp(stream.read(block.post_attention_layernorm)[0])[None])
    return model.lm_head(stream.read(llama.norm)[0][:, -1])


class _Stream:
    """A residual stream: its writers so far, and what each reader gets."""

    def __init__(self, other: Tensor | None, parts: list[Tensor]) -> None:
        self.written: list[Tensor] = []
        self.total: Tensor | float = 0.0
        self.other, self.parts = other, parts

    def write(self, values: Stacked, bias: Tensor | None = None) -> None:
        self.written.append(values)
        self.total = self.total + values.sum(0) + (0.0 if bias is None else bias)

    def read(self, norm: Any) -> Float[Tensor, "reader batch pos d_model"]:
        """What the readers of the next block get, behind their norm; one row where all get the
        same."""
        if self.other is None:
            return norm(self.total)[None]
        swap = self.parts.pop(0)
        now = torch.cat(self.written)
        change = torch.einsum("bur,ubpd->rbpd", swap, self.other[: len(now)] - now)
        return norm(self.total + change)


def _heads(attention: Any, x: Tensor, heads: int) -> list[Float[Tensor, "batch head pos d_head"]]:
    """Queries, keys and values; each head's from its own row of x where there are several."""
    found = []
    for part, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        own = x[part * heads : (part + 1) * heads] if len(x) > 1 else x.expand(heads, -1, -1, -1)
        value = torch.einsum("hbpd,hkd->bhpk", own, linear.weight.unflatten(0, (heads, -1)))
        if linear.bias is not None:
            value = value + linear.bias.view(heads, 1, -1)
        found.append(value)
    return found


def _out(linear: Any, z: Tensor) -> tuple[Stacked, Tensor | None]:
    """What every head writes, and the bias that belongs to none."""
    weight = linear.weight.unflatten(1, (z.shape[1], -1))
    return torch.einsum("bhpk,dhk->hbpd", z, weight), linear.bias


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * turn[0][:, None] + torch.cat([-b, a], dim=-1) * turn[1][:, None]

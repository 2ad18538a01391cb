"""The representation of a picture as a sum of what heads and MLPs of a vision tower add to it.

The last stream is x = x_0 + sum_l (sum_h a_lh + b_l + mlp_l). What reads it is linear once the
scales of the final norm (and, of SigLIP, the pattern of the pooling attention) are held at what
they are in this run. So every part c has a share A(c), and

    representation = A(x_0) + sum A(a_lh) + sum A(b_l) + sum A(mlp_l) + rest,

    CLIP:    A(c) = P (g * (c - mean c) / scale) at the class token
             rest = P b
    SigLIP:  A(c) = W_O sum_pos alpha W_V (g * (c - mean c) / scale)
             rest = biases + the pooler's MLP

(Gandelsman et al. 2310.05916, who do CLIP). The direct share of a part says nothing of what it does
through later parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.engine.embeddings import check_dual
from mechmm.engine.record import values
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

PROJECTION, POOLER = "vision_projection", "pooler"
"""Projectors through which dual encoders read the last stream: a matrix, or attention."""
BLOCK, HEADS, MLP = "vision.blocks", "attn.hook_result", "hook_mlp_out"
SCALE = "vision.ln_final.hook_scale"


@dataclass(frozen=True, eq=False)
class Direct:
    """The shares of all parts.

    Attributes:
        heads: of every head [image, layer, head, d]. mlps: of every MLP [image, layer, d].
        start: of what enters the first block [image, d].
        rest: biases, and of SigLIP the pooler's MLP [image, d].
        representation: what they add up to, before it is normed [image, d].
    """

    heads: Float[Tensor, "image layer head d"]
    mlps: Float[Tensor, "image layer d"]
    start: Float[Tensor, "image d"]
    rest: Float[Tensor, "image d"]
    representation: Float[Tensor, "image d"]


@torch.no_grad()
def direct(model: HookedMultimodal, batch: Batch) -> Direct:
    """The shares of all parts in the representations of a batch's pictures, on the CPU.

    Raises:
        ValueError: a model that is no dual encoder.
    """
    check_dual(model)
    tower = model.towers["vision"]
    layers = range(tower.cfg.n_layers)
    start, end = f"{BLOCK}.0.hook_resid_pre", f"{BLOCK}.{layers[-1]}.hook_resid_post"
    kept = values(model, batch, [start, end, SCALE])
    kind = Projection if PROJECTION in model.family.projectors else Pooling
    reading = kind.of(model, batch, kept[end], kept[SCALE])
    found: dict[str, Tensor] = {}

    def share(value: Tensor, hook: Any) -> None:
        found[hook.name] = reading.share(value)

    names = [f"{BLOCK}.{i}.{name}" for i in layers for name in (HEADS, MLP)]
    with model.hooks(fwd_hooks=[(name, share) for name in names]):
        whole = values(model, batch, [reading.out])[reading.out][:, 0]
    biases = (tower.weight("b_O", layer) for layer in layers)
    rest = reading.rest + sum(
        reading.share(bias.expand(kept[start].shape)) for bias in biases if bias is not None
    )
    heads = torch.stack([found[f"{BLOCK}.{i}.{HEADS}"] for i in layers], 1)
    mlps = torch.stack([found[f"{BLOCK}.{i}.{MLP}"] for i in layers], 1)
    parts = (heads, mlps, reading.share(kept[start]), rest, whole)
    return Direct(*(part.float().cpu() for part in parts))


@dataclass(frozen=True, eq=False)
class Norm:
    """The final norm with its scales held.

    Attributes:
        scale: [image, pos, 1]. weight, bias: [d_model].
    """

    scale: Float[Tensor, "image pos one"]
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    @classmethod
    def of(cls, model: HookedMultimodal, scale: Tensor) -> Norm:
        """From the scales of a run."""
        tower = model.towers["vision"]
        module: Any = tower.module(tower.row.ln_final)
        return cls(scale, module.weight, module.bias)

    def share(self, part: Float[Tensor, "image pos *part d_model"]) -> Tensor:
        """The share of a part, without the bias."""
        scale = self.scale.view(*self.scale.shape[:2], *[1] * (part.ndim - 2))
        return (part - part.mean(-1, keepdim=True)) / scale * self.weight


@dataclass(frozen=True, eq=False)
class Projection:
    """CLIP: the class token, normed, times a matrix."""

    norm: Norm
    matrix: Float[Tensor, "d d_model"]
    out: str = f"{PROJECTION}.hook_out"

    @classmethod
    def of(cls, model: HookedMultimodal, batch: Batch, end: Tensor, scale: Tensor) -> Projection:
        """From what a run gives."""
        module: Any = model.hf_model.get_submodule(model.family.projectors[PROJECTION].root)
        return cls(Norm.of(model, scale[:, :1]), module.weight)

    @property
    def rest(self) -> Float[Tensor, " d"]:
        """What no part has a share in."""
        return self.norm.bias @ self.matrix.T

    def share(self, part: Float[Tensor, "image pos *part d_model"]) -> Tensor:
        """A of a part [image, *part, d]."""
        return self.norm.share(part[:, :1])[:, 0] @ self.matrix.T


@dataclass(frozen=True, eq=False)
class Pooling:
    """SigLIP: a learned query attends to all positions; an MLP is added.

    Attributes:
        pattern: of the pooling attention [image, head, pos].
        added: what the MLP adds [image, d].
    """

    norm: Norm
    attention: nn.MultiheadAttention
    pattern: Float[Tensor, "image head pos"]
    added: Float[Tensor, "image d"]
    out: str = f"{POOLER}.hook_out"

    @classmethod
    def of(cls, model: HookedMultimodal, batch: Batch, end: Tensor, scale: Tensor) -> Pooling:
        """From what a run gives."""
        module: Any = model.hf_model.get_submodule(model.family.projectors[POOLER].root)
        norm, attention = Norm.of(model, scale), module.attention
        x = norm.share(end) + norm.bias
        mask = batch.extra.get("pixel_attention_mask")
        hidden = None if mask is None else mask == 0
        query = module.probe.expand(len(x), -1, -1)
        options = {"need_weights": True, "average_attn_weights": False}
        pooled, pattern = attention(query, x, x, key_padding_mask=hidden, **options)
        added = module.mlp(module.layernorm(pooled))[:, 0]
        return cls(norm, attention, pattern[:, :, 0], added)

    @property
    def rest(self) -> Float[Tensor, "image d"]:
        """What no part has a share in: biases and the MLP."""
        matrix, bias = self._values
        pooled = (self.norm.bias @ matrix.T + bias) @ self.attention.out_proj.weight.T
        return self.added + pooled + self.attention.out_proj.bias

    @property
    def _values(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the values."""
        packed = self.attention.in_proj_weight, self.attention.in_proj_bias
        return packed[0].chunk(3)[2], packed[1].chunk(3)[2]

    def share(self, part: Float[Tensor, "image pos *part d_model"]) -> Tensor:
        """A of a part [image, *part, d]."""
        value = self.norm.share(part) @ self._values[0].T
        split = value.unflatten(-1, (self.pattern.shape[1], -1))
        pooled = torch.einsum("ip...hd,ihp->i...hd", split, self.pattern)
        return pooled.flatten(-2) @ self.attention.out_proj.weight.T

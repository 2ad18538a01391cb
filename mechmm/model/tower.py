"""One transformer stack of a model: its config in TransformerLens's terms and its weights.

Weights of a block are views of the Hugging Face parameters in TransformerLens's axis order,
detached and without a copy; reading them costs nothing, and writing to them would change the model,
so don't. A tower's own `W_Q`, `W_K`, ... stack the blocks along a first axis, which makes a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from mechmm.model.families import Stack

NORMALIZATION = {"layer": "LN", "rms": "RMS", "rms_plus_one": "RMS"}
WEIGHTS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
}
"""The weights of a block by the part that holds them."""


class TowerConfig(TransformerLensConfig):
    """`transformer_lens`'s config of one tower: n_layers, n_heads, n_key_value_heads, d_model,
    d_head, d_mlp, d_vocab, n_ctx, act_fn, normalization_type, device, dtype, model_name."""

    model_name: str = ""


class Tower:
    """A stack of blocks and what is needed to read it.

    Attributes:
        prefix: of its hook names, for example `"vision."`, empty for the language model.
        row: where things are, paths relative to `root`.
        root: the Hugging Face module.
        blocks: the Hugging Face blocks in order.
        cfg: sizes, in TransformerLens's names.
    """

    def __init__(
        self, prefix: str, row: Stack, root: nn.Module, config: Any, unembed: nn.Module | None
    ) -> None:
        self.prefix, self.row, self.root, self.unembed = prefix, row, root, unembed
        self.blocks = [block for path in row.blocks for block in root.get_submodule(path)]  # pyright: ignore[reportGeneralTypeIssues]
        self.cfg = self._config(config)

    def module(self, path: str | None, block: int | None = None) -> nn.Module | None:
        """The module at a path of the row, in the stack or in one block; None if it has none."""
        if path is None:
            return None
        start = self.root if block is None else self.blocks[block]
        try:
            return start.get_submodule(path)
        except AttributeError:
            return None

    def _inner(self, block: int, part: str, path: str | None) -> nn.Module | None:
        return None if path is None else self.module(f"{getattr(self.row, part)}.{path}", block)

    def linear(self, block: int, name: str) -> nn.Linear | None:
        """The projection `q`, `k`, `v`, `o`, `mlp_in`, `mlp_gate` or `mlp_out` of a block."""
        part = "mlp" if name.startswith("mlp_") else "attn"
        return self._inner(block, part, getattr(self.row, name))  # type: ignore[return-value]

    def _config(self, config: Any) -> TowerConfig:
        query_heads = config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        parameter = next(self.root.parameters())
        positions = self.module(f"{self.row.embed}.position_embedding")
        cfg = TowerConfig(
            d_model=config.hidden_size,
            d_head=d_head,
            n_layers=len(self.blocks),
            n_ctx=getattr(config, "max_position_embeddings", None) or len(positions.weight),  # type: ignore[union-attr, arg-type]
            n_heads=query_heads,
            n_key_value_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            d_mlp=config.intermediate_size,
            d_vocab=getattr(config, "vocab_size", -1) if self.unembed is not None else -1,
            device=str(parameter.device),
            dtype=parameter.dtype,
            act_fn=getattr(config, "hidden_act", None) or config.hidden_activation,
            gated_mlp=self.row.mlp_gate is not None,
            normalization_type=NORMALIZATION[self.row.norm],
            uses_rms_norm=self.row.norm != "layer",
            final_rms=self.row.norm != "layer",
            eps=getattr(config, "rms_norm_eps", None) or config.layer_norm_eps,
            positional_embedding_type="rotary"
            if hasattr(config, "rope_parameters")
            else "standard",
        )
        cfg.model_name = config.model_type
        return cfg

    def weights(self, block: int, part: str) -> dict[str, Callable[[], Tensor | None]]:
        """Readers of the weights of one block's `attn` or `mlp`, by TransformerLens name."""
        return {name: partial(self.weight, name, block) for name in WEIGHTS[part]}

    def weight(self, name: str, block: int) -> Tensor | None:
        """A weight or bias of one block as a view, or None where the block has none.

        W_Q [head, d_model, d_head] (W_K, W_V: key-value heads), W_O [head, d_head, d_model],
        W_in, W_gate [d_model, d_mlp], W_out [d_mlp, d_model]; b_Q [head, d_head], b_O [d_model].
        """
        kind, what = name.split("_")
        place = {"in": "mlp_in", "gate": "mlp_gate", "out": "mlp_out"}.get(what, what.lower())
        linear = self.linear(block, place)
        value = None if linear is None else linear.weight if kind == "W" else linear.bias
        if value is None:
            return None
        value, d_head = value.detach(), self.cfg.d_head
        if what == "O" and kind == "W":
            return rearrange(value, "d_model (h d) -> h d d_model", d=d_head)
        if what in "QKV":
            pattern = "(h d) d_model -> h d_model d" if kind == "W" else "(h d) -> h d"
            return rearrange(value, pattern, d=d_head)
        return value.T if kind == "W" else value

    def stacked(self, name: str) -> Tensor | None:
        """A weight of every block, stacked along a first axis: a copy."""
        found = [self.weight(name, block) for block in range(len(self.blocks))]
        views = [view for view in found if view is not None]
        return torch.stack(views) if len(views) == len(found) else None

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab, d_model]; patch embedding [channel * row * column, d_model]."""
        weight = next(p for n, p in self._embed_parameters() if p.ndim in (2, 4)).detach()
        if weight.ndim == 4:
            return rearrange(weight, "d_model c h w -> (c h w) d_model")
        return weight

    def _embed_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        embed = self.module(self.row.embed)
        found = [] if embed is None else list(embed.named_parameters())
        return iter(sorted(found, key=lambda item: "position" in item[0]))

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, d_vocab].

        Raises:
            AttributeError: for a tower that has none.
        """
        if self.unembed is None:
            raise AttributeError(f"tower {self.prefix!r} has no unembedding")
        return self.unembed.weight.detach().T  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Tensor:
        if name in (*WEIGHTS["attn"], *WEIGHTS["mlp"]):
            found = self.stacked(name)
            if found is not None:
                return found
        raise AttributeError(f"tower {self.prefix!r} has no {name}")

    def __repr__(self) -> str:
        c = self.cfg
        sizes = f"{c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads"
        return f"Tower({self.prefix.rstrip('.') or 'language'}: {c.model_name}, {sizes})"

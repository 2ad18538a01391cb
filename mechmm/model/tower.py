"""One transformer stack of a model: its config in TransformerLens's terms and its weights.

Weights of a block are views of the Hugging Face parameters in TransformerLens's axis order,
detached and without a copy; reading them costs nothing, and writing to them would change the model,
so don't. A tower's own `W_Q`, `W_K`, ... stack the blocks along a first axis, which makes a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from einops import parse_shape, rearrange
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from mechmm.model.packing import Back, Pack, unpacked
from mechmm.model.rows import VERIFIED, Stack

NORMALIZATION = {"layer": "LN", "rms": "RMS", "rms_plus_one": "RMS"}
WEIGHTS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
}
"""The weights of a block by the part that holds them."""
SIZES = {
    "d_model": ("hidden_size", "d_model", "embed_dim"),
    "d_head": ("head_dim",),
    "n_heads": ("num_attention_heads", "num_heads", "attention_heads"),
    "d_mlp": ("intermediate_size", "encoder_ffn_dim", "ffn_dim"),
    "n_ctx": ("max_position_embeddings", "max_source_positions"),
    "act_fn": ("hidden_act", "hidden_activation", "activation_function"),
    "eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"),
}
"""Entries of a config under their various names, by TransformerLens's name."""
PATHS = (
    *("embed", "ln_pre", "ln_final"),
    *("ln1", "attn", "ln1_post", "ln2", "mlp", "ln2_post", "cross_attn", "ln_cross"),
    *("attn_out", "cross_attn_out", "mlp_out_at", "mid"),
)


PROJECTIONS = {
    "attn": ("q", "k", "v", "qkv", "o", "core"),
    "cross_attn": ("cross_q", "cross_k", "cross_v", "cross_o"),
    "mlp": ("mlp_in", "mlp_gate", "mlp_out", "experts", "router"),
}
"""What a row names inside the parts of a block."""


class MissingPathError(ValueError):
    """A row names a module that this version of `transformers` does not have."""


def remedy() -> str:
    """What to do about a row that does not fit."""
    same = transformers.__version__ == VERIFIED
    return "mend the row" if same else "install that version, or mend the row"


class TowerConfig(TransformerLensConfig):
    """`transformer_lens`'s config of one tower: n_layers, n_heads, n_key_value_heads, d_model,
    d_head, d_mlp, d_vocab, n_ctx, act_fn, normalization_type, device, dtype, model_name."""

    model_name: str = ""


def found(root: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a row's path (`a|b`: the first that exists), or None."""
    for choice in (path or "").rstrip("?").lstrip("<").split("|"):
        try:
            module = root.get_submodule(choice) if path is not None else None
        except AttributeError:
            continue
        if module is not None:
            return module
    return None


class Tower:
    """A stack of blocks and what is needed to read it.

    Attributes:
        prefix: of its hook names, for example `"vision."`, empty for the language model.
        row: where things are, paths relative to `root`.
        root: the Hugging Face module.
        blocks: the Hugging Face blocks in order.
        ends: numbers of the last block of each of the lists that they come from.
        config: the Hugging Face config.
        cfg: sizes, in TransformerLens's names.
        pack: of the run in progress, for a tower that packs.
        shape: of what entered the block that runs.
    """

    def __init__(
        self, prefix: str, row: Stack, root: nn.Module, config: Any, unembed: nn.Module | None
    ) -> None:
        self.prefix, self.row, self.root, self.unembed = prefix, row, root, unembed
        lists = [list(self._list(path)) for path in row.blocks]
        self.blocks = [block for blocks in lists for block in blocks]
        self.ends = set((np.cumsum([len(blocks) for blocks in lists]) - 1).tolist())
        self._refuse_missing()
        self.config = config
        self.cfg = self._sizes(config)
        self.pack: Pack | None = None
        self.shape: torch.Size | None = None

    @property
    def name(self) -> str:
        """Its name in `model.towers`."""
        return self.prefix.rstrip(".") or "language"

    def _list(self, path: str) -> Iterator[nn.Module]:
        start, *rest = path.split(".*")
        module = found(self.root, start)
        if module is None:
            raise MissingPathError(self._missing(path))
        inside = [module]
        for _ in rest:
            inside = [child for parent in inside for child in parent.children()]
        return iter(inside if rest else module.children())

    def _refuse_missing(self) -> None:
        """Refuse a row with a path that no block has."""
        for name in PATHS:
            path = getattr(self.row, name)
            if path is None or path.endswith("?"):
                continue
            starts = [self.root] if name in PATHS[:3] else self.blocks
            if starts and all(found(start, path) is None for start in starts):
                raise MissingPathError(self._missing(path))
        for part, names in PROJECTIONS.items():
            inside = getattr(self.row, part)
            for name in names if inside is not None else ():
                path = getattr(self.row, name) or getattr(self.row, name.removeprefix("cross_"))
                if path is None or path.endswith("?") or not self.blocks:
                    continue
                if all(self.part(i, part, path) is None for i in range(len(self.blocks))):
                    raise MissingPathError(self._missing(f"{inside}.{path}"))

    def _missing(self, path: str) -> str:
        return (
            f"tower {self.name!r} ({type(self.root).__name__}) has no module {path!r} in "
            f"transformers {transformers.__version__}; its row in mechmm/model/stacks.py was "
            f"verified with transformers {VERIFIED}: {remedy()}"
        )

    # Modules ---------------------------------------------------------------------------------

    def module(self, path: str | None, block: int | None = None) -> nn.Module | None:
        """The module at a path of the row, in the stack or in one block; None if it has none."""
        return found(self.root if block is None else self.blocks[block], path)

    def part(self, block: int, part: str, path: str | None) -> nn.Module | None:
        """A module inside `attn`, `cross_attn` or `mlp` of a block."""
        inside = self.module(getattr(self.row, part), block)
        return None if inside is None or path is None else found(inside, path)

    def linear(self, block: int, name: str) -> nn.Linear | None:
        """The projection `q`, `k`, `v`, `o`, `qkv`, `cross_q`, ..., `mlp_in`, ... of a block."""
        path = getattr(self.row, name)
        if name.startswith("mlp_"):
            return self.part(block, "mlp", path)  # type: ignore[return-value]
        if name.startswith("cross_"):
            path = path or getattr(self.row, name.removeprefix("cross_"))
            return self.part(block, "cross_attn", path)  # type: ignore[return-value]
        return self.part(block, "attn", path)  # type: ignore[return-value]

    def first(self, block: int, *paths: str | None) -> nn.Module | None:
        """The first of some paths that a block has."""
        modules = (self.module(path, block) for path in paths)
        return next((module for module in modules if module is not None), None)

    def heads(self, block: int) -> int:
        """Query heads of a block's attention."""
        module = self.module(self.row.attn or self.row.cross_attn, block)
        for name in ("num_heads", "groups", "num_attention_heads"):
            number = getattr(module, name, None)
            if isinstance(number, int):
                return number
        return self.cfg.n_heads

    def d_head(self, block: int) -> int:
        """Size of a query head of a block."""
        o = self.linear(block, "o") or self.linear(block, "cross_o")
        return self.cfg.d_head if o is None else o.in_features // self.heads(block)

    # How its values lie ----------------------------------------------------------------------

    def shown(self, value: Tensor, where: str = "inside") -> tuple[Tensor, Back]:
        """A value of its modules as [batch, pos, ...], and the way back.

        Args:
            where: `"embed"`; `"stream"` (what enters and leaves a block); `"inside"` (a block);
                `"experts"` (of a mixture); `"pooled"` (the final norm); `"features"` and `"tokens"`
                (what enters and leaves a projector).
        """
        if self.pack is not None and self.row.packed is not None:
            return self._unpacked(value, where)
        if value.ndim == 5 and where in ("features", "tokens"):
            return laid_out(value, "prompt image tile pos d -> (prompt image) (tile pos) d")
        layout = self._layout(where) if value.ndim == 4 else None
        if layout is not None:
            return laid_out(value, layout)
        if value.ndim == 2 and where in ("features", "tokens") and self.shape is not None:
            shown = value.view(self.shape[0], -1, value.shape[-1])
            return shown, lambda new: new.reshape(value.shape)
        if value.ndim == 2 and self.row.pooled and where == "pooled":
            return value[:, None], lambda new: new[:, 0]
        flat = value.ndim == 2 or (value.ndim == 3 and where == "experts")
        if flat and self.shape is not None and len(value) == self.shape[:2].numel():
            shape = (*self.shape[:2], *value.shape[1:])
            return value.view(shape), lambda new: new.reshape(value.shape)
        return value, lambda new: new

    def _layout(self, where: str) -> str | None:
        """How a value with four axes lies, where it is no heads' value."""
        row = self.row
        if where == "tokens" or (where == "features" and row.stream_layout is None):
            return "image row column d -> image (row column) d"
        layouts = {"embed": row.embed_layout or row.stream_layout}
        return layouts.get(where, None if where == "inside" else row.stream_layout)

    def _unpacked(self, value: Tensor, where: str) -> tuple[Tensor, Back]:
        """A packed value by image; what is shorter than the patches are merged tokens."""
        assert self.pack is not None
        assert self.row.packed is not None
        axis = int(value.shape[0] == 1 and value.ndim > 2) if self.row.packed.axis else 0
        index = self.pack.embed if where == "embed" else self.pack.blocks
        if where == "tokens" or value.shape[axis] != int((index >= 0).sum()):
            index = self.pack.tokens(value.shape[axis])
        return unpacked(value, index, axis)

    def is_stream(self, value: Tensor) -> bool:
        """Whether what enters the final norm is the residual stream (or all it is ever given): some
        models norm a pooled position a second time, which nothing reads."""
        return self.row.pooled or value.ndim > 2 or self.shape is None or len(self.shape) == 2

    # Sizes -----------------------------------------------------------------------------------

    def _entry(self, config: Any, size: str, default: Any = None) -> Any:
        names = (self.row.sizes[size],) if size in self.row.sizes else SIZES[size]
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    def _anywhere(self, name: str) -> nn.Linear | None:
        """A projection of the first block that has it."""
        modules = (self.linear(block, name) for block in range(len(self.blocks)))
        return next((module for module in modules if module is not None), None)

    def _sizes(self, config: Any) -> TowerConfig:
        heads, d_model = (self._entry(config, size) for size in ("n_heads", "d_model"))
        heads = heads if isinstance(heads, int) else heads[0]
        d_model = d_model if isinstance(d_model, int) else d_model[-1]
        d_head = self._entry(config, "d_head", d_model // heads)
        keys = self._anywhere("k") or self._anywhere("cross_k")
        parameter = next(self.root.parameters())
        positions = self.module(f"{(self.row.embed or '').rstrip('?')}.position_embedding")
        n_ctx = self._entry(config, "n_ctx") or getattr(positions, "num_embeddings", None)
        eps = self._entry(config, "eps", 1e-5)
        act_fn = self._entry(config, "act_fn", "gelu")
        mlp_out = self._anywhere("mlp_out")
        cfg = TowerConfig(
            d_model=d_model,
            d_head=d_head,
            n_layers=len(self.blocks),
            n_ctx=n_ctx or -1,
            n_heads=heads,
            n_key_value_heads=heads if keys is None else keys.out_features // d_head,
            d_mlp=mlp_out.in_features if mlp_out is not None else self._entry(config, "d_mlp"),
            d_vocab=getattr(config, "vocab_size", -1) if self.unembed is not None else -1,
            device=str(parameter.device),
            dtype=parameter.dtype,
            act_fn=act_fn if isinstance(act_fn, str) else "gelu",
            gated_mlp=self.row.mlp_gate is not None,
            normalization_type=NORMALIZATION[self.row.norm],
            uses_rms_norm=self.row.norm != "layer",
            final_rms=self.row.norm != "layer",
            eps=eps,
            positional_embedding_type="rotary"
            if hasattr(config, "rope_parameters")
            else "standard",
        )
        cfg.model_name = config.model_type
        return cfg

    # Weights ---------------------------------------------------------------------------------

    def weights(self, block: int, part: str) -> dict[str, Callable[[], Tensor | None]]:
        """Readers of the weights of one block's `attn`, `cross_attn` or `mlp`, by
        TransformerLens's name."""
        names = WEIGHTS["mlp" if part == "mlp" else "attn"]
        prefix = "cross_" if part == "cross_attn" else ""
        return {name: partial(self.weight, name, block, prefix) for name in names}

    def weight(self, name: str, block: int, prefix: str = "") -> Tensor | None:
        """A weight or bias of one block as a view, or None where the block has none.

        W_Q [head, d_model, d_head] (W_K, W_V: key-value heads; W_G: a gate that the query
        projection gives besides), W_O [head, d_head, d_model],
        W_in, W_gate [d_model, d_mlp], W_out [d_mlp, d_model]; b_Q [head, d_head], b_O [d_model].
        """
        kind, what = name.split("_")
        if what in "QKVG":
            return self._head_weight(kind, what, block, prefix)
        place = {"in": "mlp_in", "gate": "mlp_gate", "out": "mlp_out"}.get(what, f"{prefix}o")
        linear = self.linear(block, place)
        value = getattr(linear, "weight" if kind == "W" else "bias", None)
        if value is None:
            return None
        value = value.detach()
        if what in ("in", "gate") and self.row.mlp_in_layout is not None:
            value = value.chunk(2)[what == "in"]
        if what == "O" and kind == "W":
            return rearrange(value, "d_model (h d) -> h d d_model", h=self.heads(block))
        return value.T if kind == "W" else value

    def _head_weight(self, kind: str, what: str, block: int, prefix: str) -> Tensor | None:
        """A weight or bias of the query, key or value projection, head by head."""
        attribute, d = "weight" if kind == "W" else "bias", self.d_head(block)
        fused = None if prefix else self.linear(block, "qkv")
        name = "q" if what == "G" else what.lower()
        linear = fused if fused is not None else self.linear(block, prefix + name)
        value = getattr(linear, attribute, None)
        if value is None:
            return None
        value = value.detach()
        if fused is not None:
            layout = self.row.qkv_layout
            value = rearrange(
                value, f"{layout} ... -> three head d_head ...", three=3, head=self.heads(block)
            )["QKV".index(what)]
        elif what in "QG" and self.row.q_gate:
            value = rearrange(value, "(h two d) ... -> two h d ...", two=2, d=d)["QG".index(what)]
        else:
            value = rearrange(value, "(h d) ... -> h d ...", d=d)
        return value.transpose(1, 2) if kind == "W" else value

    def stacked(self, name: str) -> Tensor | None:
        """A weight of every block, stacked along a first axis: a copy."""
        every = [self.weight(name, block) for block in range(len(self.blocks))]
        views = [view for view in every if view is not None]
        return torch.stack(views) if views and len(views) == len(every) else None

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab, d_model]; patch embedding [channel * (frame *) row * column,
        d_model].

        Raises:
            AttributeError: for a tower without a table or a linear map of patches of its own.
        """
        embed = getattr(self.root, "get_input_embeddings", lambda: None)()
        weight = None if embed is None else self._embedding_weight(embed)
        if weight is None:
            raise AttributeError(f"tower {self.name!r} has no embedding matrix of its own")
        if isinstance(embed, nn.Embedding):
            return weight.detach()
        return weight.detach().flatten(1).T

    def _embedding_weight(self, embed: nn.Module) -> Tensor | None:
        """The table, or the weight of the only convolution or linear layer of an embedding."""
        kinds = (nn.Embedding, nn.Linear, nn.Conv2d, nn.Conv3d)
        if isinstance(embed, kinds):
            return embed.weight
        found = [m.weight for m in embed.modules() if isinstance(m, kinds[1:])]
        return found[0] if len(found) == 1 else None

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
        if "prefix" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        if name in (*WEIGHTS["attn"], *WEIGHTS["mlp"]):
            found = self.stacked(name)
            if found is not None:
                return found
        raise AttributeError(f"tower {self.prefix!r} has no {name}")

    def __repr__(self) -> str:
        c = self.cfg
        sizes = f"{c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads"
        return f"Tower({self.name}: {c.model_name}, {sizes})"


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Back]:
    """A value in another layout (einops), and the way back."""
    left, right = layout.split(" -> ")
    sizes = parse_shape(value, left)
    return rearrange(value, layout), lambda new: rearrange(new, f"{right} -> {left}", **sizes)

"""Edge ablation by brute force, as a reference: a LLaVA of CLIP and Llama in plain float64.

No hook, no module of the model is called and nothing is shared with the engine: the blocks of both
towers are walked with the weights as they are. Every reader has an input of its own, the sum of
what its edges carry: the value that the writer has in this run, or in a run on another input.

Writers: `vision.input` (embeddings behind the norm before the first block), `vision.a{l}.h{h}`,
`vision.m{l}`, `projector`, `input` (embeddings of text), `a{l}.h{h}`, `m{l}`. Readers: `<q>`, `<k>`
and `<v>` of each head (`<k>` and `<v>` by key-value head), MLPs, `projector` and `logits`. Biases
behind heads belong to no writer and are always there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.activations import ACT2FN

On = Callable[[str], "bool | Bool[Tensor, 'batch']"]
"""Whether an edge is on, for all prompts or by prompt (then with one picture per prompt)."""
Values = dict[str, Tensor]
_VISION, _LANGUAGE = "model.vision_tower.", "model.language_model."
_PROJECTOR = "model.multi_modal_projector."


class EdgeReference:
    """Runs a model with any of its edges ablated.

    Args:
        hf_model: a LLaVA of a CLIP tower and a Llama, which reads one vision layer.
    """

    def __init__(self, hf_model: LlavaForConditionalGeneration) -> None:
        self.config: Any = hf_model.config
        self.weights = {name: p.detach().double() for name, p in hf_model.named_parameters()}
        layer = self.config.vision_feature_layer
        blocks = self.config.vision_config.num_hidden_layers
        self.vision_blocks = layer if layer >= 0 else blocks + 1 + layer

    @property
    def edges(self) -> tuple[str, ...]:
        """Every edge, in the order of the model: readers as they are computed, then writers."""
        vision, text = self.config.vision_config, self.config.text_config
        heads = vision.num_attention_heads
        found: list[str] = []
        writers = ["vision.input"]
        for layer in range(self.vision_blocks):
            found += _block_edges(f"vision.a{layer}", f"vision.m{layer}", writers, heads, heads)
        found += [f"{writer}->projector" for writer in writers]
        writers = ["input", "projector"]
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        for layer in range(text.num_hidden_layers):
            found += _block_edges(f"a{layer}", f"m{layer}", writers, heads, groups)
        return (*found, *(f"{writer}->logits" for writer in writers))

    @torch.no_grad()
    def values(self, inputs: Mapping[str, Tensor]) -> Values:
        """What every writer writes in a plain run."""
        walk = _Walk(lambda edge: True, None)
        self._run(walk, inputs)
        return walk.values

    @torch.no_grad()
    def logits(
        self,
        inputs: Mapping[str, Tensor],
        on: On | Collection[str] | None = None,
        other: Values | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at the last position.

        Args:
            inputs: `input_ids`, `attention_mask` [batch, pos], `pixel_values`, and `position_ids`
                where positions are not counted from the first column.
            on: the edges that carry this run's values; default: all.
            other: the writers' values that all other edges carry, from `values`.
        """
        if on is None:
            return self._run(_Walk(lambda edge: True, other), inputs)
        return self._run(_Walk(on if callable(on) else on.__contains__, other), inputs)

    def _run(self, walk: _Walk, inputs: Mapping[str, Tensor]) -> Tensor:
        image = inputs["input_ids"] == self.config.image_token_index
        said = F.embedding(inputs["input_ids"], self._w(_LANGUAGE + "embed_tokens"))
        seen = self._project(walk, inputs["pixel_values"].double())
        shown = torch.zeros_like(said)
        shown[image] = seen.flatten(0, 1)
        walk.start(input=said.masked_fill(image[..., None], 0.0), projector=shown)
        return self._language(walk, inputs)

    # Vision and projector --------------------------------------------------------------------

    def _project(self, walk: _Walk, pixels: Tensor) -> Tensor:
        """The projector's output [image, token, d_model]."""
        vision = self.config.vision_config
        walk.start(**{"vision.input": self._embed(pixels)})
        head = vision.hidden_size // vision.num_attention_heads
        for layer in range(self.vision_blocks):
            at = f"{_VISION}encoder.layers.{layer}."
            norm = self._layer_norm(at + "layer_norm1", vision.layer_norm_eps)
            out = self._w(at + "self_attn.out_proj").split(head, dim=1)
            written = {}
            for h in range(vision.num_attention_heads):
                name = f"vision.a{layer}.h{h}"
                q, k, v = (
                    self._part(walk.read(f"{name}<{x}>", norm), f"{at}self_attn.{x}_proj", h, head)
                    for x in "qkv"
                )
                pattern = (q @ k.mT * head**-0.5).softmax(-1)
                written[name] = pattern @ v @ out[h].T
            walk.write(written, self._b(at + "self_attn.out_proj"))
            norm = self._layer_norm(at + "layer_norm2", vision.layer_norm_eps)
            hidden = self._map(walk.read(f"vision.m{layer}", norm), at + "mlp.fc1")
            hidden = ACT2FN[vision.hidden_act](hidden)
            walk.write({f"vision.m{layer}": self._map(hidden, at + "mlp.fc2")})
        features = walk.read("projector", lambda x: x)
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        hidden = ACT2FN[self.config.projector_hidden_act](
            self._map(features, _PROJECTOR + "linear_1")
        )
        return self._map(hidden, _PROJECTOR + "linear_2")

    def _embed(self, pixels: Tensor) -> Tensor:
        vision = self.config.vision_config
        at = _VISION + "embeddings."
        patches = F.conv2d(pixels, self._w(at + "patch_embedding"), stride=vision.patch_size)
        patches = patches.flatten(2).mT
        first = self.weights[at + "class_embedding"].expand(len(patches), 1, -1)
        stream = torch.cat([first, patches], dim=1) + self._w(at + "position_embedding")
        return self._layer_norm(_VISION + "pre_layrnorm", vision.layer_norm_eps)(stream)

    # Language model --------------------------------------------------------------------------

    def _language(self, walk: _Walk, inputs: Mapping[str, Tensor]) -> Tensor:
        text = self.config.text_config
        turn = self._rotary(inputs)
        hidden_scores = _hidden(inputs)
        for layer in range(text.num_hidden_layers):
            at = f"{_LANGUAGE}layers.{layer}."
            norm = self._rms_norm(at + "input_layernorm")
            walk.write(
                self._text_heads(walk, layer, norm, turn, hidden_scores),
                self._b(at + "self_attn.o_proj"),
            )
            x = walk.read(f"m{layer}", self._rms_norm(at + "post_attention_layernorm"))
            gate = ACT2FN[text.hidden_act](self._map(x, at + "mlp.gate_proj"))
            hidden = gate * self._map(x, at + "mlp.up_proj")
            walk.write({f"m{layer}": self._map(hidden, at + "mlp.down_proj")})
        last = walk.read("logits", self._rms_norm(_LANGUAGE + "norm"))[:, -1]
        tied = self.config.tie_word_embeddings
        return last @ self._w(_LANGUAGE + "embed_tokens" if tied else "lm_head").T

    def _text_heads(self, walk: _Walk, layer: int, norm: Any, turn: Any, hidden: Tensor) -> Values:
        text = self.config.text_config
        heads, groups, at = text.num_attention_heads, text.num_key_value_heads, _attention(layer)
        head = self._head_size()
        keys, values = [], []
        for g in range(groups):
            name = f"a{layer}.h{g}"
            keys.append(turn(self._part(walk.read(f"{name}<k>", norm), at + "k_proj", g, head)))
            values.append(self._part(walk.read(f"{name}<v>", norm), at + "v_proj", g, head))
        out = self._w(at + "o_proj").split(head, dim=1)
        written = {}
        for h in range(heads):
            name, g = f"a{layer}.h{h}", h * groups // heads
            q = turn(self._part(walk.read(f"{name}<q>", norm), at + "q_proj", h, head))
            pattern = (q @ keys[g].mT * head**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            # A padded position before the prompt sees nothing at all.
            written[name] = pattern.nan_to_num() @ values[g] @ out[h].T
        return written

    def _rotary(self, inputs: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Rotary positions of queries and keys [batch, pos, d_head]."""
        ids, size = inputs["input_ids"], self._head_size()
        counted = torch.arange(ids.shape[1]).expand(ids.shape)
        positions = inputs.get("position_ids", counted)
        theta = self.config.text_config.rope_parameters["rope_theta"]
        # In float32, as the model has it.
        speed = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = (positions[..., None].float() * speed).double()

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        return turn

    def _head_size(self) -> int:
        text = self.config.text_config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    # Weights ---------------------------------------------------------------------------------

    def _w(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def _b(self, name: str) -> Tensor | None:
        return self.weights.get(f"{name}.bias")

    def _map(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w(name), self._b(name))

    def _part(self, x: Tensor, name: str, number: int, size: int) -> Tensor:
        """What one head has of a projection."""
        part = slice(number * size, (number + 1) * size)
        bias = self._b(name)
        return F.linear(x, self._w(name)[part], None if bias is None else bias[part])

    def _layer_norm(self, name: str, eps: float) -> Callable[[Tensor], Tensor]:
        weight, bias = self._w(name), self._b(name)
        return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def _rms_norm(self, name: str) -> Callable[[Tensor], Tensor]:
        weight, eps = self._w(name), self.config.text_config.rms_norm_eps
        return lambda x: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


class _Walk:
    """One run: what has been written so far in the stream, and what each reader gets of it."""

    def __init__(self, on: On, other: Values | None) -> None:
        self.on, self.other = on, other
        self.values: Values = {}
        self.writers: list[str] = []
        self.stream = torch.empty(0)
        self.normed: tuple[Any, Tensor] | None = None

    def start(self, **values: Tensor) -> None:
        """Begin a tower's stream."""
        self.writers, self.stream = [], torch.zeros_like(next(iter(values.values())))
        self.write(values)

    def write(self, values: Values, bias: Tensor | None = None) -> None:
        """Add values to the stream. They are seen by whoever reads from now on."""
        self.values.update(values)
        self.writers += values
        self.stream = sum(values.values(), self.stream) + (0.0 if bias is None else bias)
        self.normed = None

    def read(self, reader: str, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """What a reader gets: the stream, but along edges that are off the other run's values."""
        own = self.stream
        for writer in self.writers if self.other is not None else ():
            on = self.on(f"{writer}->{reader}")
            if on is True:
                continue
            change = self.other[writer] - self.values[writer]  # type: ignore[index]
            own = own + (change if on is False else change.masked_fill(on[:, None, None], 0.0))
        if own is not self.stream:
            return norm(own)
        if self.normed is None or self.normed[0] is not norm:
            self.normed = (norm, norm(own))
        return self.normed[1]


def _attention(layer: int) -> str:
    return f"{_LANGUAGE}layers.{layer}.self_attn."


def _hidden(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch query key"]:
    """Which keys a query does not see: later ones and padding."""
    ids = inputs["input_ids"]
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return later | (mask == 0)[:, None, :]


def _block_edges(
    attention: str, mlp: str, writers: list[str], heads: int, groups: int
) -> Iterator[str]:
    """Edges into a block; its heads and MLP join the writers."""
    readers = [f"{attention}.h{g}<{x}>" for g in range(groups) for x in "kv"]
    readers += [f"{attention}.h{h}<q>" for h in range(heads)]
    yield from (f"{writer}->{reader}" for reader in readers for writer in tuple(writers))
    writers += [f"{attention}.h{h}" for h in range(heads)]
    yield from (f"{writer}->{mlp}" for writer in tuple(writers))
    writers.append(mlp)

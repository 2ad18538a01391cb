"""From a program to a Hugging Face LLaVA whose weights compute it.

Norms have random weights (and, in the vision tower, biases), which are divided out of the matrices
that read them, so that no coordinate of any stream means anything by itself. The noise of every
component is scaled, in the order of the model, to the length that is wanted on some random inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mechmm.zoo.planted.pictures import (
    COLORS,
    MEASURES,
    SHAPES,
    SIDE,
    Scene,
    decoder,
)
from mechmm.zoo.planted.program import (
    ONE,
    Head,
    Program,
    Rule,
    Step,
    place,
    reads,
    symbols,
    true_edges,
    writes,
)
from mechmm.zoo.planted.space import Space
from mechmm.zoo.planted.weights import head_weights, mlp_weights
from mechmm.zoo.planted.words import SPECIAL, VOCABULARY, build_config

WIDTH, HIDDEN = 128, 128
VISION_LAYERS, VISION_HEADS = 4, 4
"""The last vision layer is not read, as in LLaVA-1.5."""
LAYERS, HEADS, D_HEAD = 4, 8, 32
SLOW = tuple(i + half for half in (0, D_HEAD // 2) for i in range(4, D_HEAD // 2))
"""Rotary dimensions that turn by less than 1e-4 radians over a prompt."""
THETA = 1e24
LOGIT = 10.0
"""The logit of the answer."""
LOUD, BESIDE = 1.0, 0.5
"""Mean length of what a noise component writes, and of the noise beside a part of the circuit."""

PATCHES = tuple(f"patch.{i}" for i in range(SIDE**2))


@dataclass(frozen=True)
class Compiled:
    """A model, the true edges of its circuit, and the node that each step became."""

    model: LlavaForConditionalGeneration
    edges: tuple[str, ...]
    nodes: Mapping[str, str]


def compile_program(program: Program, random: np.random.Generator) -> Compiled:
    """A model that computes a program, in float32 and evaluation mode."""
    vision = place(program.vision, VISION_LAYERS - 1, VISION_HEADS, random)
    language = place(program.language, LAYERS, HEADS, random)
    seen, said = _spaces(program, random)
    with torch.random.fork_rng(devices=[]):
        model: Any = LlavaForConditionalGeneration._from_config(_config()).eval()
    maker = _Maker(random, program, {vision[s.name]: s for s in program.vision}, seen)
    speaker = _Maker(random, program, {language[s.name]: s for s in program.language}, said)
    with torch.no_grad():
        maker.vision(model.model.vision_tower)
        _projector(model.model.multi_modal_projector, program.projector, seen, said, random)
        speaker.language(model.model.language_model, model.lm_head)
        hooks = [
            *_hush_tower(model.model.vision_tower.encoder.layers, maker, VISION_HEADS),
            _hush(model.model.multi_modal_projector.linear_2, said, [BESIDE]),
            *_hush_tower(model.model.language_model.layers, speaker, HEADS),
        ]
        model(**_anything(random))
    for hook in hooks:
        hook.remove()
    nodes = {**{name: f"vision.{node}" for name, node in vision.items()}, **language}
    return Compiled(model, true_edges(program, vision, language), nodes)


def _config() -> LlavaConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN}
    vision = {"num_hidden_layers": VISION_LAYERS, "num_attention_heads": VISION_HEADS}
    text = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": D_HEAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": 128,
    }
    return build_config({**sizes, **vision}, {**sizes, **text}, read=-2)


def _spaces(program: Program, random: np.random.Generator) -> tuple[Space, Space]:
    """The streams of the vision tower and the language model."""
    steps = [*program.vision, *program.language]
    known = {step.name: [*reads(step), *writes(step)] for step in steps}
    before = [part for step in program.vision for part in known[step.name]]
    before += [rule.when for rule in program.projector]
    before += [{name: 1.0} for name in (*PATCHES, *MEASURES)]
    behind = [part for step in program.language for part in known[step.name]]
    behind += [rule.then for rule in program.projector] + list(program.words.values())
    behind += [{symbol: 1.0} for symbol in program.answers.values()]
    return (
        Space(symbols(before), WIDTH, random, centred=True),
        Space(symbols(behind), WIDTH, random, centred=False),
    )


@dataclass(frozen=True)
class _Maker:
    """Sets the weights of one tower."""

    random: np.random.Generator
    program: Program
    steps: Mapping[str, Step]
    space: Space

    def vision(self, tower: Any) -> None:
        """Set the weights of a CLIP vision tower."""
        self._patches(tower.embeddings)
        # Puts the stream back to the length at which it was written.
        tower.pre_layrnorm.weight.fill_(self.space.gain)
        slow = range(WIDTH // VISION_HEADS)
        for layer, block in enumerate(tower.encoder.layers):
            for norm in (block.layer_norm1, block.layer_norm2):
                self._dress(norm)
            self._heads(block.self_attn, "out_proj", block.layer_norm1, layer, VISION_HEADS, slow)
            weights = mlp_weights(self.space, self.space, self._rules(layer), HIDDEN, self.random)
            _put(block.mlp.fc1, weights.gate, self.space.gain, block.layer_norm2)
            _put(block.mlp.fc2, weights.down)

    def language(self, tower: Any, unembed: nn.Linear) -> None:
        """Set the weights of a Llama."""
        space = self.space
        words = [space.write({ONE: 1.0, **self.program.words.get(w, {})}) for w in VOCABULARY]
        _copy(tower.embed_tokens.weight, np.stack(words) + space.babble(len(words), self.random).T)
        for layer, block in enumerate(tower.layers):
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                self._dress(norm)
            self._heads(block.self_attn, "o_proj", block.input_layernorm, layer, HEADS, SLOW)
            rules = self._rules(layer)
            weights = mlp_weights(space, space, rules, HIDDEN, self.random, gated=True)
            norm = block.post_attention_layernorm
            _put(block.mlp.gate_proj, weights.gate, space.gain, norm)
            _put(block.mlp.up_proj, weights.up, space.gain, norm)
            _put(block.mlp.down_proj, weights.down)
        self._dress(tower.norm)
        answers = self.program.answers
        reads = [LOGIT * space.read({answers[w]: 1.0} if w in answers else {}) for w in VOCABULARY]
        _put(unembed, np.stack(reads), space.gain, tower.norm)

    def _patches(self, embeddings: Any) -> None:
        """Pixels to measures and noise; positions to codes."""
        space, (kernel, offset) = self.space, decoder()
        noise = space.babble(kernel[0].size, self.random).reshape(WIDTH, *kernel.shape[1:])
        measures = np.stack([space.write({name: 1.0}) for name in MEASURES], axis=1)
        spread = np.sqrt(kernel[0].size / 3)
        pixels = np.tensordot(measures, kernel, axes=1) + noise / spread
        _copy(embeddings.patch_embedding.weight, pixels)
        codes = [space.write({ONE: 1.0, name: 1.0}) + measures @ offset for name in PATCHES]
        first = space.write({ONE: 1.0})
        _copy(embeddings.position_embedding.weight, np.stack([first, *codes]))
        _copy(embeddings.class_embedding, space.babble(1, self.random)[:, 0])

    def _dress(self, norm: Any) -> None:
        """Random weights, and biases where there are any."""
        _copy(norm.weight, np.exp(self.random.normal(0, 0.3, WIDTH)))
        if getattr(norm, "bias", None) is not None:
            _copy(norm.bias, self.random.normal(0, 0.3, WIDTH))

    def _rules(self, layer: int) -> tuple[Rule, ...]:
        step = self.steps.get(f"m{layer}")
        return () if step is None or isinstance(step, Head) else step.rules

    def _heads(
        self, block: Any, out: str, norm: Any, layer: int, heads: int, slow: Sequence[int]
    ) -> None:
        """Set the weights of all heads of a layer."""
        made = []
        size = block.head_dim
        for number in range(heads):
            step = self.steps.get(f"a{layer}.h{number}")
            head = step if isinstance(step, Head) else None
            made.append(head_weights(self.space, head, size, list(slow), self.random))
        gain = self.space.gain
        _put(block.q_proj, np.concatenate([one.query for one in made]), gain, norm)
        _put(block.k_proj, np.concatenate([one.key for one in made]), gain, norm)
        _put(block.v_proj, np.concatenate([one.value for one in made]), gain, norm)
        _put(getattr(block, out), np.concatenate([one.out for one in made], axis=1))


def _projector(
    projector: Any, rules: Sequence[Rule], seen: Space, said: Space, random: np.random.Generator
) -> None:
    """Set the weights of the projector, which reads the vision tower's stream without a norm."""
    weights = mlp_weights(seen, said, rules, WIDTH, random)
    _put(projector.linear_1, weights.gate)
    _put(projector.linear_2, weights.down)
    _copy(projector.linear_2.bias, said.write({ONE: 1.0}))


def _put(linear: nn.Linear, matrix: np.ndarray, gain: float = 1.0, norm: Any = None) -> None:
    """Set a matrix [out, in] that reads a stream, or what a norm makes of it."""
    bias = np.zeros(len(matrix))
    if norm is not None:
        matrix = gain * matrix / norm.weight.double().numpy()
        if getattr(norm, "bias", None) is not None:
            bias = -matrix @ norm.bias.double().numpy()
    _copy(linear.weight, matrix)
    if linear.bias is not None:
        _copy(linear.bias, bias)


def _copy(parameter: torch.Tensor, value: np.ndarray) -> None:
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


# How loud noise is ---------------------------------------------------------------------------


def _hush_tower(blocks: Any, maker: _Maker, heads: int) -> list[Any]:
    """Scale the noise of all heads and MLPs of a tower while it runs."""

    def level(node: str) -> float:
        return BESIDE if node in maker.steps else LOUD

    hooks = []
    for layer, block in enumerate(blocks):
        attention, mlp = block.self_attn, block.mlp
        out = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj
        down = mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj
        hooks.append(_hush(out, maker.space, [level(f"a{layer}.h{h}") for h in range(heads)]))
        hooks.append(_hush(down, maker.space, [level(f"m{layer}")]))
    return hooks


def _hush(linear: nn.Linear, space: Space, levels: Sequence[float]) -> Any:
    """Before a linear map runs, give the noise that each part of its input writes a mean length."""
    noise = torch.from_numpy(space.noise).float()

    def scale(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        parts = zip(
            args[0].chunk(len(levels), -1), linear.weight.chunk(len(levels), 1), levels, strict=True
        )
        for value, weight, level in parts:
            loud = noise.T @ (noise @ weight)
            length = (value @ loud.T).norm(dim=-1).mean()
            weight += (level / length - 1) * loud

    return linear.register_forward_pre_hook(scale)


def _anything(random: np.random.Generator, number: int = 16, words: int = 8) -> dict:
    """Inputs of random pictures and words."""
    pictures = []
    for grain in range(number):
        colors, shapes = random.choice(list(COLORS), 4), random.choice(SHAPES, 4)
        scene = Scene(tuple(colors.tolist()), tuple(shapes.tolist()), grain)
        pictures.append(np.asarray(scene.render(), np.float32) / 127.5 - 1)
    said = random.integers(len(SPECIAL), len(VOCABULARY), (number, words))
    before = [VOCABULARY.index("<s>"), *[VOCABULARY.index("<image>")] * SIDE**2]
    ids = np.concatenate([np.tile(before, (number, 1)), said], axis=1)
    return {
        "input_ids": torch.from_numpy(ids),
        "pixel_values": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2),
    }

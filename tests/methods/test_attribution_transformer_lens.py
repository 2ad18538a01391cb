"""On text alone, scores of edges are those of TransformerLens on the same weights.

Its `attribution_patch` points towards the clean prompt, as ours does, so that no sign is turned; it
has an edge for every position, and no edges for heads that share keys and values.
"""

from __future__ import annotations

import pytest
import torch
from einops import einsum
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    cache_activation_and_gradient,
)
from transformers import LlamaForCausalLM

import mechmm as mm
from mechmm.testing import tiny

TEXTS = ("the red circle is left of a blue square", "a green square is right of the red circle")
WRITERS = {"embed": "input", "attn_head_out": "a{layer}.h{head}", "mlp_out": "m{layer}"}
READERS = {
    **{f"{letter}_input": f"a{{layer}}.h{{head}}<{letter}>" for letter in "qkv"},
    "mlp_in": "m{layer}",
    "logits": "logits",
}


class Both:
    """One pair of texts for our model and for TransformerLens's view of its language model."""

    def __init__(self) -> None:
        self.model = tiny(key_value_heads=4)
        prompts = (mm.data.Prompt(text) for text in TEXTS)
        self.pairs = mm.PairDataset([mm.Pair(*prompts, "red", "blue")], self.model)
        batch = self.pairs.batch([0])
        self.clean, self.corrupt = batch.clean.input_ids, batch.corrupt.input_ids
        self.answer, self.foil = (self.model.answer_tokens(t)[0] for t in ("red", "blue"))
        ours = self.model.hf_model
        alone = LlamaForCausalLM(ours.config.text_config).eval()
        alone.model.load_state_dict(ours.model.language_model.state_dict())
        alone.lm_head.load_state_dict(ours.lm_head.state_dict())
        name = "LlamaForCausalLM"
        self.bridge = build_bridge_from_module(alone, name, hf_config=alone.config)

    def metric(self, logits):
        return logits[0, -1, self.answer] - logits[0, -1, self.foil]


@pytest.fixture(scope="module")
def both():
    return Both()


def name_of(node, names):
    return names[node.kind].format(layer=node.layer, head=node.head)


def test_scores_by_position_are_transformer_lenss(both):
    ours = mm.attribute(both.model, both.pairs, method="eap", spans="positions")
    config = EdgeAttributionConfig(granularity="edge")
    theirs = attribution_patch(both.bridge, both.clean, both.corrupt, both.metric, config=config)
    edges, wanted = zip(*theirs.edge_scores.items(), strict=True)
    names = [
        f"{name_of(writer, WRITERS)}->{name_of(reader, READERS)} @ {writer.position}"
        for writer, reader in edges
    ]
    found, wanted = ours.scores[0, ours.graph.edges(names)], torch.tensor(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)
    assert (wanted.abs() > 1e-3 * wanted.abs().max()).float().mean() > 0.1
    left = ours.scores[0].abs().sum() - found.abs().sum()
    assert abs(left) < 1e-4 * found.abs().sum()  # what has no picture has no other scores


def test_integrated_gradients_are_the_published_algorithm_on_transformer_lens(both):
    """Hanna et al. 2403.17806, section 3, with TransformerLens's hooks."""
    steps = 3
    ours = mm.attribute(both.model, both.pairs, method="eap-ig-inputs", steps=steps)
    written, read, layers = ["hook_embed"], [], both.bridge.cfg.n_layers
    for layer in range(layers):
        block = f"blocks.{layer}"
        written += [f"{block}.attn.hook_result", f"{block}.hook_mlp_out"]
        read += [*(f"{block}.attn.hook_{letter}_input" for letter in "qkv"), f"{block}.hook_mlp_in"]
    read.append(f"blocks.{layers - 1}.hook_resid_post")
    flags = ("attn_result", "split_qkv_input", "hook_mlp_in")
    for flag in flags:
        getattr(both.bridge, f"set_use_{flag}")(True)
    clean, corrupt = (
        cache_activation_and_gradient(both.bridge, ids, both.metric, written).activations
        for ids in (both.clean, both.corrupt)
    )
    gradients = []
    for k in range(1, steps + 1):
        start, end = corrupt["hook_embed"], clean["hook_embed"]
        between = (start + k / steps * (end - start)).requires_grad_()
        with both.bridge.hooks(fwd_hooks=[("hook_embed", lambda value, hook, b=between: b)]):
            cache = cache_activation_and_gradient(both.bridge, both.corrupt, both.metric, read)
        gradients.append(cache.gradients)
    change = {name: (clean[name] - corrupt[name])[0] for name in written}
    slope = {name: sum(g[name] for g in gradients)[0] / steps for name in read}
    names, wanted = [], []
    for reader in read:
        for writer in written[: 1 + written_before(reader)]:
            u, v = (x if x.ndim == 3 else x[:, None] for x in (change[writer], slope[reader]))
            wanted.append(einsum(u, v, "pos u d, pos v d -> u v").flatten())
            names += [f"{a}->{b}" for a in nodes(writer, u) for b in nodes(reader, v)]
    found, expected = ours.scores[0, ours.graph.edges(names)], torch.cat(wanted)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)
    assert len(names) == len(set(names))
    one = mm.attribute(both.model, both.pairs, method="eap").scores[0, ours.graph.edges(names)]
    assert (one - found).abs().max() > 1e-2 * found.abs().max()


def written_before(hook: str) -> int:
    """How many hooks behind the embedding write before a reader."""
    layer = int(hook.split(".")[1])
    return 2 * layer + ("mlp_in" in hook) + 2 * ("resid_post" in hook)


def nodes(hook: str, value) -> list[str]:
    """Our names of what writes or reads at one of their hooks [pos, node, d_model]."""
    if hook == "hook_embed":
        return ["input"]
    layer, last = hook.split(".")[1], hook.rpartition("hook_")[2]
    if last in ("mlp_out", "mlp_in"):
        return [f"m{layer}"]
    if last == "resid_post":
        return ["logits"]
    end = "" if last == "result" else f"<{last[0]}>"
    return [f"a{layer}.h{head}{end}" for head in range(value.shape[1])]

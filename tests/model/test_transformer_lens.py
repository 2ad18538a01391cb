"""On text alone, TransformerLens on the same weights shows the same activations; its cache works.

The bridge is built from a model in memory. Its loader, `boot_transformers`, is never called: it
installs packages where a processor fails to load.
"""

from copy import deepcopy

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import AutoModelForCausalLM

from mechmm.testing import tiny, tiny_inputs

HEADS = [4, 2, 1]


def bridge_of(model) -> TransformerBridge:
    """TransformerLens's own view of the language model inside one of ours."""
    ours = model.hf_model
    config = deepcopy(ours.config.text_config)  # choosing eager attention writes to the config
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone.model.load_state_dict(ours.get_submodule("model.language_model").state_dict())
    alone.lm_head.load_state_dict(ours.lm_head.state_dict())
    name = type(alone).__name__
    bridge_config = build_bridge_config_from_hf(alone.config, name, "tiny", torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    return TransformerBridge(alone, adapter, None)


def text(model) -> torch.Tensor:
    return tiny_inputs(model, (0, 0), 9)["input_ids"]


@torch.no_grad()
def both(model):
    """(our logits, our cache, TransformerLens's logits, its cache)."""
    ids = text(model)
    logits, cache = model.run_with_cache(ids)
    theirs, their_cache = bridge_of(model).run_with_cache(ids)
    return logits, cache, theirs, their_cache


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("heads", HEADS)
def test_activations_equal_transformer_lenss(name, heads):
    logits, cache, theirs, their_cache = both(tiny(text=name, key_value_heads=heads))
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
    shared = set(cache.keys()) & set(their_cache.keys())
    for key in shared:
        ours, expected = cache[key], their_cache[key]
        shown = expected > -1e30  # how "masked" is written does not matter
        assert torch.equal(ours > -1e30, shown), key
        difference = (ours - expected)[shown].abs().max()
        assert difference < 1e-5 * max(1.0, expected[shown].abs().max()), key
    points = [
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_attn_out",
        "hook_mlp_out",
        "ln1.hook_scale",
        "ln1.hook_normalized",
        "ln2.hook_scale",
        "ln2.hook_normalized",
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_rot_q",
        "attn.hook_rot_k",
        "attn.hook_attn_scores",
        "attn.hook_pattern",
        "attn.hook_z",
        "mlp.hook_pre",
        "mlp.hook_pre_linear",
        "mlp.hook_post",
    ]
    wanted = {f"blocks.{layer}.{point}" for layer in range(2) for point in points}
    wanted |= {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    assert wanted <= shared


def test_an_edit_has_the_effect_that_it_has_in_transformer_lens():
    model = tiny()
    bridge, ids = bridge_of(model), text(model)

    def first_head_off(value, hook):
        value[:, 0] = 0.0
        return value

    for point in (
        "blocks.0.attn.hook_pattern",
        "blocks.1.hook_resid_mid",
        "blocks.1.mlp.hook_post",
    ):
        with torch.no_grad():
            ours = model.run_with_hooks(ids, fwd_hooks=[(point, first_head_off)])
            theirs = bridge.run_with_hooks(ids, fwd_hooks=[(point, first_head_off)])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, model(ids), atol=1e-3)


@pytest.mark.parametrize("heads", HEADS)
def test_weights_have_transformer_lenss_axes(heads):
    model = tiny(text="qwen2", key_value_heads=heads)
    bridge = bridge_of(model)
    for layer in range(2):
        ours, theirs = model.blocks[layer], bridge.blocks[layer]
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            assert torch.equal(getattr(ours.attn, name), getattr(theirs.attn, name)), name
        for name in ("W_in", "W_gate", "W_out"):
            assert torch.equal(getattr(ours.mlp, name), getattr(theirs.mlp, name)), name
    assert torch.equal(model.W_U, bridge.W_U)
    assert torch.equal(model.W_E, bridge.W_E)


def test_config_values_are_transformer_lenss():
    model = tiny()
    cfg = bridge_of(model).cfg
    names = [
        "n_layers",
        "n_heads",
        "n_key_value_heads",
        "d_model",
        "d_head",
        "d_mlp",
        "d_vocab",
        "n_ctx",
        "act_fn",
    ]
    for name in names:
        assert getattr(model.cfg, name) == getattr(cfg, name), name


# ActivationCache -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached():
    model = tiny()
    with torch.no_grad():
        logits, cache = model.run_with_cache(text(model))
        bridge = bridge_of(model)
        _, theirs = bridge.run_with_cache(text(model))
    return model, logits, cache, theirs


def test_cache_shorthand(cached):
    _, _, cache, _ = cached
    assert isinstance(cache, ActivationCache)
    assert cache["resid_post", 0] is cache["blocks.0.hook_resid_post"]
    assert cache["pattern", -1] is cache["blocks.1.attn.hook_pattern"]
    assert cache["embed"] is cache["hook_embed"]
    assert cache["normalized", 1, "ln2"] is cache["blocks.1.ln2.hook_normalized"]


def test_cache_stacks(cached):
    _, _, cache, theirs = cached
    torch.testing.assert_close(
        cache.stack_activation("z"), theirs.stack_activation("z"), atol=1e-5, rtol=1e-5
    )
    ours, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    expected, their_labels = theirs.accumulated_resid(incl_mid=True, return_labels=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert labels == their_labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]


def test_decomposition_adds_up_to_the_residual_stream(cached):
    _, _, cache, _ = cached
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    torch.testing.assert_close(parts.sum(0), cache["resid_post", 1], atol=1e-5, rtol=1e-5)


def test_head_results_from_the_weights_equal_the_hooked_ones(cached):
    model, _, cache, _ = cached
    with torch.no_grad():
        _, hooked = model.run_with_cache(text(model), names_filter=lambda n: n.endswith("result"))
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    for index, name in enumerate(hooked):
        torch.testing.assert_close(
            stack[4 * index : 4 * index + 4].movedim(0, 2), hooked[name], atol=1e-5, rtol=1e-5
        )


def test_scaled_decomposition_gives_the_logits(cached):
    """Direct logit attribution: components over the final scale, times its weight, times W_U."""
    model, logits, cache, _ = cached
    scaled = cache.decompose_resid(apply_ln=True)
    weight = model.towers["language"].module("norm").weight.detach()
    per_part = (scaled * weight) @ model.W_U
    torch.testing.assert_close(per_part.sum(0), logits, atol=1e-4, rtol=1e-4)


def test_neuron_results_add_up_to_the_mlp(cached):
    _, _, cache, _ = cached
    torch.testing.assert_close(
        cache.get_neuron_results(0).sum(-2), cache["mlp_out", 0], atol=1e-5, rtol=1e-5
    )


def test_batch_axis_can_be_removed(cached):
    model, *_ = cached
    with torch.no_grad():
        _, cache = model.run_with_cache(text(model)[:1], remove_batch_dim=True)
    assert cache["resid_post", 0].shape == (10, 32)
    assert cache["pattern", 0].shape == (4, 10, 10)

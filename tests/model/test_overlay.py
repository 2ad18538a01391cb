"""The hooks: same numbers as the Hugging Face model, every edit seen by everything downstream."""

from collections.abc import Callable

import pytest
import torch
from einops import einsum, repeat
from torch import Tensor

from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny, tiny_hf, tiny_inputs

GROUPS = {"full": 4, "grouped": 2, "single": 1}
ALL = [
    {"vision": vision, "text": text, "key_value_heads": heads}
    for vision in ("clip", "siglip")
    for text in ("llama", "qwen2", "mistral")
    for heads in GROUPS.values()
]
FEW = [
    {"vision": "clip", "text": "llama", "key_value_heads": 2},
    {"vision": "siglip", "text": "qwen2", "key_value_heads": 4},
    {"vision": "siglip", "text": "mistral", "key_value_heads": 1},
    {"vision": "clip", "text": "qwen2", "key_value_heads": 1, "attention": "eager"},
]


def label(options: dict) -> str:
    return "-".join(str(value) for value in options.values())


every_variant = pytest.mark.parametrize("options", ALL, ids=label)
some_variants = pytest.mark.parametrize("options", FEW, ids=label)


def inputs_of(model, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts of different lengths, one image and two."""
    return tiny_inputs(model, (1, 2), (6, 3), seed=seed)


def batch_of(model: HookedMultimodal, seed: int = 0) -> Batch:
    return Batch.from_inputs(model, **inputs_of(model, seed))


def unpadded(model: HookedMultimodal) -> Batch:
    """Padding has meaningless rows: they attend to everything, or to nothing, by implementation."""
    return Batch.from_inputs(model, **tiny_inputs(model, (1, 1), 6))


@torch.no_grad()
def run(model: HookedMultimodal, batch: Batch, *hooks: tuple) -> Tensor:
    return model.run_with_hooks(batch, fwd_hooks=list(hooks))


@torch.no_grad()
def hf_logits(hf_model, inputs) -> Tensor:
    return hf_model(**inputs, use_cache=False).logits


def nothing(value: Tensor, hook) -> None:
    pass


def anywhere(name: str) -> bool:
    return True


def attention_inside(name: str) -> bool:
    return name.endswith(("hook_attn_scores", "hook_pattern"))


def noise_like(value: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator).to(value.dtype) / 2


def adding(seed: int = 0) -> Callable:
    return lambda value, hook: value + noise_like(value, seed)


def cache_of(model: HookedMultimodal, batch: Batch, *hooks: tuple):
    """Every activation, `hook_result` included, of a run with some edits."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(batch, names_filter=anywhere)


# Same numbers --------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_hooks_the_logits_are_hugging_faces(options, attention):
    hf_model = tiny_hf(**options, attention=attention)
    inputs = inputs_of(hf_model)
    before = hf_logits(hf_model, inputs)
    model = HookedMultimodal.from_hf(hf_model)
    assert torch.equal(run(model, Batch.from_inputs(model, **inputs)), before)


@every_variant
def test_with_patterns_hooked_the_logits_are_hugging_faces_eager(options):
    model = tiny(**options)
    eager = hf_logits(tiny_hf(**options, attention="eager"), inputs_of(model))
    assert torch.equal(run(model, batch_of(model), (attention_inside, nothing)), eager)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_bfloat16_is_as_exact_within_one_path_and_within_rounding_across_paths(vision):
    options = {"vision": vision, "text": "qwen2", "dtype": torch.bfloat16}
    model = tiny(**options)
    inputs, batch = inputs_of(model), batch_of(model)
    sdpa = hf_logits(tiny_hf(**options), inputs)
    eager = hf_logits(tiny_hf(**options, attention="eager"), inputs)
    assert torch.equal(run(model, batch), sdpa)
    assert torch.equal(run(model, batch, (anywhere, nothing)), eager)
    # bfloat16 has 8 bits: 2^-8 per rounding, some dozens of roundings from pixel to logit.
    real = batch.attention_mask.bool()
    assert (sdpa - eager)[real].abs().max() < 0.1 * eager[real].abs().max()


@some_variants
@pytest.mark.parametrize("gradients", [False, True])
def test_hooks_that_return_nothing_change_nothing(options, gradients):
    model = tiny(**options)
    batch = batch_of(model)
    eager = hf_logits(tiny_hf(**{**options, "attention": "eager"}), batch.inputs)
    with torch.set_grad_enabled(gradients):
        logits = model.run_with_hooks(batch, fwd_hooks=[(anywhere, nothing)])
    assert torch.equal(logits, eager)


def test_each_hook_alone_changes_nothing():
    model = tiny()
    batch = unpadded(model)
    plain = run(model, batch)
    for name in model.hook_dict:
        logits = run(model, batch, (name, nothing))
        if attention_inside(name):  # this layer runs eager attention, the others do not
            torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5, msg=name)
        else:
            assert torch.equal(logits, plain), name


def test_a_hook_that_returns_the_value_changes_nothing():
    model = tiny(attention="eager")
    batch = batch_of(model)
    logits = run(model, batch, (anywhere, lambda value, hook: value.clone()))
    assert torch.equal(logits, run(model, batch))


# Edits ---------------------------------------------------------------------------------------


@some_variants
def test_an_edit_in_place_equals_the_same_edit_returned(options):
    model = tiny(**options, vision_layers=2)
    batch = batch_of(model)

    def in_place(value, hook):
        value += noise_like(value)

    for name in model.hook_dict:
        assert torch.equal(
            run(model, batch, (name, in_place)), run(model, batch, (name, adding()))
        ), name


def test_an_edit_in_place_equals_the_returned_one_with_gradients_too():
    model = tiny(layers=1, vision_layers=2)
    batch = batch_of(model)

    def in_place(value, hook):
        value.mul_(0.9)

    def returned(value, hook):
        return value * 0.9

    for name in model.hook_dict:
        one = model.run_with_hooks(batch, fwd_hooks=[(name, in_place)])
        other = model.run_with_hooks(batch, fwd_hooks=[(name, returned)])
        assert torch.equal(one, other), name


@pytest.mark.parametrize("tower", ["", "vision."])
@pytest.mark.parametrize(
    "name", ["hook_resid_mid", "hook_attn_out", "ln2.hook_normalized", "attn.hook_result"]
)
def test_an_edit_of_one_position_leaves_earlier_activations_and_positions_alone(tower, name):
    model = tiny(attention="eager")
    batch = unpadded(model)
    _, plain = cache_of(model, batch)
    edited_name = f"{tower}blocks.1.{name}"

    def at_last(value, hook):
        value[:, -1] += 1.0

    _, edited = cache_of(model, batch, (edited_name, at_last))
    order = list(plain.keys())
    for earlier in order[: order.index(edited_name)]:
        assert torch.equal(edited[earlier], plain[earlier]), earlier
    after = f"{tower}blocks.1.hook_resid_post"
    assert torch.equal(edited[after][:, :-1], plain[after][:, :-1])
    assert not torch.equal(edited[after][:, -1], plain[after][:, -1])


@some_variants
def test_the_residual_stream_adds_up(options):
    model = tiny(**options)
    _, cache = cache_of(model, batch_of(model))
    for tower in model.towers.values():
        for layer in range(tower.cfg.n_layers):
            block = f"{tower.prefix}blocks.{layer}.hook_"
            mid = cache[f"{block}resid_pre"] + cache[f"{block}attn_out"]
            assert torch.equal(mid, cache[f"{block}resid_mid"])
            assert torch.equal(mid + cache[f"{block}mlp_out"], cache[f"{block}resid_post"])
            assert torch.equal(mid, cache[f"{block}mlp_in"])


@some_variants
def test_head_results_are_z_times_w_o_and_add_up_to_the_attention_output(options):
    model = tiny(**options)
    _, cache = cache_of(model, batch_of(model))
    for tower in model.towers.values():
        for layer in range(tower.cfg.n_layers):
            name = f"{tower.prefix}blocks.{layer}"
            attn = model.get_submodule(f"{name}.attn")
            z, result = cache[f"{name}.attn.hook_z"], cache[f"{name}.attn.hook_result"]
            by_hand = einsum(z, attn.W_O, "b p h d_head, h d_head d_model -> b p h d_model")
            torch.testing.assert_close(result, by_hand, atol=1e-5, rtol=1e-5)
            summed = result.sum(-2) + (0 if attn.b_O is None else attn.b_O)
            torch.testing.assert_close(summed, cache[f"{name}.hook_attn_out"], atol=1e-5, rtol=1e-5)


def test_ablating_a_head_by_its_result_equals_ablating_its_z():
    model = tiny(text="qwen2")
    batch = batch_of(model)

    def head_off(value, hook):
        value[:, :, 2] = 0.0

    for prefix in ("", "vision."):
        by_z = run(model, batch, (f"{prefix}blocks.1.attn.hook_z", head_off))
        by_result = run(model, batch, (f"{prefix}blocks.1.attn.hook_result", head_off))
        torch.testing.assert_close(by_result, by_z, atol=1e-4, rtol=1e-4)


# Attention -----------------------------------------------------------------------------------


def attention_output(model, name: str, pattern: Tensor, value: Tensor) -> Tensor:
    """Attention written by hand, from a pattern and the values of the key-value heads."""
    attn = model.get_submodule(name)
    groups = pattern.shape[1] // value.shape[2]
    value = repeat(value, "b k h d -> b k (h g) d", g=groups)
    z = einsum(pattern, value, "b h q k, b k h d -> b q h d")
    out = einsum(z, attn.W_O, "b q h d, h d m -> b q m")
    return out if attn.b_O is None else out + attn.b_O


@some_variants
def test_patterns_are_distributions_over_what_may_be_attended_to(options):
    model = tiny(**options)
    batch = batch_of(model)
    _, cache = cache_of(model, batch)
    real = batch.attention_mask.bool()
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        may = real[:, None, None, :] & torch.ones(pattern.shape[-2:], dtype=torch.bool).tril()
        blocked = ~may.expand_as(pattern) & real[:, None, :, None]
        assert pattern[blocked].abs().max() == 0
    sums = cache["vision.blocks.0.attn.hook_pattern"].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@some_variants
def test_scores_are_rotated_queries_times_keys(options):
    model = tiny(**options)
    _, cache = cache_of(model, batch_of(model))
    for prefix in ("", "vision."):
        name = f"{prefix}blocks.1.attn.hook_"
        q, k = cache[f"{name}rot_q"], cache[f"{name}rot_k"]
        k = repeat(k, "b k h d -> b k (h g) d", g=q.shape[2] // k.shape[2])
        scores = einsum(q, k, "b q h d, b k h d -> b h q k") * q.shape[-1] ** -0.5
        shown = cache[f"{name}attn_scores"]
        allowed = shown > torch.finfo(shown.dtype).min / 2
        torch.testing.assert_close(shown[allowed], scores[allowed], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cache[f"{name}pattern"], shown.softmax(-1))


def test_rotation_leaves_the_first_position_alone_and_the_vision_tower_has_none():
    model = tiny()
    _, cache = cache_of(model, Batch.from_inputs(model, **tiny_inputs(model)))
    for part in "qk":
        plain, rotated = cache[part, 0], cache[f"rot_{part}", 0]
        assert torch.equal(rotated[:, 0], plain[:, 0])
        assert not torch.allclose(rotated[:, 5], plain[:, 5])
        vision = f"vision.blocks.0.attn.hook_{part}"
        assert torch.equal(cache[vision], cache[vision.replace("hook_", "hook_rot_")])


@some_variants
@pytest.mark.parametrize("prefix", ["", "vision."])
def test_a_pattern_edit_is_what_attention_written_by_hand_gives(options, prefix):
    model = tiny(**options)
    batch, name = batch_of(model), f"{prefix}blocks.1.attn"
    _, plain = cache_of(model, batch)
    pattern = plain[f"{name}.hook_pattern"].flip(1) * 0.7
    _, edited = cache_of(model, batch, (f"{name}.hook_pattern", lambda value, hook: pattern))
    wanted = attention_output(model, name, pattern, plain[f"{name}.hook_v"])
    out = edited[f"{prefix}blocks.1.hook_attn_out"]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, plain[f"{prefix}blocks.1.hook_attn_out"], atol=1e-2)


@some_variants
@pytest.mark.parametrize("prefix", ["", "vision."])
def test_a_knocked_out_score_gets_no_weight(options, prefix):
    model = tiny(**options)
    batch, name = batch_of(model), f"{prefix}blocks.0.attn"

    def knock_out(value, hook):
        value[:, :, -1, 3] = -torch.inf

    _, plain = cache_of(model, batch)
    _, edited = cache_of(model, batch, (f"{name}.hook_attn_scores", knock_out))
    scores = plain[f"{name}.hook_attn_scores"].clone()
    scores[:, :, -1, 3] = -torch.inf
    assert edited[f"{name}.hook_pattern"][:, :, -1, 3].abs().max() == 0
    wanted = attention_output(model, name, scores.softmax(-1), plain[f"{name}.hook_v"])
    out = edited[f"{prefix}blocks.0.hook_attn_out"]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_key_value_edits_act_on_the_whole_group_of_query_heads(attention):
    model = tiny(key_value_heads=2, attention=attention)
    batch = batch_of(model)
    name = "blocks.0.attn"
    _, plain = cache_of(model, batch)

    def first_off(value, hook):
        value[:, :, 0] = 0.0

    _, edited = cache_of(model, batch, (f"{name}.hook_v", first_off))
    assert edited[f"{name}.hook_z"][:, :, :2].abs().max() == 0
    assert torch.equal(edited[f"{name}.hook_z"][:, :, 2:], plain[f"{name}.hook_z"][:, :, 2:])


# Residual stream -----------------------------------------------------------------------------


@some_variants
@pytest.mark.parametrize("tower", ["language", "vision"])
def test_an_edit_of_resid_mid_reaches_the_skip_and_the_mlp(options, tower):
    model = tiny(**options)
    batch, tower = batch_of(model), model.towers[tower]
    name = f"{tower.prefix}blocks.1.hook_resid_"
    _, plain = cache_of(model, batch)
    _, edited = cache_of(model, batch, (f"{name}mid", adding()))
    mid = plain[f"{name}mid"] + noise_like(plain[f"{name}mid"])
    ln2, mlp = tower.module(tower.row.ln2, 1), tower.module(tower.row.mlp, 1)
    with torch.no_grad():
        wanted = mid + mlp(ln2(mid))
    assert torch.equal(edited[f"{name}post"], wanted)


@some_variants
def test_an_edit_of_mlp_in_reaches_the_mlp_alone(options):
    model = tiny(**options)
    batch = batch_of(model)
    name = "blocks.1.hook_"
    _, plain = cache_of(model, batch)
    _, edited = cache_of(model, batch, (f"{name}mlp_in", adding()))
    changed = plain[f"{name}mlp_in"] + noise_like(plain[f"{name}mlp_in"])
    tower = model.towers["language"]
    with torch.no_grad():
        out = tower.module(tower.row.mlp, 1)(tower.module(tower.row.ln2, 1)(changed))
    assert torch.equal(edited[f"{name}resid_mid"], plain[f"{name}resid_mid"])
    assert torch.equal(edited[f"{name}resid_post"], plain[f"{name}resid_mid"] + out)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_vision_edit_equals_a_hand_written_pytorch_hook(vision, layer):
    model = tiny(vision=vision)
    batch = batch_of(model)
    by_hook = run(model, batch, (f"vision.blocks.{layer}.hook_resid_post", adding()))
    hf_model = tiny_hf(vision=vision)
    block = hf_model.get_submodule("model.vision_tower.encoder.layers")[layer]
    block.register_forward_hook(lambda module, args, output: output + noise_like(output))
    assert torch.equal(by_hook, hf_logits(hf_model, batch.inputs))


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("read", "layers"), [(-1, [2]), (-2, [1]), ([1, -1], [0, 2]), ([0, 2], [1])]
)
def test_a_vision_edit_reaches_the_projector_past_hugging_faces_recorders(vision, read, layers):
    """The recorders are installed by a first run, before our hooks are."""
    hf_model = tiny_hf(vision=vision, vision_feature_layer=read)
    inputs = inputs_of(hf_model)
    hf_logits(hf_model, inputs)
    model = HookedMultimodal.from_hf(hf_model)
    batch = Batch.from_inputs(model, **inputs)
    for layer in layers:
        value = torch.full((3, 17 if vision == "clip" else 16, 32), 0.25 + layer)
        hook = (f"vision.blocks.{layer}.hook_resid_post", lambda old, hook, value=value: value)
        _, cache = cache_of(model, batch, hook)
        slot = 0 if isinstance(read, int) else [r % 4 for r in read].index(layer + 1)
        entered = cache["projector.hook_in"][..., slot * 32 : slot * 32 + 32]
        assert torch.equal(entered, value[:, 1:])


def test_an_edit_of_the_first_vision_block_reaches_a_projector_that_reads_its_input():
    model = tiny(vision_feature_layer=[0, -1])
    batch = batch_of(model)
    value = torch.full((3, 17, 32), 0.5)
    _, cache = cache_of(model, batch, ("vision.blocks.0.hook_resid_pre", lambda old, hook: value))
    assert torch.equal(cache["projector.hook_in"][..., :32], value[:, 1:])


@pytest.mark.parametrize("layer", [0, 1])
def test_recorded_hidden_states_show_edits_where_they_belong(layer):
    """An in-place edit at a block's input stays out of what was recorded one layer earlier."""
    model = tiny()
    batch = batch_of(model)

    def in_place(value, hook):
        value += 1.0

    def recorded(*hooks):
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            return model.hf_model(**batch.inputs, output_hidden_states=True).hidden_states

    plain = recorded()
    at_input = recorded((f"blocks.{layer}.hook_resid_pre", in_place))
    for before in range(1, layer + 1):
        assert torch.equal(at_input[before], plain[before])
    assert not torch.equal(at_input[layer + 1], plain[layer + 1])
    at_output = recorded(("blocks.0.hook_resid_post", in_place))
    assert torch.equal(at_output[1], plain[1] + 1.0)


def test_image_positions_enter_the_first_block_as_the_projector_gives_them():
    model = tiny()
    batch = batch_of(model)
    _, cache = cache_of(model, batch)
    entered = cache["resid_pre", 0]
    picture = batch.layout.mask("image")
    assert torch.equal(entered[picture], cache["projector.hook_out"].flatten(0, 1))
    assert torch.equal(entered[~picture], cache["hook_embed"][~picture])
    assert torch.equal(cache["hook_embed"], model.W_E[batch.input_ids])


# Norms ---------------------------------------------------------------------------------------


def norm_by_hand(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """(normalised, scale) in TransformerLens's terms: normalised = centred / scale."""
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x / scale, scale


@some_variants
@pytest.mark.parametrize("tower", ["language", "vision"])
def test_norms_show_scale_and_normalised_value(options, tower):
    model = tiny(**options)
    _, cache = cache_of(model, batch_of(model))
    tower = model.towers[tower]
    for layer in range(tower.cfg.n_layers):
        name = f"{tower.prefix}blocks.{layer}"
        for norm, entering in (("ln1", "resid_pre"), ("ln2", "mlp_in")):
            x = cache[f"{name}.hook_{entering}"]
            normalized, scale = norm_by_hand(x, tower.row.norm, tower.cfg.eps)
            shown = f"{name}.{norm}.hook_"
            torch.testing.assert_close(cache[f"{shown}normalized"], normalized)
            torch.testing.assert_close(cache[f"{shown}scale"], scale)


@some_variants
@pytest.mark.parametrize("tower", ["language", "vision"])
def test_edits_of_scale_and_normalised_value_reach_the_projections(options, tower):
    model = tiny(**options)
    batch, tower = batch_of(model), model.towers[tower]
    name = f"{tower.prefix}blocks.1"
    attn, norm = model.get_submodule(f"{name}.attn"), tower.module(tower.row.ln1, 1)
    _, plain = cache_of(model, batch)
    normalized = plain[f"{name}.ln1.hook_normalized"]
    bias = getattr(norm, "bias", None)

    def query(normalized):
        x = normalized * norm.weight.detach() + (0 if bias is None else bias.detach())
        q = einsum(x, attn.W_Q, "b p m, h m d -> b p h d")
        return q if attn.b_Q is None else q + attn.b_Q

    torch.testing.assert_close(
        query(normalized), plain[f"{name}.attn.hook_q"], atol=1e-5, rtol=1e-5
    )
    for point, wanted in (("scale", query(normalized / 2)), ("normalized", query(2 * normalized))):
        hook = (f"{name}.ln1.hook_{point}", lambda value, hook: value * 2)
        _, edited = cache_of(model, batch, hook)
        torch.testing.assert_close(edited[f"{name}.attn.hook_q"], wanted, atol=1e-5, rtol=1e-5)


def test_the_final_norm_feeds_the_unembedding():
    model = tiny()
    logits, cache = cache_of(model, batch_of(model))
    weight = model.towers["language"].module("norm").weight.detach()
    by_hand = (cache["ln_final.hook_normalized"] * weight) @ model.W_U
    torch.testing.assert_close(logits, by_hand, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        zero = run(model, batch_of(model), ("ln_final.hook_normalized", lambda v, hook: v * 0))
    assert zero.abs().max() == 0


# MLP, projector ------------------------------------------------------------------------------


def test_gated_mlp_hooks_are_the_steps_of_the_mlp():
    model = tiny()
    _, cache = cache_of(model, batch_of(model))
    mlp, name = model.blocks[0].mlp, "blocks.0.mlp.hook_"
    normed = cache["blocks.0.ln2.hook_normalized"]
    x = normed * model.towers["language"].module("post_attention_layernorm", 0).weight.detach()
    gate, linear = cache[f"{name}pre"], cache[f"{name}pre_linear"]
    torch.testing.assert_close(gate, x @ mlp.W_gate, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear, x @ mlp.W_in, atol=1e-5, rtol=1e-5)
    post = cache[f"{name}post"]
    torch.testing.assert_close(post, torch.nn.functional.silu(gate) * linear)
    torch.testing.assert_close(cache["mlp_out", 0], post @ mlp.W_out, atol=1e-5, rtol=1e-5)


def test_vision_mlp_and_projector_hooks_are_their_steps():
    model = tiny(vision="siglip")
    _, cache = cache_of(model, batch_of(model))
    mlp, name = model.vision.blocks[1].mlp, "vision.blocks.1."
    out = cache[f"{name}mlp.hook_post"] @ mlp.W_out + mlp.b_out
    torch.testing.assert_close(out, cache[f"{name}hook_mlp_out"], atol=1e-5, rtol=1e-5)
    gelu = torch.nn.functional.gelu
    pre, post = cache[f"{name}mlp.hook_pre"], cache[f"{name}mlp.hook_post"]
    torch.testing.assert_close(post, gelu(pre, approximate="tanh"))
    torch.testing.assert_close(cache["projector.hook_post"], gelu(cache["projector.hook_pre"]))
    read = cache["vision.blocks.2.hook_resid_post"][:, 1:]
    assert torch.equal(cache["projector.hook_in"], read)


# Weights -------------------------------------------------------------------------------------


def test_weights_are_views_of_the_parameters():
    model = tiny(text="qwen2")
    language = model.hf_model.get_submodule("model.language_model.layers.1")
    vision = model.hf_model.get_submodule("model.vision_tower.encoder.layers.1")
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    pairs = [
        (attn.W_Q, language.self_attn.q_proj.weight),
        (attn.W_K, language.self_attn.k_proj.weight),
        (attn.W_V, language.self_attn.v_proj.weight),
        (attn.W_O, language.self_attn.o_proj.weight),
        (attn.b_K, language.self_attn.k_proj.bias),
        (mlp.W_gate, language.mlp.gate_proj.weight),
        (mlp.W_in, language.mlp.up_proj.weight),
        (mlp.W_out, language.mlp.down_proj.weight),
        (model.vision.blocks[1].attn.W_O, vision.self_attn.out_proj.weight),
        (model.vision.blocks[1].mlp.b_in, vision.mlp.fc1.bias),
    ]
    for view, parameter in pairs:
        assert view.data_ptr() == parameter.data_ptr()
        assert not view.requires_grad
    assert attn.W_Q.shape == (4, 32, 8)
    assert attn.W_K.shape == (2, 32, 8)
    assert attn.W_O.shape == (4, 8, 32)
    assert attn.b_O is None
    assert model.W_Q.shape == (2, 4, 32, 8)
    assert model.towers["vision"].W_in.shape == (3, 32, 48)


def test_weights_give_the_activations():
    model = tiny(text="qwen2")
    _, cache = cache_of(model, batch_of(model))
    tower = model.towers["language"]
    norm = tower.module(tower.row.ln1, 0).weight.detach()
    x = cache["blocks.0.ln1.hook_normalized"] * norm
    for part in "QKV":
        weight, bias = (getattr(model.blocks[0].attn, f"{kind}_{part}") for kind in "Wb")
        by_hand = einsum(x, weight, "b p m, h m d -> b p h d") + bias
        shown = cache[f"blocks.0.attn.hook_{part.lower()}"]
        torch.testing.assert_close(shown, by_hand, atol=1e-5, rtol=1e-5)


def test_the_patch_embedding_gives_the_vision_embedding():
    model = tiny(vision="siglip")
    batch = batch_of(model)
    _, cache = cache_of(model, batch)
    patches = torch.nn.functional.unfold(batch.extra["pixel_values"], 8, stride=8).mT
    tower = model.towers["vision"]
    embed = tower.module("embeddings")
    by_hand = patches @ tower.W_E + embed.patch_embedding.bias + embed.position_embedding.weight
    torch.testing.assert_close(cache["vision.hook_embed"], by_hand.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(AttributeError, match="has no W_U"):
        _ = tower.W_U


# Gradients -----------------------------------------------------------------------------------


def target_of(logits: Tensor, batch: Batch) -> Tensor:
    real = logits[batch.attention_mask.bool()]
    return (real * noise_like(real, seed=1)).sum()


def gradients_of(model: HookedMultimodal, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """At each hook: (value, gradient of the target), from autograd on the hooked tensors."""
    caught = {}

    def catch(value, hook):
        caught[hook.name] = value

    with model.hooks(fwd_hooks=[(anywhere, catch)]):
        target = target_of(model(batch), batch)
    found = torch.autograd.grad(target, list(caught.values()), allow_unused=True)
    return {
        name: (value.detach(), torch.zeros_like(value) if gradient is None else gradient)
        for (name, value), gradient in zip(caught.items(), found, strict=True)
    }


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_gradients_equal_finite_differences(vision):
    """In float64, where only the parts that `transformers` keeps in float32 round."""
    model = tiny(vision=vision, text="qwen2", dtype=torch.float64, attention="eager")
    batch = unpadded(model)
    step = 3e-3
    for name, (value, gradient) in gradients_of(model, batch).items():
        # along the gradient with random signs: large enough to measure, not the easy direction
        way = gradient.abs() * noise_like(value, seed=2).sign()
        size = way.norm()
        if size == 0:  # behind the vision layer that is read
            assert name.startswith("vision.ln_final")
            continue
        way = way / size + 0.5 * gradient / gradient.norm()

        def shifted(sign, name=name, way=way):
            logits = run(model, batch, (name, lambda old, hook: old + sign * step * way))
            return target_of(logits, batch)

        measured = (shifted(1) - shifted(-1)) / (2 * step)
        expected = (gradient * way).sum()
        assert abs(measured - expected) < 2e-2 * gradient.norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hooks_that_return_nothing_leave_gradients_alone(attention):
    model = tiny(attention=attention, vision_feature_layer=[-2, -1])
    inputs = inputs_of(model)

    def pixel_gradient(hooks):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        batch = Batch.from_inputs(model, **{**inputs, "pixel_values": pixels})
        with model.hooks(fwd_hooks=hooks):
            target = target_of(model(batch), batch)
        return torch.autograd.grad(target, pixels)[0]

    plain, hooked = pixel_gradient([]), pixel_gradient([(anywhere, nothing)])
    torch.testing.assert_close(hooked, plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-4)


def test_backward_hooks_see_the_gradient_and_can_edit_it():
    model = tiny(attention="eager")
    batch = batch_of(model)
    expected = {name: gradient for name, (_, gradient) in gradients_of(model, batch).items()}
    seen = {}

    def see(gradient, hook):
        seen[hook.name] = gradient

    with model.hooks(bwd_hooks=[(anywhere, see)]):
        target_of(model(batch), batch).backward()
    for name, gradient in expected.items():
        if not name.startswith("vision.ln_final"):
            torch.testing.assert_close(
                seen[name], gradient, msg=lambda m, name=name: f"{name}: {m}"
            )
    model.hf_model.zero_grad()
    with model.hooks(bwd_hooks=[("blocks.0.hook_resid_pre", lambda g, hook: (g * 0,))]):
        target_of(model(batch), batch).backward()
    projector = model.hf_model.get_submodule("model.multi_modal_projector.linear_1").weight
    assert projector.grad.abs().max() == 0
    later = model.hf_model.get_submodule("model.language_model.layers.1.mlp.up_proj").weight
    assert later.grad.abs().max() > 0


def test_the_last_block_gradient_equals_one_by_hand():
    """d target / d resid_post of the last block, through the final norm and the unembedding."""
    model = tiny()
    batch = batch_of(model)
    value, gradient = gradients_of(model, batch)["blocks.1.hook_resid_post"]
    leaf = value.clone().requires_grad_()
    normalized, _ = norm_by_hand(leaf, "rms", model.cfg.eps)
    weight = model.towers["language"].module("norm").weight.detach()
    target_of((normalized * weight) @ model.W_U, batch).backward()
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-5, rtol=1e-4)

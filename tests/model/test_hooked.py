"""HookedMultimodal: loading, hooks that come off again, caching, generation, and every error."""

import copy
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mechmm.model.attention import listening
from mechmm.model.batch import Batch, InputError
from mechmm.model.families import UnknownArchitectureError, family_of, stack_of
from mechmm.model.hooked import HookedMultimodal, UnknownHookError
from mechmm.testing import assert_no_hooks, tiny, tiny_hf, tiny_inputs, tiny_processor
from mechmm.testing.recipes import VOCABULARY
from mechmm.testing.vocabulary import token

QUESTION = "<image> what color is the circle ? answer :"


@pytest.fixture
def model():
    return tiny()


def batch_of(model, images=(1,), words=5) -> Batch:
    return Batch.from_inputs(model, **tiny_inputs(model, images, words))


def quiet(model) -> bool:
    return not any(listening(hook) for hook in model.hook_points())


def double(value, hook):
    return value * 2


# Caching -------------------------------------------------------------------------------------


@torch.no_grad()
def test_names_filter_is_a_name_a_list_or_a_function(model):
    batch = batch_of(model)
    plain = model(batch)
    names = ["vision.blocks.0.hook_resid_pre", "projector.hook_out", "blocks.1.attn.hook_z"]
    for wanted, found in (
        (names[1], names[1:2]),
        (names, names),
        (tuple(names), names),
        (lambda name: name in names, names),
    ):
        logits, cache = model.run_with_cache(batch, names_filter=wanted)
        assert list(cache.keys()) == found
        assert torch.equal(logits, plain)


@torch.no_grad()
def test_by_default_all_is_cached_but_derived_results(model):
    batch = batch_of(model)
    _, cache = model.run_with_cache(batch)
    missing = set(model.hook_dict) - set(cache.keys())
    assert missing == {name for name in model.hook_dict if name.endswith("hook_result")}
    _, cache = model.run_with_cache(batch, names_filter="blocks.0.attn.hook_result")
    assert cache["result", 0].shape == (1, batch.input_ids.shape[1], 4, 32)
    assert quiet(model)


def test_cached_gradients(model):
    batch = batch_of(model)
    model.hf_model.requires_grad_(True)
    seen = {}

    def keep(gradient, hook):
        seen[hook.name] = gradient.shape

    with model.hooks(bwd_hooks=[("vision.blocks.0.hook_mlp_out", keep)]):
        model(batch)[0, -1, 7].backward()
    assert seen == {"vision.blocks.0.hook_mlp_out": (1, 17, 32)}


@torch.no_grad()
def test_logits_to_keep(model):
    batch = batch_of(model)
    whole, last = model(batch), model(batch, logits_to_keep=1)
    torch.testing.assert_close(last, whole[:, -1:])


# Hooks come off ------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_come_off_after_success_and_after_an_exception(model):
    batch = batch_of(model)
    plain = model(batch)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        assert not torch.equal(model(batch), plain)
    assert quiet(model)
    assert torch.equal(model(batch), plain)

    def fail(value, hook):
        raise RuntimeError("inside a hook")

    with pytest.raises(RuntimeError, match="inside a hook"):
        model.run_with_hooks(batch, fwd_hooks=[("vision.blocks.1.attn.hook_pattern", fail)])
    assert quiet(model)
    assert torch.equal(model(batch), plain)


@torch.no_grad()
def test_an_unknown_name_in_a_list_leaves_nothing_behind(model):
    with (
        pytest.raises(UnknownHookError),
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double), ("blocks.9.hook_x", double)]),
    ):
        pass
    assert quiet(model)


@torch.no_grad()
def test_added_hooks_stay_until_reset(model):
    batch = batch_of(model)
    plain = model(batch)
    model.add_hook("vision.blocks.2.hook_resid_post", double)
    edited = model(batch)
    assert not torch.equal(edited, plain)
    with model.hooks(fwd_hooks=[("hook_embed", double)]):
        assert not torch.equal(model(batch), edited)
    assert torch.equal(model(batch), edited)
    model.reset_hooks()
    assert torch.equal(model(batch), plain)
    model.add_hook(lambda name: name.endswith("hook_mlp_out"), double)
    assert sum(listening(hook) for hook in model.hook_points()) == 5
    model.reset_hooks()
    model.add_perma_hook("hook_embed", double)
    model.reset_hooks()
    assert not torch.equal(model(batch), plain)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(batch), plain)


@torch.no_grad()
def test_unwrap_gives_the_model_back_as_it_was(model):
    for attention in ("sdpa", "eager"):
        hf_model = tiny_hf(attention=attention)
        inputs = tiny_inputs(hf_model, (1, 2), (4, 2))
        before = hf_model(**inputs).logits
        hidden = hf_model(**inputs, output_hidden_states=True).hidden_states
        model = HookedMultimodal.from_hf(hf_model)
        model.add_perma_hook("blocks.0.hook_mlp_out", double)
        assert not torch.equal(model(Batch.from_inputs(model, **inputs)), before)
        with pytest.raises(AssertionError, match="left behind"):
            assert_no_hooks(hf_model)
        assert model.unwrap() is hf_model
        assert_no_hooks(hf_model)
        assert hf_model.config._attn_implementation == attention
        assert torch.equal(hf_model(**inputs).logits, before)
        again = hf_model(**inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(again, hidden, strict=True))
        model = HookedMultimodal.from_hf(hf_model)
        assert torch.equal(model(Batch.from_inputs(model, **inputs)), before)


def test_a_copy_is_refused_with_the_way_to_make_one(model):
    with pytest.raises(TypeError, match=r"copy.deepcopy\(model.unwrap\(\)\), wrap both"):
        copy.deepcopy(model)


def test_a_model_cannot_be_wrapped_twice(model):
    with pytest.raises(ValueError, match=r"wrapped already; call unwrap\(\) on that first"):
        HookedMultimodal.from_hf(model.hf_model)


def test_a_run_whose_attention_hooks_would_be_dead_is_refused(model):
    batch = batch_of(model)
    hf_model = model.unwrap()
    with pytest.raises(ValueError, match="attention of tower 'vision' was set to 'sdpa'"):
        model(batch)
    model = HookedMultimodal.from_hf(hf_model)
    hf_model.config.vision_config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="attention of tower 'vision' was set to 'eager'"):
        model(batch)
    with pytest.raises(ValueError, match="attention of tower 'vision' was set to 'eager'"):
        model.generate(batch, max_new_tokens=1)


def test_importing_and_wrapping_leave_other_models_alone(model):
    other = tiny_hf(seed=1)
    inputs = tiny_inputs(other)
    with torch.no_grad():
        before = other(**inputs).logits
        with model.hooks(fwd_hooks=[(lambda name: True, double)]):
            assert torch.equal(other(**inputs).logits, before)
    assert_no_hooks(other)


# What it is ----------------------------------------------------------------------------------


def test_sizes_and_towers():
    model = tiny(vision="siglip", text="qwen2", heads=4, key_value_heads=2, layers=2)
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.d_head, cfg.d_mlp) == (2, 32, 8, 48)
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_vocab, cfg.n_ctx) == (4, 2, VOCABULARY, 256)
    assert (cfg.normalization_type, cfg.model_name, cfg.dtype) == ("RMS", "qwen2", torch.float32)
    assert list(model.towers) == ["vision", "language"]
    vision = model.towers["vision"].cfg
    assert (vision.n_layers, vision.n_key_value_heads, vision.normalization_type) == (3, 4, "LN")
    assert vision.model_name == "siglip_vision_model"
    assert tiny().towers["vision"].cfg.n_ctx == vision.n_ctx + 1
    text = repr(model)
    assert text.startswith(
        f"HookedMultimodal(LlavaForConditionalGeneration, {len(model.hook_dict)} hook"
    )
    assert "language: qwen2, 2 layers, d_model 32, 4 heads" in text
    assert "vision: siglip_vision_model, 3 layers" in text
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.image_token == "<image>"
    assert not list(model.parameters())


def test_words_and_tokens(model):
    assert model.to_single_token("red") == model.answer_tokens(" red")[0]
    assert model.to_string(model.to_tokens("red circle")[0]) == "<s> red circle"
    assert model.answer_tokens("red circle") == model.to_tokens("red circle")[0, 1:].tolist()
    with pytest.raises(ValueError, match="'red circle' is 2 tokens, not one"):
        model.to_single_token("red circle")
    with pytest.raises(ValueError, match="cannot write the answer 'zebra'"):
        model.to_single_token("zebra")
    with pytest.raises(ValueError, match="cannot write the answer ''"):
        model.answer_tokens("")


# Generation ----------------------------------------------------------------------------------

PUSH = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 4
IMAGE = token("<image>")  # which a model that was not trained may write too
OPTIONS = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "suppress_tokens": [IMAGE],
}


def push(value, hook):
    return value + PUSH


@torch.no_grad()
def greedy(model, inputs: dict, hooks: list) -> torch.Tensor:
    """Six tokens without a cache: the whole prompt, picture included, at every step."""
    inputs, start = dict(inputs), inputs["input_ids"].shape[1]
    del inputs["position_ids"]
    for _ in range(6):
        batch = Batch.from_inputs(model, **inputs)
        logits = model.run_with_hooks(batch, fwd_hooks=hooks)[:, -1]
        logits[:, [model.hf_model.generation_config.eos_token_id, IMAGE]] = -torch.inf
        new = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], -1)
        ones = torch.ones_like(new)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], -1)
    return inputs["input_ids"][:, start:]


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "projector.hook_out"])
def test_hooks_are_live_in_cached_decoding(text, name):
    model = tiny(text=text)
    inputs = tiny_inputs(model, (1, 2), (3, 4))
    batch = Batch.from_inputs(model, **inputs)
    plain = model.generate(batch, **OPTIONS)
    assert torch.equal(plain, greedy(model, inputs, []))
    with model.hooks(fwd_hooks=[(name, push)]):
        edited = model.generate(batch, **OPTIONS)
    assert edited.shape == (2, 6)
    assert not torch.equal(edited, plain)
    assert torch.equal(edited, greedy(model, inputs, [(name, push)]))


def test_an_edit_of_one_step_changes_what_follows_it(model):
    batch = batch_of(model)
    steps = []

    def late(value, hook):
        steps.append(value.shape[1])
        return value + PUSH if len(steps) >= 4 else value

    plain = model.generate(batch, **OPTIONS)
    seen = []

    def watch(value, hook):
        seen.append(hook.name)

    hooks = [("blocks.1.hook_resid_post", late), ("vision.hook_embed", watch)]
    with model.hooks(fwd_hooks=hooks):
        edited = model.generate(batch, **OPTIONS)
    assert steps == [batch.input_ids.shape[1], 1, 1, 1, 1, 1]
    assert seen == ["vision.hook_embed"]
    assert torch.equal(edited[:, :3], plain[:, :3])
    assert not torch.equal(edited, plain)


def test_patterns_can_be_edited_in_cached_decoding(model):
    batch = batch_of(model)

    def look_at_first(value, hook):
        value[:] = 0.0
        value[..., 0] = 1.0

    def last_row_only(value, hook):
        assert value.shape[-1] >= value.shape[-2]

    hooks = [
        ("blocks.1.attn.hook_pattern", look_at_first),
        ("blocks.0.attn.hook_pattern", last_row_only),
    ]
    with model.hooks(fwd_hooks=hooks):
        edited = model.generate(batch, **OPTIONS)
    inputs = tiny_inputs(model, (1,), 5)
    assert torch.equal(edited, greedy(model, inputs, hooks))


def test_right_padded_prompts_are_not_continued(model):
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 1), (3, 5), padding_side="right"))
    with pytest.raises(InputError, match="encode with padding_side='left'"):
        model.generate(batch, max_new_tokens=1)


# Loading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    """A model saved with its processor, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp(request.param)
    hf_model = tiny_hf(vision=request.param)
    hf_model.save_pretrained(path)
    tiny_processor(hf_model).save_pretrained(path)
    return path, request.param


@torch.no_grad()
def test_loading_a_folder(folder):
    path, vision = folder
    model, made = HookedMultimodal.from_pretrained(path, device="cpu"), tiny(vision=vision)
    picture = Image.new("RGB", (50, 40), "red")
    ours, theirs = (m(m.encode(QUESTION, picture)) for m in (model, made))
    assert torch.equal(ours, theirs)
    half = HookedMultimodal.from_pretrained(str(path), dtype=torch.bfloat16)
    assert half.dtype == half.cfg.dtype == torch.bfloat16
    logits = half(half.encode(QUESTION, picture)).float()
    assert (logits - ours).abs().max() < 0.1 * ours.abs().max()


def test_a_wrapped_model_can_be_saved_and_loaded(model, tmp_path):
    model.hf_model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = HookedMultimodal.from_pretrained(tmp_path)
    batch = batch_of(model)
    assert torch.equal(loaded(batch), model(batch))
    assert loaded.unwrap().config._attn_implementation == "sdpa"


def test_loading_errors(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ValueError, match="give either device or device_map, not both"):
        HookedMultimodal.from_pretrained(path, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match=r"is no model: it has no config\.json"):
        HookedMultimodal.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"huggingface\.co"):
        HookedMultimodal.from_pretrained("nobody/nothing")
    shutil.copy(path / "config.json", tmp_path)
    with pytest.raises(OSError, match=r"safetensors|pytorch_model"):
        HookedMultimodal.from_pretrained(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_way_to_add_it(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(
        UnknownArchitectureError, match="no row for architecture 'LlamaForCausalLM'"
    ):
        HookedMultimodal.from_hf(LlamaForCausalLM(config).eval())
    config.save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitectureError, match="names no architecture"):
        HookedMultimodal.from_pretrained(tmp_path)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    how = r"nearest: .*LlavaForConditionalGeneration.*write one Family row in mechmm/model/fam"
    with pytest.raises(UnknownArchitectureError, match=how):
        HookedMultimodal.from_pretrained(tmp_path)
    with pytest.raises(
        UnknownArchitectureError, match="tower 'audio': no row for model_type 'whisper'"
    ):
        stack_of("whisper", "audio")
    assert family_of("LlavaForConditionalGeneration").towers["language"] == "model.language_model"


# Other errors --------------------------------------------------------------------------------


def test_an_unknown_hook_name_is_refused_with_the_nearest(model):
    batch = batch_of(model)
    near = "unknown hook 'blocks.0.hook_resid_pst'; nearest: .*blocks.0.hook_resid_post"
    with pytest.raises(UnknownHookError, match=near):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.0.hook_resid_pst", double)])
    with pytest.raises(UnknownHookError, match=near):
        model.run_with_cache(batch, names_filter="blocks.0.hook_resid_pst")
    with pytest.raises(UnknownHookError, match=near):
        model.run_with_cache(batch, names_filter=["hook_embed", "blocks.0.hook_resid_pst"])
    with pytest.raises(UnknownHookError, match=near):
        model.add_hook("blocks.0.hook_resid_pst", double)
    with pytest.raises(UnknownHookError, match=r"unknown hook 'vision\.block.0.hook_z'"):
        model.check_names(["vision.block.0.hook_z"])
    assert quiet(model)


def test_training_mode_is_refused(model):
    with pytest.raises(ValueError, match=r"training mode, .* call hf_model.eval\(\) first"):
        HookedMultimodal.from_hf(tiny_hf().train())
    batch = batch_of(model)
    model.hf_model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(batch)


def test_a_run_needs_a_batch(model):
    with pytest.raises(TypeError, match="Batch"):
        model({"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(TypeError, match="Batch"):
        model(QUESTION)


def test_tiny_models_that_do_not_exist():
    with pytest.raises(ValueError, match=r"no tiny family 'blip'; there are .*llava"):
        tiny("blip")
    with pytest.raises(ValueError, match="no tiny vision tower 'vit'; there are clip, siglip"):
        tiny(vision="vit")
    with pytest.raises(ValueError, match=r"no tiny language model 'gpt'; there are .*llama"):
        tiny(text="gpt")
    with pytest.raises(ValueError, match="words has 1 entries for 2 prompts"):
        tiny_inputs(tiny_hf(), (1, 1), (3,))


def test_tiny_models_repeat_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, other, third = tiny_hf(), tiny_hf(), tiny_hf(seed=1)
    assert torch.equal(torch.rand(2), expected)
    weights = [model.lm_head.weight for model in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

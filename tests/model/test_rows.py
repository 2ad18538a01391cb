"""Rows that do not fit a model are refused with what, where and what to do; the page is current."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from mechmm.cli import app
from mechmm.model import families, stacks
from mechmm.model.batch import Batch
from mechmm.model.families import FAMILIES, UnknownArchitectureError
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.rows import Projector
from mechmm.model.tower import MissingPathError
from mechmm.runs.families import families_page
from mechmm.testing import assert_no_hooks, tiny_hf, tiny_inputs, tiny_processor

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"ln2": "second_norm"}, "second_norm"),
        ({"attn": "attention"}, "attention"),
        ({"mlp_in": "wide"}, "mlp.wide"),
        ({"k": "keys"}, "self_attn.keys"),
        ({"blocks": ("h",)}, "h"),
    ],
)
def test_a_path_that_does_not_exist_is_named_with_both_versions(monkeypatch, change, path):
    row = replace(stacks.GATED_DECODER, **change)
    monkeypatch.setitem(stacks.STACKS, "llama", row)
    message = (
        rf"tower 'language' \(LlamaModel\) has no module '{path}' in transformers "
        rf"{transformers.__version__}; its row in mechmm/model/stacks.py was verified with "
    )
    with pytest.raises(MissingPathError, match=message):
        HookedMultimodal.from_hf(tiny_hf("llava"))


def test_a_root_that_does_not_exist_is_named(monkeypatch):
    family = FAMILIES["LlavaForConditionalGeneration"]
    moved = replace(family, towers={**family.towers, "vision": "model.eyes"})
    monkeypatch.setitem(families.FAMILIES, family.architecture, moved)
    with pytest.raises(MissingPathError, match=r"has no module 'model.eyes' in transformers"):
        HookedMultimodal.from_hf(tiny_hf("llava"))


def test_an_unknown_architecture_is_told_the_nearest_rows():
    with pytest.raises(UnknownArchitectureError, match="nearest: Qwen2_5_VLForConditional"):
        families.family_of("Qwen2_5_OmniForConditionalGeneration")


def test_an_unknown_tower_is_told_the_nearest_rows():
    with pytest.raises(UnknownArchitectureError, match=r"tower 'vision': .* nearest: dinov"):
        families.stack_of("dinov9", "vision")


def test_a_wrong_row_leaves_the_model_as_it_was(monkeypatch):
    hf_model = tiny_hf("llava")
    inputs = tiny_inputs(hf_model)
    with torch.no_grad():
        before = hf_model(**inputs).logits
    monkeypatch.setitem(stacks.STACKS, "llama", replace(stacks.GATED_DECODER, ln2="nowhere"))
    with pytest.raises(MissingPathError):
        HookedMultimodal.from_hf(hf_model)
    with torch.no_grad():
        assert torch.equal(hf_model(**inputs).logits, before)
    monkeypatch.undo()
    HookedMultimodal.from_hf(hf_model)


DEVICE_MAPS = {
    "auto": "auto",
    "a layer on disk": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_placed_by_accelerate_every_hook_shows_the_same(device_map, tmp_path):
    hf_model = tiny_hf("llava")
    hf_model.save_pretrained(tmp_path)
    tiny_processor(hf_model).save_pretrained(tmp_path)
    caches = []
    for model in (
        HookedMultimodal.from_hf(hf_model),
        HookedMultimodal.from_pretrained(tmp_path, device_map=device_map),
    ):
        batch = Batch.from_inputs(model, **tiny_inputs(model, (1, 2)))
        with torch.no_grad():
            logits, cache = model.run_with_cache(batch, names_filter=lambda name: True)
        caches.append({**cache, "logits": logits})
    plain, placed = caches
    assert plain.keys() == placed.keys()
    assert all(torch.equal(plain[name], placed[name]) for name in plain)


def test_the_page_is_made_from_the_rows():
    assert PAGE.read_text() == families_page(), "run `make families`"


def test_the_command_lists_every_row():
    found = CliRunner().invoke(app, ["families", "--json"])
    assert found.exit_code == 0
    assert {row["architecture"] for row in json.loads(found.stdout)} == set(FAMILIES)


def test_a_wrong_projector_leaves_the_model_as_it_was(monkeypatch):
    family = FAMILIES["LlavaForConditionalGeneration"]
    for projector in (Projector("model.nowhere"), Projector("model.multi_modal_projector", "in")):
        hf_model = tiny_hf("llava")
        wrong = replace(family, projectors={"projector": projector})
        monkeypatch.setitem(families.FAMILIES, family.architecture, wrong)
        with pytest.raises(MissingPathError, match=r"'model.nowhere'|no module 'in'"):
            HookedMultimodal.from_hf(hf_model)
        assert_no_hooks(hf_model)


def test_a_model_whose_blocks_all_have_experts_is_hooked():
    config = tiny_hf("qwen3_vl_moe").config
    config.text_config.mlp_only_layers = []
    model = HookedMultimodal.from_hf(type(tiny_hf("qwen3_vl_moe"))(config).eval())
    assert all(f"blocks.{i}.mlp.hook_router" in model.hook_dict for i in range(model.cfg.n_layers))
    assert "blocks.0.mlp.hook_pre" not in model.hook_dict


def test_weight_for_another_expert_chooses_it():
    model = HookedMultimodal.from_hf(tiny_hf("qwen3_vl_moe"))
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1,)))
    hook, out = "blocks.0.mlp.hook_router", "blocks.0.mlp.hook_expert_out"

    def swap(value, hook):
        return value.flip(-1)

    def all_of_them(value, hook):
        return torch.ones_like(value)

    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, swap)]):
        cache = model.run_with_cache(batch, names_filter=[hook, out])[1]
    used = cache[out].abs().amax(-1) > 0
    assert torch.equal(used, cache[hook] != 0)
    with pytest.raises(ValueError, match="gives weight to more than 2 experts"), torch.no_grad():
        model.run_with_hooks(batch, fwd_hooks=[(hook, all_of_them)])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "clip", "mistral3", "dinov2", "emu3"])
def test_the_embedding_matrix_is_that_of_the_embedding(family):
    model = HookedMultimodal.from_hf(tiny_hf(family))
    for name, tower in model.towers.items():
        shape = tower.W_E.shape
        assert shape[1] == tower.cfg.d_model
        wide = tower.config.vocab_size if name in ("language", "text") else None
        assert wide is None or shape[0] == wide

"""Processors load without torchvision where transformers allows it; else the error says how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from mechmm.model import processors
from mechmm.model.batch import Batch, InputError
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.processors import MissingVideoProcessor, load_processor, part_of
from mechmm.testing import tiny_hf, tiny_inputs, tiny_processor, tiny_tokenizer

OPTIONS = {"revision": None, "trust_remote_code": False}
WITH_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "llava_next_video", "glm4v")
without_torchvision = pytest.mark.skipif(
    is_torchvision_available(), reason="it is about an installation without torchvision"
)


def write(folder: Path, **files: dict) -> None:
    """JSON files of a folder, by name."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "processor_config.json").read_text())


# Without its video part ----------------------------------------------------------------------


@without_torchvision
@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_a_processor_that_takes_videos_loads_for_pictures(family, tmp_path):
    hf_model = tiny_hf(family)
    made = tiny_processor(hf_model)
    made.chat_template = "{{ messages[0].content }}"
    hf_model.config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    loaded, reason = load_processor(str(tmp_path), OPTIONS)
    assert reason == ""
    assert isinstance(loaded, type(made).__mro__[2])
    assert type(loaded).__name__ == settings_of(tmp_path)["processor_class"]
    assert loaded.chat_template == made.chat_template
    assert loaded.image_processor.to_dict() == made.image_processor.to_dict()
    with pytest.raises(ImportError, match=r'torchvision, .*pip install "mechmm\[video\]"'):
        loaded(text=["<video>"], videos=[[Image.new("RGB", (8, 8))] * 2])


@without_torchvision
def test_settings_of_a_missing_video_processor_are_saved_again(tmp_path):
    reader = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 7}
    made = tiny_processor(tiny_hf("qwen2_vl"))
    tiny_hf("qwen2_vl").config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    write(tmp_path, video_preprocessor_config=reader)
    named = settings_of(tmp_path)
    del named["processor_class"], named["video_processor"]  # as in older checkpoints
    write(tmp_path, processor_config=named)
    loaded, _ = load_processor(str(tmp_path), OPTIONS)
    assert loaded.video_processor.settings == reader
    loaded.save_pretrained(tmp_path / "again")
    assert settings_of(tmp_path / "again")["video_processor"] == reader
    assert settings_of(tmp_path / "again")["processor_class"] == "Qwen2VLProcessor"


def test_where_torchvision_is_installed_nothing_is_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processors, "_assembled", pytest.fail)
    hf_model = tiny_hf("llava")
    hf_model.config.save_pretrained(tmp_path)
    tiny_processor(hf_model).save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), OPTIONS)[1] == ""
    (tmp_path / "processor_config.json").write_text("{")
    assert "not a valid JSON" in load_processor(str(tmp_path), OPTIONS)[1]


# Without a processor -------------------------------------------------------------------------

NEEDS_MORE = {
    "cohere2_vision": ("Cohere2VisionProcessor", "Cohere2VisionImageProcessorFast"),
    "llama4": ("Llama4Processor", "Llama4ImageProcessorFast"),
    "pixtral": ("PixtralProcessor", "PixtralImageProcessor"),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor"),
    "dinov3_vit": (None, "DINOv3ViTImageProcessorFast"),
}


@without_torchvision
@pytest.mark.parametrize("family", NEEDS_MORE)
def test_a_model_whose_processor_needs_more_loads_and_says_what(family, tmp_path):
    kind, images = NEEDS_MORE[family]
    tiny_hf(family).save_pretrained(tmp_path)
    if kind is not None:
        tiny_tokenizer().save_pretrained(tmp_path)
        write(tmp_path, processor_config={"processor_class": kind})
    write(tmp_path, preprocessor_config={"image_processor_type": images})
    model = HookedMultimodal.from_pretrained(tmp_path)
    assert model.processor is None
    with pytest.raises(InputError, match=r'(orchvision|num2words).*pip install "mechmm\[video\]"'):
        model.encode("what ?", Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match=r"no processor \(.*; pass one to from_hf"):
        model.chat([])
    assert model(Batch.from_inputs(model, **tiny_inputs(model))) is not None


def test_a_model_without_processor_files_loads(tmp_path):
    tiny_hf("llava").save_pretrained(tmp_path)
    model = HookedMultimodal.from_pretrained(tmp_path)
    assert model.processor is model.tokenizer is None
    assert model.image_token == "token 4"
    with pytest.raises(InputError, match=r"no processor \(the folder '.*' has no files of one\)"):
        model.encode("what ?", [])
    with pytest.raises(InputError, match=r"no tokenizer \(the folder .*or use Batch.from_inputs"):
        model.to_tokens("what ?")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_processor(str(tmp_path), OPTIONS)[0] is None


def test_one_part_of_a_processor_is_all_of_it(tmp_path):
    hf_model = tiny_hf("vit")
    hf_model.config.save_pretrained(tmp_path)
    tiny_processor(hf_model).save_pretrained(tmp_path)
    images, _ = load_processor(str(tmp_path), OPTIONS)
    assert type(images) is type(AutoImageProcessor.from_pretrained(tmp_path))
    assert part_of(images, "image_processor") is images
    assert part_of(images, "tokenizer") is None
    tiny_tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert part_of(words, "tokenizer") is words
    model = HookedMultimodal.from_hf(tiny_hf("llava"), words)
    assert model.encode("what color ?", images=[]).layout.text_only
    with pytest.raises(InputError, match=r"no image processor \(TokenizersBackend has none\)"):
        HookedMultimodal.from_hf(tiny_hf("vit"), words).encode(None, Image.new("RGB", (8, 8)))
    assert MissingVideoProcessor().to_dict() == {}

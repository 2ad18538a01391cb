"""What `model.encode` refuses, beside pictures that do not fit (`test_batch`), with a reason."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image
from transformers.utils import is_torchvision_available

from mechmm.model.batch import InputError
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny

RATE = 16_000
PICTURE = Image.new("RGB", (40, 24), "red")
VIDEO = np.zeros((4, 24, 40, 3), dtype=np.uint8)
CLIP = np.zeros(8000)
SOUND = "<audio> what is it ?"


@cache
def model_of(family: str) -> HookedMultimodal:
    return tiny(family)


def refused(message: str, family: str, *args, **options) -> None:
    with pytest.raises(InputError, match=message):
        model_of(family).encode(*args, **options)


# A processor that does not fit the model -------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "setting", "wrong", "message"),
    [
        ("llava", "patch_size", 16, r"has 4 image placeholders, .* 1 image\(s\) .* 16 positions"),
        ("gemma3", "full_image_sequence", "<image>", "has 1 image placeholders, .* 16 positions"),
        ("deepseek_vl", "num_image_tokens", 9, "has 9 image placeholders, .* fill 16 positions"),
    ],
)
def test_another_number_of_tokens_than_the_picture_fills(family, setting, wrong, message):
    model = tiny(family)
    setattr(model.processor, setting, wrong)
    with pytest.raises(InputError, match=f"prompt 0 {message}"):
        model.encode(f"{model.image_token} red ?", PICTURE)


def test_a_picture_whose_tokens_are_cut_off():
    model = tiny()
    model.processor.text_kwargs = {"truncation": True, "max_length": 5}
    with pytest.raises(InputError, match=r"LlavaProcessor refuses these prompts: Mismatch in `im"):
        model.encode("<image> red ?", PICTURE)


def test_a_processor_that_writes_the_placeholders_itself():
    message = "the processor of this model puts one picture before every text, so give every"
    refused(f"prompt 0 has 2 pictures; {message}", "blip-2", "red ?", [PICTURE, PICTURE])
    refused(f"prompt 1 has 0 pictures; {message}", "blip-2", ["red ?", "?"], [PICTURE, []])
    assert model_of("blip-2").encode(["red ?", "?"], images=[]).layout.text_only
    refused("prompt 0 has 7 image placeholders, but .* fill 6", "blip-2", "<image> red ?", PICTURE)


def test_a_processor_that_needs_a_picture_in_every_prompt():
    texts = ["<image> red ?", "what color ?"]
    refused("prompt 1 has no picture, and PaliGemma", "paligemma", texts, [PICTURE, []])
    refused("prompt 0 has no picture, and PaliGemma", "paligemma", texts[1], [])


# Videos ----------------------------------------------------------------------------------------


def test_a_video_where_a_picture_is_expected(tmp_path):
    refused(r"not uint8 \[4, 24, 40, 3\]; a video is passed as videos=", "llava", "<image>", VIDEO)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0" * 64)
    refused(r"clip\.mp4' is a video where a picture is expected", "llava", "<image>", path)
    refused("takes images, but videos were given", "llava", "<image>", videos=VIDEO)
    assert model_of("llava").encode("red ?", images=[]).layout.text_only


@pytest.mark.skipif(is_torchvision_available(), reason="about missing torchvision")
def test_a_video_without_torchvision():
    for family in ("qwen2_vl", "llava_onevision"):
        mark = model_of(family).marks["video"]
        message = r'videos are read with torchvision, .*pip install "mechmm\[video\]"'
        refused(message, family, f"{mark} red ?", videos=VIDEO)
        assert model_of(family).encode("red ?", videos=[]).layout.text_only


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (VIDEO[0], r"a video must be uint8 .* not uint8 \[24, 40, 3\]; a picture is passed as im"),
        (VIDEO.astype(float), r"not float64 \[4, 24, 40, 3\]"),
        (VIDEO[:0], r"not uint8 \[0, 24, 40, 3\]"),
        ([[PICTURE, PICTURE.resize((8, 8))]], r"differ in size, \(8, 8\) and \(24, 40\)"),
        ([VIDEO, VIDEO], "prompt 0 has 1 '<video>' placeholders but 2 videos; give one video for"),
        ([[]], r"prompt 0 has 1 '<video>' placeholder\(s\) but no video; pass videos, or"),
        (["clip.mp4"], "'clip.mp4' is no video"),
    ],
)
def test_an_entry_that_is_no_video(videos, message, monkeypatch):
    model = tiny("qwen2_vl")
    model.processor.video_processor = None  # whatever reads videos, these do not reach it
    with pytest.raises(InputError, match=message):
        model.encode("<video> red ?", videos=videos)


def test_pictures_where_a_video_is_expected():
    refused("'<video>' placeholder.* but no video", "qwen2_vl", "<video>", videos=[], images=[])
    refused("images are missing; pass one picture", "qwen2_vl", "<video> red ?")
    message = r"1 picture\(s\) but no '<image>' placeholder"
    refused(message, "qwen2_vl", "<video> red ?", PICTURE)


# Sound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (
            (CLIP, 44_100),
            r"44100 samples per second, the model hears 16000; resample it, .*\(samples, 16000, 4",
        ),
        (CLIP, r"prompt 0: a clip is a pair .* has no rate \(the model hears 16000 Hz\)"),
        ((np.zeros((2, 8000)), RATE), r"floats \[sample\] .* not float64 \[2, 8000\]"),
        ((CLIP.astype(np.int16), RATE), r"floats \[sample\] .* not int16 \[8000\]"),
        ((CLIP[:0], RATE), r"not float64 \[0\]"),
        ((np.zeros(RATE + 1600), RATE), "lasts 1.1 s, of which the model hears 1 s; cut it"),
        ([(CLIP, RATE)] * 2, "has 1 '<audio>' placeholders but 2 clips"),
        (None, "audio are missing; pass one clip"),
        (["a.wav"], "'a.wav' is no clip"),
    ],
)
def test_sound_that_the_model_cannot_hear(audio, message):
    refused(message, "qwen2_audio", SOUND, audio=audio)


def test_media_that_the_model_does_not_take():
    refused("takes audio, but images were given", "qwen2_audio", SOUND, PICTURE)
    refused("takes images and videos, but audio", "qwen2_vl", "red ?", audio=(CLIP, RATE))


# Texts -----------------------------------------------------------------------------------------


def test_texts_where_none_are_read_and_none_where_they_are():
    refused("ViTModel reads no text; pass None as text", "vit", "red ?", PICTURE)
    refused("no text was given; pass at least one", "llava", None, PICTURE)
    refused("no text was given; pass at least one", "clip", None, PICTURE)


def test_encoders_without_pictures():
    for images in (None, []):
        refused("images are missing; pass one picture or a list", "clip", "red", images)
        refused("images are missing; pass one picture or a list", "vit", None, images)
    refused("3 is no picture; pass one picture or", "clip", "red", [3])
    refused("only compares texts", "clip", "red", PICTURE, padding_side="left")


def test_conversations_are_not_guessed():
    with pytest.raises(InputError, match="LlavaProcessor has no chat template; write the prompt"):
        model_of("llava").chat([{"role": "user", "content": "hello"}])
    bare = HookedMultimodal.from_hf(tiny().unwrap())
    with pytest.raises(InputError, match="this model has no processor; pass one to from_hf"):
        bare.chat([])
    message = "prompt 0 starts with '<s>', prompt 1 does not; pass either all of them through"
    refused(message, "llava", ["<s> red ?", "red ?"], images=[])

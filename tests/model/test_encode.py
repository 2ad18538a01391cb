"""`model.encode` through each family's own processor equals what transformers makes of the same."""

from __future__ import annotations

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import Box, SpanError
from mechmm.model.processors import UNMARKED
from mechmm.testing import RECIPES, tiny, tiny_hf, tiny_processor

RATE = 16_000


@cache
def model_of(family: str) -> HookedMultimodal:
    return tiny(family)


def picture(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(seed: int = 0, length: int = 9000) -> tuple[np.ndarray, int]:
    return np.random.default_rng(seed).normal(scale=0.1, size=length), RATE


def reads_text(family: str) -> bool:
    return "input_ids" in inspect.signature(tiny_hf(family).forward).parameters


HAVE = [family for family in RECIPES if tiny_processor(tiny_hf(family)) is not None]
SEE = [
    family
    for family in HAVE
    if reads_text(family) and model_of(family).family.media[0].placeholder is not None
    if "image" in model_of(family).marks
]
COMPARE = ["clip", "siglip", "siglip2"]
ALONE = [family for family in HAVE if not reads_text(family)]


def prompts(model: HookedMultimodal) -> tuple[list[str], list[list[Image.Image]]]:
    """Texts of different lengths, with no picture, one or two of different sizes."""
    mark, kind = model.image_token, type(model.processor).__name__
    # Emu3's tokenizer of pictures sees the padding of smaller ones.
    narrow = (40, 24) if kind == "Emu3Processor" else (24, 60)
    one, two, three = picture(0), picture(1, *narrow), picture(2, *narrow)
    if kind in UNMARKED:
        return ["what color is the circle ? answer :", "is the moon red ?"], [[one], [two]]
    texts = [f"{mark} what color is the circle ?", f"what is left of {mark} and {mark} right ?"]
    groups = [[one], [two, three]]
    if kind == "PaliGemmaProcessor":  # which takes no prompt without a picture
        return texts, groups
    return [*texts, "is the moon red ?"], [*groups, []]


@torch.no_grad()
def theirs(family: str, text: str, images: list[Image.Image]) -> torch.Tensor:
    """Logits [pos, vocab] as the documentation of transformers has it: processor, then model."""
    hf_model = tiny_hf(family)
    processor = tiny_processor(hf_model)
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if "pixel_values_images" in inputs:  # Video-LLaVA warns of its own processor's name
        inputs["pixel_values"] = inputs.pop("pixel_values_images")
    start = hf_model.generation_config.decoder_start_token_id
    if hf_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.full((1, 1), start)
    return hf_model(**inputs)["logits"][0]


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("family", SEE)
@torch.no_grad()
def test_a_batch_equals_each_prompt_through_transformers(family, side):
    model = model_of(family)
    if side == "left" and model.config.is_encoder_decoder:
        pytest.skip("an encoder counts positions from the left")
    texts, images = prompts(model)
    batch = model.encode(texts, images, padding_side=side)
    together = model(batch)
    for prompt, (text, group) in enumerate(zip(texts, images, strict=True)):
        alone = theirs(family, text, group)
        real = batch.attention_mask[prompt].bool()
        ours = together[prompt] if model.config.is_encoder_decoder else together[prompt, real]
        torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)
    assert [len(share) for share in batch.layout.media] == [len(group) for group in images]
    assert [len(share) for share in batch.layout.windows] == [len(group) for group in images]
    assert batch.images == tuple(map(tuple, images))


def test_no_family_with_a_processor_is_left_out():
    rest = ["emu3", "qwen2_audio", *COMPARE, *ALONE]
    assert set(HAVE) <= {*SEE, *rest}
    assert {"smolvlm", "pixtral", "llama4"}.isdisjoint(HAVE)


# Loaded by the name of a folder --------------------------------------------------------------

FOLDERS = (
    "llava",
    "llava_next",
    "llava_onevision",
    "idefics3",
    "qwen2_vl",
    "qwen2_5_vl",
    "internvl",
    "gemma3",
    "paligemma",
    "clip",
    "siglip",
    "vit",
    "qwen2_audio",
)


def example(model: HookedMultimodal) -> tuple[tuple, dict]:
    """What a model may be asked, as arguments of `encode`."""
    mark = model.image_token
    if not model.takes("input_ids"):
        return (None, [picture(0), picture(1)]), {}
    if "audio" in model.marks:
        return (f"{mark} what is it ?",), {"audio": clip()}
    return (f"{mark} what color is the circle ?", picture()), {}


@pytest.mark.parametrize("family", FOLDERS)
@torch.no_grad()
def test_a_folder_with_model_and_processor_is_all_it_takes(family, tmp_path):
    made = model_of(family)
    made.hf_model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    loaded = HookedMultimodal.from_pretrained(tmp_path)
    args, options = example(made)
    ours, theirs = loaded.encode(*args, **options), made.encode(*args, **options)
    assert ours.layout.tokens == theirs.layout.tokens
    assert ours.layout.windows == theirs.layout.windows
    torch.testing.assert_close(loaded(ours), made(theirs))
    assert loaded.marks == made.marks


# Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", COMPARE)
@pytest.mark.parametrize("pictures", [1, 2, 3])
@torch.no_grad()
def test_texts_are_compared_with_any_number_of_pictures(family, pictures):
    model = model_of(family)
    texts = ["what color is the circle ?", "red"]
    images = [picture(seed) for seed in range(pictures)]
    batch = model.encode(texts, images)
    hf_model = tiny_hf(family)
    padding = {"padding": "max_length"} if family == "siglip" else {"padding": True}
    padding = {} if family == "siglip2" else padding
    inputs = tiny_processor(hf_model)(text=texts, images=images, return_tensors="pt", **padding)
    wanted = hf_model(**inputs).logits_per_image
    torch.testing.assert_close(model(batch), wanted)
    assert wanted.shape == (pictures, 2)
    assert sum(map(len, batch.layout.windows)) == sum(map(len, batch.images)) == pictures
    if pictures == 1:
        assert torch.equal(model(model.encode(texts, images[0])), model(batch))


@pytest.mark.parametrize("family", ALONE)
@torch.no_grad()
def test_a_tower_alone_takes_pictures_alone(family):
    model, images = model_of(family), [picture(0), picture(1, 24, 60)]
    batch = model.encode(None, images)
    hf_model = tiny_hf(family)
    output = hf_model(**tiny_processor(hf_model)(images, return_tensors="pt"))
    assert torch.equal(model(batch), output[model.family.output])
    assert len(batch) == len(batch.layout.media) == 2
    assert batch.images == tuple((image,) for image in images)


# Sound and videos ----------------------------------------------------------------------------


@torch.no_grad()
def test_sound_equals_what_transformers_makes_of_it():
    model = model_of("qwen2_audio")
    texts = ["<start> <audio> <end> what is it ?", "<audio> and <audio> four"]
    clips = [[clip(0)], [clip(1, 16000), clip(2, 4000)]]
    batch = model.encode(texts, audio=clips)
    hf_model = tiny_hf("qwen2_audio")
    flat = [samples for group in clips for samples, _ in group]
    inputs = tiny_processor(hf_model)(
        text=texts,
        audio=flat,
        sampling_rate=RATE,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    real = batch.attention_mask.bool()
    torch.testing.assert_close(model(batch)[real], hf_model(**inputs).logits[real])
    assert batch.layout.windows == (((0, 0, 0.5625, 1),), ((0, 0, 1, 1), (0, 0, 0.25, 1)))
    assert [[medium.kind for medium in share] for share in batch.layout.media] == [
        ["audio"],
        ["audio", "audio"],
    ]
    assert batch.images == ()
    alone = model.encode(texts[0], audio=clips[0][0])
    torch.testing.assert_close(model(alone)[0], model(batch)[0][real[0]])


class FrameReader:
    """Reads videos by pairs of frames as pictures, in the place of one that needs torchvision."""

    merge_size = 2

    def __init__(self, image_processor) -> None:
        self.image_processor = image_processor

    def __call__(self, videos, **options) -> BatchFeature:
        read = [self.image_processor(list(video[::2]), return_tensors="pt") for video in videos]
        grids = [[len(one["image_grid_thw"]), *one["image_grid_thw"][0, 1:]] for one in read]
        pixels = torch.cat([one["pixel_values"] for one in read])
        return BatchFeature(
            {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}, "pt"
        )


@torch.no_grad()
def test_videos_stand_beside_pictures():
    model = tiny("qwen2_vl")
    assert model.marks == {"image": "<image>", "video": "<video>"}
    reader = FrameReader(model.processor.image_processor)
    model.processor.video_processor = reader
    frames = [picture(seed, 64, 48) for seed in range(4)]
    video = np.stack([np.asarray(frame) for frame in frames])
    text = "<image> what is left of <video> ?"
    batch = model.encode(text, picture(), videos=video)
    assert [medium.kind for medium in batch.layout.media[0]] == ["image", "video"]
    assert batch.layout.windows == (((0, 0, 40, 24), (0, 0, 64, 48)),)
    assert len(batch.layout.media[0][1].views) == 2
    assert torch.equal(model(model.encode(text, picture(), videos=[frames])), model(batch))
    swapped = model.encode("<video> what is left of <image> ?", picture(), videos=video)
    assert [medium.kind for medium in swapped.layout.media[0]] == ["video", "image"]
    assert swapped.layout.windows == (((0, 0, 64, 48), (0, 0, 40, 24)),)
    wanted = reader([video])["pixel_values_videos"]
    assert torch.equal(batch.extra["pixel_values_videos"], wanted)
    two = model.encode(["<video> red ?", "<video> <video> ?"], videos=[video, [video, video[:2]]])
    assert [len(share) for share in two.layout.media] == [1, 2]


# Conversations -------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)


@torch.no_grad()
def test_a_conversation_is_written_by_the_processors_template():
    model = tiny("qwen2_vl")
    model.processor.chat_template = TEMPLATE
    parts = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    messages = [{"role": "user", "content": parts}]
    text = model.chat(messages)
    assert text == "<s> <image> what color is the circle ? answer :"
    assert model.chat(messages, add_generation_prompt=False) == text.removesuffix("answer :")
    batch = model.encode([text, text], [picture(), picture(1)])
    # The template has written <s>; the tokenizer adds no second one.
    assert (batch.input_ids == model.tokenizer.bos_token_id).sum(-1).tolist() == [1, 1]
    plain = model.encode(text.removeprefix("<s> "), picture())
    assert torch.equal(batch.input_ids[:1], plain.input_ids)


def test_token_types_are_kept_where_the_model_takes_them():
    for family, name in (("gemma3", "token_type_ids"), ("qwen2_5_vl", "mm_token_type_ids")):
        model = model_of(family)
        batch = model.encode(f"{model.image_token} red ?", picture())
        assert torch.equal(batch.extra[name].bool(), batch.layout.mask("image")), family
    assert "token_type_ids" not in model_of("llava").encode("<image> red ?", picture()).extra
    paligemma = model_of("paligemma").encode("<image> red ?", picture())
    assert set(paligemma.extra) == {"pixel_values", "token_type_ids"}


def test_a_mark_is_what_the_processor_asks_for_not_the_token_that_is_filled():
    marks = {"gemma3": "<start>", "aya_vision": "<image>", "blip-2": "", "clip": ""}
    for family, mark in marks.items():
        assert model_of(family).image_token == mark, family
    filled = {
        family: model_of(family).token_of(model_of(family).family.media[0]) for family in marks
    }
    assert filled["gemma3"] == filled["blip-2"] == "<image>"
    assert filled["aya_vision"] == "<|IMG_PATCH|>"


@torch.no_grad()
def test_crops_that_are_media_of_their_own_have_no_known_windows():
    model = tiny("gemma3")
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    model.processor.images_kwargs = {**model.processor.images_kwargs, **crops}
    batch = model.encode("<start> red ?", picture(0, 96, 32))
    assert len(batch.layout.media[0]) == 1 + 3
    assert batch.layout.windows == ()
    with pytest.raises(SpanError, match="unknown which part of each picture the model sees"):
        batch.layout.patches(Box(0, 0, 8, 8))
    assert model(batch).shape[1] == batch.layout.shape[1]


@torch.no_grad()
def test_pictures_of_one_prompt_may_be_any_form_and_take_the_models_dtype():
    model = tiny("qwen2_vl", dtype=torch.bfloat16)
    batch = model.encode("<image> and <image> ?", [np.asarray(picture()), picture(1)])
    assert batch.extra["pixel_values"].dtype == torch.bfloat16
    assert model(batch).dtype == torch.bfloat16

"""Inputs: refused with a reason where text and pictures do not fit, else the same numbers."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mechmm.model.batch import Batch, InputError, per_prompt
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny, tiny_hf, tiny_inputs
from mechmm.testing.recipes import VOCABULARY

QUESTION = "<image> what color is the circle ? answer :"
TWO = "what is left of <image> and <image> right ?"
WITHOUT = "is the moon red ?"


def picture(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model():
    return tiny()


@torch.no_grad()
def logits(model, batch: Batch) -> torch.Tensor:
    return model(batch)


# Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (QUESTION, None, "images are missing; .* images=\\[\\] to run on text alone on purpose"),
        (WITHOUT, None, "images are missing"),
        (QUESTION, [], "prompt 0 has 1 '<image>' placeholder\\(s\\) but no picture"),
        (WITHOUT, picture(), "prompt 0 has 1 picture\\(s\\) but no '<image>' placeholder"),
        (TWO, picture(), "prompt 0 has 2 '<image>' placeholders but 1 pictures"),
        (QUESTION, [picture(), picture()], "prompt 0 has 1 '<image>' placeholders but 2 pictures"),
        ([QUESTION, TWO], [picture(), [picture()]], "prompt 1 has 2 '<image>' placeholders but 1"),
        ([QUESTION, WITHOUT], [picture(), picture()], "prompt 1 has 1 picture\\(s\\) but no"),
        (
            [QUESTION, QUESTION],
            [picture(), []],
            "prompt 1 has 1 '<image>' placeholder\\(s\\) but no",
        ),
        ([QUESTION, QUESTION], [picture()], "images has 1 entries for 2 texts"),
        ([QUESTION, QUESTION], picture(), "images has 1 entries for 2 texts"),
        ([QUESTION], [picture(), picture()], "prompt 0 has 1 '<image>' placeholders but 2"),
        ([], [], "no text was given"),
    ],
)
def test_text_and_pictures_that_do_not_fit_are_refused(model, text, images, message):
    with pytest.raises(InputError, match=message):
        model.encode(text, images)


def test_an_entry_that_is_no_picture_is_refused():
    with pytest.raises(InputError, match="None is no picture; for a text without one give"):
        per_prompt([QUESTION, WITHOUT], [picture(), None], "<image>")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3)), "must be uint8 \\[height, width, 3\\], not float64 \\[8, 8, 3\\]"),
        (np.zeros((8, 8), dtype=np.uint8), "not uint8 \\[8, 8\\]"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "not uint8 \\[3, 8, 8\\]"),
        (np.zeros((8, 8, 4), dtype=np.uint8), "not uint8 \\[8, 8, 4\\]"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(model, array, message):
    with pytest.raises(InputError, match=f"prompt 1: an image array .*{message}"):
        model.encode([QUESTION, QUESTION], [picture(), array])


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_truncated_picture_is_refused(model, tmp_path, kind, opened):
    path = tmp_path / f"cut.{kind}"
    picture(width=200, height=200).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    message = rf"prompt 0: '.*cut\.{kind}' is missing, truncated"
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(Image.open(path)) if opened else path
        with pytest.raises(InputError, match=message):
            model.encode(QUESTION, given)


def test_a_file_that_is_missing_or_no_picture_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"prompt 0: .*nowhere\.png' is missing"):
        model.encode(QUESTION, tmp_path / "nowhere.png")
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    with pytest.raises(InputError, match=r"prompt 1: .*notes\.png' is .* no image file"):
        model.encode([QUESTION, QUESTION], [picture(), str(text)])


def test_a_model_without_processor_says_so():
    bare = HookedMultimodal.from_hf(tiny_hf())
    with pytest.raises(InputError, match="no processor; pass one to from_hf, or use Batch"):
        bare.encode(QUESTION, picture())
    assert Batch.from_inputs(bare, **tiny_inputs(bare)).layout.tokens[0][0] == " 1"


def test_ready_tensors_without_pixels_or_placeholders_are_refused(model):
    inputs = tiny_inputs(model, (0, 1), 4)
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(InputError, match="prompt 1 has 16 image placeholders but no pixel_values"):
        Batch.from_inputs(model, **text)
    with pytest.raises(InputError, match="prompt 1 has 16 image placeholders but no pixel_values"):
        model(inputs["input_ids"])
    words = tiny_inputs(model, (0, 0), 4)
    with pytest.raises(
        InputError, match=r"pixel_values of 1 image\(s\) were given but no prompt has"
    ):
        Batch.from_inputs(model, **words, pixel_values=inputs["pixel_values"])


def test_counts_that_do_not_match_are_refused_with_the_prompt(model):
    inputs = tiny_inputs(model, (1, 1), 4)
    ids = inputs["input_ids"].clone()
    ids[1, ids[1] == model.placeholder] = 7
    ids[1, 2:5] = model.placeholder
    with pytest.raises(InputError, match=r"prompt 1 has 3 .* 1 image\(s\) left for it fill 16"):
        Batch.from_inputs(model, **{**inputs, "input_ids": ids})
    one, pixels = inputs["input_ids"][:1], inputs["pixel_values"]
    with pytest.raises(InputError, match=r"2 images were given, but .* placeholders for 1 of them"):
        Batch.from_inputs(model, input_ids=one, pixel_values=pixels)
    with pytest.raises(InputError, match=r"prompt 1 has 16 .* 0 image\(s\) left for it fill 0"):
        Batch.from_inputs(model, **{**inputs, "pixel_values": pixels[:1]})


def test_other_ready_tensors_that_cannot_be_used_are_refused(model):
    inputs = tiny_inputs(model)
    with pytest.raises(InputError, match="input_ids are missing"):
        Batch.from_inputs(model, pixel_values=inputs["pixel_values"])
    with pytest.raises(
        InputError, match=r"the model has no input 'attention_maks'; it takes .*attention_mask"
    ):
        Batch.from_inputs(model, **inputs, attention_maks=inputs["attention_mask"])
    pixels = inputs["pixel_values"]
    with pytest.raises(
        InputError,
        match=r"pixel_values are torch.float64, the model is torch.float32; pass pixel_values.to",
    ):
        Batch.from_inputs(model, **{**inputs, "pixel_values": pixels.double()})
    with pytest.raises(InputError, match="pixel_values are on meta, the model is on cpu"):
        Batch.from_inputs(model, **{**inputs, "pixel_values": pixels.to("meta")})


def test_text_alone_on_purpose_runs(model):
    batch = model.encode([WITHOUT, "what"], images=[])
    assert batch.layout.text_only
    assert "pixel_values" not in batch.inputs
    assert logits(model, batch).shape == (2, 6, VOCABULARY)


# Accepted ------------------------------------------------------------------------------------


def test_every_form_of_a_picture_gives_the_same_pixels(model, tmp_path: Path):
    given = picture()
    path = tmp_path / "picture.png"
    given.save(path)
    wanted = model.encode(QUESTION, given).extra["pixel_values"]
    for form in (path, str(path), np.asarray(given), [given], given.convert("RGBA")):
        batch = model.encode(QUESTION, form)
        assert torch.equal(batch.extra["pixel_values"], wanted)
        assert batch.layout.windows == (((0.0, 0.0, 40.0, 24.0),),)
    assert batch.images[0][0].size == (40, 24)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_change_the_numbers(vision, side, attention):
    model = tiny(vision=vision, text="qwen2", attention=attention)
    texts = [QUESTION, TWO, WITHOUT]
    images = [[picture(1)], [picture(2), picture(3)], []]
    batch = model.encode(texts, images, padding_side=side)
    together = logits(model, batch)
    for prompt, (text, group) in enumerate(zip(texts, images, strict=True)):
        alone = logits(model, model.encode(text, group))[0]
        real = batch.attention_mask[prompt].bool()
        torch.testing.assert_close(together[prompt, real], alone, atol=1e-5, rtol=1e-5)
        assert batch.position_ids[prompt, real].tolist() == list(range(len(alone)))


def test_the_picture_matters_and_its_order_too(model):
    one, other = (logits(model, model.encode(QUESTION, picture(seed))) for seed in (1, 2))
    assert (one - other)[0, -1].abs().max() > 1e-2
    one, other = (
        logits(model, model.encode(TWO, pair))
        for pair in ([picture(1), picture(2)], [picture(2), picture(1)])
    )
    assert (one - other)[0, -1].abs().max() > 1e-2


def test_ready_tensors_equal_encoding(model):
    batch = model.encode([QUESTION, WITHOUT], [picture(), []])
    processed = model.processor(
        text=[QUESTION, WITHOUT],
        images=[picture()],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    ready = Batch.from_inputs(model, **processed)
    assert set(ready.inputs) == set(batch.inputs)
    for name, value in batch.inputs.items():
        assert torch.equal(ready.inputs[name], value), name
    for name in ("modality", "image", "row", "column"):
        assert torch.equal(getattr(ready.layout, name), getattr(batch.layout, name))
    assert ready.layout.tokens == batch.layout.tokens
    assert torch.equal(logits(model, ready), logits(model, batch))
    assert len(batch) == 2


def test_mask_and_positions_are_made_where_they_are_missing(model):
    inputs = tiny_inputs(model, (1, 1), 4)
    full = Batch.from_inputs(model, **inputs)
    bare = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    assert torch.equal(logits(model, Batch.from_inputs(model, **bare)), logits(model, full))


def test_text_as_token_ids_equals_text_encoded(model):
    batch = model.encode(WITHOUT, images=[])
    assert torch.equal(model(batch.input_ids), model(batch))
    assert torch.equal(model.to_tokens(WITHOUT), batch.input_ids)


def test_pictures_take_the_models_dtype():
    model = tiny(dtype=torch.bfloat16)
    batch = model.encode(QUESTION, picture())
    assert batch.extra["pixel_values"].dtype == torch.bfloat16
    assert batch.input_ids.dtype == torch.long
    assert logits(model, batch).dtype == torch.bfloat16


def test_a_batch_moves_with_everything_but_its_layout(model):
    batch = model.encode(QUESTION, picture())
    away = batch.to("meta")
    assert {value.device.type for value in away.inputs.values()} == {"meta"}
    assert away.layout is batch.layout
    assert away.images is batch.images
    assert batch.input_ids.device.type == "cpu"
    with pytest.raises(
        InputError, match=r"the batch is on meta, the model on cpu; call batch.to\("
    ):
        model(away)

"""Every position knows what it is: checked by painting a patch and seeing where it arrives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mechmm.model.batch import Batch
from mechmm.model.layout import IMAGE, PADDING, TEXT, Box, Patches, SpanError, Words
from mechmm.testing import tiny, tiny_inputs

QUESTION = "<image> what color is the circle ? answer :"
TWO = "what is left of <image> and <image> right ?"
WITHOUT = "is the moon red ?"
TOWERS = [("clip", "default"), ("clip", "full"), ("siglip", "full"), ("siglip", "default")]


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def mixed(model):
    """One image, two images, none, padded on the left."""
    images = [picture(64, 48), [picture(30, 70), picture()], []]
    return model.encode([QUESTION, TWO, WITHOUT], images).layout


def words_of(layout, span: str, prompt: int = 0) -> str:
    return "".join(layout.tokens[prompt][p] for p in layout.positions(span, prompt)).strip()


# Where patches are ---------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "select"), TOWERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_painted_patch_arrives_at_its_positions_and_nowhere_else(vision, select, side):
    """The projector reads the embedding, so nothing mixes on the way to the language model."""
    model = tiny(vision=vision, select=select, vision_feature_layer=[0])
    texts = [WITHOUT, "left " + TWO]
    plain = model.encode(texts, [[], [picture(), picture(seed=1)]], padding_side=side)
    for row, column in [(0, 1), (2, 3), (3, 0)]:
        box = Box(column * 8, row * 8, column * 8 + 8, row * 8 + 8, image=1)
        layout = plain.layout.with_span("painted", [Words("moon"), box])
        changed = picture(seed=1)
        changed.paste((255, 0, 0), (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
        edited = model.encode(texts, [[], [picture(), changed]], padding_side=side)
        with torch.no_grad():
            (_, before), (_, after) = (model.run_with_cache(batch) for batch in (plain, edited))

        def moved(name, before=before, after=after):
            return (before[name] != after[name]).any(-1).nonzero().tolist()

        positions = layout.positions("painted", 1)
        assert len(positions) == 1
        assert moved("blocks.0.hook_resid_pre") == [[1, positions[0]]]
        image, place = layout.vision_positions("painted", 1)[0]
        assert moved("vision.hook_embed") == [[image, place]]
        assert layout.find(box, 1) == positions
        assert layout.box(positions[0], 1) == box


@pytest.mark.parametrize(
    ("vision", "select", "tokens", "classes", "first"),
    [
        ("clip", "default", 16, 0, (0, 0)),
        ("clip", "full", 17, 1, (-1, -1)),
        ("siglip", "full", 16, 0, (0, 0)),
        ("siglip", "default", 15, 0, (0, 1)),
    ],
)
def test_image_positions_of_every_strategy(vision, select, tokens, classes, first):
    layout = tiny(vision=vision, select=select).encode(QUESTION, picture()).layout
    places = layout.positions("image")
    assert places == list(range(1, 1 + tokens))
    assert [int(layout.image[0, p]) for p in places] == [0] * tokens
    rows, columns = layout.row[0, places].tolist(), layout.column[0, places].tolist()
    assert (rows[0], columns[0]) == first
    cells = list(zip(rows, columns, strict=True))[classes:]
    assert cells == [(r, c) for r in range(4) for c in range(4)][-len(cells) :]
    extra = 1 if vision == "clip" else 0
    assert layout.vision_positions("all") == [(0, p) for p in range(16 + extra)]
    assert len(layout.vision_positions("image")) == len(cells)


def test_a_class_token_is_no_patch_and_a_dropped_patch_has_no_position():
    layout = tiny(select="full").encode(QUESTION, picture()).layout
    with pytest.raises(SpanError, match="prompt 0: position 1 is image, not a patch"):
        layout.box(1)
    layout = tiny(vision="siglip", select="default").encode(QUESTION, picture()).layout
    with pytest.raises(SpanError, match="no position for row 0, column 0 of image 0"):
        layout.find(Patches(((0, 0),)))


def test_boxes_are_in_pixels_of_the_picture_as_it_was_given(mixed):
    wide = mixed.find(Box(0, 0, 16, 12))
    assert [(int(mixed.row[0, p]), int(mixed.column[0, p])) for p in wide] == [(0, 0)]
    (touched,) = mixed.patches(Box(15, 11, 33, 13))
    assert touched == Patches(tuple((r, c) for r in (0, 1) for c in (0, 1, 2)))
    (tall,) = mixed.patches(Box(0, 69, 30, 70, image=0), prompt=1)
    assert tall == Patches(((3, 0), (3, 1), (3, 2), (3, 3)), image=0)
    assert mixed.box(mixed.positions("image", 1)[5], 1) == Box(7.5, 17.5, 15.0, 35.0, image=0)


@pytest.mark.parametrize("width", [7, 30, 32, 100, 336, 399, 1000])
def test_the_box_of_a_patch_touches_that_patch_alone(width):
    model = tiny()
    layout = model.encode(QUESTION, picture(width, width + 1)).layout
    for position in layout.positions("image"):
        cell = (int(layout.row[0, position]), int(layout.column[0, position]))
        assert layout.cells(layout.box(position)) == {(0, *cell)}
        assert layout.find(layout.box(position)) == [position]


# Spans ---------------------------------------------------------------------------------------


def test_built_in_spans(mixed):
    assert words_of(mixed, "before_image") == "<s>"
    assert words_of(mixed, "question") == "what color is the circle ? answer :"
    assert words_of(mixed, "before_image", 1) == "<s> what is left of"
    assert words_of(mixed, "text", 1) == "<s> what is left of and right ?"
    assert words_of(mixed, "question", 1) == "right ?"
    assert [words_of(mixed, "last", prompt) for prompt in range(3)] == [":", "?", "?"]
    assert words_of(mixed, "all", 2) == words_of(mixed, "question", 2) == "<s> is the moon red ?"
    assert mixed.positions("image", 2) == mixed.positions("before_image", 2) == []
    assert mixed.last.tolist() == [mixed.shape[1] - 1] * 3


def test_modalities_cover_every_position(mixed):
    for prompt, (text, image) in enumerate([(9, 16), (8, 32), (6, 0)]):
        kinds = mixed.modality[prompt].tolist()
        assert (kinds.count(TEXT), kinds.count(IMAGE)) == (text, image)
        assert kinds.count(PADDING) == mixed.shape[1] - text - image


def test_right_padding_moves_the_last_position(model):
    images = [[picture()], []]
    layout = model.encode([QUESTION, WITHOUT], images, padding_side="right").layout
    assert layout.last.tolist() == [24, 5]
    assert layout.positions("last", 1) == [5]
    assert words_of(layout, "all", 1) == "<s> is the moon red ?"


def test_words_are_found_by_occurrence(model):
    text = "is the red circle left of the <image> red square ? the red"
    layout = model.encode(text, picture()).layout
    assert [layout.find(Words("red", nth)) for nth in range(3)] == [[3], [24], [28]]
    assert layout.find(Words("red square")) == [24, 25]
    assert layout.find(Words("RED  square")) == [24, 25]
    with pytest.raises(SpanError, match=r"occurrence 3 of 'red' is not in its text \(found 3\)"):
        layout.find(Words("red", 3))
    with pytest.raises(SpanError, match="occurrence 0 of 'moon'"):
        layout.find(Words("moon"))
    with pytest.raises(SpanError, match="found 0"):
        layout.find(Words(""))


def test_words_end_where_words_end(model):
    """With a tokenizer of pieces: "one" is not in "stone", and a word may be several tokens."""
    layout = model.encode("is the moon red ?", images=[]).layout
    pieces = replace(layout, tokens=((" st", "one", " one", " circ", "le", "?"),))
    assert pieces.find(Words("one")) == [2]
    assert pieces.find(Words("stone")) == [0, 1]
    assert pieces.find(Words("stone one")) == [0, 1, 2]
    assert pieces.find(Words("circle?")) == [3, 4, 5]
    assert pieces.find(Words("?")) == [5]
    with pytest.raises(SpanError, match="'circ'"):
        pieces.find(Words("circ"))


def test_user_defined_spans(mixed):
    places = [Words("circle"), Box(0, 0, 8, 8, image=1), Words("moon red")]
    layout = mixed.with_span("thing", places)
    assert layout.spans[-1] == "thing"
    assert "thing" not in mixed.spans
    assert words_of(layout, "thing") == "circle"
    assert words_of(layout, "thing", 2) == "moon red"
    place = layout.positions("thing", 1)[0]
    assert (layout.image[1, place], layout.row[1, place], layout.column[1, place]) == (1, 0, 0)
    assert layout.vision_positions("thing", 1) == [(1, 1)]
    everywhere = layout.with_span("is", Words("is"))
    assert [words_of(everywhere, "is", prompt) for prompt in range(3)] == ["is"] * 3


def test_overlapping_spans_are_refused(mixed):
    layout = mixed.with_span("a", [Box(0, 0, 32, 24), Words("left"), Words("moon")])
    with pytest.raises(
        SpanError, match=r"span 'b' overlaps span 'a': prompt 2, position \d+ \(' moon'\)"
    ):
        layout.with_span("b", [Box(32, 0, 64, 24), Words("right"), Words("the moon")])
    with pytest.raises(SpanError, match="span 'b' overlaps span 'a': prompt 0"):
        layout.with_span("b", [Box(0, 0, 4, 4), Words("right"), Words("red")])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            Box(0, 0, 65, 10),
            r"not inside what the model sees of the picture, from \(0, 0\) to \(64, 48\)",
        ),
        (Box(-1, 0, 5, 10), "not inside what the model sees"),
        (Box(5, 0, 5, 10), "give left < right"),
        (Box(0, 40, 5, 49), "not inside what the model sees"),
        (Box(0, 0, 5, 5, image=1), r"prompt 0 has 1 image\(s\); there is no image 1"),
        (Box(0, 0, 5, 5, image=-1), "there is no image -1"),
        (
            Patches(((4, 0),)),
            "no position for row 4, column 0 of image 0, view 0; its images have 4 x 4",
        ),
        (Patches(((0, 0),), image=2), "of image 2"),
    ],
)
def test_places_that_do_not_exist_are_refused(mixed, where, message):
    with pytest.raises(SpanError, match=message):
        mixed.find(where)


def test_other_span_errors(mixed):
    with pytest.raises(SpanError, match="unknown span 'imag'; this layout has all, text, image"):
        mixed.mask("imag")
    with pytest.raises(SpanError, match="span 'image' exists already"):
        mixed.with_span("image", Words("is"))
    with pytest.raises(SpanError, match="2 places for 3 prompts"):
        mixed.with_span("x", [Words("is"), Words("is")])
    with pytest.raises(SpanError, match=r"prompt 2 has 0 image\(s\)"):
        mixed.with_span("x", Box(0, 0, 4, 4))
    with pytest.raises(SpanError, match="position 0 is padding, not a patch"):
        mixed.box(0)


def test_sizes_are_unknown_for_ready_tensors(model):
    layout = Batch.from_inputs(model, **tiny_inputs(model)).layout
    with pytest.raises(SpanError, match="unknown which part of each picture the model sees"):
        layout.patches(Box(0, 0, 8, 8))
    assert layout.find(Patches(((1, 2),))) == [layout.positions("image")[6]]


# Printed -------------------------------------------------------------------------------------


def test_the_printed_table(mixed):
    lines = str(mixed.with_span("thing", [Words("circle"), Words("right"), Words("red")])).split(
        "\n"
    )
    assert [line.split() for line in lines[:7]] == [
        ["prompt", "positions", "what", "spans", "tokens"],
        ["0", "0..14", "padding", "<pad>"],
        ["0", "15", "text", "before_image", "<s>"],
        ["0", "16..31", "image", "0,", "4", "x", "4", "patches", "<image>"],
        ["0", "32..35", "text", "question", "what", "color", "is", "the"],
        ["0", "36", "text", "question,", "thing", "circle"],
        ["0", "37..38", "text", "question", "?", "answer"],
    ]
    assert lines[-1].split() == ["2", "39", "text", "question,", "last", "?"]
    assert sum("image 1, 4 x 4 patches" in line for line in lines) == 1
    assert "text only" not in lines[0]


def test_text_alone_is_noted(model):
    layout = model.encode([WITHOUT, "what color"], images=[]).layout
    assert layout.text_only
    assert str(layout).startswith("text only, on purpose: no image was given\n")

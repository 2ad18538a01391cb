"""Pixel boxes meet the patches that show them, whatever the image processor does to a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

import mechmm as mm
from mechmm.model.grids import window
from mechmm.model.layout import SpanError
from mechmm.zoo.recipe import build_model, build_processor

CROPPING = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}


def brightest_patch(pixels: np.ndarray) -> tuple[int, int]:
    blocks = pixels.reshape(8, 12, 8, 12).mean((1, 3))
    return tuple(int(i) for i in np.unravel_index(blocks.argmax(), blocks.shape))


@pytest.mark.parametrize(("width", "height"), [(192, 96), (96, 192), (48, 48), (150, 300)])
def test_a_cropped_picture_keeps_its_boxes(width, height):
    processor = build_processor()
    processor.image_processor = CLIPImageProcessorPil(**CROPPING)
    model = mm.HookedMultimodal.from_hf(build_model().eval(), processor)
    picture = Image.new("RGB", (width, height))
    layout = model.encode("<image> what color is the circle ?", picture).layout
    box = layout.box(layout.positions("image")[8 * 2 + 5])
    inside = tuple(round(edge) for edge in (box.left, box.top, box.right, box.bottom))
    picture.paste((255, 255, 255), inside)
    seen = processor.image_processor(picture, return_tensors="np")["pixel_values"][0, 0]
    assert brightest_patch(seen) == (2, 5)
    assert layout.cells(box) == {(0, 2, 5)}


def test_a_box_outside_the_crop_is_refused():
    processor = build_processor()
    processor.image_processor = CLIPImageProcessorPil(**CROPPING)
    model = mm.HookedMultimodal.from_hf(build_model().eval(), processor)
    layout = model.encode("<image> what color is the circle ?", Image.new("RGB", (192, 96))).layout
    with pytest.raises(SpanError, match=r"what the model sees .* \(48, 0\) to \(144, 96\)"):
        layout.patches(mm.Box(0, 0, 40, 40))


def test_a_stretched_picture_is_seen_whole():
    assert window(build_processor().image_processor, 50, 100) == (0.0, 0.0, 50.0, 100.0)

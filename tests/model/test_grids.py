"""Pixel boxes meet the patches that show them, whatever the image processor does to a picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaImageProcessorPil,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

import mechmm as mm
from mechmm.model.batch import Batch
from mechmm.model.grids import Grid, Medium, plain
from mechmm.model.grids.tiles import UNKNOWN
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import SpanError, Window
from mechmm.model.windows import placed, window
from mechmm.testing import RECIPES, tiny, tiny_hf, tiny_processor
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


# Every image processor -------------------------------------------------------------------------

LAYER = "vision.blocks.0.hook_resid_pre"
"""Where every position of a tower still stands for its own patch."""
SKIPPED = {
    "chameleon": "no tower",
    "emu3": "no tower",
    "florence2": "its last patches are made of earlier ones",
    "qwen2_audio": "it hears",
}
PLACED = [
    family
    for family in RECIPES
    if family not in SKIPPED and tiny_processor(tiny_hf(family)) is not None
]


def arguments(model: HookedMultimodal, pictures: list[Image.Image]) -> tuple:
    """A prompt with some pictures, as arguments of `encode`."""
    if not model.takes("input_ids"):
        return None, pictures
    return " and ".join([model.image_token] * len(pictures)) + " what color ?", pictures


def at_patches(model: HookedMultimodal, pictures: list[Image.Image]) -> tuple[Batch, torch.Tensor]:
    batch = model.encode(*arguments(model, pictures))
    return batch, model.run_with_cache(batch, names_filter=LAYER)[1][LAYER]


def cell_box(window: Window, view: Grid, row: int, column: int) -> list[float]:
    """Left, top, right and bottom of a cell in pixels, given what is seen of the picture."""
    wide, high = window[2] - window[0], window[3] - window[1]
    left, top, right, bottom = view.window
    x, y = (right - left) / view.columns, (bottom - top) / view.rows
    return [
        window[0] + (left + column * x) * wide,
        window[1] + (top + row * y) * high,
        window[0] + (left + (column + 1) * x) * wide,
        window[1] + (top + (row + 1) * y) * high,
    ]


def inside(box: list[float], size: tuple[int, int]) -> tuple[int, ...] | None:
    """The part of a box that lies in the picture, None where that is less than most of it."""
    edges = [min(max(round(edge), 0), size[n % 2]) for n, edge in enumerate(box)]
    wide, high = edges[2] - edges[0], edges[3] - edges[1]
    most = wide * high > 0.7 * (box[2] - box[0]) * (box[3] - box[1])
    return tuple(edges) if min(wide, high) > 0 and most else None


def check_boxes(model: HookedMultimodal, size: tuple[int, int], pictures: int = 1) -> int:
    """Paint the pixel box of some cells white: the tower sees it where the cell comes from."""
    blank = Image.new("RGB", size, (90, 90, 90))
    batch, before = at_patches(model, [blank] * pictures)
    medium, seen = batch.layout.media[0][0], batch.layout.windows[0][0]
    painted = 0
    for number, view in enumerate(medium.views):
        for cell in range(0, view.rows * view.columns, max(1, view.rows * view.columns // 3)):
            row, column = divmod(cell, view.columns)
            box = inside(cell_box(seen, view, row, column), size)
            if box is None:
                continue
            picture = blank.copy()
            picture.paste((255, 255, 255), box)
            change = (at_patches(model, [picture, *[blank] * (pictures - 1)])[1] - before).norm(
                dim=-1
            )
            sources = view.sources[cell].tolist()
            place = [sources[0][0], int(change[sources[0][0]].argmax())]
            assert place in sources, f"view {number}, row {row}, column {column}: seen at {place}"
            assert (number, row, column) in batch.layout.cells(mm.Box(*box))
            painted += 1
    return painted


@pytest.mark.parametrize("size", [(96, 64), (64, 108)])
@pytest.mark.parametrize("family", PLACED)
@torch.no_grad()
def test_a_box_of_pixels_is_seen_where_the_layout_says(family, size):
    assert check_boxes(tiny(family), size)


@torch.no_grad()
def test_boxes_of_pictures_that_share_a_prompt():
    model = tiny("llava_onevision")  # shows them whole, padded to squares
    assert check_boxes(model, (96, 64), pictures=2)
    windows = at_patches(model, [Image.new("RGB", (96, 64))] * 2)[0].layout.windows
    assert windows == (((0.0, -16.0, 96.0, 80.0),) * 2,)


@torch.no_grad()
def test_boxes_of_pictures_padded_to_a_canvas_of_tiles():
    config = RECIPES["mllama"].config()
    ratios = [list(ratio) for ratio in get_all_supported_aspect_ratios(6)]
    config.vision_config.supported_aspect_ratios = ratios
    hf_model = MllamaForConditionalGeneration(config).eval()
    model = HookedMultimodal.from_hf(hf_model, tiny_processor(hf_model))
    assert check_boxes(model, (90, 70)) > 1
    # 82 x 64 pixels of 3 x 2 tiles
    assert window(model.processor.image_processor, 90, 70) == (0, 0, 90 * 96 / 82, 70)


@pytest.mark.parametrize("size", [(96, 64), (64, 108)])
@torch.no_grad()
def test_boxes_of_a_picture_padded_to_a_square_and_cropped(size):
    model = tiny("llava")
    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    model.processor.image_processor = LlavaImageProcessorPil(do_pad=True, **options)
    assert check_boxes(model, size)
    long = max(size)
    seen = window(model.processor.image_processor, *size)
    assert seen[2] - seen[0] == seen[3] - seen[1] == pytest.approx(long * 32 / 40)


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"size": {"height": 24, "width": 48}}, (0, 0, 60, 40)),
        ({"size": {"shortest_edge": 20}}, (0, 0, 60, 40)),
        ({"size": {"max_pixels": 900, "min_pixels": 100}}, (0, 0, 60, 40)),
        ({"size": {"longest_edge": 30}, "do_center_crop": True}, (10, 0, 50, 40)),
        ({"size": {"shortest_edge": 20}, "do_center_crop": True}, (10, 0, 50, 40)),
        ({"size": {"height": 20, "width": 20}, "do_center_crop": True}, (0, 0, 60, 40)),
        (
            {"size": {"shortest_edge": 40, "longest_edge": 30}, "do_center_crop": True},
            (10, 0, 50, 40),
        ),
        ({"size": None, "do_center_crop": True, "do_resize": False}, (20, 10, 40, 30)),
    ],
)
def test_sizes_of_any_kind(settings, seen):
    crop = {"height": 20, "width": 20}
    processor = SimpleNamespace(**{"do_resize": True, "crop_size": crop, **settings})
    assert window(processor, 60, 40) == pytest.approx(seen)


def test_an_image_processor_that_shows_parts_of_its_own():
    kind = type("Llama4ImageProcessorFast", (), {})
    assert window(kind(), 60, 40) is None


def test_tiles_that_nobody_places_keep_their_windows():
    medium = Medium((plain(2, 2, window=UNKNOWN), plain(2, 2)), tower_positions=4, tower_rows=2)
    assert placed(medium, build_processor().image_processor, 60, 40) is medium
    tiled = GotOcr2ImageProcessorPil(size={"height": 20, "width": 20}, max_patches=6)
    assert placed(medium, tiled, 60, 40) is medium  # it makes six tiles of such a picture

"""Pictures seen in several views: places, boxes and spans of tiles, videos and queries."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechmm.engine import sites
from mechmm.engine.located import places
from mechmm.model.batch import Batch, InputError
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import Box, Patches, SpanError
from mechmm.testing import tiny_hf, tiny_inputs

PICTURE = (0.0, 0.0, 120.0, 80.0)


def layout_of(family: str, kind: str = "image"):
    model = HookedMultimodal.from_hf(tiny_hf(family))
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1,), kind=kind))
    return replace(batch.layout, windows=((PICTURE,),))


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "llava_onevision"])
def test_a_box_is_found_in_every_view_and_a_position_knows_its_box(family):
    layout = layout_of(family)
    (medium,) = layout.media[0]
    assert len(medium.views) > 1
    box = Box(30, 20, 34, 24)
    for patches in layout.patches(box):
        view = medium.views[patches.view]
        for row, column in patches.cells:
            (position,) = layout.find(Patches(((row, column),), 0, patches.view))
            back = layout.box(position)
            assert back.left < 34
            assert back.right > 30
            assert back.top < 24
            assert back.bottom > 20
            assert layout.find(back) == sorted(layout.find(back))
            assert position in layout.find(back)
            assert view.tokens > 1
    assert len(layout.find(box)) == sum(len(p.cells) for p in layout.patches(box))
    assert len(layout.patches(box)) == 2  # the whole picture, and one tile or all as one grid


def test_a_merged_cell_stands_for_all_its_patches():
    layout = layout_of("qwen2_5_vl")
    (medium,) = layout.media[0]
    (view,) = medium.views
    position = layout.find(Patches(((1, 2),)))[0]
    spanned = layout.with_span("cell", Patches(((1, 2),)))
    columns = view.columns * 2
    wanted = [(0, (2 + r) * columns + 4 + c) for r in range(2) for c in range(2)]
    assert spanned.vision_positions("cell") == wanted
    assert spanned.positions("cell") == [position]


def test_queries_stand_for_the_whole_picture():
    layout = layout_of("blip-2")
    (medium,) = layout.media[0]
    assert len(layout.positions("image")) == medium.tokens
    patches = {tuple(p) for p in medium.views[0].sources.reshape(-1, 2).tolist()}
    assert set(layout.vision_positions("image")) == patches
    with pytest.raises(SpanError, match="reaches the language model without places"):
        layout.find(Box(1, 1, 20, 20))


def test_cross_attention_leaves_the_span_of_the_picture_to_the_tower():
    layout = layout_of("mllama")
    assert len(layout.positions("image")) == 1
    assert len(layout.vision_positions("image")) == len(layout.media[0][0].views[0].sources)


def test_a_dual_encoders_picture_has_patches_and_no_positions():
    model = HookedMultimodal.from_hf(tiny_hf("clip"))
    layout = Batch.from_inputs(model, **tiny_inputs(model, (1, 1))).layout
    assert layout.positions("image", 1) == []
    assert len(layout.vision_positions("image", 1)) == len(layout.media[1][0].views[0].sources)


def test_frames_of_a_video_are_views_with_a_number():
    layout = layout_of("qwen2_vl", "video")
    (medium,) = layout.media[0]
    assert [view.frame for view in medium.views] == list(range(len(medium.views)))
    assert layout.mask("video").sum() == medium.tokens
    assert "video" in layout.spans
    assert not layout.mask("image").any()
    assert "video 0 view 1" in str(layout)


def test_unknown_windows_of_tiles_are_passed_over():
    layout = layout_of("internvl")
    (medium,) = layout.media[0]
    unknown = [view for view in medium.views if np.isnan(view.window).any()]
    assert unknown
    found = layout.patches(Box(30, 20, 34, 24))
    assert all(not np.isnan(medium.views[p.view].window).any() for p in found)


def test_a_video_where_images_are_expected_is_refused():
    model = HookedMultimodal.from_hf(tiny_hf("qwen2_vl"))
    inputs = tiny_inputs(model, (1,))
    video = tiny_inputs(model, (1,), kind="video")
    mixed = {name: value for name, value in inputs.items() if "pixel" not in name}
    mixed |= {"pixel_values_videos": video["pixel_values_videos"]}
    mixed |= {"video_grid_thw": video["video_grid_thw"]}
    del mixed["image_grid_thw"]
    with pytest.raises(InputError, match=r"image placeholders but no pixel_values were given.*vid"):
        Batch.from_inputs(model, **mixed)


def test_two_kinds_of_media_in_one_prompt_are_told_apart():
    model = HookedMultimodal.from_hf(tiny_hf("qwen2_vl"))
    image, video = (tiny_inputs(model, (1,), kind=kind) for kind in ("image", "video"))
    joined = {
        name: torch.cat([image[name], video[name]], dim=1)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    media = {k: v for both in (image, video) for k, v in both.items() if k not in joined}
    layout = Batch.from_inputs(model, **joined, **media).layout
    assert [medium.kind for medium in layout.media[0]] == ["image", "video"]
    assert set(layout.image[0][layout.mask("image")[0]].tolist()) == {0}
    assert set(layout.image[0][layout.mask("video")[0]].tolist()) == {1}
    batch = Batch.from_inputs(model, **joined, **media)
    with pytest.raises(SpanError, match="images and videos, and the tower runs once for each kind"):
        model.run_with_cache(batch)
    with pytest.raises(SpanError, match="use one kind per batch"):
        places(sites.projector(model).table.iloc[0], batch.layout, 0)

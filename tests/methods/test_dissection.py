"""A unit that draws a mask is found with IoU 1; IoUs of every family are those counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine.boxes import box_of, places_in
from mechmm.engine.located import located
from mechmm.engine.sites import Sites
from mechmm.model.layout import SpanError
from mechmm.results.result import Result, concat
from mechmm.testing import tiny, tiny_pairs

N = 6
UNIT = 5


def half(side: str, size: tuple[int, int] = (32, 32)) -> mm.Box:
    """The left or the right half of a picture, inside its outermost pixels."""
    middle, (width, height) = size[0] / 2, size
    return mm.Box(0, 0, middle, height) if side == "left" else mm.Box(middle, 0, width, height)


@pytest.fixture(scope="module")
def scenes():
    return shapes.scenes("color", 24, seed=0)


@pytest.fixture(scope="module")
def colors(demo):
    return shapes.color_pairs(demo, 24, seed=0)


@pytest.fixture(scope="module")
def found(demo, colors, scenes):
    return mm.dissection(demo, colors, shapes.concepts(scenes), n_shuffled=8, least=0.2)


def by_hand(model, pairs, concepts, sites, top, tower="vision"):
    """IoUs from a cache, one prompt at a time; masks from the pixel box of every place."""
    values, masks = [], []
    for number in range(len(pairs)):
        batch = pairs.batch([number]).clean
        places = located(Sites(sites.table.iloc[:1]), batch.layout)
        hooks = list(sites.table["hook"])
        _, cache = model.run_with_cache(batch, names_filter=hooks)
        for row, position in zip(places.row, places.position, strict=True):
            values.append(torch.cat([cache[hook][row, position].flatten() for hook in hooks]))
            seen = box_of(batch.layout, tower, 0, int(row), int(position))
            masks.append([_touches(seen, own[number]) for own in concepts.values()])
    values, masks = torch.stack(values).float(), torch.tensor(masks)
    highest = values.sort(0, descending=True).values[round(top * len(values))]
    maps = values > highest
    both = (maps[:, :, None] & masks[:, None]).sum(0)
    either = (maps[:, :, None] | masks[:, None]).sum(0)
    return both / either.clamp(min=1)


def _touches(seen, places) -> bool:
    if seen is None:
        return False
    _, left, top, right, bottom = seen
    return any(
        left < p.right - 1e-6
        and right > p.left + 1e-6
        and top < p.bottom - 1e-6
        and bottom > p.top + 1e-6
        for p in places
    )


@pytest.mark.parametrize(
    ("family", "tower"),
    [
        *((family, "vision") for family in ("llava", "gemma3", "idefics3", "qwen2_vl")),
        *((family, "vision") for family in ("llava_next", "internvl", "blip-2")),
        *((family, "projector") for family in ("llava", "qwen2_vl", "llava_next")),
    ],
)
def test_ious_are_those_counted_by_hand(family, tower):
    model, pairs = tiny_pairs(family, N)
    concepts = {
        "box": [[half("left" if i % 2 else "right")] if i else [] for i in range(N)],
        "corners": [[mm.Box(1, 1, 7, 7), mm.Box(20, 24, 31, 31)] for _ in range(N)],
    }
    hook = f"vision.blocks.{model.towers['vision'].cfg.n_layers - 1}.mlp.hook_post"
    hook = "projector.hook_post" if tower == "projector" else hook
    sites = mm.sites.named(model, hook, ["image"])
    found = mm.dissection(model, pairs, concepts, sites=sites, top=0.1, batch_size=4)
    expected = by_hand(model, pairs, concepts, sites, 0.1, tower)
    torch.testing.assert_close(found.iou(), expected, atol=2e-3, rtol=0)
    assert found.iou().max() > 0.05
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_what_a_projector_makes_of_a_box_enters_at_the_positions_of_the_box(family):
    """Its hidden layer is changed at the places of a box: the stream changes there and nowhere
    else."""
    model, pairs = tiny_pairs(family, 2)
    batch, box = pairs.batch([0, 1]).clean, half("left")
    places = places_in(batch.layout, "projector", 1, box)

    def edit(value, hook):
        value = value.clone()
        for row, position in places:
            value[row, position] += 1
        return value

    streams = []
    for hooks in ([], [("projector.hook_post", edit)]):
        watch = ("blocks.0.hook_resid_pre", lambda value, hook: streams.append(value.clone()))
        with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, watch]):
            model(batch)
    moved = ((streams[1] - streams[0]).norm(dim=-1) > 1e-5).nonzero().tolist()
    assert moved == [[1, position] for position in batch.layout.find(box, 1)]
    for row, position in places:
        image, left, *_ = box_of(batch.layout, "projector", 1, row, position)
        assert (image, left < box.right) == (0, True)


def test_towers_without_language_and_towers_of_language():
    """Encoders alone are read from batches; where pictures have no tower, the model that reads
    their tokens."""
    model = tiny("dinov2")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in "1234"]
    batches = [model.encode(None, picture) for picture in pictures]
    places = {"left": [[half("left")]] * 3 + [[]]}
    assert len(mm.dissection(model, batches, places, top=0.1).overlap) == 4
    model, pairs = tiny_pairs("chameleon", 4)
    sites = mm.sites.residual(model, ["image"], layers=[0])
    found = mm.dissection(model, pairs, places, sites=sites, top=0.1)
    torch.testing.assert_close(
        found.iou(), by_hand(model, pairs, places, sites, 0.1, "language"), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("family", ["chameleon", "florence2"])
def test_sites_that_are_proposed_exist(family):
    """Where there is no vision tower with patches the error names a call that can be made."""
    model, pairs = tiny_pairs(family, 4)
    places = {"left": [[half("left")]] * 3 + [[]]}
    with pytest.raises(ValueError, match="no vision tower with patches") as refused:
        mm.dissection(model, pairs, places)
    proposed = str(refused.value).partition("for example ")[2]
    sites = eval(proposed, {"mm": mm, "model": model})
    found = mm.dissection(model, pairs, places, sites=sites, top=0.1)
    assert len(found.units) == sum(sites.table["layer"].notna()) * model.cfg.d_model


def test_audio_has_no_pictures_to_dissect():
    model = tiny("qwen2_audio")
    with pytest.raises(ValueError, match="no other in which a picture has places"):
        mm.dissection(model, [])


@pytest.fixture(scope="module")
def planted():
    """A tiny model of which one hidden unit is as high as a patch is bright, and pictures of noise
    that are bright in one quarter each."""
    model, _ = tiny_pairs("llava", 1)
    rng, pairs, places = np.random.default_rng(0), [], []
    for number in range(12):
        left, top = 16 * (number % 2), 16 * (number // 2 % 2)
        pixels = rng.integers(0, 60, (2, 32, 32, 3), dtype=np.uint8)
        pixels[:, top : top + 16, left : left + 16] += 150
        pictures = [Image.fromarray(own) for own in pixels]
        text = f"{model.image_token} what color is the circle ? answer :"
        prompts = [mm.Prompt(text, (picture,)) for picture in pictures]
        box = mm.Box(left, top, left + 16, top + 16)
        pairs.append(mm.Pair(*prompts, "red", "blue", {"bright": box}))
        places.append([box])
    tower, seen = model.hf_model.model.vision_tower, {}
    patches = tower.config.image_size // tower.config.patch_size

    def look(module, args, kwargs):
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        blocks = pixels.mean(1).unflatten(2, (patches, -1)).unflatten(1, (patches, -1))
        seen["bright"] = blocks.mean((2, 4)).flatten(1)

    def draw(module, args, output):
        output[:, 1:, UNIT] = 5 + seen["bright"]
        return output

    first = tower.get_submodule("encoder.layers.0.mlp.fc1")
    handles = [
        tower.register_forward_pre_hook(look, with_kwargs=True),
        first.register_forward_hook(draw),
    ]
    yield model, mm.PairDataset(pairs, model), places
    for handle in handles:
        handle.remove()


def test_a_planted_unit_is_found_and_exchanged_masks_do_not_fit(planted):
    model, pairs, places = planted
    others = {"elsewhere": places[1:] + places[:1]}
    found = mm.dissection(model, pairs, {"bright": places, **others}, top=0.25)
    best = found.to_dataframe().iloc[0]
    assert (best["layer"], best["unit"], best["concept"]) == (0, UNIT, "bright")
    assert best["iou"] == 1.0
    assert best["detector"]
    assert best["null_high"] < 0.7  # a quarter of the pictures are bright in the same place
    assert found.iou()[:, 0].sort(descending=True).values[1] < 1.0
    assert (found.overlap[:, UNIT, 0] == found.area[:, 0]).all()


def test_spans_of_pairs_are_concepts(planted):
    model, pairs, places = planted
    own = mm.dissection(model, pairs, top=0.25)
    given = mm.dissection(model, pairs, {"bright": places}, top=0.25)
    assert own.equals(given)
    assert own.concepts == ("bright",)


def test_a_concept_that_is_the_same_everywhere_has_no_detectors(planted):
    """Exchanged masks are its own, so that no IoU is above them."""
    model, pairs, _ = planted
    found = mm.dissection(model, pairs, {"corner": [[half("left")]] * len(pairs)}, top=0.25)
    assert not found.detectors().any()
    torch.testing.assert_close(found.null, found.iou()[:, 0].expand(len(found.null), -1))


def test_units_of_the_demo_detect_and_shuffles_do_not(found):
    table = found.to_dataframe()
    assert table["iou"].iloc[0] > 0.5
    assert table["iou"].is_monotonic_decreasing
    assert found.detectors().sum() > 5 * found.by_chance().max()
    for end in ("null", "rotated_null"):
        assert getattr(found, end).mean() < 0.1
    assert list(found.by_layer()["units"]) == [320] * 4
    assert found.by_layer()["detectors"].sum() == found.detectors().sum()


def test_concepts_of_scenes_are_where_things_are(scenes):
    concepts = shapes.concepts(scenes)
    for number, scene in enumerate(scenes):
        assert len(concepts["thing"][number]) == len(scene.things)
        for color in ("red", "pink"):
            count = sum(thing.color == color for thing in scene.things)
            assert len(concepts[f"color {color}"][number]) == count
    total = sum(len(own) for name in concepts if name != "thing" for own in concepts[name])
    things = [thing for scene in scenes for thing in scene.things]
    assert total == sum(1 if thing.digit is not None else 2 for thing in things)


def test_scenes_are_those_of_pairs(colors, scenes):
    for pair, scene in zip(colors, scenes, strict=True):
        assert np.array_equal(np.asarray(pair.clean.images[0]), np.asarray(scene.render()))


def test_saved_is_loaded_and_figures_show_the_numbers(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    figures = found.plot()
    assert sum(figures["concepts"].data[0].x) == found.detectors().sum()
    bars = figures["units"].data[0]
    assert list(bars.x) == pytest.approx(found.to_dataframe()["iou"].head(len(bars.x)).tolist())
    assert (np.asarray(bars.error_x.array) >= 0).all()
    assert "1280 units" in found.summary()
    found.page("Units")


def test_results_of_other_thresholds_are_not_joined(found):
    with pytest.raises(ValueError, match="differ in `null`"):
        concat([found, replace(found, null=found.null + 1)])


def test_places_in_a_picture_are_refused_where_it_has_none(demo, colors):
    layout = colors.batch([0]).clean.layout
    patch = mm.Patches(((0, 0),))
    assert places_in(layout, "vision", 0, patch) == {(0, 1)}  # behind the class token
    for wrong in (mm.Patches(((8, 0),)), mm.Patches(((0, 0),), 1), mm.Patches(((0, 0),), 0, 2)):
        with pytest.raises(SpanError, match="8 x 8 patches"):
            places_in(layout, "vision", 0, wrong)


PLACES = [[mm.Box(0, 0, 24, 24)]] * 24


@pytest.mark.parametrize(
    ("concepts", "options", "message"),
    [
        ({}, {}, "no concepts"),
        ({"a": PLACES[:3]}, {}, "places for 3 examples, and there are 24"),
        ({"a": [[]] * 24}, {}, "nowhere"),
        ({"a": [[mm.Box(0, 0, 500, 9)]] * 24}, {}, "not inside"),
        ({"a": PLACES}, {"top": 0.0}, "top is 0.0"),
        ({"a": PLACES}, {"top": 0.6}, "top is 0.6"),
        ({"a": PLACES}, {"least": 0.0}, "least is 0.0"),
        ({"a": PLACES}, {"n_shuffled": 1}, "2 or more"),
        ({"a": PLACES}, {"seed": -1}, "seed"),
        ({"a": PLACES}, {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused(demo, colors, concepts, options, message):
    with pytest.raises(ValueError, match=message):
        mm.dissection(demo, colors, concepts, **options)


def test_sites_that_cannot_be_compared_are_refused(demo, colors):
    every = {"a": PLACES}
    both = mm.sites.residual(demo, ["image"], layers=[0])
    single = mm.sites.neurons(demo, {0: [1, 2]}, ["image"], tower="vision")
    for sites, message in ((both, "one tower"), (single, "whole hooks")):
        with pytest.raises(ValueError, match=message):
            mm.dissection(demo, colors, every, sites=sites)
    resampled, pairs = tiny_pairs("idefics2", 2)
    sites = mm.sites.named(resampled, "projector.hook_post", ["image"])
    with pytest.raises(ValueError, match="positions in projector"):
        mm.dissection(resampled, pairs, {"a": PLACES[:2]}, sites=sites)
    with pytest.raises(ValueError, match="batches name no concepts"):
        mm.dissection(demo, [colors.batch([0]).clean])
    with pytest.raises(ValueError, match="could exchange"):
        mm.dissection(demo, colors[:1], {"a": PLACES[:1]}, top=0.1)

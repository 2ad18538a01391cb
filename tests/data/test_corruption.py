"""Corruptions change what they say, where they say, and nothing else."""

import numpy as np
import pytest
from PIL import Image

from mechmm.data import shapes
from mechmm.data.corruption import (
    Cells,
    CorruptionError,
    blank,
    blur,
    corrupt,
    drop_object,
    gaussian_noise,
    make_pairs,
    mean_patches,
    on_images,
    on_text,
    region_mask,
    replace_token,
    swap_patches,
)
from mechmm.data.pairs import PairError, Prompt
from mechmm.data.scenes import BACKGROUND, Scene, Thing
from mechmm.model.layout import Box

SCENE = Scene((Thing(5, "circle", "red"), Thing(10, "star", "blue")))
PICTURE = SCENE.render()
OTHER = Scene((Thing(5, "ring", "green"), Thing(0, "heart", "pink"))).render()
BOX = Box(24.0, 24.0, 48.0, 48.0)
CELLS = Cells(((2, 2), (2, 3), (3, 2), (3, 3)), (8, 8))
TEXT = "<image> what color is the circle ? answer :"
CHANGES = {
    "swap": lambda image, region: swap_patches(image, OTHER, region),
    "mean": mean_patches,
    "blank": blank,
    "noise": lambda image, region: gaussian_noise(image, 40.0, 3, region),
    "blur": lambda image, region: blur(image, 3.0, region),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@changes
def test_only_the_region_changes_and_the_original_stays(change):
    before = PICTURE.copy()
    after = change(PICTURE, BOX)
    differs = (array(after) != array(before)).any(-1)
    assert differs.any()
    assert not (differs & ~region_mask(PICTURE.size, BOX)).any()
    assert before == PICTURE


@changes
def test_a_box_and_the_cells_that_fill_it_are_the_same_region(change):
    assert change(PICTURE, BOX) == change(PICTURE, CELLS)


@changes
def test_everywhere_is_the_whole_picture(change):
    assert change(PICTURE, None) == change(PICTURE, Box(0.0, 0.0, 96.0, 96.0))


@changes
def test_the_same_call_gives_the_same_picture(change):
    assert change(PICTURE, BOX) == change(PICTURE, BOX)


@changes
@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Box(90.0, 0.0, 100.0, 10.0), "not inside the picture of 96 x 96"),
        (Box(10.0, 10.0, 10.0, 20.0), "not inside"),
        (Cells(((8, 0),), (8, 8)), r"cell \(8, 0\) is not on the grid of 8 x 8"),
        (Cells(((0, -1),), (8, 8)), r"cell \(0, -1\)"),
    ],
)
def test_a_region_outside_the_picture_is_refused(change, region, message):
    with pytest.raises(CorruptionError, match=message):
        change(PICTURE, region)


def test_swapped_patches_are_the_other_pictures():
    swapped = swap_patches(PICTURE, OTHER, BOX)
    inside = region_mask(PICTURE.size, BOX)
    assert (array(swapped)[inside] == array(OTHER)[inside]).all()
    assert swap_patches(PICTURE, OTHER) == OTHER


def test_pictures_of_different_sizes_are_not_swapped():
    with pytest.raises(CorruptionError, match="96 x 96 pixels, the other one 48 x 48"):
        swap_patches(PICTURE, OTHER.resize((48, 48)))


def test_mean_patches_have_the_mean_colour():
    mean = array(PICTURE).mean((0, 1))
    assert np.abs(array(mean_patches(PICTURE)) - mean).max() <= 0.5


def test_blank_is_one_colour():
    assert set(blank(PICTURE, color=(1, 2, 3)).get_flattened_data()) == {(1, 2, 3)}


def test_noise_has_the_wanted_spread_and_its_seed():
    grey = Image.new("RGB", (96, 96), (128, 128, 128))
    noisy = gaussian_noise(grey, 20.0, seed=1)
    assert array(noisy).std() == pytest.approx(20, rel=0.02)
    assert noisy != gaussian_noise(grey, 20.0, seed=2)
    assert gaussian_noise(grey, 0.0) == grey


def test_noise_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].tolist()
    gaussian_noise(PICTURE, 10.0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("change", [gaussian_noise, blur])
def test_negative_amounts_are_refused(change):
    with pytest.raises(CorruptionError, match="give 0 or more"):
        change(PICTURE, -1.0)


def test_blur_keeps_the_mean_and_lowers_the_contrast():
    blurred = blur(PICTURE, 5.0)
    assert array(blurred).mean() == pytest.approx(array(PICTURE).mean(), abs=1)
    assert array(blurred).std() < array(PICTURE).std()


def test_a_dropped_object_leaves_background_and_the_rest():
    dropped = drop_object(SCENE, 0)
    cell = region_mask(PICTURE.size, BOX)
    assert (array(dropped.render())[cell] == BACKGROUND).all()
    assert (array(dropped.render())[~cell] == array(PICTURE)[~cell]).all()


@pytest.mark.parametrize("index", [2, -1])
def test_an_object_that_is_not_there_cannot_be_dropped(index):
    with pytest.raises(CorruptionError, match=f"2 things; there is no thing {index}"):
        drop_object(SCENE, index)


def test_a_token_is_replaced_by_as_many(model):
    text = "red circle in b2 , red ring in c1 ."
    assert replace_token(model, text, "red", "blue") == text.replace("red", "blue", 1)
    second = replace_token(model, text, "red", "blue", nth=1)
    assert second == "red circle in b2 , blue ring in c1 ."
    assert replace_token(model, text, "red circle", "blue star").startswith("blue star in")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("red", "red blue", "turns 6 tokens into 7"),
        ("circle", "teapot", "does not know 'teapot'"),
        ("green", "blue", r"occurrence 0 of 'green' is not in .*\(found 0\)"),
        ("re", "blue", "occurrence 0 of 're'"),
    ],
)
def test_tokens_that_cannot_be_replaced_are_refused(model, old, new, message):
    with pytest.raises(CorruptionError, match=message):
        replace_token(model, "red circle in b2 .", old, new)


def test_pairs_are_made_of_prompts_and_a_corruption(model):
    prompts = [Prompt(TEXT, (PICTURE,)), Prompt(TEXT, (OTHER,))]
    spans = [{"object": BOX}, {}]
    pairs = make_pairs(
        model, prompts, ["red", "green"], ["blue", "pink"], on_images(blank, region=BOX), spans
    )
    assert [pair.clean for pair in pairs] == prompts
    assert pairs[0].corrupt.images[0] == blank(PICTURE, BOX)
    assert pairs[0].meta == {"corruption": "blank"}
    assert pairs.spans == ("object",)
    report = pairs.check()
    assert report["flips"].dtype == bool
    assert len(report) == 2


def test_one_picture_of_several_is_corrupted(model):
    prompt = Prompt("<image> <image> what is in a1 ? answer :", (PICTURE, OTHER))
    pairs = make_pairs(model, [prompt], ["star"], ["ring"], on_images(blank, image=1))
    assert pairs[0].corrupt.images == (PICTURE, blank(OTHER))


def test_pairs_are_corrupted_each_in_its_own_way(model):
    pairs = shapes.color_pairs(model, 3)
    ways = [on_images(blank, region=pair.spans["object"]) for pair in pairs]
    changed = corrupt(pairs, ways)
    for old, new in zip(pairs, changed, strict=True):
        assert new.clean == old.clean
        assert new.spans == old.spans
        assert new.meta == {**old.meta, "corruption": "blank"}
        assert new.corrupt.images[0] == blank(old.clean.images[0], old.spans["object"])


def test_texts_are_corrupted(model):
    pairs = shapes.color_pairs(model, 2, form="text")

    def recolor(text: str) -> str:
        return replace_token(model, text, text.split()[0], "brown")

    changed = corrupt(pairs, on_text(recolor))
    assert all(pair.corrupt.text.startswith("brown ") for pair in changed)
    assert changed[0].meta["corruption"] == "recolor"


def test_a_corruption_that_changes_nothing_is_refused(model):
    with pytest.raises(PairError, match=r"pair 0: .* the same"):
        corrupt(shapes.color_pairs(model, 1), on_images(gaussian_noise, sd=0.0))


def test_a_corruption_that_does_not_fit_names_the_prompt(model):
    pairs = shapes.color_pairs(model, 2)
    bad = on_images(blank, image=1)
    with pytest.raises(
        CorruptionError, match=r"prompt 1: .* 1 picture\(s\); there is no picture 1"
    ):
        corrupt(pairs, [on_images(blank), bad])
    texts = shapes.color_pairs(model, 1, form="text")
    with pytest.raises(CorruptionError, match=r"0 picture\(s\); there is no picture"):
        corrupt(texts, on_images(blank))


@pytest.mark.parametrize("name", ["answers", "foils", "corruptions", "spans"])
def test_lists_of_another_length_are_refused(model, name):
    given = {
        "answers": ["red"],
        "foils": ["blue"],
        "corruptions": [on_images(blank)],
        "spans": [{}],
    }
    given[name] = []
    with pytest.raises(CorruptionError, match=f"0 {name} for 1 prompts"):
        make_pairs(
            model,
            [Prompt(TEXT, (PICTURE,))],
            given["answers"],
            given["foils"],
            given["corruptions"],
            given["spans"],
        )


def test_another_number_of_corruptions_than_pairs_is_refused(model):
    with pytest.raises(CorruptionError, match="2 corruptions for 1 pairs"):
        corrupt(shapes.color_pairs(model, 1), [on_images(blank)] * 2)

"""Scenes, questions, digits and the minimal pairs made of them."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mechmm.data import digits, questions, shapes
from mechmm.data.pairs import PairDataset
from mechmm.data.questions import ANSWERS, KINDS, NOTHING, Question
from mechmm.data.scenes import BACKGROUND, CELLS, COLORS, SHAPES, Scene, Thing
from mechmm.data.shapes import HELD_OUT, Sampler
from mechmm.model.layout import Box, Words

kinds = pytest.mark.parametrize("kind", KINDS)
PARTS = {"test": set(digits.split("test")), "train": set(digits.split("train"))}


def scene(*words: str) -> Scene:
    """A scene from descriptions such as `red circle b2`, or `4 c1` for a digit."""
    things = []
    for word in words:
        *what, cell = word.split()
        if what[0].isdigit():
            things.append(Thing(CELLS.index(cell), digit=digits.with_label(what[0])[0]))
        else:
            things.append(Thing(CELLS.index(cell), what[1], what[0]))
    return Scene(tuple(things))


def read(text: str) -> Scene:
    """The scene that a description describes (digits: some image of the digit)."""
    return scene(
        *(part.replace("digit ", "").replace(" in", "") for part in text[:-2].split(" , "))
    )


def drawn(kind: str, sampler: Sampler, n: int = 40, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [sampler.pair(rng, kind) for _ in range(n)]


def touched(thing: Thing) -> np.ndarray:
    """Which pixels differ from the background where the thing stands alone."""
    return (np.asarray(Scene((thing,)).render()) != BACKGROUND).any(-1)


# Scenes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", ["red", "yellow"])
def test_a_thing_is_drawn_inside_its_cell_in_its_colour(shape, color):
    picture = np.asarray(scene(f"{color} {shape} b3").render()).astype(int)
    inside = np.zeros((96, 96), dtype=bool)
    inside[48:72, 24:48] = True
    assert (picture[~inside] == BACKGROUND).all()
    assert (np.abs(picture - COLORS[color]).max(-1) <= 1).sum() > 50


def test_shapes_are_drawn_differently():
    pictures = {shape: scene(f"red {shape} a1").render().tobytes() for shape in SHAPES}
    assert len(set(pictures.values())) == len(SHAPES)


def test_description_and_picture_agree():
    for kind in ("color", "beside"):
        for clean, _, _ in drawn(kind, Sampler(), 10):
            again = read(clean.describe())
            assert again.describe() == clean.describe()
            for thing, said in zip(clean.things, again.things, strict=True):
                assert (thing.cell, thing.shape, thing.color, thing.name) == (
                    (said.cell, said.shape, said.color, said.name)
                )


def test_a_description_has_four_words_a_thing():
    assert scene("red circle b2", "4 c1").describe() == "red circle in b2 , digit 4 in c1 ."


@pytest.mark.parametrize("patches", [4, 8, 16])
def test_masks_match_the_pixels(patches):
    for clean, _, _ in drawn("beside", Sampler(), 5):
        whole = np.asarray(clean.render()).astype(int)
        side = 96 // patches
        for index, thing in enumerate(clean.things):
            mask = clean.patch_mask(index, patches)
            drop = np.asarray(clean.drop(index).render()).astype(int)
            differs = np.abs(whole - drop).max(-1) > 8
            wanted = differs.reshape(patches, side, patches, side).any((1, 3))
            assert (mask == wanted).all()
            cell = np.kron(np.arange(16).reshape(4, 4) == thing.cell, np.ones((24, 24))) > 0
            assert not (differs & ~cell).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": 16, "shape": "ring", "color": "red"}, "cell 16 is outside 0..15"),
        ({"cell": -1, "shape": "ring", "color": "red"}, "cell -1"),
        ({"cell": 0, "shape": "ring"}, "either a shape with a color, or a digit"),
        ({"cell": 0}, "either a shape"),
        ({"cell": 0, "shape": "ring", "color": "red", "digit": 3}, "either a shape"),
        ({"cell": 0, "shape": "teapot", "color": "red"}, "unknown shape or color: red teapot"),
        ({"cell": 0, "shape": "ring", "color": "mauve"}, "unknown shape or color: mauve ring"),
    ],
)
def test_things_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Thing(**options)


def test_two_things_in_one_cell_are_refused():
    with pytest.raises(ValueError, match="two things in cell b2"):
        scene("red circle b2", "blue ring b2")
    with pytest.raises(ValueError, match="two things in cell a1"):
        scene("red circle b2", "blue ring a1").replace(0, cell=0)


# Questions -----------------------------------------------------------------------------------

ROOM = scene("red circle b2", "blue star d2", "red ring b4", "7 c4")


@pytest.mark.parametrize(
    ("kind", "about", "answer"),
    [
        ("color", ("star",), "blue"),
        ("shape", ("blue",), "star"),
        ("shape", ("red",), None),
        ("cell", ("b4",), "ring"),
        ("cell", ("c4",), "7"),
        ("cell", ("a1",), NOTHING),
        ("where", ("circle",), "b2"),
        ("count", ("red",), "2"),
        ("count", ("pink",), "0"),
        ("same", ("circle", "ring"), "yes"),
        ("same", ("circle", "star"), "no"),
        ("horizontal", ("circle", "star"), "left"),
        ("horizontal", ("star", "circle"), "right"),
        ("horizontal", ("circle", "ring"), None),
        ("vertical", ("circle", "ring"), "above"),
        ("vertical", ("ring", "star"), "below"),
        ("vertical", ("circle", "star"), None),
        ("digit", (), "7"),
        ("beside", ("ring",), "7"),
        ("beside", ("circle",), None),
        ("color", ("heart",), None),
    ],
)
def test_questions_are_answered_by_the_scene(kind, about, answer):
    assert Question(kind, about).answer(ROOM) == answer


@kinds
def test_every_question_found_is_well_posed(kind):
    for question in questions.questions(ROOM, kind):
        assert question.answer(ROOM) in ANSWERS[kind]
        assert question.text == KINDS[kind].template.format(*question.about)


@kinds
def test_a_description_gives_the_same_answers(kind):
    for clean, corrupt, question in drawn(kind, Sampler(), 20):
        for one in (clean, corrupt):
            assert question.answer(read(one.describe())) == question.answer(one)


# Digits --------------------------------------------------------------------------------------


def test_the_split_is_fixed_complete_and_disjoint():
    assert not PARTS["train"] & PARTS["test"]
    assert PARTS["train"] | PARTS["test"] == set(range(1797))
    assert len(PARTS["test"]) == 360
    assert digits.split("test")[:3] == digits.split("test")[:3]


def test_digits_are_those_of_scikit_learn():
    data = load_digits()
    for index in (0, 7, 1796):
        assert digits.digit_label(index) == str(data.target[index])
        picture = np.asarray(digits.digit_image(index)).astype(float)
        assert np.abs(picture - data.images[index] / 16 * 255).max() <= 1


def test_images_with_a_label_show_it_and_are_of_the_part():
    found = digits.with_label("7", "test")
    assert found
    assert set(found) <= PARTS["test"]
    assert {digits.digit_label(index) for index in found} == {"7"}


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown part 'validation'; use 'train' or 'test'"):
        digits.split("validation")


# Minimal pairs -------------------------------------------------------------------------------


@kinds
def test_a_minimal_pair_differs_in_one_thing_and_in_its_pixels_only(kind):
    for clean, corrupt, _ in drawn(kind, Sampler()):
        changed = [
            i for i, (a, b) in enumerate(zip(clean.things, corrupt.things, strict=True)) if a != b
        ]
        assert len(changed) == 1
        before, after = clean.things[changed[0]], corrupt.things[changed[0]]
        differs = (np.asarray(clean.render()) != np.asarray(corrupt.render())).any(-1)
        assert differs.any()
        assert not (differs & ~(touched(before) | touched(after))).any()


@kinds
def test_a_minimal_pair_has_two_answers(kind):
    for clean, corrupt, question in drawn(kind, Sampler()):
        assert question.answer(clean) != question.answer(corrupt)
        assert {question.answer(clean), question.answer(corrupt)} <= set(ANSWERS[kind])


@pytest.mark.parametrize("combos", ["seen", "unseen"])
@kinds
def test_combinations_of_the_other_set_are_never_sampled(kind, combos):
    sampler, rng = Sampler(combos=combos), np.random.default_rng(0)
    scenes = [sampler.ask(rng, kind)[0] for _ in range(40)]
    if combos == "seen" or shapes.ATTRIBUTE[kind] not in ("color", "shape"):
        scenes += [one for pair in drawn(kind, sampler) for one in pair[:2]]
    for thing in (thing for one in scenes for thing in one.things if thing.shape):
        assert ((thing.color, thing.shape) in HELD_OUT) == (combos == "unseen")


@pytest.mark.parametrize("kind", ["color", "shape", "count", "same"])
def test_pairs_that_would_need_a_second_unseen_colour_are_refused(kind):
    with pytest.raises(ValueError, match="every shape has only one unseen color"):
        Sampler(combos="unseen").pair(np.random.default_rng(0), kind)


def test_every_colour_and_every_shape_but_no_more_is_held_out_once():
    assert Counter(color for color, _ in HELD_OUT) == Counter(list(COLORS))
    assert Counter(shape for _, shape in HELD_OUT) == Counter(SHAPES)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ["digit", "beside", "cell"])
def test_digits_come_from_the_wanted_part(kind, part):
    for pair in drawn(kind, Sampler(part), 20):
        used = {t.digit for one in pair[:2] for t in one.things if t.digit is not None}
        assert used <= PARTS[part]


def test_an_unknown_kind_of_pair_is_refused(model):
    with pytest.raises(ValueError, match="unknown kind 'smell'; use one of color"):
        shapes.pairs(model, "smell", 2)


# Pair datasets -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["image", "text"])
@kinds
def test_pairs_carry_answers_spans_and_labels(model, kind, form):
    rng = np.random.default_rng(3)
    wanted = [Sampler().pair(rng, kind) for _ in range(6)]
    pairs = shapes.pairs(model, kind, 6, seed=3, form=form)
    assert isinstance(pairs, PairDataset)
    for pair, (clean, corrupt, question) in zip(pairs, wanted, strict=True):
        assert (pair.answer, pair.foil) == (question.answer(clean), question.answer(corrupt))
        assert pair.meta == {"kind": kind, "form": form, "asked": " ".join(question.about)}
        shown = [prompt.images for prompt in (pair.clean, pair.corrupt)]
        assert shown == ([(clean.render(),), (corrupt.render(),)] if form == "image" else [(), ()])
        assert question.text in pair.clean.text


@kinds
def test_what_changes_lies_in_the_object_spans(model, kind):
    for pair in shapes.pairs(model, kind, 8):
        boxes = [pair.spans[name] for name in ("object", "object_corrupt") if name in pair.spans]
        assert all(isinstance(box, Box) for box in boxes)
        inside = np.zeros((96, 96), dtype=bool)
        for box in boxes:
            inside[int(box.top) : int(box.bottom), int(box.left) : int(box.right)] = True
        clean, corrupt = (np.asarray(p.images[0]) for p in (pair.clean, pair.corrupt))
        assert not ((clean != corrupt).any(-1) & ~inside).any()
        assert ("object_corrupt" in pair.spans) == (shapes.ATTRIBUTE[kind] == "cell")


@kinds
def test_the_distractor_is_a_thing_that_stays(model, kind):
    found = 0
    for pair in shapes.pairs(model, kind, 8):
        box = pair.spans.get("distractor")
        if box is not None:
            area = (box.left, box.top, box.right, box.bottom)
            cell = pair.clean.images[0].crop(area)
            assert cell == pair.corrupt.images[0].crop(area)
            assert len(cell.getcolors(9999)) > 1
            found += 1
    assert found


def test_spans_of_a_text_are_descriptions_found_in_both_prompts(model):
    pairs = shapes.pairs(model, "color", 4, form="text")
    batch = next(pairs.batches(4))
    for row, pair in enumerate(pairs):
        place = pair.spans["object"]
        assert isinstance(place, Words)
        for side, color in ((batch.clean, pair.answer), (batch.corrupt, pair.foil)):
            tokens = [side.layout.tokens[row][i] for i in side.layout.positions("object", row)]
            assert tokens == [f" {color}", *(f" {word}" for word in place.text.split()[1:])]


def test_pairs_of_a_seed_are_the_same_and_start_the_same(model):
    five, three = (shapes.pairs(model, "same", n, seed=7) for n in (5, 3))
    assert five[:3].content_hash() == three.content_hash()
    assert five.content_hash() != shapes.pairs(model, "same", 5, seed=8).content_hash()


def test_color_pairs_are_pairs_about_color(model):
    short, long = shapes.color_pairs(model, 3, seed=1), shapes.pairs(model, "color", 3, seed=1)
    assert short.content_hash() == long.content_hash()


def test_pairs_take_a_sampler(model):
    pairs = shapes.pairs(model, "where", 4, form="text", sampler=Sampler(combos="unseen"))
    for pair in pairs:
        for thing in read(pair.clean.text.split(" where")[0]).things:
            assert thing.shape is None or (thing.color, thing.shape) in HELD_OUT


@pytest.mark.parametrize(
    ("options", "message"), [({"n": 0}, "0 pairs were asked for"), ({"n": -3}, "-3 pairs")]
)
def test_too_few_pairs_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        shapes.pairs(model, "color", **options)

"""Pairs are aligned or refused, and come back from a folder as they went."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mechmm.data import shapes
from mechmm.data.metrics import accuracy, last_logits, logit_diff, score
from mechmm.data.pairs import Pair, PairDataset, PairError, Prompt, _check_aligned
from mechmm.data.scenes import Scene, Thing
from mechmm.model.layout import Box, Patches, SpanError, Words

RED, BLUE = (Scene((Thing(5, "circle", color),)).render() for color in ("red", "blue"))
TEXT = "<image> what color is the circle ? answer :"
IN_WORDS = "{} circle in b2 . what color is the circle ? answer :"
OBJECT = {"object": Box(24.0, 24.0, 48.0, 48.0)}


def image_pair(**changes) -> Pair:
    pair = Pair(
        Prompt(TEXT, (RED,)), Prompt(TEXT, (BLUE,)), "red", "blue", OBJECT, {"kind": "color"}
    )
    return replace(pair, **changes)


def text_pair(**changes) -> Pair:
    prompts = (Prompt(IN_WORDS.format(color)) for color in ("red", "blue"))
    spans = {"thing": Words("red circle")}
    return replace(Pair(*prompts, "red", "blue", spans, {"kind": "words"}), **changes)


def two_images(**changes) -> Pair:
    text = "<image> <image> what is in a1 ? answer :"
    pair = Pair(
        Prompt(text, (RED, BLUE)),
        Prompt(text, (RED, RED)),
        "blue circle",
        "red",
        {"second": Box(0.0, 0.0, 24.0, 24.0, image=1), "patches": Patches(((2, 2), (3, 2)), 0)},
        {"kind": "two", "hard": True, "level": 3, "share": 0.5},
    )
    return replace(pair, **changes)


@pytest.fixture(scope="module")
def mixed(model) -> PairDataset:
    """Pairs of different lengths with one, no and two pictures."""
    return PairDataset([image_pair(), text_pair(), two_images()], model)


# Making --------------------------------------------------------------------------------------


def test_a_prompt_keeps_its_pictures_as_rgb():
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    prompt = Prompt(TEXT, (picture,))
    assert prompt.images[0].mode == "RGB"
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    assert prompt.images[0].getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": " "}, "the answer must be a text"),
        ({"foil": ""}, "the foil must be a text"),
        ({"spans": {"image": Words("color")}}, "a span 'image' already"),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused_at_once(changes, message):
    with pytest.raises(PairError, match=message):
        image_pair(**changes)


REFUSED = {
    "another length of text": (
        {"corrupt": Prompt("<image> what color is it the circle ? answer :", (BLUE,))},
        "the clean prompt fills 73 positions, the corrupt one 74; reword one of them",
    ),
    "another number of pictures": (
        {"corrupt": Prompt("<image> " + TEXT, (BLUE, RED))},
        "fills 73 positions, the corrupt one 137; resize one of the images or drop the pair",
    ),
    "another place of the picture": (
        {"corrupt": Prompt("what <image> color is the circle ? answer :", (BLUE,))},
        "position 1 is row 0, column 0 of image 0 in the clean prompt and text in the corrupt one",
    ),
    "the same prompts": (
        {"corrupt": Prompt(TEXT, (RED,))},
        "clean and the corrupt prompt are the same",
    ),
    "no picture": ({"clean": Prompt(TEXT)}, "the clean prompt has 1 '<image>' placeholder"),
    "no placeholder": ({"corrupt": Prompt("red", (RED,))}, "the corrupt prompt has 1 picture"),
    "an unknown answer": ({"answer": "teapot"}, "cannot write the answer 'teapot'"),
    "an unknown foil": ({"foil": "teapot"}, "cannot write the answer 'teapot'"),
    "equal answer and foil": ({"foil": "Red"}, "answer and foil are the same tokens"),
    "foil begins with the answer": ({"foil": "red circle"}, "one begins with the other"),
    "placeholder in the answer": ({"answer": "<image>"}, "has an image placeholder"),
    "words not there": ({"spans": {"a": Words("heart")}}, "span 'a', .* occurrence 0 of 'heart'"),
    "box outside": (
        {"spans": {"a": Box(0.0, 0.0, 97.0, 9.0)}},
        "span 'a', .* not inside what the model sees",
    ),
    "no such image": (
        {"spans": {"a": Box(0.0, 0.0, 9.0, 9.0, 1)}},
        "span 'a', .* there is no image 1",
    ),
    "no such patch": ({"spans": {"a": Patches(((8, 0),))}}, "span 'a', .* no position for row 8"),
    "empty span": ({"spans": {"a": Patches(())}}, "span 'a' is empty"),
    "overlapping spans": (
        {"spans": {"a": Words("color is"), "b": Words("is the")}},
        "spans 'a' and 'b' overlap at position",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_pair_that_cannot_be_used_is_refused_with_its_number(model, changes, message):
    with pytest.raises(PairError, match="pair 1: .*" + message):
        PairDataset([image_pair(), image_pair(**changes)], model)


def test_images_of_another_grid_are_refused(model):
    layout = model.encode(TEXT, RED).layout
    ((medium,),) = layout.media
    (view,) = medium.views
    wide = replace(medium, views=(replace(view, rows=2, columns=8),))
    other = replace(layout, media=((wide,),))
    with pytest.raises(PairError, match="resize one of them or drop the pair"):
        _check_aligned(layout, other)


def test_no_pairs_are_refused(model):
    with pytest.raises(PairError, match="there are no pairs"):
        PairDataset([], model)


# Selecting -----------------------------------------------------------------------------------


def test_a_dataset_is_a_sequence_of_pairs(mixed):
    assert len(mixed) == 3
    assert mixed[0] == image_pair()
    assert mixed[-1] == mixed[2] == two_images()
    assert list(mixed) == [mixed[i] for i in range(3)]
    with pytest.raises(IndexError):
        mixed[3]


@pytest.mark.parametrize(
    ("index", "kept"),
    [
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        ([True, False, True], [0, 2]),
        (np.array([False, True, False]), [1]),
        (torch.tensor([True, True, False]), [0, 1]),
        (torch.tensor([-1]), [2]),
    ],
    ids=["slice", "list", "mask", "array", "tensor mask", "tensor"],
)
def test_parts_are_datasets(mixed, index, kept):
    part = mixed[index]
    assert isinstance(part, PairDataset)
    assert list(part) == [mixed[i] for i in kept]
    assert next(part.batches(2)).indices == tuple(range(len(kept)))[:2]


def test_a_mask_of_another_length_is_refused(mixed):
    with pytest.raises(PairError, match=r"shape \[2\], the dataset 3 pairs"):
        mixed[[True, False]]


@pytest.mark.parametrize("index", [slice(3, None), [], [False] * 3])
def test_an_empty_part_is_refused(mixed, index):
    with pytest.raises(PairError, match="holds no pair"):
        mixed[index]


def test_pairs_are_selected_by_label_and_condition(mixed):
    assert list(mixed.where(kind="words")) == [mixed[1]]
    assert list(mixed.where(hard=True, level=3)) == [mixed[2]]
    assert list(mixed.where(lambda pair: bool(pair.clean.images))) == [mixed[0], mixed[2]]
    assert list(mixed.where(lambda pair: pair.foil == "red", kind="two")) == [mixed[2]]


def test_a_selection_that_finds_nothing_says_what_there_is(mixed):
    with pytest.raises(
        PairError, match="no pair has meta 'knd'; there is hard, kind, level, share"
    ):
        mixed.where(knd="color")
    with pytest.raises(
        PairError, match="no pair fits kind='smell'; kind is one of color, two, words"
    ):
        mixed.where(kind="smell")
    with pytest.raises(PairError, match="no pair fits the condition"):
        mixed.where(lambda pair: False)


def test_a_dataset_shows_what_it_holds(mixed):
    assert repr(mixed).startswith(
        "PairDataset(1 color, 1 words, 1 two; spans: object, thing, second"
    )


# Batches -------------------------------------------------------------------------------------


def test_batches_have_one_length_and_left_padding(mixed):
    batch = next(mixed.batches(3))
    assert batch.clean.input_ids.shape == batch.corrupt.input_ids.shape
    assert torch.equal(batch.clean.layout.modality, batch.corrupt.layout.modality)
    assert (batch.clean.attention_mask[:, -1] == 1).all()
    assert len(batch) == 3
    assert batch.pairs == mixed.pairs


def test_batches_cover_the_pairs_in_order(mixed):
    assert [batch.indices for batch in mixed.batches(2)] == [(0, 1), (2,)]
    assert [batch.indices for batch in mixed.batches()] == [(0, 1, 2)]


def test_a_batch_of_none_is_refused(mixed):
    with pytest.raises(ValueError, match="a batch of 0 pairs"):
        mixed.batches(0)


def test_a_mixed_batch_runs_as_its_pairs_alone(model, mixed):
    together = next(mixed.batches(3))
    alone = list(mixed.batches(1))
    for side in ("clean", "corrupt"):
        logits = last_logits(model, getattr(together, side))
        single = torch.cat([last_logits(model, getattr(batch, side)) for batch in alone])
        torch.testing.assert_close(logits, single, atol=1e-5, rtol=0)
        scores = score(model, getattr(together, side), together.answers)
        singles = [score(model, getattr(batch, side), batch.answers) for batch in alone]
        torch.testing.assert_close(scores, torch.cat(singles), atol=1e-4, rtol=0)


def test_spans_hold_for_both_prompts_and_are_empty_where_a_pair_lacks_them(mixed):
    batch = next(mixed.batches(3))
    names = ("object", "thing", "second", "patches")
    assert mixed.spans == names
    for layout in (batch.clean.layout, batch.corrupt.layout):
        counts = {name: layout.mask(name).sum(-1).tolist() for name in names}
        assert counts == {
            "object": [4, 0, 0],
            "thing": [0, 2, 0],
            "second": [0, 0, 4],
            "patches": [0, 0, 2],
        }
    words = [
        "".join(layout.tokens[1][i] for i in layout.positions("thing", 1))
        for layout in (batch.clean.layout, batch.corrupt.layout)
    ]
    assert words == [" red circle", " blue circle"]
    assert {
        int(batch.clean.layout.image[2, i]) for i in batch.clean.layout.positions("second", 2)
    } == {1}
    with pytest.raises(SpanError, match="unknown span"):
        batch.clean.layout.mask("distractor")


def test_text_alone_makes_a_batch(model):
    batch = next(PairDataset([text_pair()], model).batches())
    assert batch.clean.layout.text_only
    assert last_logits(model, batch.clean).isfinite().all()


def test_answers_and_foils_of_a_batch(model, mixed):
    batch = next(mixed.batches(3))
    assert batch.answers.answer_ids[2].tolist() == model.answer_tokens("blue circle")
    assert batch.answers.foil_ids[:, 0].tolist() == [
        model.to_single_token(word) for word in ("blue", "blue", "red")
    ]
    assert torch.equal(batch.foils.answer_ids, batch.answers.foil_ids)


# Checking ------------------------------------------------------------------------------------


def test_check_reports_what_the_model_says(model, mixed):
    report = mixed.check(size=2)
    assert report.index.tolist() == [0, 1, 2]
    assert report["kind"].tolist() == ["color", "words", "two"]
    for number, batch in enumerate(mixed.batches(1)):
        row = report.loc[number]
        for side in ("clean", "corrupt"):
            run = getattr(batch, side)
            said = model.to_string(last_logits(model, run).argmax(-1))
            assert row[f"{side}_says"] == said
            wanted = score(model, run, batch.answers, logit_diff).item()
            assert row[f"{side}_logit_diff"] == pytest.approx(wanted, abs=1e-4)
        assert row["clean_right"] == bool(score(model, batch.clean, batch.answers, accuracy))
        assert row["flips"] == bool(score(model, batch.corrupt, batch.foils, accuracy))


def test_check_sees_right_answers_and_flips(model):
    said = PairDataset([image_pair(), text_pair()], model).check()
    pairs = [
        image_pair(answer=said["clean_says"][0]),
        text_pair(foil=said["corrupt_says"][1]),
    ]
    report = PairDataset(pairs, model).check(model)
    assert report["clean_right"].tolist() == [True, False]
    assert report["flips"].tolist() == [False, True]


# Keeping -------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(model, mixed, tmp_path):
    mixed.save(tmp_path / "new" / "pairs")
    again = PairDataset.load(tmp_path / "new" / "pairs", model)
    assert list(again) == list(mixed)
    assert again.content_hash() == mixed.content_hash()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pairs"]


def test_what_a_file_says_beside_its_pixels_does_not_count(model, tmp_path):
    RED.save(tmp_path / "red.jpg", dpi=(300, 300), comment="mine")
    with Image.open(tmp_path / "red.jpg") as opened:
        pairs = PairDataset([image_pair(clean=Prompt(TEXT, (opened,)))], model)
    pairs.save(tmp_path / "pairs")
    assert list(PairDataset.load(tmp_path / "pairs", model)) == list(pairs)


def test_texts_with_line_separators_come_back(model, tmp_path):
    prompts = [Prompt(IN_WORDS.format(color) + "\u2028 ?\n") for color in ("red", "blue")]
    pairs = PairDataset([Pair(*prompts, "red", "blue", meta={"ü": "é\x85"})], model)
    pairs.save(tmp_path / "pairs")
    assert list(PairDataset.load(tmp_path / "pairs", model)) == list(pairs)


def test_identical_pictures_are_stored_once(mixed, tmp_path):
    mixed.save(tmp_path / "pairs")
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 2


def test_an_empty_folder_is_filled_and_a_full_one_refused(mixed, tmp_path):
    (tmp_path / "pairs").mkdir()
    mixed.save(tmp_path / "pairs")
    before = (tmp_path / "pairs" / "pairs.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        mixed[:1].save(tmp_path / "pairs")
    assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        mixed.save(tmp_path / "file")


def test_a_save_that_fails_leaves_nothing(mixed, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        mixed.save(tmp_path / "pairs")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_reads_texts_pixels_answers_and_spans_but_no_labels(model):
    first = PairDataset([image_pair()], model).content_hash()
    changed = RED.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    for changes in (
        {"clean": Prompt(TEXT, (changed,))},
        {"answer": "green"},
        {"foil": "green"},
        {"spans": {}},
    ):
        assert PairDataset([image_pair(**changes)], model).content_hash() != first
    assert PairDataset([image_pair(meta={"kind": "other"})], model).content_hash() == first


def edited(record, **changes):
    return json.dumps({**record, **changes})


BROKEN = {
    "no JSON": (lambda r: "{", "Expecting property name"),
    "a list": (lambda r: "[]", "a pair must have exactly the entries"),
    "an entry too many": (lambda r: edited(r, extra=1), "exactly the entries clean, corrupt"),
    "an answer missing": (lambda r: json.dumps({**r, "answer": 3}), "the answer must be a text"),
    "a prompt without text": (
        lambda r: edited(r, clean={"images": []}),
        "a prompt must have exactly",
    ),
    "images as a text": (
        lambda r: edited(r, clean={"text": "a", "images": "b"}),
        "a list of images",
    ),
    "meta as a list": (lambda r: edited(r, meta=[]), "meta must be an object"),
    "meta of lists": (lambda r: edited(r, meta={"a": [1]}), "meta 'a' must be"),
    "an unknown place": (lambda r: edited(r, spans={"a": {"place": "Blob"}}), "one of Box, Words"),
    "half a box": (
        lambda r: edited(r, spans={"a": {"place": "Box", "left": 1.0}}),
        "span 'a' is no Box",
    ),
    "a box of words": (
        lambda r: edited(r, spans={"a": {"place": "Box", "left": "far"}}),
        "span 'a' is no Box: could not convert",
    ),
    "cells in a row": (
        lambda r: edited(r, spans={"a": {"place": "Patches", "cells": [1, 2]}}),
        "span 'a' is no Patches",
    ),
    "a picture missing": (
        lambda r: edited(r, clean={"text": TEXT, "images": ["gone.png"]}),
        "gone.png' is missing or no image",
    ),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_names_file_and_line(model, tmp_path, breaking, message):
    PairDataset([image_pair(), image_pair()], model).save(tmp_path / "pairs")
    path = tmp_path / "pairs" / "pairs.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{breaking(json.loads(second))}\n")
    with pytest.raises(PairError, match=f"pairs.jsonl, line 2: .*{message}"):
        PairDataset.load(tmp_path / "pairs", model)


def test_a_changed_picture_is_noticed(model, mixed, tmp_path):
    mixed.save(tmp_path / "pairs")
    for path in (tmp_path / "pairs" / "images").iterdir():
        Image.new("RGB", (96, 96)).save(path)
    with pytest.raises(PairError, match=r"line 1: .* is not the picture that was saved"):
        PairDataset.load(tmp_path / "pairs", model)


def test_pairs_that_are_not_aligned_name_file_and_pair(model, mixed, tmp_path):
    mixed.save(tmp_path / "pairs")
    path = tmp_path / "pairs" / "pairs.jsonl"
    path.write_text(path.read_text().replace("blue circle in b2 .", "blue circle in b2 , red ."))
    with pytest.raises(
        PairError, match=r"pairs.jsonl .*pair 1: the clean prompt fills 14 positions"
    ):
        PairDataset.load(tmp_path / "pairs", model)


def test_a_folder_without_pairs_is_refused(model, tmp_path):
    with pytest.raises(PairError, match=r"pairs\.jsonl' does not exist"):
        PairDataset.load(tmp_path, model)


# Tables --------------------------------------------------------------------------------------


def table(**changes) -> pd.DataFrame:
    columns = {
        "clean_text": [TEXT, IN_WORDS.format("red")],
        "corrupt_text": [TEXT, IN_WORDS.format("blue")],
        "clean_image": [RED, None],
        "corrupt_image": [BLUE, None],
        "answer": ["red", "red"],
        "foil": ["blue", "blue"],
    }
    return pd.DataFrame({**columns, **changes})


def test_a_table_gives_pairs_with_labels(model, tmp_path):
    RED.save(tmp_path / "red.png")
    df = table(
        clean_image=["red.png", float("nan")],
        corrupt_image=[[BLUE], None],
        kind=["color", None],
        level=[1, 2],
    )
    pairs = PairDataset.from_dataframe(df, model, folder=tmp_path)
    assert pairs[0] == image_pair(spans={}, meta={"kind": "color", "level": 1})
    assert pairs[1] == text_pair(spans={}, meta={"level": 2})


def test_a_table_of_texts_needs_no_picture_columns(model):
    df = table().drop(columns=["clean_image", "corrupt_image"])[1:]
    assert list(PairDataset.from_dataframe(df, model)) == [text_pair(spans={}, meta={})]


WRONG = {
    "texts": ({"answer": ["red", 3]}, "row 1: column 'answer' must hold texts, not 3"),
    "pictures": ({"clean_image": [3.5, None]}, "row 0: column 'clean_image' must hold paths"),
    "files": ({"clean_image": ["gone.png", None]}, "row 0: column 'clean_image': .*gone.png"),
    "labels": ({"kind": [["a"], "b"]}, "row 0: column 'kind' must hold texts, numbers"),
    "alignment": ({"foil": ["blue", "red"]}, "pair 1: answer and foil are the same"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_names_row_and_column(model, changes, message):
    with pytest.raises(PairError, match=message):
        PairDataset.from_dataframe(table(**changes), model)


def test_missing_and_doubled_columns_are_named(model):
    lacking = table().drop(columns=["foil", "clean_text"])
    with pytest.raises(
        PairError, match=r"lacks the column\(s\) clean_text, foil; it has corrupt_text"
    ):
        PairDataset.from_dataframe(lacking, model)
    df = table()
    with pytest.raises(PairError, match=r"appear twice: \['foil'\]"):
        PairDataset.from_dataframe(pd.concat([df, df[["foil"]]], axis=1), model)


def test_procedural_pairs_survive_a_folder(model, tmp_path):
    for form in ("image", "text"):
        pairs = shapes.pairs(model, "horizontal", 3, form=form)
        pairs.save(tmp_path / form)
        assert list(PairDataset.load(tmp_path / form, model)) == list(pairs)

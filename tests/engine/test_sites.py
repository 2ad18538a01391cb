"""Sites name the places that they say they name."""

from __future__ import annotations

import pytest

import mechmm as mm
from mechmm.data.scenes import Scene, Thing
from mechmm.engine.located import places, random_like
from mechmm.model.layout import Box
from mechmm.zoo.recipe import build_model, build_processor

SCENE = Scene((Thing(5, "circle", "red"), Thing(10, "star", "blue")))
PROMPT = "<image> what color is the circle ? answer :"


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_hf(build_model().eval(), build_processor())


@pytest.fixture(scope="module")
def layout(model):
    """Two prompts of different length: a picture, and one with two pictures."""
    picture = SCENE.render()
    batch = model.encode([PROMPT, f"<image> {PROMPT}"], [[picture], [picture, picture]])
    return batch.layout.with_span("object", Box(24, 24, 48, 48))


def only(sites, **columns):
    found = sites.where(**columns)
    assert len(found) == 1
    return found.table.iloc[0]


def test_a_box_is_the_same_place_in_every_tower(model, layout):
    sites = mm.sites.residual(model, ("object",), layers=[0]) + mm.sites.projector(
        model, ("object",)
    )
    vision = places(only(sites, tower="vision"), layout, 0)
    language = places(only(sites, tower="language"), layout, 0)
    projected = places(only(sites, tower="projector"), layout, 0)
    cells = [(row, column) for row in (2, 3) for column in (2, 3)]
    first = layout.positions("image", 0)[0]
    assert vision == [(0, 1 + 8 * r + c) for r, c in cells]
    assert language == [(0, first + 8 * r + c) for r, c in cells]
    assert projected == [(0, 8 * r + c) for r, c in cells]


def test_rows_of_the_vision_tower_count_images(model, layout):
    site = mm.sites.projector(model).table.iloc[0]
    assert {row for row, _ in places(site, layout, 0)} == {0}
    assert {row for row, _ in places(site, layout, 1)} == {1, 2}
    assert len(places(site, layout, 1)) == 128


def test_positions_count_from_the_first_real_token(model, layout):
    sites = mm.sites.residual(model, positions=[0, -1], towers=["language"], layers=[0])
    start = layout.positions("all", 0)[0]
    assert start > 0
    assert places(sites.table.iloc[0], layout, 0) == [(0, start)]
    assert places(sites.table.iloc[1], layout, 0) == [(0, layout.shape[1] - 1)]


def test_patches_are_every_position_of_the_vision_tower(model, layout):
    sites = mm.sites.patches(model, layers=[2])
    found = [places(row, layout, 0)[0] for _, row in sites.table.iterrows()]
    assert found == [(0, p) for p in range(65)]


def test_text_has_no_place_in_the_vision_tower(model):
    table = mm.sites.residual(model, ("image", "question", "last")).table
    assert set(table[table.tower == "vision"]["span"]) == {"image"}


def test_random_sites_have_the_kind_and_size_of_the_real_ones(model, layout):
    sites = mm.sites.residual(model, ("object",)) + mm.sites.heads(model, ("object",))
    null = random_like(sites, layout, n=5, seed=3)
    assert len(null) == 4 * 5
    assert set(zip(null.table.tower, null.table.kind, strict=True)) == set(
        zip(sites.table.tower, sites.table.kind, strict=True)
    )
    drawn = [places(row, layout, 0) for _, row in null.table.iterrows()]
    assert all(len(set(found)) == 4 for found in drawn)
    assert len({tuple(found) for found in drawn}) > 5


def test_labels_read_well(model):
    sites = mm.sites.heads(model, towers=["vision"], layers=[2]) + mm.sites.projector(model)
    assert sites.labels()[1] == "vision layer 2 head 1, all"
    assert sites.labels()[-1] == "projector out, image"

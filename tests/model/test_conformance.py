"""Every row of the family table, point by point, on its tiny model (`mechmm.testing`).

A point that a family cannot pass is named with its reason, and has to fail indeed.
"""

from functools import lru_cache

import pytest
import torch

from mechmm.model.families import FAMILIES
from mechmm.testing import RECIPES, conformance, places, tiny_hf
from mechmm.testing.conformance import Case

EVERY = [(family, kind) for family, recipe in RECIPES.items() for kind in recipe.makers]
LANGUAGE = [(f, k) for f, k in EVERY if FAMILIES[RECIPES[f].architecture].unembed is not None]
POINTS = {**conformance.POINTS, **places.POINTS}
NUMBERS = ("same logits", "clean into clean", "sums", "weights", "generates")
"""The points that a variant of a family might change."""


@lru_cache(maxsize=4)  # a case holds a model and its activations
def case_of(family: str, kind: str, **options) -> Case:
    return Case(family, kind, **options)


def check(case: Case, point: str) -> None:
    exempt = places.exempt if point in places.POINTS else conformance.exempt
    reason = exempt(case, point)
    if reason is None:
        POINTS[point](case)
        return
    if passes(case, point):
        pytest.fail(f"passes, though it is said that {reason}")
    pytest.skip(reason)


def passes(case: Case, point: str) -> bool:
    try:
        POINTS[point](case)
    except (AssertionError, KeyError, StopIteration):  # no language model, no tower
        return False
    return True


def test_every_row_has_a_tiny_model_and_every_tiny_model_a_row():
    assert {recipe.architecture for recipe in RECIPES.values()} == set(FAMILIES)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_family(family, kind, point):
    check(case_of(family, kind), point)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_saved_and_loaded(family, kind, tmp_path):
    conformance.saves(case_of(family, kind), tmp_path)


@pytest.mark.parametrize("point", NUMBERS)
@pytest.mark.parametrize("key_value_heads", [4, 1])
@pytest.mark.parametrize(("family", "kind"), [pair for pair in LANGUAGE if pair[1] != "video"])
def test_full_and_single_key_value_head(family, kind, key_value_heads, point):
    options = (("heads", 4), ("key_value_heads", key_value_heads))
    check(case_of(family, kind, options=options), point)


@pytest.mark.parametrize("point", ["same logits", "fires once", "features", "projected"])
@pytest.mark.parametrize(("family", "kind"), LANGUAGE)
def test_padded_on_the_right(family, kind, point):
    check(case_of(family, kind, side="right"), point)


@pytest.mark.parametrize("point", ["same logits", "fires once", "clean into clean", "sums"])
@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_bfloat16(family, kind, point):
    check(case_of(family, kind, options=(("dtype", torch.bfloat16),)), point)


@pytest.mark.parametrize(("family", "kind"), LANGUAGE)
def test_text_alone(family, kind):
    """Without media, logits are Hugging Face's too."""
    case = case_of(family, kind, prompts=(0, 0))
    if family in TEXT_NEEDS_PICTURES:
        pytest.skip(f"{family} takes no prompt without a picture")
    conformance.same_logits(case)


TEXT_NEEDS_PICTURES = ("blip-2", "instructblip")
"""`transformers` requires their pixels."""


def test_a_seed_is_a_model():
    first, again, other = (tiny_hf("qwen2_vl", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


NEW = [("siglip", "qwen3"), ("clip", "cohere2"), ("siglip", "smollm3")]


@pytest.mark.parametrize("point", [*NUMBERS, "fires once", "alive", "features"])
@pytest.mark.parametrize(("vision", "text"), NEW)
def test_a_new_combination_of_known_towers_needs_no_row(vision, text, point):
    check(case_of("llava", "image", options=(("vision", vision), ("text", text))), point)


@pytest.mark.parametrize("point", [*NUMBERS, "fires once", "alive"])
def test_norms_behind_attention_and_mlp(point):
    check(case_of("chameleon", "image", options=(("swin_norm", True),)), point)

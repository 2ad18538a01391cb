"""Chunks of pairs, joined, are what one pass over all pairs gives: values, nulls and tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.part import Part
from mechmm.results.result import concat
from mechmm.runs.arguments import Known, Scene
from mechmm.runs.methods import METHODS
from mechmm.runs.place import Place

CIRCUIT = {"step": "image", "n": 30}
SITES = {"kind": "residual", "spans": ["object", "distractor"], "layers": [1]}
CASES = {
    "patch": {"pairs": "things", "sites": SITES, "n_null": 3},
    "attribute": {"pairs": "shown", "algorithm": "eap"},
    "faithfulness": {"pairs": "shown", "circuit": [CIRCUIT], "n_random": 1},
    "faithfulness_curve": {"pairs": "shown", "scores": {"step": "image"}, "fractions": [0.05]},
    "completeness": {"pairs": "shown", "circuit": CIRCUIT, "n_cuts": 1, "n_random": 1},
    "minimality": {"pairs": "shown", "circuit": CIRCUIT, "n_random": 1},
    "interchange": {
        "pairs": "shown",
        "text_pairs": "told",
        "image_circuit": CIRCUIT,
        "text_circuit": {"step": "text", "n": 30},
        "n_random": 1,
    },
    "pruning_curve": {"pairs": "things", "layer": 1, "fractions": [0.2], "n_random": 2},
    "early_exit": {"pairs": "things"},
}
NOT = {
    "patch": {"direction": "resample"},
    "attribute": {"algorithm": "random"},
    "faithfulness": {"target": "mean"},
    "completeness": {"n_greedy": 1},
}


@pytest.fixture(scope="module")
def scene():
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    sets = {
        "things": shapes.pairs(model, "color", 3, seed=1),
        "shown": shapes.pairs(model, "color", 3, seed=1, spans="data"),
        "told": shapes.pairs(model, "color", 3, seed=1, form="text", spans="data"),
    }
    found = {
        name: mm.attribute(model, sets[own], method="eap", spans=["data"])
        for name, own in (("image", "shown"), ("text", "told"))
    }
    return Scene(model, sets, found.__getitem__, Path())


def checked(scene, method, **changes):
    known = Known(tuple(scene.pairs), {"image": "attribute", "text": "attribute"})
    return METHODS[method].check({**CASES[method], **changes}, Place("demo.toml"), known)


def part(scene, start, size):
    sets = {name: Part(pairs, start, size) for name, pairs in scene.pairs.items()}
    return Scene(scene.model, sets, scene.result, scene.base)


SLOW = ("attribute", "faithfulness_curve", "completeness", "minimality", "interchange")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_parts_join_to_the_whole(scene, name):
    method, options = METHODS[name], checked(scene, name)
    assert method.chunked(options)
    whole = method.run(options, scene, tokens=4096)
    parts = [method.run(options, part(scene, *at), tokens=4096) for at in ((0, 2), (2, 2))]
    for key, joined in concat(parts)._values().items():
        one = whole._values()[key]
        if isinstance(one, torch.Tensor):
            assert torch.allclose(joined.double(), one.double(), atol=1e-4, equal_nan=True), key


@pytest.mark.parametrize("name", NOT)
def test_what_is_made_of_all_pairs_is_not_chunked(scene, name):
    assert not METHODS[name].chunked(checked(scene, name, **NOT[name]))


def test_random_places_of_a_part_are_those_of_the_whole(scene):
    pairs = scene.pairs["things"]
    assert Part(pairs, 2, 5).batch([0]).numbers == pairs.batch([2]).numbers == (2,)
    assert Part(pairs, 2, 5).batch([0]).indices == (0,)
    assert Part(pairs, 2, 5).first.pairs == pairs.first.pairs == pairs.pairs[:1]
    assert len(Part(pairs, 2, 5)) == 1

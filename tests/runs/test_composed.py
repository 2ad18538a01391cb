"""Steps on circuits and answers, and the tables that headlines can read."""

from __future__ import annotations

import pandas as pd
import pytest

import mechmm as mm
from mechmm.data import shapes
from mechmm.runs import composed, tables
from mechmm.runs.config import load
from mechmm.runs.methods import METHODS
from mechmm.runs.place import ConfigError

CONFIG = """
name = "t"
[model]
name = "mechmm/demo"
[pairs.color]
make = "shapes.color_pairs"
n = 2
[[steps]]
name = "eap"
method = "attribute"
[[steps]]
name = "curve"
method = "faithfulness_curve"
scores = { step = "eap" }
[[headlines]]
name = "CMD"
step = "curve"
table = "TABLE"
column = "cmd"
"""


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


@pytest.fixture(scope="module")
def pairs(model):
    return shapes.color_pairs(model, 2, seed=3)


@pytest.fixture(scope="module")
def scores(model, pairs):
    return mm.attribute(model, pairs, method="eap", spans=("object",))


def test_a_circuit_is_found_again_with_the_same_pairs_and_not_with_random_scores(
    model, pairs, scores
):
    circuit = scores.circuit(fraction=0.05)
    options = {"fraction": 0.05, "n_random": 20}
    same = composed.rediscovery(model, pairs, circuit, method="eap", **options).to_dataframe()
    assert same["iou"].eq(1).all()
    assert same["span"].tolist() == ["all", "object", "rest"]
    random = composed.rediscovery(model, pairs, circuit, method="random", **options).to_dataframe()
    assert random["iou"][0] < 0.1


def test_a_chosen_circuit_and_answers_are_what_they_are_elsewhere(model, pairs, scores, tmp_path):
    circuit = scores.circuit(n=30)
    table = composed.chosen_circuit(model, circuit).to_dataframe()
    assert table.iloc[:, 0].tolist() == circuit.edges
    found = composed.answers(model, pairs)
    pd.testing.assert_frame_equal(found.to_dataframe(), pairs.check())
    found.save(tmp_path / "answers")
    again = composed.Answers.load(tmp_path / "answers").to_dataframe()
    assert again["clean_right"].tolist() == pairs.check()["clean_right"].tolist()
    figure = found.plot()["answers"]
    assert list(figure.data[0].x) == pytest.approx([1.0, float(pairs.check()["flips"].mean())])


def test_areas_are_those_of_circuits_and_of_random_ones(model, pairs, scores):
    fractions = (0.02, 0.1, 1.0)
    found = mm.faithfulness_curve(model, pairs, scores, fractions=fractions, n_random=1)
    table = tables.read(found, "areas").set_index("null")
    for null in (False, True):
        assert table.loc[null, "cmd"] == pytest.approx(found.cmd(null))
        assert table.loc[null, "cpr"] == pytest.approx(found.cpr(null))


@pytest.mark.parametrize(
    ("method", "there", "not_there"),
    [
        ("neuron_attribution", "effects", "sheet"),
        ("interchange", "overlap", "values"),
        ("back_patch", "verdict", "gains"),
        ("faithfulness", "areas", "faithfulness"),
    ],
)
def test_tables_are_what_gives_one_without_being_told_anything(method, there, not_there):
    names = tables.names(METHODS[method].function)
    assert {there, "to_dataframe"} <= set(names)
    assert not_there not in names


def test_a_table_that_a_result_does_not_have_is_refused(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.replace("TABLE", "areas"))
    assert load(path).headlines[0].table == "areas"
    path.write_text(CONFIG.replace("TABLE", "area"))
    with pytest.raises(ConfigError, match="did you mean `areas`"):
        load(path)

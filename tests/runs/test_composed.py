"""Steps on circuits and answers, and the tables that headlines can read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import mechmm as mm
from mechmm.data import shapes
from mechmm.runs import composed, tables
from mechmm.runs.config import load
from mechmm.runs.methods import METHODS
from mechmm.runs.paths import RunError
from mechmm.runs.place import ConfigError
from mechmm.runs.replaying import replay
from mechmm.testing import tiny

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


def test_the_heads_of_a_dual_encoder_are_described_without_pairs(tmp_path):
    clip = tiny("clip")
    clip.hf_model.save_pretrained(tmp_path / "clip")
    clip.processor.save_pretrained(tmp_path / "clip")
    path = tmp_path / "demo.toml"
    path.write_text(HEADS)
    found = mm.runs.run(path, tmp_path / "run")
    rng = np.random.default_rng(3)
    pictures = [shapes.Sampler().scene(rng, "shape").render() for _ in range(4)]
    texts = {"color": ["red", "blue"], "shape": ["circle", "star"]}
    direct = mm.text_span(clip, pictures, texts, n_texts=2, n_random=2, n_ablated=1, seed=3)
    table = direct.to_dataframe()
    pd.testing.assert_frame_equal(found.table("heads"), table, atol=1e-6)
    assert found.headlines["value"][0] == pytest.approx(table["explained"].mean(), abs=1e-6)
    assert found.headlines["n"][1] == 2
    assert replay(tmp_path / "run").agrees
    with pytest.raises(RunError, match=r"\(text_span\): .* is no dual encoder"):
        mm.runs.run(path, tmp_path / "other", ['model.name="mechmm/demo"'])
    with pytest.raises(ConfigError, match=r"missing key `pairs`; give at least one set of pairs"):
        load(path, ["steps=[{name='heads', method='answers'}]"])


HEADS = """
name = "heads"
seed = 3
model = { name = "clip" }
[[steps]]
name = "heads"
method = "text_span"
texts = { color = ["red", "blue"], shape = ["circle", "star"] }
kind = "shape"
n = 4
n_texts = 2
n_random = 2
n_ablated = 1
[[headlines]]
name = "explained"
step = "heads"
column = "explained"
[[headlines]]
name = "ablated"
step = "heads"
table = "ablation"
column = "change"
where = { ablated = "color" }
"""
OVERLAP = """
[[steps]]
name = "same"
method = "overlap"
circuit = { step = "eap", n = 40 }
other_circuit = { step = "eap", n = 40 }
[[steps]]
name = "half"
method = "overlap"
circuit = { step = "eap", n = 40 }
other_circuit = { step = "eap", n = 20 }
n_random = 5
[[headlines]]
name = "same"
step = "same"
column = "iou"
where = { span = "all" }
minus = "random_high"
[[headlines]]
name = "half"
step = "half"
column = "iou"
where = { span = "all" }
"""


def test_circuits_of_a_run_overlap_as_they_are_nested(tmp_path):
    path = tmp_path / "demo.toml"
    start = CONFIG.split("[[steps]]")
    path.write_text("[[steps]]".join(start[:2]) + OVERLAP)
    found = mm.runs.run(path, tmp_path / "run")
    one, other = (found.table(name).set_index("span").loc["all"] for name in ("same", "half"))
    assert one["edges"] == one["other_edges"] == other["edges"] > other["other_edges"]
    assert one["iou"] == 1
    assert other["iou"] == other["other_edges"] / other["edges"]
    assert found.headlines["value"].tolist() == [1 - one["random_high"], other["iou"]]
    assert list((found.folder / "figures").glob("half.*.json"))

"""Completeness, minimality and interchange of circuits are what whole runs of edges say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import mechmm as mm
from mechmm.data import shapes
from mechmm.engine.ablate import run_circuits
from mechmm.engine.wiring import wired
from mechmm.results.result import Result
from mechmm.testing import tiny
from mechmm.zoo import planted


@pytest.fixture(scope="module")
def made():
    return planted.build("copy_from_text", seed=0)


@pytest.fixture(scope="module")
def pairs(made):
    return made.pairs(3)


@pytest.fixture(scope="module")
def truth(made):
    return mm.Circuit.named(mm.graph(made.model), list(made.edges))


# Completeness ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(made, pairs, truth):
    return mm.completeness(made.model, pairs, truth, n_cuts=2, n_greedy=0, n_random=2)


def test_without_a_planted_circuit_nothing_is_left(complete):
    assert abs(complete.rest) < 0.01
    assert complete.null_rest.min() > 0.9
    table = complete.to_dataframe()
    assert (table.loc[~table["null"], "incompleteness"] < 0.01).all()
    random = table[table["null"] & (table["kind"] == "random")]
    assert (random["incompleteness"] > 0.9).all()


def test_cuts_are_runs_of_the_model_and_of_the_circuit(made, pairs, truth):
    found = mm.completeness(made.model, pairs, truth, n_cuts=0, n_random=0)
    wiring = wired(made.model)
    wanted = run_circuits(made.model, pairs, wiring, [~truth.keep], mm.logit_diff)
    assert torch.allclose(found.model, wanted.values, atol=1e-3)
    assert torch.allclose(found.circuit[0], wanted.empty, atol=1e-3)
    assert torch.allclose(found.full, wanted.full, atol=1e-3)


def test_greedy_cuts_are_inside_the_circuit(made, pairs, truth, monkeypatch):
    monkeypatch.setattr("mechmm.methods.completeness.GREEDY_STEPS", 2)
    monkeypatch.setattr("mechmm.methods.completeness.TRIED", 3)
    found = mm.completeness(made.model, pairs[:1], truth, n_cuts=0, n_greedy=1, n_random=0)
    row = found.to_dataframe().iloc[1]
    assert row["kind"] == "greedy"
    assert row["edges"] == 2
    assert list(found.plot()) == ["rest", "incompleteness"]


# Minimality --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minimal(made, pairs, truth):
    idle = mm.Circuit.named(truth.graph, ["input->logits"])
    return mm.minimality(made.model, pairs, truth | idle, n_random=4)


def test_every_planted_edge_is_needed_and_no_other(made, minimal):
    table = minimal.to_dataframe().set_index("name")
    assert set(table.index[table["matters"]]) == set(made.edges)
    assert (table.loc[list(made.edges), "loss"] > 0.1).all()
    assert minimal.minimal == pytest.approx(len(made.edges) / (len(made.edges) + 1))


def test_losses_are_of_the_circuit_without_an_edge(made, pairs, truth, minimal):
    wiring, without = wired(made.model), truth.keep.copy()
    edge = truth.graph.edges(made.edges[:1])
    without[edge] = False
    without[truth.graph.edges(["input->logits"])] = True
    wanted = run_circuits(made.model, pairs, wiring, [without], mm.logit_diff)
    row = minimal.parts["name"].tolist().index(made.edges[0])
    assert torch.allclose(minimal.values[row], wanted.values[0], atol=1e-3)
    f = (wanted.values[0] - wanted.empty).mean() / (wanted.full - wanted.empty).mean()
    assert float(minimal.losses()[row]) == pytest.approx(1 - float(f), abs=0.01)


def test_a_node_goes_with_all_of_its_edges(made, pairs, truth):
    found = mm.minimality(made.model, pairs[:2], truth, by="node", n_random=2)
    table = found.to_dataframe()
    ends = {"input", "vision.input", "logits"}
    assert set(table.loc[~table["null"], "name"]) == set(truth.nodes) - ends
    assert (table.loc[~table["null"], "loss"] > 0.1).all()


def test_tests_of_circuits_are_shown_and_saved(complete, minimal, tmp_path):
    for name, result in (("complete", complete), ("minimal", minimal)):
        assert Result.load(result.save(tmp_path / name)).equals(result)
        assert "figure-1" in result.page("Test").html()
    assert "random circuits" in str(complete.plot()["rest"].layout)
    bar = minimal.plot().data[0]
    assert bar.x[0] == pytest.approx(float(minimal.losses().max()), abs=1e-5)
    assert "7 edges" in complete.summary()
    assert "Of the circuit's 8 edges 7 change" in minimal.summary()


# Interchange -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(demo):
    return [shapes.pairs(demo, "color", 3, seed=3, form=f, spans="data") for f in ("image", "text")]


@pytest.fixture(scope="module")
def circuits(demo, forms):
    spans = ("data", "last", "question")
    found = [mm.attribute(demo, pairs, spans=spans, method="eap-ig-inputs") for pairs in forms]
    return [scores.circuit(fraction=0.02) for scores in found]


@pytest.fixture(scope="module")
def exchanged(demo, forms, circuits):
    return mm.interchange(demo, *forms, *circuits, n_random=2)


def test_last_parts_are_interchangeable_and_data_parts_are_not(exchanged):
    table = exchanged.table()
    for form in ("image", "text"):
        last, data = table.loc[(form, "last")], table.loc[(form, "data")]
        assert last["other"] > 0.9 * last["own"]
        assert max(last["without"], last["random"]) < 0.1
        assert data["other"] < 0.8 * data["own"]
    assert table.loc[("image", "data"), "other"] < 0.05


def test_runs_are_of_the_edges_that_they_say(demo, forms, circuits, exchanged):
    wiring, (image, text) = wired(demo, circuits[0].graph.spans[:-1]), circuits
    last = image.graph.span == image.graph.spans.index("last")
    language = np.char.startswith(np.array(image.graph.names()), "vision.")
    keep = np.where(last & ~language, text.keep, image.keep)
    wanted = run_circuits(demo, forms[0], wiring, [image.keep, keep], mm.logit_diff)
    runs = exchanged.runs
    chosen = (runs["form"] == "image") & runs["span"].isin(["", "last"])
    rows = np.flatnonzero(chosen & runs["kind"].isin(["own", "other"]))
    assert torch.allclose(exchanged.values[rows], wanted.values, atol=1e-3)
    assert exchanged.overlap["iou"].iloc[0] > exchanged.overlap["random_high"].iloc[0]


def test_exchanges_are_shown_and_saved(exchanged, tmp_path):
    figures = exchanged.plot()
    assert set(figures) == {"image", "text"}
    labels = figures["text"].layout.yaxis.ticktext
    assert labels[:2] == ("own circuit", "data: the other form's part")
    own = exchanged.table().loc[("text", "data"), "own"]
    assert figures["text"].data[0].x[0] == pytest.approx(own, abs=1e-5)
    assert Result.load(exchanged.save(tmp_path / "exchanged")).equals(exchanged)
    assert "3 scenes in both forms" in exchanged.page("Forms").summary


# Bad input ---------------------------------------------------------------------------------------


def test_bad_tests_are_refused(made, pairs, truth):
    model = made.model
    with pytest.raises(ValueError, match="n_cuts is -1; give 0 or more"):
        mm.completeness(model, pairs, truth, n_cuts=-1)
    with pytest.raises(ValueError, match="n_random is -1; give 0 or more"):
        mm.minimality(model, pairs, truth, n_random=-1)
    with pytest.raises(ValueError, match="unknown by='head'; use edge or node"):
        mm.minimality(model, pairs, truth, by="head")
    loose = mm.Circuit.named(truth.graph, ["vision.input->projector"])
    for test in (mm.completeness, mm.minimality):
        with pytest.raises(ValueError, match="no edge of it lies on a way"):
            test(model, pairs, loose)
        with pytest.raises(ValueError, match="unknown target 'noise'"):
            test(model, pairs, truth, target="noise")
        with pytest.raises(ValueError, match="the circuit is of"):
            test(tiny("llava"), pairs, truth)


def test_bad_exchanges_are_refused(demo, forms, circuits):
    graph = mm.graph(demo)
    plain = mm.Circuit.named(graph, ["input->logits"])
    with pytest.raises(ValueError, match=r"no parts to exchange; find them with spans="):
        mm.interchange(demo, *forms, plain, plain)
    with pytest.raises(ValueError, match="with the same spans"):
        mm.interchange(demo, *forms, circuits[0], plain)
    with pytest.raises(ValueError, match="3 pairs in pictures but 2 in words"):
        mm.interchange(demo, forms[0], forms[1][:2], *circuits)
    named = [shapes.pairs(demo, "color", 2, form=f) for f in ("image", "text")]
    with pytest.raises(ValueError, match="unknown span 'data'"):
        mm.interchange(demo, *named, *circuits)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_encoders_have_no_answer_that_circuits_could_be_measured_by(family):
    model = tiny(family)
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    prompts = (mm.Prompt("a red circle", (picture,)) for picture in (red, blue))
    pairs = mm.PairDataset([mm.Pair(*prompts, "red", "blue")], model)
    circuit = mm.Circuit.named(mm.graph(model), ["vision.input->vision.logits"])
    for call in (
        lambda: mm.attribute(model, pairs),
        lambda: mm.faithfulness(model, pairs, circuit),
        lambda: mm.acdc(model, pairs, threshold=0.1),
    ):
        with pytest.raises(ValueError, match=r"gives none: it only encodes; mm\.graph"):
            call()


def test_a_metric_gives_a_number_per_example(made, pairs, truth):
    with pytest.raises(ValueError, match="it must give one number per example"):
        mm.faithfulness(made.model, pairs, truth, metric=lambda logits, _: logits.mean())

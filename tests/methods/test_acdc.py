"""ACDC cuts the edges that the paper's loop cuts, and finds planted circuits."""

from __future__ import annotations

import numpy as np
import pytest

import mechmm as mm
from mechmm.engine.ablate import masks_of
from mechmm.engine.contrast import contrasts
from mechmm.engine.wiring import wired
from mechmm.results.result import Result
from mechmm.testing import tiny
from mechmm.zoo import planted


@pytest.fixture(scope="module")
def model():
    return tiny("llava", layers=1, vision_layers=1, heads=2)


@pytest.fixture(scope="module")
def pairs(model):
    prompts = [mm.Prompt(f"{color} circle left of blue star :") for color in ("red", "green")]
    return mm.PairDataset(
        [mm.Pair(*prompts, "red", "green"), mm.Pair(*prompts, "one", "two")], model
    )


def by_hand(model, pairs, threshold: float, signed: bool, metric=mm.logit_diff) -> list[str]:
    """The algorithm of the paper, one whole run after the other."""
    wiring = wired(model)
    graph = wiring.graph
    (parts,) = contrasts(model, pairs, wiring, metric, streams=True)
    splice = parts[0].splice()

    def mean(keep: np.ndarray) -> float:
        return float(splice.run(masks_of(graph, [keep])).double().mean())

    keep = np.ones(len(graph), dtype=bool)
    now = mean(keep)
    for edge in reversed(range(len(graph))):
        new = keep.copy()
        new[edge] = False
        value = mean(new)
        if (now - value if signed else abs(now - value)) < threshold:
            keep, now = new, value
    return mm.Circuit(graph, keep, np.zeros(len(graph), np.float32)).pruned().edges


@pytest.mark.parametrize(
    ("metric", "threshold", "signed", "together"),
    [(mm.logit_diff, 0.05, False, 3), (mm.kl, 1e-4, True, 2)],
)
def test_what_is_left_is_what_one_run_after_the_other_leaves(
    model, pairs, metric, threshold, signed, together
):
    options = {"metric": metric, "threshold": threshold, "signed": signed}
    found = mm.acdc(model, pairs, **options, together=together, batch_size=1, n_random=2)
    assert found.circuit.edges == by_hand(model, pairs, threshold, signed, metric)
    assert 0 < len(found.circuit) < 0.9 * len(found.graph)
    alone = mm.faithfulness(model, pairs, found.circuit, metric=metric, n_random=0)
    assert found.faithfulness() == pytest.approx(float(alone.faithfulness()[0]), abs=1e-4)
    assert found.metric == metric.__name__


@pytest.fixture(scope="module")
def found(model, pairs):
    said = []
    result = mm.acdc(
        model, pairs, threshold=0.05, spans=("last",), report=lambda *done: said.append(done)
    )
    assert said[-1] == (len(result.graph), len(result.graph))
    assert said == sorted(said)
    return result


def test_a_trace_ends_at_the_circuit(found):
    trace = found.to_dataframe()
    assert trace["value"].iloc[-1] == pytest.approx(float(found.values.mean()), abs=1e-3)
    assert trace["faithfulness"].iloc[-1] == pytest.approx(found.faithfulness(), abs=1e-3)
    kept = trace[~trace["cut"]]
    assert (kept["effect"].abs() >= 0.05).all()
    assert (trace.loc[trace["cut"], "effect"].abs() < 0.05).all()
    assert set(found.circuit.edges) <= set(kept["edge"])
    assert len(trace) < len(found.graph)  # edges that lead nowhere are not tried


def test_what_was_found_is_shown_and_saved(found, tmp_path):
    figures = found.plot()
    assert set(figures) == {"bars", "edges", "circuit"}
    own, random = figures["bars"].data[0].x
    assert own == pytest.approx(found.faithfulness(), abs=1e-5)
    assert random == pytest.approx(float(found._share(found.null.mean())), abs=1e-5)
    assert "random circuits" in str(figures["bars"].layout)
    assert f"{len(found.circuit)} are left" in found.page("ACDC").summary
    assert Result.load(found.save(tmp_path / "found")).equals(found)


def test_a_number_of_edges_in_the_place_of_a_threshold(model, pairs, monkeypatch):
    monkeypatch.setattr("mechmm.methods.acdc.SEARCHES", 3)
    found = mm.acdc(model, pairs[:1], n=8, n_random=0)
    assert 0 < len(found.circuit) <= 8
    again = mm.acdc(model, pairs[:1], threshold=found.threshold, n_random=0)
    assert again.circuit.edges == found.circuit.edges


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either a threshold or n"),
        ({"threshold": 0.1, "n": 3}, "give either a threshold or n"),
        ({"threshold": 0.0}, "threshold is 0.0; give a number above 0"),
        ({"n": 0}, "n is 0"),
        ({"threshold": 0.1, "together": 0}, "together is 0"),
        ({"threshold": 0.1, "n_random": -1}, "n_random is -1"),
        ({"threshold": 0.1, "target": "noise"}, "unknown target 'noise'"),
        ({"threshold": 0.1, "spans": ("imagge",)}, "imagge"),
    ],
)
def test_bad_searches_are_refused(model, pairs, options, said):
    with pytest.raises(ValueError, match=said):
        mm.acdc(model, pairs[:1], **options)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["shape_of_color", "copy_from_text"])
def test_a_planted_circuit_is_found(task):
    made = planted.build(task, seed=0)
    found = mm.acdc(made.model, made.pairs(6), threshold=0.2, n_random=1)
    assert set(found.circuit.edges) == set(made.edges)

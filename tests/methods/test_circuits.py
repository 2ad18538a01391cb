"""Attribution, circuits and faithfulness, as a user calls them."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.results.graph import EdgeError
from mechmm.results.result import Result, concat
from mechmm.testing import tiny_hf
from mechmm.testing.edges import EdgeReference
from mechmm.zoo import planted


@pytest.fixture(scope="module")
def made():
    return planted.build("shape_of_color", seed=0)


@pytest.fixture(scope="module")
def pairs(made):
    return made.pairs(9)


@pytest.fixture(scope="module")
def scores(made, pairs):
    return mm.attribute(made.model, pairs, method="eap-ig-inputs", steps=20)


@pytest.fixture(scope="module")
def truth(made):
    return mm.Circuit.named(mm.graph(made.model), list(made.edges))


def test_the_true_circuit_is_faithful_and_all_else_is_not(made, pairs, truth):
    found = mm.faithfulness(made.model, pairs, [truth, ~truth], n_random=2)
    true, rest = found.faithfulness()[:2].tolist()
    assert true >= 0.99
    assert abs(rest) <= 0.01
    assert found.faithfulness()[2:].abs().max() <= 0.01 or len(found.circuits) == 6
    table = found.to_dataframe()
    assert (table["low"] <= table["faithfulness"] + 1e-6).all()
    assert (table["high"] >= table["faithfulness"] - 1e-6).all()


def test_ends_are_the_metrics_of_both_prompts(made, pairs, scores):
    clean, corrupt = (
        mm.data.metrics.score(made.model, getattr(b, prompt), b.answers)
        for b in pairs.batches(9)
        for prompt in ("clean", "corrupt")
    )
    assert torch.allclose(scores.clean, clean, atol=1e-4)
    assert torch.allclose(scores.reference, corrupt, atol=1e-4)


def test_integrated_gradients_find_the_planted_circuit(scores, truth, made, pairs):
    found = scores.circuit(n=len(truth))
    assert (found & truth).keep.sum() >= len(truth) - 1
    assert mm.faithfulness(made.model, pairs, found, n_random=0).faithfulness()[0] > 0.95


def test_scores_of_every_method_are_per_example(made, pairs):
    for method in ("eap", "clean-corrupt", "eap-ig-activations", "random"):
        few = mm.attribute(made.model, pairs[:3], method=method, steps=2)
        if method != "random":
            alone = mm.attribute(made.model, pairs[1:2], method=method, steps=2)
            size = few.scores.abs().max()
            assert torch.allclose(few.scores[1], alone.scores[0], atol=1e-4 * float(size)), method
        assert few.scores.shape == (3, len(few.graph))


def test_integrated_scores_add_up_to_the_difference(made, pairs, scores):
    """Into the logits, the scores of all edges add up to the metric's change (completeness): the
    path goes all the way from corrupt to clean."""
    graph = scores.graph
    last = graph.dst == graph._reader_numbers["logits"]
    for steps, near in ((4, 0.5), (64, 0.05)):
        own = mm.attribute(made.model, pairs[:3], method="eap-ig-inputs", steps=steps)
        total = own.scores[:, torch.from_numpy(last)].sum(1)
        assert (total - (own.clean - own.reference)).abs().max() < near * 10


@pytest.mark.parametrize("target", ["mean", "zero"])
def test_other_targets_stand_for_what_is_cut(made, pairs, target):
    graph = mm.graph(made.model)
    everything = mm.Circuit.named(graph, graph.names())
    found = mm.faithfulness(made.model, pairs[:3], everything, target=target, n_random=1)
    assert found.faithfulness()[0] == pytest.approx(1, abs=1e-3)
    assert torch.allclose(found.values[0], found.full, atol=1e-3)
    scores = mm.attribute(made.model, pairs[:3], method="eap", target=target)
    assert scores.reference.isnan().all()
    assert scores.scores.abs().sum() > 0


def test_zero_is_a_run_in_which_every_component_writes_nothing(made, pairs):
    """Only the biases behind heads are left, as in TransformerLens's zero ablation."""
    model = made.model
    found = mm.faithfulness(model, pairs[:2], some(model), target="zero", n_random=0)
    zeroed = [
        (name, lambda value, hook: torch.zeros_like(value))
        for name in model.hook_dict
        if name.endswith(("hook_z", "hook_mlp_out", "blocks.0.hook_resid_pre"))
    ]
    batch = next(iter(pairs[:2].batches(2)))
    with model.hooks(fwd_hooks=zeroed):
        wanted = mm.data.metrics.score(model, batch.clean, batch.answers)
    assert torch.allclose(found.empty, wanted, atol=1e-4)


def some(model) -> mm.Circuit:
    return mm.Circuit.named(mm.graph(model), ["input->logits"])


@pytest.mark.slow
def test_exact_scores_are_what_the_clean_run_loses(made, pairs):
    """Of some edges of a small model: the reference in float64 says the same."""
    one = pairs[:1]
    reference = EdgeReference(made.model.hf_model)
    batch = next(iter(one.batches(1)))
    other = reference.values(batch.corrupt.inputs)
    found = mm.attribute(made.model, one, method="exact")
    names = found.graph.names()
    ids = (int(batch.answers.answer_ids[0, 0]), int(batch.answers.foil_ids[0, 0]))

    def metric(on):
        logits = reference.logits(batch.clean.inputs, on, other)[0]
        return float(logits[ids[0]] - logits[ids[1]])

    whole = metric(lambda edge: True)
    for number in [*found.graph.edges(made.edges), 0, 100, 900, 1500]:
        lost = whole - metric(lambda edge, name=names[number]: edge != name)
        assert float(found.scores[0, number]) == pytest.approx(lost, abs=5e-3), names[number]


def test_results_are_saved_and_joined(scores, truth, tmp_path, made, pairs):
    assert Result.load(scores.save(tmp_path / "scores")).equals(scores)
    loaded = mm.Circuit.load(truth.save(tmp_path / "truth"))
    assert loaded.equals(truth)
    assert loaded.graph.matches(truth.graph)
    halves = [mm.attribute(made.model, part, method="eap") for part in (pairs[:4], pairs[4:])]
    both = mm.attribute(made.model, pairs, method="eap")
    assert torch.allclose(concat(halves).scores, both.scores, atol=1e-3)


def test_a_circuit_by_size(scores):
    total = len(scores.graph)
    assert len(scores.circuit(n=30, prune=False)) == 30
    assert len(scores.circuit(fraction=0.05, prune=False)) == round(0.05 * total)
    by_size = scores.circuit(threshold=0.5, prune=False)
    assert (np.abs(scores.mean()[by_size.keep]) >= 0.5).all()
    signed = scores.circuit(n=10, signed=True, prune=False)
    assert (signed.scores[signed.keep] > 0).all()
    greedy = scores.circuit(n=40, greedy=True, prune=False)
    assert len(greedy) == 40
    wanted = greedy.graph.readers["name"].iloc[greedy.graph.dst[greedy.keep]]
    assert "logits" in set(wanted)
    assert len(scores.circuit(n=40)) <= 40


def test_dead_ends_have_no_effect(made, pairs, scores):
    loose = scores.circuit(n=60, prune=False)
    assert 0 < len(loose.pruned()) < len(loose)
    found = mm.faithfulness(made.model, pairs[:3], [loose, loose.pruned()], n_random=0)
    assert torch.allclose(found.values[0], found.values[1], atol=1e-4)


def test_sets_of_edges(scores, truth):
    found = scores.circuit(n=20)
    assert len(found | truth) + len(found & truth) == len(found) + len(truth)
    assert len(found - truth) == len(found) - len(found & truth)
    table = found.overlap(truth, n_random=200)
    row = table.iloc[0]
    assert row["iou"] == pytest.approx(len(found & truth) / len(found | truth))
    assert row["iou"] > row["random_high"]


def test_exports(truth, tmp_path):
    graph = nx.read_graphml(truth.to_graphml(tmp_path / "truth.graphml"))
    assert graph.number_of_edges() == len(truth)
    assert set(graph.nodes) == set(truth.nodes)
    kinds = {data["kind"] for _, data in graph.nodes(data=True)}
    assert {"input", "head", "mlp", "projector", "logits"} <= kinds
    assert truth.to_dataframe()["edge"].tolist() == truth.edges


def test_keys_that_heads_share_are_a_node_of_their_own():
    model = mm.HookedMultimodal.from_hf(tiny_hf("llava", heads=4, key_value_heads=2))
    circuit = mm.Circuit.named(mm.graph(model), ["input->a1.h1<v>", "input->a1.h1<q>", "m0->m1"])
    assert circuit.nodes == ["input", "m0", "a1.h1", "a1.kv1", "m1"]
    found = circuit.to_networkx()
    assert found.nodes["a1.kv1"]["kind"] == "kv"
    assert found.number_of_edges() == 3


def test_curves_end_at_the_whole_model(made, pairs, scores):
    curve = mm.faithfulness_curve(
        made.model, pairs[:4], scores, fractions=(0.01, 0.1, 1.0), n_random=1
    )
    table = curve.curve()
    assert table["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-3)
    assert curve.cpr() > curve.cpr(null=True)
    assert curve.cmd() < curve.cmd(null=True)


def test_spans_have_every_edge_once(made):
    split = mm.graph(made.model, spans=("image", "question", "last"))
    assert split.spans == ("image", "question", "last", "rest")
    assert len(split) == 4 * len(mm.graph(made.model))
    assert len(split.edges(["m0->logits"])) == 4
    (one,) = split.edges(["m0->logits @ last"])
    assert split.names(np.array([one])) == ["m0->logits @ last"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "eap-ig"}, "unknown method 'eap-ig'; use eap, eap-ig-inputs"),
        ({"target": "noise"}, "unknown target 'noise'; use corrupt, mean, zero"),
        ({"steps": 0}, "steps is 0"),
        ({"metric": mm.accuracy}, "no gradient"),
        ({"method": "clean-corrupt", "target": "mean"}, "no prompt gives the target 'mean'"),
        ({"spans": ("imagge",)}, "imagge"),
    ],
)
def test_bad_attribution_is_refused(made, pairs, options, said):
    with pytest.raises(ValueError, match=said):
        mm.attribute(made.model, pairs[:1], **options)


def test_bad_circuits_are_refused(made, pairs, scores, truth):
    with pytest.raises(ValueError, match="exactly one of n, fraction and threshold"):
        scores.circuit()
    with pytest.raises(ValueError, match="2000000 edges were asked for, of a graph with 1882"):
        scores.circuit(n=2_000_000)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        scores.circuit(fraction=1.5)
    with pytest.raises(ValueError, match="the circuit is empty"):
        mm.faithfulness(made.model, pairs, truth - truth)
    loose = mm.Circuit.named(truth.graph, ["vision.input->projector"]).pruned()
    with pytest.raises(ValueError, match="no edge of it lies on a way"):
        mm.faithfulness(made.model, pairs, loose)
    other = mm.HookedMultimodal.from_hf(tiny_hf("llava"))
    with pytest.raises(ValueError, match="the circuit is of"):
        mm.faithfulness(other, pairs, truth)
    with pytest.raises(ValueError, match="different graphs"):
        truth | some(other)
    with pytest.raises(EdgeError, match=r"no writer 'a9.h9'; nearest"):
        mm.Circuit.named(truth.graph, ["a9.h9->logits"])
    with pytest.raises(EdgeError, match="does not write into what"):
        mm.Circuit.named(truth.graph, ["m3->a0.h0<q>"])
    with pytest.raises(EdgeError, match="is no edge; write it as"):
        mm.Circuit.named(truth.graph, ["a0.h0"])

"""Circuits of nodes and neurons, as a user calls them."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data.metrics import score
from mechmm.results.graph import EdgeError
from mechmm.results.result import Result, concat
from mechmm.testing import tiny_hf
from mechmm.zoo import planted

SPANS = ("image", "last")


@pytest.fixture(scope="module")
def made():
    return planted.build("shape_of_color", seed=0)


@pytest.fixture(scope="module")
def pairs(made):
    return made.pairs(6)


@pytest.fixture(scope="module")
def nodes(made, pairs):
    return mm.attribute(made.model, pairs, granularity="node", steps=10)


@pytest.fixture(scope="module")
def neurons(made, pairs):
    return mm.attribute(made.model, pairs[:3], granularity="neuron", spans=SPANS, steps=2)


@pytest.fixture(scope="module")
def truth(made, nodes):
    """The nodes that the compiler says compute the answer."""
    return mm.Circuit.named(nodes.graph, [name for name in made.nodes if name != "logits"])


def test_nodes_are_all_writers_and_neurons_their_parts(made):
    graph = mm.graph(made.model)
    nodes = mm.graph(made.model, granularity="node")
    assert nodes.names() == graph.writers["name"].tolist()
    neurons = mm.graph(made.model, SPANS, "neuron")
    wide = 1 + 3 * (4 * 32 + 128), 2 + 4 * (8 * 32 + 128)  # the last vision block is not read
    assert len(neurons) == 2 * wide[0] + 3 * wide[1]  # no patch is the last token
    names = neurons.names()
    assert len(set(names)) == len(names)
    assert {"vision.input @ image", "vision.a0.h3.d5 @ rest", "m3.n17 @ last"} <= set(names)
    some = np.array([0, 500, 2345, len(neurons) - 1])
    assert neurons.numbers([names[i] for i in some]).tolist() == some.tolist()
    assert len(neurons.numbers(["a2.h1 @ last"])) == 32
    assert len(neurons.numbers(["a2.h1.d3"])) == 3
    table = neurons.table(neurons.numbers(["a2.h1.d3 @ last"]))
    row = table.iloc[0].to_dict()
    wanted = {"tower": "language", "kind": "head", "layer": 2, "head": 1, "neuron": 3}
    assert row == {"name": "a2.h1.d3 @ last", "span": "last", **wanted}


def test_integrated_gradients_find_the_planted_nodes(made, pairs, nodes, truth):
    found = nodes.circuit(n=len(truth))
    assert (found & truth).keep.sum() >= len(truth) - 1
    alone = mm.faithfulness(made.model, pairs, [truth, ~truth], n_random=2)
    true, rest = alone.faithfulness()[:2].tolist()
    assert true > 0.99
    assert abs(rest) < 0.01
    assert alone.circuits["nodes"].tolist()[:2] == [len(truth), len(nodes.graph) - len(truth)]


def test_the_whole_is_the_clean_run_and_nothing_the_corrupt_one(made, pairs, neurons):
    part = pairs[:3]
    curve = mm.faithfulness_curve(made.model, part, neurons, fractions=(0.01, 0.2, 1.0), n_random=1)
    (batch,) = part.batches(3)
    clean, corrupt = (score(made.model, b, batch.answers) for b in (batch.clean, batch.corrupt))
    assert torch.allclose(curve.full, clean, atol=1e-4)
    assert torch.allclose(curve.empty, corrupt, atol=1e-4)
    assert torch.equal(curve.values[2], curve.full)
    assert curve.cpr() > curve.cpr(null=True)
    assert "neurons" in curve.plot()["curve"].layout.xaxis.title.text


@pytest.mark.parametrize("target", ["mean", "zero"])
def test_other_targets_stand_for_what_is_cut(made, pairs, target):
    """With the MLP of the last block alone cut: as a hook in a full run."""
    units, hook = mm.graph(made.model, granularity="node"), "blocks.3.hook_mlp_out"
    without = ~mm.Circuit.named(units, ["m3"])
    found = mm.faithfulness(made.model, pairs, without, target=target, n_random=0)
    scores = mm.attribute(made.model, pairs, method="exact", target=target, graph=units)
    caught = []
    (batch,) = pairs.batches(6)
    note = (hook, lambda value, hook: caught.append(value.clone()))
    with made.model.hooks(fwd_hooks=[note]):
        made.model(batch.clean)
    real = batch.clean.layout.modality > 0
    new = caught[0][real].mean(0) if target == "mean" else torch.zeros(caught[0].shape[-1])
    cut = (hook, lambda value, hook: torch.where(real[..., None], new, value))
    with made.model.hooks(fwd_hooks=[cut]):
        wanted = score(made.model, batch.clean, batch.answers)
    assert torch.allclose(found.values[0], wanted, atol=1e-3)
    lost = scores.scores[:, units.numbers(["m3"])[0]]
    assert torch.allclose(lost, found.full - wanted, atol=1e-3)
    assert scores.reference.isnan().all()


def test_scores_of_every_method_are_per_example(made, pairs):
    units = mm.graph(made.model, granularity="node")
    for method in ("eap", "clean-corrupt", "eap-ig-activations", "atp*", "exact", "random"):
        few = mm.attribute(made.model, pairs[:3], method=method, steps=2, graph=units)
        assert few.scores.shape == (3, len(units))
        if method != "random":
            alone = mm.attribute(made.model, pairs[1:2], method=method, steps=2, graph=units)
            size = float(few.scores.abs().max())
            assert torch.allclose(few.scores[1], alone.scores[0], atol=1e-4 * size), method


def test_atp_of_nodes_is_the_sum_of_edges(made, pairs):
    spans = ("image",)
    edges = mm.attribute(made.model, pairs[:2], method="atp*", spans=spans)
    nodes = mm.attribute(made.model, pairs[:2], method="atp*", spans=spans, granularity="node")
    one = nodes.graph.numbers(["m1 @ rest"])[0]
    graph = edges.graph
    own = (graph.writers["name"].to_numpy()[graph.src] == "m1") & (graph.span == 1)
    wanted = edges.scores[:, torch.from_numpy(own)].sum(1)
    assert torch.allclose(nodes.scores[:, one], wanted, rtol=1e-4)


def test_results_are_saved_and_joined(made, pairs, nodes, neurons, truth, tmp_path):
    for number, result in enumerate((nodes, neurons, truth, neurons.circuit(n=20))):
        loaded = Result.load(result.save(tmp_path / str(number)))
        assert loaded.equals(result)
        assert loaded.graph.matches(result.graph)
    halves = [
        mm.attribute(made.model, part, method="eap", graph=nodes.graph)
        for part in (pairs[:4], pairs[4:])
    ]
    both = mm.attribute(made.model, pairs, method="eap", graph=nodes.graph)
    assert torch.allclose(concat(halves).scores, both.scores, atol=1e-3)


def test_tables_and_figures_say_what_is_scored(nodes, neurons):
    table = neurons.to_dataframe()
    assert list(table.columns[:6]) == ["name", "tower", "kind", "layer", "head", "neuron"]
    assert table["score"].abs().is_monotonic_decreasing
    assert set(neurons.plot()) == {"neurons", "mass"}
    assert "strongest nodes" in nodes.plot()["nodes"].layout.title.text
    assert f"{len(nodes.graph)} nodes" in nodes.summary()


def test_circuits_of_units_are_sets_too(nodes, neurons, truth):
    found = nodes.circuit(n=8)
    assert len(found) == len(found.pruned()) == 8  # nothing is pruned
    assert len(found | truth) + len(found & truth) == len(found) + len(truth)
    assert set(found.nodes) == set(found.names)
    overlap = found.overlap(truth, n_random=50)
    assert {"nodes", "other_nodes"} <= set(overlap.columns)
    some = neurons.circuit(n=200)
    for span in range(3):
        own = some.graph.span == span
        assert (some.random(1).keep & own).sum() == (some.keep & own).sum()
    assert some.to_dataframe()["score"].abs().min() >= np.abs(some.scores[~some.keep]).max()


def test_a_circuit_of_nodes_is_drawn_by_the_edges_between_them(made, truth, neurons, tmp_path):
    between = truth.edges_between()
    kept, links = set(truth.nodes), between.to_dataframe()
    readers = {name.split("<")[0] for name in links["reader"]}
    assert set(links["writer"]) <= kept
    assert readers <= kept | {"logits"}
    assert set(made.edges) <= set(between.names)  # the true edges join true nodes
    graph = nx.read_graphml(truth.to_graphml(tmp_path / "truth.graphml"))
    assert set(graph.nodes) == kept | {"logits"}
    assert len(truth.plot().data)
    figure = neurons.circuit(n=50).plot()
    counts = [np.nansum(np.array(trace.z, dtype=float)) for trace in figure.data]
    assert sum(counts) == 50


def test_edges_between_nodes_follow_spans(made):
    """A query reads where its head writes; what keys read may be anywhere."""
    units = mm.graph(made.model, ("image",), "node")
    some = mm.Circuit.named(units, ["m0 @ image", "m0 @ rest", "a1.h2 @ rest"])
    assert {e for e in some.edges if "a1" in e.split("->")[1]} == {
        "m0->a1.h2<q> @ rest",
        *(f"m0->a1.h2<{side}> @ {span}" for side in "kv" for span in ("image", "rest")),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"granularity": "head"}, "unknown granularity 'head'; use edge, node, neuron"),
        ({"granularity": "neuron", "method": "atp*"}, r"score nodes or edges with it"),
        ({"granularity": "node", "method": "eap-ig"}, "unknown method 'eap-ig'"),
        ({"granularity": "node", "target": "noise"}, "unknown target 'noise'"),
        ({"granularity": "node", "spans": ("imagge",)}, "imagge"),
        ({"granularity": "node", "metric": mm.accuracy}, "no gradient"),
        ({"graph": "own", "granularity": "node"}, "a graph was given beside spans or granularity"),
        ({"graph": "own", "spans": ("image",)}, "a graph was given beside spans or granularity"),
        ({"graph": "other"}, "the graph is .*the model has .*mm.graph"),
    ],
)
def test_bad_requests_are_refused(made, pairs, options, said):
    own = {"own": made.model, "other": mm.HookedMultimodal.from_hf(tiny_hf("llava"))}
    if "graph" in options:
        options = {**options, "graph": mm.graph(own[options["graph"]], granularity="node")}
    with pytest.raises(ValueError, match=said):
        mm.attribute(made.model, pairs[:1], **options)


def test_bad_circuits_are_refused(made, pairs, nodes, truth):
    with pytest.raises(ValueError, match="nodes have none; leave it out"):
        nodes.circuit(n=3, greedy=True)
    with pytest.raises(ValueError, match="9000 nodes were asked for"):
        nodes.circuit(n=9000)
    with pytest.raises(ValueError, match="the circuit is empty; keep more nodes"):
        mm.faithfulness(made.model, pairs, truth - truth)
    other = mm.HookedMultimodal.from_hf(tiny_hf("llava"))
    with pytest.raises(ValueError, match="find circuits on the model"):
        mm.faithfulness(other, pairs, truth)
    edges = mm.Circuit.named(mm.graph(made.model), ["input->logits"])
    with pytest.raises(ValueError, match="circuit 1 of"):
        mm.faithfulness(made.model, pairs, [truth, edges])
    with pytest.raises(ValueError, match="different graphs"):
        truth | edges
    with pytest.raises(ValueError, match="different graphs"):
        edges | truth
    neurons = mm.graph(made.model, ("image",), "neuron")
    for name, said in (
        ("a9.h9", "no neuron 'a9.h9'; nearest"),
        ("m1.n999", "m1 has n0..n127, not n999"),
        ("m1.d3", "no neuron 'm1.d3'; nearest: m1"),
        ("m1.n3 @ last", "the spans there are image, rest"),
    ):
        with pytest.raises(EdgeError, match=said):
            mm.Circuit.named(neurons, [name])

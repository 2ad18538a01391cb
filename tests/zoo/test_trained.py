"""Trained models answer, by the circuit that their causal model has and by little else."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ablation import Ablation

from mechmm.engine.wiring import wired
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing.edges import EdgeReference
from mechmm.zoo import planted
from mechmm.zoo.planted import training
from mechmm.zoo.planted.causal import CAUSAL, SAID, SEEN
from mechmm.zoo.planted.tasks import TASKS
from mechmm.zoo.planted.walk import walk

N = 12


@pytest.fixture(scope="module", params=planted.TRAINED)
def run(request):
    return Ablation(planted.load(request.param), N)


def test_it_answers(run):
    answers = run.made.pairs(32, seed=3).check()
    assert answers["clean_right"].all()
    assert answers["flips"].all()


def test_its_circuit_is_what_it_answers_by(run):
    true = set(run.made.edges)
    assert true <= set(run.reference.edges)
    assert run.faithfulness(true).mean() == pytest.approx(1, abs=0.01)
    assert run.faithfulness(lambda edge: edge not in true).mean() == pytest.approx(0, abs=0.01)


def test_every_edge_of_its_circuit_is_necessary_and_no_other(run):
    false = [edge for edge in run.reference.edges if edge not in run.made.edges]
    needed, unneeded = run.effects(run.made.edges).mean(1), run.effects(false).mean(1)
    assert needed.min() > 0.1
    assert needed.min() > 3 * unneeded.abs().max()


def test_the_rest_is_alive(run):
    """What heads outside the circuit write is not far shorter than inside, and differs between the
    prompts of a pair."""
    values, circuit = run.reference.values(run.clean), set(run.made.nodes)
    for tower in ("vision.", ""):
        heads = [n for n in values if re.fullmatch(re.escape(tower) + r"a\d+\.h\d+", n)]
        length = {n: values[n].norm(dim=-1).mean() for n in heads}
        change = {n: (values[n] - run.other[n]).norm(dim=-1).mean() for n in heads}
        usual = torch.stack([length[n] for n in heads if n in circuit]).mean()
        rest = [n for n in heads if n not in circuit]
        assert len(rest) >= 4
        assert all(length[n] > usual / 15 for n in rest)
        assert all(change[n] > usual / 100 for n in rest)


@pytest.mark.parametrize("task", planted.TRAINED)
def test_the_causal_model_gives_the_answers_of_the_task(task):
    causal, random = CAUSAL[task], np.random.default_rng(0)
    examples = training.Examples.drawn(TASKS[task], causal, 40, random)
    for i, case in enumerate(examples.cases):
        other = examples.values[i - 1]
        assert causal.answer(examples.values[i]) == TASKS[task].answer(case)
        assert causal.answer(causal.values(case, (), other)) == causal.answer(examples.values[i])
        inputs = [edge for edge in causal.edges if edge.split("->")[0] in (SEEN, SAID)]
        for swapped in (inputs, causal.edges, causal.edges[-1:]):
            assert causal.answer(causal.values(case, swapped, other)) == causal.answer(other)


def test_an_interchange_of_the_question_keeps_the_picture():
    causal = CAUSAL["color_at_cell"]
    random = np.random.default_rng(0)
    examples = training.Examples.drawn(TASKS["color_at_cell"], causal, 8, random)
    for i, case in enumerate(examples.cases):
        other = examples.values[i - 1]
        words = [edge for edge in causal.edges if edge.startswith(f"{SAID}->")]
        found = causal.answer(causal.values(case, words, other))
        assert found == case.scene.color_at("_".join(other[SAID]))


def test_a_walk_is_the_model_with_edges_swapped():
    hf = training.untrained(1)
    model = HookedMultimodal.from_hf(hf, training.build_processor())
    graph = wired(model).graph
    pairs = planted.load("same_color").pairs(4)
    (batch,) = pairs.batches(4)
    clean, corrupt = dict(batch.clean.inputs), dict(batch.corrupt.inputs)
    reference, random = EdgeReference(hf), np.random.default_rng(0)
    assert set(reference.edges) == set(graph.names())
    with torch.no_grad():
        other = walk(hf, graph, corrupt["pixel_values"], corrupt["input_ids"])
        plain = walk(hf, graph, clean["pixel_values"], clean["input_ids"])
        expected = model(Batch.from_inputs(model, **clean))[:, -1]
        torch.testing.assert_close(plain.logits, expected, rtol=0, atol=1e-5)
        swap = random.random((4, len(graph))) < 0.3
        found = walk(
            hf,
            graph,
            clean["pixel_values"],
            clean["input_ids"],
            torch.from_numpy(swap.astype(np.float32)),
            other,
        ).logits
    on = {name: torch.from_numpy(~swap[:, i]) for i, name in enumerate(graph.names())}
    expected = reference.logits(clean, on.__getitem__, reference.values(corrupt))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (found - plain.logits).abs().max() > 0.01


def test_swaps_are_of_the_kinds_that_strictness_needs():
    graph = wired(planted.load("color_at_cell").model).graph
    swaps = training.Swaps.of(graph, CAUSAL["color_at_cell"])
    drawn = swaps.draw(400, False, np.random.default_rng(0))
    outside, circuit = drawn[:, swaps.outside], drawn[:, swaps.circuit]
    alone = outside.all(1)
    assert 0.2 < alone.mean() < 0.6
    assert (circuit.all(1) & ~outside.any(1)).any()
    assert (~outside.any(1) & ~circuit.any(1)).any()
    assert (circuit.sum(1) == 1).any()
    first = swaps.draw(50, True, np.random.default_rng(0))
    assert first[:, swaps.outside].all()


def test_the_same_seed_trains_the_same_model(monkeypatch):
    monkeypatch.setattr(training, "CASES", 40)
    state = torch.random.get_rng_state()
    told: list[dict] = []
    one, two = (
        training.train("color_at_cell", 1, training.Recipe(steps=3), told.append) for _ in range(2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    start = dict(training.untrained(1).named_parameters())
    for name, weight in one.model.hf_model.named_parameters():
        assert torch.equal(weight, two.model.hf_model.get_parameter(name))
        if not name.endswith(("post_layernorm.weight", "post_layernorm.bias", "k_proj.bias")):
            assert not torch.equal(weight, start[name]), name
    assert one.edges == planted.load("color_at_cell").edges


def test_what_cannot_be_trained_or_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'count_to_two'; there are color_at_cell"):
        training.train("count_to_two")
    with pytest.raises(ValueError, match="0 or more, not -1"):
        training.train("same_color", seed=-1)
    with pytest.raises(ValueError, match="there are color_at_cell, same_color"):
        planted.load(tmp_path)


def test_saved_is_loaded(tmp_path):
    made = planted.load("same_color")
    made.save(tmp_path / "model")
    loaded = planted.load(tmp_path / "model")
    assert (loaded.name, loaded.edges, loaded.why) == (made.name, made.edges, made.why)

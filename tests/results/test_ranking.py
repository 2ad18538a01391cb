"""Areas under ROC curves, against what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mechmm.engine.wiring import wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.ranking import auroc, greedy_auroc
from mechmm.testing import tiny_hf


@pytest.fixture(scope="module")
def graph():
    return wired(HookedMultimodal.from_hf(tiny_hf("llava", layers=1))).graph


@pytest.fixture(scope="module")
def true(graph):
    """A way from the words to the logits."""
    keep = np.zeros(len(graph), dtype=bool)
    keep[graph.edges(["input->a0.h0<v>", "a0.h0->m0", "m0->logits"])] = True
    return keep


def test_it_is_the_chance_to_be_ranked_above():
    scores, true = np.array([3.0, -2.0, 1.0, -1.0, 0.0]), np.array([1, 0, 1, 0, 0], dtype=bool)
    pairs = [(abs(a), abs(b)) for a in scores[true] for b in scores[~true]]
    expected = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert auroc(scores, true) == pytest.approx(expected)


def test_perfect_and_worst(graph, true):
    best = np.where(true, -2.0, 1.0)
    assert auroc(best, true) == 1
    assert greedy_auroc(graph, best, true, [true.mean(), 1.0]) == 1
    assert auroc(-1 / best, true) == 0


def test_greedy_circuits_hold_no_edges_that_lead_nowhere(graph, true):
    """A strong edge into a head that no kept edge reads is never chosen."""
    scores = np.where(true, 1.0, 0.0)
    scores[graph.edges(["vision.input->vision.a0.h1<v>"])] = 5.0
    assert auroc(scores, true) < 1
    assert greedy_auroc(graph, scores, true, [true.mean(), 1.0]) == 1


def test_no_scores_are_worth_a_half(graph, true):
    assert auroc(np.zeros(len(graph)), true) == 0.5

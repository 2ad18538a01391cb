"""The benchmark of circuits on one small case; its numbers are those of the methods."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import mechmm as mm
from mechmm import cli
from mechmm.runs.bench import HELD_OUT, Bench, run
from mechmm.runs.cases import case_names, chosen_cases
from mechmm.zoo import planted

CASE = "trained/color_at_cell"


@pytest.fixture(scope="module")
def found():
    return run(Bench([CASE], ["eap-ig-inputs", "random"], pairs=3, steps=5))


def test_the_known_circuit_is_run(found):
    (truth,), _ = found
    made = planted.load("color_at_cell")
    circuit = mm.Circuit.named(mm.graph(made.model), made.edges)
    pairs = made.pairs(3, seed=HELD_OUT)
    again = mm.faithfulness(made.model, pairs, [circuit, ~circuit], n_random=0).faithfulness()
    assert (truth.edges, truth.true) == (len(circuit.graph), len(made.edges))
    assert [truth.circuit, truth.rest] == pytest.approx(again.tolist())


def test_rows_are_what_methods_give(found):
    _, (row, null) = found
    made = planted.load("color_at_cell")
    scores = mm.attribute(made.model, made.pairs(3), method="eap-ig-inputs", steps=5)
    held_out = made.pairs(3, seed=HELD_OUT)
    curve = mm.faithfulness_curve(made.model, held_out, scores, n_random=0)
    assert row.cmd == pytest.approx(curve.cmd())
    assert row.edge_auroc > 0.9 > null.edge_auroc
    assert row.cmd < null.cmd
    kept = scores.circuit(fraction=row.share, prune=False)
    alone = mm.faithfulness(made.model, held_out, kept, n_random=0)
    assert alone.faithfulness() >= 0.85
    assert row.vision == sum(edge.startswith("vision.") for edge in kept.edges)
    assert row.seconds > 0


def test_the_command_writes_a_page_and_all_rows(tmp_path):
    words = ["bench", "circuits", "--quick", "--models", CASE, "--methods", "eap", "--pairs", "3"]
    words += ["--json", tmp_path / "new" / "rows.json", "--out", tmp_path / "page"]
    answer = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert answer.exit_code == 0, answer.output
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [(row["model"], row["method"]) for row in written["rows"]] == [(CASE, "eap")]
    assert written["truths"][0]["true"] == len(planted.load("color_at_cell").edges)
    assert CASE in (tmp_path / "page" / "circuits.html").read_text()


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        (Bench(["color_at_cel"]), "'color_at_cel'.*compiled/color_at_cell.*demo"),
        (Bench(methods=["eapp"]), "unknown method 'eapp'; use eap, eap-ig-inputs"),
        (Bench(pairs=0), "pairs is 0"),
        (Bench(seed=-1), "seed is -1"),
    ],
)
def test_what_cannot_run_is_refused(bench, message):
    with pytest.raises(ValueError, match=message):
        run(bench)


def test_cases_by_kind():
    assert chosen_cases([]) == case_names()
    assert chosen_cases(["redundant", "demo"]) == ("redundant/backup_heads", "demo/color")
    assert len(case_names()) == len(set(case_names())) == 6 + 1 + 3 + 1


def test_methods_that_run():
    assert "exact" in Bench().tried
    assert "exact" not in Bench(quick=True).tried
    assert Bench(methods=["exact"], quick=True).tried == ("exact",)

"""Every benchmark builds its table, here on a toy size; its numbers are not looked at."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import mechmm as mm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by its name, for one thread."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_overhead(script, tmp_path, capsys):
    overhead, timing = script("overhead"), script("_timing")
    toy = overhead.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8)
    rows = overhead.measure(toy, rounds=1)
    timing.report(rows, tmp_path / "rows.json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {tuple(row) for row in printed} == {("job", "against", "ratio", "goal", "met")}
    assert len(printed) == len(written) == len(rows)
    assert {row["job"] for row in written} >= set(overhead.JOBS.values())
    for row in written:
        if row["note"] is None:
            assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
            assert row["met"] == eval(f"{row['ratio']} {row['goal']}")
        else:
            assert row["against"] == overhead.NNSIGHT
            assert row["ratio"] is row["met"] is None


def test_overhead_patches_change_the_logits(script):
    overhead = script("overhead")
    toy = overhead.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8)
    ours = overhead.Ours(overhead.Task(toy, "cpu", torch.float32))
    with torch.no_grad():
        (plain,) = ours.forward()
        assert not torch.allclose(ours.patch_residual()[0], plain)
        assert not torch.allclose(ours.patch_head()[0], plain)


@pytest.mark.slow
def test_sweep(script, tmp_path, capsys):
    sweep, timing = script("sweep"), script("_timing")
    toy = sweep.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8)
    rows = sweep.measure(toy, rounds=1, sample=2)
    timing.report(rows, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {row["job"].split(":")[0].split(", floating")[0] for row in written} == {
        job.name for job in sweep.JOBS.values()
    }
    assert "values within" in capsys.readouterr().out
    for row in written:
        if row["note"] is None:
            assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
            assert row["cells"] >= 2
        else:
            assert row["against"] == sweep.NNSIGHT


def test_exact(script, tmp_path):
    sweep, exact, timing = script("sweep"), script("exact"), script("_timing")
    rows = exact.measure(sweep.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8), rounds=1)
    timing.report(rows, tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    assert {row.job for row in rows} == {"exact, text, 46 edges"}


def test_the_bound_of_a_sweep_is_the_sum_over_its_cells(script):
    sweep = script("sweep")
    shape = sweep.Shape(2, 32, 2, 3, 4, 3, 32, 2, 64, 64, 8)
    last = sweep.operations(shape, 20, 2, 19)
    assert sweep.operations(shape, 20, 1, 19) - last == sweep.per_token(shape) + 4 * 32 * 20
    assert sweep.bound(shape, 20) > 3 * 20 * last


def test_goals(script):
    compare = script("_timing").compare
    row = compare("job", "peer", "ms", [2.0, 3.0, 4.0], [4.0, 4.0, 4.0], "<= 0.75")
    assert (row.ratio, row.met) == (0.75, True)
    assert row.noise > 0
    assert not compare("job", "peer", "MB", [1.0], [1.0], "< 1").met
    assert compare("job", "peer", "MB", [1.0], [1.0], None).met is None


def test_peak_memory_is_exact(script):
    peak_bytes = script("_timing").peak_bytes
    kept = []

    def side():
        for _ in range(3):
            torch.empty(1000)
        kept.append(torch.empty(500))

    assert peak_bytes(side) == 4000


@pytest.mark.slow
def test_circuits(script, tmp_path, capsys):
    circuits, timing = script("circuits"), script("_timing")
    toy = circuits.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8, real=False)
    run = circuits.Run(rounds=1, python=None, real=False, lengths=(8,), sample=1)
    rows = circuits.measure(toy, run, circuits.JOBS)
    timing.report(rows, tmp_path / "rows.json")
    capsys.readouterr()
    written = json.loads((tmp_path / "rows.json").read_text())
    others = {row["against"]: row for row in written}
    assert {circuits.BARE, circuits.LENS, circuits.EAP_IG, circuits.AUTO_CIRCUIT} <= set(others)
    for row in written:
        if row["against"] in (circuits.EAP_IG, circuits.AUTO_CIRCUIT):
            assert "not installed" in row["note"]
        else:
            assert row["ratio"] > 0


def test_scores_that_differ_are_no_row(script):
    circuits = script("circuits")
    ours = torch.tensor([1.0, -2.0])
    assert circuits.agree(ours, ours, "same") == 0
    with pytest.raises(AssertionError, match="other: scores differ"):
        circuits.agree(ours, -ours, "other")


def test_what_ran_elsewhere_takes_what_it_took_there(script):
    timing = script("_timing")
    found = timing.interleaved({"side": lambda: timing.Elsewhere(12.0)}, rounds=2)
    assert found == {"side": [12.0, 12.0]}


@pytest.mark.slow
def test_lens(script, tmp_path):
    lens, timing = script("lens"), script("_timing")
    toy = lens.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8, real=False)
    rows = lens.measure(toy, rounds=1)
    timing.report(rows, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {row["against"] for row in written} == {lens.BARE, lens.PEER, lens.LIMIT}
    for row in written:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])


def test_the_products_of_the_lens_are_all_made(script):
    """What is timed as bare products is as much work as the readout's: every row, every word."""
    lens = script("lens")
    toy = lens.Shape(2, 32, 2, 3, 4, 2, 32, 2, 64, 64, 8, real=False)
    task = lens.Task(toy)
    assert len(task.normed) == 64 * (1 + toy.layers)
    logits = task.normed @ task.head.unembed.weight.T
    torch.testing.assert_close(task.top().logits, logits.topk(lens.K).values)


def test_scale_plans_without_weights_what_it_plans_with_them(script, monkeypatch, capsys):
    sweep, scale = script("sweep"), script("scale")
    task = sweep.Task(sweep.SHAPES["tiny"], "cpu", torch.float32)
    for name, job in scale.plans("tiny", torch.float32, 512).items():
        known = sweep.JOBS[name].sites(task)
        real = mm.Sweep(task.hooked, task.pairs["image"], known, tokens=512).plan()
        assert float(job.plan().flops.sum()) == float(real.flops.sum()) > 0
    cluster = scale.Cluster(cards=4, pairs=100, chunk=10, rate=1e9, efficiency=0.5)
    assert cluster.seconds(1e9) == 3 * 10 / 0.5  # 10 chunks on 4 cards: the busiest runs 3
    monkeypatch.setattr("sys.argv", ["scale.py", "--shape", "tiny", "--dtype", "float32"])
    scale.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(scale.JOBS)
